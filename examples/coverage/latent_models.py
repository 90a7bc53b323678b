"""Discrete latent variables summed out: mixtures, hidden Markov chains, annotation, capture and recapture, topics."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.scipy.special import logsumexp
from numpyro.infer.autoguide import AutoDelta, AutoNormal
from numpyro.infer.initialization import init_to_feasible, init_to_sample

from examples.coverage.problem import Problem, adam, arrays, example


def normal(model: Any, start: Any = None) -> AutoNormal:
    """A mean-field guide at a feasible point; mixtures start at a prior draw, which tells their components apart."""
    return AutoNormal(model, init_loc_fn=start or init_to_feasible, init_scale=0.05)


@example("examples/hmm_enum.py, with the states summed out by the forward algorithm")
def hidden_markov_model(small: bool = False) -> Problem:
    """Binary chords from a hidden chain of states; the forward algorithm in a scan over sequences at once."""

    def model(x, states):
        notes = x.shape[2]
        transition = numpyro.sample("transition", dist.Dirichlet(jnp.ones((states, states))).to_event(1))
        emission = numpyro.sample("emission", dist.Beta(1.0, 9.0).expand([states, notes]).to_event(2))
        log_transition = jnp.log(transition)

        def log_likelihood(chord):
            return chord @ jnp.log(emission).T + (1.0 - chord) @ jnp.log1p(-emission).T  # (sequences, states)

        def step(alpha, chord):
            moved = logsumexp(alpha[:, :, None] + log_transition, 1)
            return moved + log_likelihood(chord), None

        alpha, _ = jax.lax.scan(step, log_likelihood(x[0]) - jnp.log(states), x[1:])
        numpyro.factor("sequences", logsumexp(alpha, 1).sum())

    rng = np.random.default_rng(0)
    steps, sequences, notes, states = (5, 3, 4, 2) if small else (60, 64, 51, 16)
    x = (rng.random((steps, sequences, notes)) < 0.15).astype(float)
    return Problem(model, normal(model, init_to_sample), arrays(x), {"states": states}, optimizer=adam())


@example("examples/hmm.py")
def supervised_hmm(small: bool = False) -> Problem:
    """A categorical chain: some sequences with their states, the rest by the forward algorithm."""

    def model(words, supervised_words, supervised_states, states, vocabulary):
        transition = numpyro.sample("transition", dist.Dirichlet(jnp.ones((states, states))).to_event(1))
        emission = numpyro.sample("emission", dist.Dirichlet(jnp.full((states, vocabulary), 0.5)).to_event(1))
        log_transition, log_emission = jnp.log(transition), jnp.log(emission)
        known = log_emission[supervised_states, supervised_words].sum()
        known += log_transition[supervised_states[:-1], supervised_states[1:]].sum()
        numpyro.factor("supervised", known)

        def step(alpha, word):
            return logsumexp(alpha[:, None] + log_transition, 0) + log_emission[:, word], None

        alpha, _ = jax.lax.scan(step, log_emission[:, words[0]], words[1:])
        numpyro.factor("unsupervised", logsumexp(alpha))

    rng = np.random.default_rng(1)
    steps, states, vocabulary = (20, 3, 5) if small else (1_000, 10, 200)
    words, labelled = rng.integers(0, vocabulary, (2, steps))
    args = arrays(words, labelled, rng.integers(0, states, steps))
    settings = {"states": states, "vocabulary": vocabulary}
    return Problem(model, normal(model), args, settings, optimizer=adam())


@example("examples/annotation.py (Dawid and Skene), the classes summed out")
def annotation(small: bool = False) -> Problem:
    """Labels by annotators of unequal quality; the true class of each item is summed out."""

    def model(labels, classes):
        annotators = labels.shape[1]
        share = numpyro.sample("share", dist.Dirichlet(jnp.ones(classes)))
        prior = jnp.ones((annotators, classes, classes)) + 3.0 * jnp.eye(classes)
        confusion = numpyro.sample("confusion", dist.Dirichlet(prior).to_event(2))  # (annotators, true, given)
        said = jax.nn.one_hot(labels, classes)  # (items, annotators, given)
        by_class = jnp.log(share) + jnp.einsum("iag,atg->it", said, jnp.log(confusion))
        numpyro.factor("labels", logsumexp(by_class, 1).sum())

    rng = np.random.default_rng(2)
    items, annotators, classes = (20, 3, 3) if small else (3_000, 20, 5)
    truth = rng.integers(0, classes, items)
    right = rng.random((items, annotators)) < 0.75
    labels = np.where(right, truth[:, None], rng.integers(0, classes, (items, annotators)))
    return Problem(model, normal(model), arrays(labels), {"classes": classes}, optimizer=adam())


@example("examples/annotation.py (item difficulty), by MixtureSameFamily-like log-sum-exp")
def item_difficulty(small: bool = False) -> Problem:
    """Annotators answer by a softmax whose sharpness depends on the item; classes summed out."""

    def model(labels, classes):
        items, annotators = labels.shape
        share = numpyro.sample("share", dist.Dirichlet(jnp.ones(classes)))
        bias = numpyro.sample("bias", dist.Normal(0.0, 1.0).expand([annotators, classes, classes]).to_event(3))
        with numpyro.plate("items", items):
            ease = numpyro.sample("ease", dist.LogNormal(0.0, 1.0))
        logits = bias + 2.0 * jnp.eye(classes)
        logits = ease[:, None, None, None] * logits  # (items, annotators, true, given)
        log_p = jax.nn.log_softmax(logits, -1)
        chosen = jnp.take_along_axis(log_p, labels[:, :, None, None], -1)[..., 0]  # (items, annotators, true)
        numpyro.factor("labels", logsumexp(jnp.log(share) + chosen.sum(1), 1).sum())

    rng = np.random.default_rng(3)
    items, annotators, classes = (20, 3, 3) if small else (1_000, 10, 5)
    truth = rng.integers(0, classes, items)
    right = rng.random((items, annotators)) < 0.7
    labels = np.where(right, truth[:, None], rng.integers(0, classes, (items, annotators)))
    return Problem(model, normal(model), arrays(labels), {"classes": classes}, optimizer=adam())


@example("examples/capture_recapture.py, alive or dead summed out")
def capture_recapture(small: bool = False) -> Problem:
    """Animals caught again or not: survival by year with a random effect, recapture by animal."""

    def model(captured):
        animals, years = captured.shape
        loc = numpyro.sample("loc", dist.Normal(0.0, 1.5))
        spread = numpyro.sample("spread", dist.HalfNormal(1.0))
        with numpyro.plate("years", years - 1):
            survival = jax.nn.sigmoid(loc + spread * numpyro.sample("effect", dist.Normal(0.0, 1.0)))
        with numpyro.plate("animals", animals):
            recapture = numpyro.sample("recapture", dist.Beta(2.0, 2.0))

        def step(alive, inputs):
            """Log probabilities of the history so far and being alive; or being dead."""
            phi, seen, seen_before = inputs
            (log_alive, log_dead) = alive
            # the first capture is given: before it nothing is learned
            lives = log_alive + jnp.log(phi) + jnp.where(seen == 1, jnp.log(recapture), jnp.log1p(-recapture))
            dies = jnp.logaddexp(log_dead, log_alive + jnp.log1p(-phi))
            dies = jnp.where(seen == 1, -1e10, dies)
            entered = seen_before == 1
            return (jnp.where(entered, lives, log_alive), jnp.where(entered, dies, log_dead)), None

        before = jnp.cumsum(captured, 1)[:, :-1] > 0
        start = (jnp.zeros(animals), jnp.full(animals, -1e10))
        (alive, dead), _ = jax.lax.scan(step, start, (survival, captured.T[1:], before.T.astype(jnp.int32)))
        numpyro.factor("histories", jnp.logaddexp(alive, dead).sum())

    rng = np.random.default_rng(4)
    animals, years = (12, 4) if small else (3_000, 15)
    alive = np.cumprod(rng.random((animals, years)) < 0.8, 1)
    captured = alive * (rng.random((animals, years)) < 0.5)
    captured[:, 0] = 1
    return Problem(model, normal(model), arrays(captured.astype(int)), optimizer=adam())


@example("tutorial: Gaussian mixture model")
def gaussian_mixture(small: bool = False) -> Problem:
    """A mixture of Gaussians with full covariances, assignments summed out by MixtureSameFamily."""

    def model(x, components):
        features = x.shape[1]
        weights = numpyro.sample("weights", dist.Dirichlet(jnp.ones(components)))
        with numpyro.plate("components", components):
            loc = numpyro.sample("loc", dist.Normal(0.0, 3.0).expand([features]).to_event(1))
            scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5).expand([features]).to_event(1))
            factor = numpyro.sample("factor", dist.LKJCholesky(features, concentration=2.0))
        parts = dist.MultivariateNormal(loc, scale_tril=scale[..., None] * factor)
        with numpyro.plate("points", x.shape[0]):
            numpyro.sample("x", dist.MixtureSameFamily(dist.Categorical(weights), parts), obs=x)

    rng = np.random.default_rng(5)
    points, features, components = (40, 2, 2) if small else (5_000, 4, 8)
    centres = 3.0 * rng.standard_normal((components, features))
    x = centres[rng.integers(0, components, points)] + rng.standard_normal((points, features))
    return Problem(model, normal(model, init_to_sample), arrays(x), {"components": components}, optimizer=adam())


@example("tutorial: Gaussian mixture model, diagonal with AutoDelta")
def diagonal_mixture(small: bool = False) -> Problem:
    """A mixture of diagonal Gaussians for wide data, fitted as a point (maximum a posteriori)."""

    def model(x, components):
        features = x.shape[1]
        weights = numpyro.sample("weights", dist.Dirichlet(jnp.ones(components)))
        with numpyro.plate("components", components):
            loc = numpyro.sample("loc", dist.Normal(0.0, 1.0).expand([features]).to_event(1))
            scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0).expand([features]).to_event(1))
        with numpyro.plate("points", x.shape[0]):
            parts = dist.Normal(loc, scale).to_event(1)
            numpyro.sample("x", dist.MixtureSameFamily(dist.Categorical(weights), parts), obs=x)

    rng = np.random.default_rng(6)
    points, features, components = (40, 3, 2) if small else (3_000, 16, 10)
    centres = 2.0 * rng.standard_normal((components, features))
    x = centres[rng.integers(0, components, points)] + rng.standard_normal((points, features))
    guide = AutoDelta(model, init_loc_fn=init_to_sample)
    return Problem(model, guide, arrays(x), {"components": components}, optimizer=adam())


@example("examples/ssbvm_mixture.py")
def torus_mixture(small: bool = False) -> Problem:
    """Pairs of dihedral angles from a mixture of sine bivariate von Mises distributions."""

    def model(angles, components):
        weights = numpyro.sample("weights", dist.Dirichlet(jnp.ones(components)))
        with numpyro.plate("components", components):
            phi_loc = numpyro.sample("phi_loc", dist.Normal(0.0, 1.5))
            psi_loc = numpyro.sample("psi_loc", dist.Normal(0.0, 1.5))
            phi_sharp = numpyro.sample("phi_sharp", dist.Gamma(4.0, 1.0))
            psi_sharp = numpyro.sample("psi_sharp", dist.Gamma(4.0, 1.0))
            bond = numpyro.sample("bond", dist.Beta(2.0, 10.0))
        parts = dist.SineBivariateVonMises(
            phi_loc, psi_loc, phi_sharp, psi_sharp, weighted_correlation=bond, validate_args=False
        )
        with numpyro.plate("residues", angles.shape[0]):
            numpyro.sample("angles", dist.MixtureSameFamily(dist.Categorical(weights), parts), obs=angles)

    rng = np.random.default_rng(7)
    points, components = (30, 2) if small else (4_000, 10)
    angles = rng.vonmises(rng.choice([-1.5, 0.0, 1.5], (points, 2)), 5.0)
    return Problem(model, normal(model), arrays(angles), {"components": components}, optimizer=adam())


@example("examples/toy_mixture_model_discrete_enumeration.py, the classes summed out")
def categorical_mixture(small: bool = False) -> Problem:
    """Latent classes of respondents with independent categorical answers."""

    def model(answers, classes, choices):
        questions = answers.shape[1]
        share = numpyro.sample("share", dist.Dirichlet(jnp.ones(classes)))
        tables = numpyro.sample("tables", dist.Dirichlet(jnp.ones((classes, questions, choices))).to_event(2))
        said = jax.nn.one_hot(answers, choices)  # (people, questions, choices)
        by_class = jnp.log(share) + jnp.einsum("pqa,cqa->pc", said, jnp.log(tables))
        numpyro.factor("answers", logsumexp(by_class, 1).sum())

    rng = np.random.default_rng(8)
    people, questions, classes, choices = (20, 3, 2, 3) if small else (2_000, 20, 6, 4)
    answers = (rng.integers(0, classes, people)[:, None] + rng.integers(0, 2, (people, questions))) % choices
    settings = {"classes": classes, "choices": choices}
    return Problem(model, normal(model), arrays(answers), settings, optimizer=adam())


@example("tutorial: text-based ideal points")
def text_ideal_points(small: bool = False) -> Problem:
    """Word counts of authors by Poisson factorization; an author's position tilts the topics' vocabulary."""

    def model(author, counts, authors, topics):
        documents, words = counts.shape
        position = numpyro.sample("position", dist.Normal(0.0, 1.0).expand([authors]).to_event(1))
        topic = numpyro.sample("topic", dist.Gamma(0.3, 0.3).expand([topics, words]).to_event(2))
        tilt = numpyro.sample("tilt", dist.Normal(0.0, 1.0).expand([topics, words]).to_event(2))
        with numpyro.plate("documents", documents):
            use = numpyro.sample("use", dist.Gamma(0.3, 0.3).expand([topics]).to_event(1))
            tilted = topic * jnp.exp(position[author][:, None, None] * tilt)  # (documents, topics, words)
            rate = jnp.einsum("dt,dtw->dw", use, tilted)
            numpyro.sample("counts", dist.Poisson(rate + 1e-6).to_event(1), obs=counts)

    def guide(author, counts, authors, topics):
        documents, words = counts.shape

        def site(name, family, shape, events, loc, scale=0.1):
            centre = numpyro.param(f"{name}_loc", jnp.full(shape, loc))
            spread = numpyro.param(f"{name}_scale", jnp.full(shape, scale), constraint=dist.constraints.positive)
            return numpyro.sample(name, family(centre, spread).to_event(events))

        site("position", dist.Normal, (authors,), 1, 0.0)
        site("topic", dist.LogNormal, (topics, words), 2, -1.0)
        site("tilt", dist.Normal, (topics, words), 2, 0.0)
        with numpyro.plate("documents", documents):
            site("use", dist.LogNormal, (documents, topics), 1, -1.0)

    rng = np.random.default_rng(9)
    documents, words, authors, topics = (6, 8, 3, 2) if small else (64, 1_500, 40, 12)
    counts = rng.poisson(rng.gamma(0.3, 1.0, (documents, words)))
    settings = {"authors": authors, "topics": topics}
    args = arrays(rng.integers(0, authors, documents), counts)
    return Problem(model, guide, args, settings, optimizer=adam())
