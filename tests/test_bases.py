"""``RAD_ELBO(base=...)``: every ELBO of NumPyro, and a user's own, with the value and expected gradient that it has.

The base itself is the slow twin: values to the bit, gradients of the exact plan to 1e-9 in double precision, those of
rounded residuals by z-scores over path keys. Then the keys of the three sources of noise, one by one.
"""

import copy
import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from models import partial_pooling, seasons, wave
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import (
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    autoguide,
)
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.elbo import ELBO
from programs import KEY, assert_close, few, flat, is_random, network, program, small_network
from zscores import assert_unbiased, assert_uncorrelated

from numpyro_rad import RAD_ELBO, Keep, NoiseKeys, StochasticRound

DRAWS = 2048


class Tempered(ELBO):
    """A user's own: the expected log-likelihood and a tenth of the entropy, written on NumPyro's public pieces."""

    def __init__(self, temperature=0.1, num_particles=1):
        super().__init__(num_particles)
        self.temperature = temperature

    def loss_with_mutable_state(self, rng_key, param_map, model, guide, *args, **kwargs):
        def particle(key):
            guide_key, model_key = jax.random.split(key)
            guided = handlers.substitute(handlers.seed(guide, guide_key), param_map)
            log_q, trace = numpyro.infer.util.log_density(guided, args, kwargs, {})
            replayed = handlers.replay(handlers.seed(handlers.substitute(model, param_map), model_key), trace)
            log_p, _ = numpyro.infer.util.log_density(replayed, args, kwargs, {})
            return log_p - self.temperature * log_q

        keys = jax.random.split(rng_key, self.num_particles)
        return {"loss": -self.vectorize_particles_fn(particle, keys).mean(), "mutable_state": None}


def counts(x, y):
    """A latent count that cannot be reparameterized: its gradient is a score function with baselines by graph."""
    rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
    n = numpyro.sample("n", dist.Poisson(rate))
    w = numpyro.sample("w", dist.Normal(jnp.zeros((x.shape[1], 8)), 1.0).to_event(2))
    with numpyro.plate("points", x.shape[0]):
        numpyro.sample("y", dist.Normal(jnp.tanh(x @ w).sum(1) + 0.1 * n, 0.5), obs=y)


def counts_guide(x, y):
    positive = dist.constraints.positive
    rate = numpyro.param("rate_loc", 2.0, constraint=positive)
    numpyro.sample("rate", dist.LogNormal(jnp.log(rate), 0.3))
    numpyro.sample("n", dist.Poisson(numpyro.param("n_rate", 1.5, constraint=positive)))
    loc = numpyro.param("w_loc", 0.1 * jnp.ones((x.shape[1], 8)))
    numpyro.sample("w", dist.Normal(loc, 0.1).to_event(2))


def mixture(x, y):
    """Points of three clusters; the cluster of each is summed out by enumeration."""
    weights = numpyro.sample("weights", dist.Dirichlet(jnp.ones(3)))
    with numpyro.plate("clusters", 3):
        loc = numpyro.sample("loc", dist.Normal(0.0, 2.0))
    with numpyro.plate("points", x.shape[0]):
        cluster = numpyro.sample("cluster", dist.Categorical(weights), infer={"enumerate": "parallel"})
        numpyro.sample("y", dist.Normal(jnp.tanh(loc[cluster]) * x[:, 0], 0.5), obs=y)


def pooled(elbo):
    return program(partial_pooling, AutoNormal(partial_pooling), *seasons(8), elbo=elbo)


def counted(elbo):
    return program(counts, counts_guide, *wave(24), elbo=elbo)


def clustered(elbo):
    guide = AutoNormal(handlers.block(mixture, hide=["cluster"]))
    return program(mixture, guide, *wave(24), elbo=elbo)


BASES = {
    "mean field": (TraceMeanField_ELBO, pooled),
    "mean field, particles": (
        partial(TraceMeanField_ELBO, 3, vectorize_particles=False),
        lambda elbo: small_network(16),
    ),
    "importance weighted": (partial(RenyiELBO, 0.0, 3), lambda elbo: small_network(16)),
    "Renyi": (partial(RenyiELBO, 2.0, 2), pooled),
    "graph": (partial(TraceGraph_ELBO, 2), counted),
    "enumeration": (partial(TraceEnum_ELBO, max_plate_nesting=1), clustered),
    "enumeration, guessed nesting": (TraceEnum_ELBO, clustered),
    "a user's own": (partial(Tempered, num_particles=2), pooled),
    "several samples at once": (partial(Trace_ELBO, multi_sample_guide=True), lambda elbo: together()),
}


def together():
    """A guide that proposes three samples at once, along a leading dimension."""

    def model(x, y):
        w = numpyro.sample("w", dist.Normal(jnp.zeros(x.shape[1]), 1.0).to_event(1))
        numpyro.sample("y", dist.Normal(jnp.tanh(x @ w), 0.5).to_event(1), obs=y)

    def guide(x, y):
        loc = numpyro.param("loc", 0.1 * jnp.ones(x.shape[1]))
        numpyro.sample("w", dist.Normal(loc, 0.1).expand([3, x.shape[1]]).to_event(1))

    return program(model, guide, *wave(16), elbo=Trace_ELBO(multi_sample_guide=True))


@pytest.mark.parametrize("name", few(BASES, "mean field, particles", slow=5))
def test_value_and_exact_gradient_are_those_of_the_base(double, name):
    make, build = BASES[name]
    problem = build(make())
    expected = problem.value_and_grad(make())
    value, gradient = problem.value_and_grad(RAD_ELBO(base=make(), codec=Keep()))
    np.testing.assert_allclose(value, expected[0], rtol=1e-12)
    assert_close(gradient, expected[1], rtol=1e-9)
    assert np.any(flat(gradient) != 0)

    ours = jax.jit(partial(problem.loss, RAD_ELBO(base=make())))(jax.random.key(KEY), problem.params)
    theirs = jax.jit(partial(problem.loss, make()))(jax.random.key(KEY), problem.params)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", few(BASES, slow=5))
def test_trains_like_the_base(name):
    """``SVI`` finds all it asks of a loss, and ten steps of the exact plan are ten steps of the base."""
    make, build = BASES[name]
    problem = build(make())
    run = lambda elbo: problem.svi(elbo).run(jax.random.key(0), 10, *problem.args, progress_bar=False)  # noqa: E731
    np.testing.assert_allclose(run(RAD_ELBO(base=make(), codec=Keep())).losses, run(make()).losses, rtol=1e-3)


@pytest.mark.parametrize(
    "name", few(["mean field, particles", "importance weighted", "graph"], "mean field, particles", slow=2)
)
def test_gradient_is_unbiased_over_path_keys(double, encode_all, name):
    make, build = BASES[name]
    problem = build(make())
    elbo = RAD_ELBO(base=make(), codec=StochasticRound(bits=2))
    assert is_random(problem.explain(elbo))
    draws = gradients(problem, elbo, path=DRAWS)
    assert_unbiased(draws, exact(problem, make()), name)


def exact(problem, base):
    """The gradient under the keys that ``gradients`` holds fixed."""
    return gradients(problem, RAD_ELBO(base=base, codec=Keep()), path=1)[0]


def gradients(problem, elbo, **draws):
    """(draws, parameters): gradients with as many draws of each source of noise as named, the others fixed."""
    (n_draws,) = set(draws.values())
    fixed = {name: jax.random.key(i) for i, name in enumerate(NoiseKeys._fields)}
    drawn = {name: jax.random.split(jax.random.fold_in(fixed[name], 9), n_draws) for name in draws}

    def gradient(drawn):
        keys = NoiseKeys(**fixed | drawn)
        rest = (problem.model, problem.guide, *problem.args)
        return flat(jax.grad(lambda params: elbo.loss_with_keys(keys, params, *rest, **problem.kwargs))(problem.params))

    return np.asarray(jax.jit(lambda drawn: jax.lax.map(gradient, drawn, batch_size=64))(drawn))


def test_attributes_are_those_of_the_base():
    elbo = RAD_ELBO(base=TraceEnum_ELBO(num_particles=4, max_plate_nesting=2))
    assert (elbo.num_particles, elbo.max_plate_nesting, elbo.can_infer_discrete) == (4, 2, True)
    assert RAD_ELBO(base=RenyiELBO(alpha=0.5)).alpha == 0.5
    assert RAD_ELBO().can_infer_discrete is False
    for other in (copy.deepcopy(elbo), pickle.loads(pickle.dumps(elbo))):
        assert other.max_plate_nesting == 2
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = elbo.no_such_thing


def test_wrong_bases():
    with pytest.raises(TypeError, match="not an instance of one of NumPyro's ELBOs"):
        RAD_ELBO(base=TraceMeanField_ELBO)
    with pytest.raises(TypeError, match="not an instance of one of NumPyro's ELBOs"):
        RAD_ELBO(base=RAD_ELBO())
    with pytest.raises(ValueError, match=r"set on the base.*TraceMeanField_ELBO"):
        RAD_ELBO(4, base=TraceMeanField_ELBO())


@pytest.mark.slow
def test_budget_bounds_all_particles_of_a_base(encode_all):
    problem = small_network()
    base = TraceMeanField_ELBO(num_particles=4)
    free = problem.explain(RAD_ELBO(base=base)).stored_bytes
    assert problem.explain(RAD_ELBO(base=base, memory_budget=free - 100)).stored_bytes <= free - 100


def test_contributions_of_sites():
    problem = small_network()
    base = TraceMeanField_ELBO(sum_sites=False)
    found = problem.loss(RAD_ELBO(base=base), jax.random.key(KEY), problem.params)
    expected = problem.loss(base, jax.random.key(KEY), problem.params)
    assert set(found) == set(expected)
    for site in expected:
        np.testing.assert_allclose(found[site], expected[site], rtol=1e-5)


# -- more kinds of models and guides -----------------------------------------------------------------------------------


def annealed():
    return program(network, autoguide.AutoDAIS(network, K=3), *wave(16))


def surrogate():
    """The surrogate sees a part of the data."""
    x, y = wave(16)
    guide = autoguide.AutoSurrogateLikelihoodDAIS(network, lambda: network(x[:4], y[:4]), K=3)
    return program(network, guide, x, y)


def semi_annealed():
    """A mean-field guide for what is global, annealing for what each point has."""
    x, y = wave(16)

    def shared():
        return numpyro.sample("w", dist.Normal(jnp.zeros(x.shape[1]), 1.0).to_event(1))

    def local(w):
        with numpyro.plate("points", x.shape[0], subsample_size=8):
            batch, targets = numpyro.subsample(x, event_dim=1), numpyro.subsample(y, event_dim=0)
            z = numpyro.sample("z", dist.Normal(jnp.tanh(batch @ w), 1.0))
            numpyro.sample("y", dist.Normal(z, 0.5), obs=targets)

    def model():
        local(shared())

    return program(model, autoguide.AutoSemiDAIS(model, local, AutoNormal(shared), K=2))


def with_nnx():
    nnx = pytest.importorskip("flax.nnx", reason="flax is not installed")
    from numpyro.contrib.module import random_nnx_module

    def model(x, y):
        layer = nnx.Linear(x.shape[1], 4, rngs=nnx.Rngs(0))
        module = random_nnx_module("network", layer, prior={"kernel": dist.Normal(), "bias": dist.Cauchy()})
        numpyro.sample("y", dist.Normal(jnp.tanh(module(x)).sum(1), 0.5).to_event(1), obs=y)

    return program(model, AutoNormal(model), *wave(16))


def with_equinox():
    eqx = pytest.importorskip("equinox", reason="equinox is not installed")
    from numpyro.contrib.module import eqx_module, random_eqx_module

    def model(x, y):
        first = eqx_module("first", eqx.nn.Linear(x.shape[1], 4, key=jax.random.key(0)))
        second = random_eqx_module("second", eqx.nn.Linear(4, 1, key=jax.random.key(1)), prior=dist.Normal())
        mean = jax.vmap(lambda row: second(jnp.tanh(first(row)))[0])(x)
        numpyro.sample("y", dist.Normal(mean, 0.5).to_event(1), obs=y)

    return program(model, AutoNormal(model), *wave(16))


def intervened():
    """``do`` and ``condition`` around a model."""
    model = handlers.condition(handlers.do(partial_pooling, data={"loc": -0.5}), data={"spread": 0.7})
    return program(model, AutoNormal(model), *seasons(8))


def state_space(x, y):
    """NumPyro's ``scan`` with a loop inside the loop and a branch in its body."""
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))

    def step(h, inputs):
        x, y = inputs
        h = jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h + 0.1 * x[0]), h)
        h = jax.lax.cond(x[1] > 0, lambda h: h**2, jnp.sin, h)
        h = numpyro.sample("h", dist.Normal(h, noise))
        numpyro.sample("y", dist.Normal(h, 0.5), obs=y)
        return h, h

    scan(step, jnp.zeros(()), (x, y))


MODELS = {
    "AutoDAIS": annealed,
    "AutoSurrogateLikelihoodDAIS": surrogate,
    "AutoSemiDAIS": semi_annealed,
    "random_nnx_module": with_nnx,
    "equinox modules": with_equinox,
    "do and condition": intervened,
    "loops and branches in a scan": lambda: program(state_space, AutoNormal(state_space), *wave(12)),
}


@pytest.mark.parametrize("name", few(MODELS, slow=4))
def test_exact_plan_has_the_gradient_of_trace_elbo(double, name):
    problem = MODELS[name]()
    expected = problem.value_and_grad(Trace_ELBO())
    for options in ({"codec": Keep()}, {"exact": True, "slices": 3}):
        value, gradient = problem.value_and_grad(RAD_ELBO(**options))
        np.testing.assert_allclose(value, expected[0], rtol=1e-12)
        assert_close(gradient, expected[1], rtol=1e-9)


# -- three sources of noise --------------------------------------------------------------------------------------------


def minibatched(num_particles=1):
    x, y = wave(48)
    problem = program(network, AutoNormal(network, init_scale=0.1), x, y, batch_size=12)
    return problem, RAD_ELBO(num_particles, codec=StochasticRound(bits=2))


@pytest.mark.parametrize("source", few(NoiseKeys._fields, slow=1))
def test_each_source_of_noise_moves_the_gradient_alone(double, encode_all, source):
    problem, elbo = minibatched()
    draws = gradients(problem, elbo, **{source: 4})
    assert len(np.unique(draws, axis=0)) == 4
    repeated = gradients(problem, elbo, **{source: 4})
    np.testing.assert_array_equal(repeated, draws)


def indices(elbo, keys, num_particles=1):
    """Which points the plate drew, for each particle."""
    seen = []

    def model():
        with numpyro.plate("points", 48, subsample_size=4) as index:
            jax.debug.callback(lambda i: seen.append(np.asarray(i).reshape(-1, 4)), index)
            numpyro.sample("z", dist.Normal(1.0, 2.0))

    def guide():
        loc = numpyro.param("loc", jnp.zeros(48))
        with numpyro.plate("points", 48, subsample_size=4):
            numpyro.sample("z", dist.Normal(numpyro.subsample(loc, event_dim=0), 1.0))

    value = elbo.loss_with_keys(keys, {"loc": jnp.zeros(48)}, model, guide)
    jax.effects_barrier()
    return value, np.sort(np.concatenate(seen), axis=0)


def test_keys_of_the_minibatch():
    key = [jax.random.key(i) for i in range(3)]
    value, drawn = indices(RAD_ELBO(), NoiseKeys(key[0], key[1], key[2]))
    assert drawn.shape == (1, 4)
    other_value, other = indices(RAD_ELBO(), NoiseKeys(key[2], key[1], key[0]))
    np.testing.assert_array_equal(other, drawn)
    assert value != other_value
    assert (indices(RAD_ELBO(), NoiseKeys(key[0], key[2], key[2]))[1] != drawn).any()


@pytest.mark.slow
def test_particles_draw_minibatches_as_the_base_does():
    keys = NoiseKeys(*[jax.random.key(i) for i in range(3)])
    for vectorize in (True, False):
        drawn = indices(RAD_ELBO(3, vectorize), keys)[1]
        assert len(np.unique(drawn, axis=0)) == 3
    together = indices(RAD_ELBO(base=RenyiELBO(num_particles=3)), keys)[1]
    assert len(np.unique(together, axis=0)) == 1


@pytest.mark.slow
def test_without_subsampling_the_guides_key_is_the_key_of_the_loss():
    problem = small_network(16)
    rest = (problem.params, problem.model, problem.guide, *problem.args)
    keys = NoiseKeys(jax.random.key(KEY), jax.random.key(1), jax.random.key(2))
    for elbo in (RAD_ELBO(), RAD_ELBO(base=TraceMeanField_ELBO(num_particles=2))):
        raw = NoiseKeys(*[jax.random.key_data(key) for key in keys])
        losses = lambda *ks, elbo=elbo: [elbo.loss_with_keys(k, *rest) for k in ks]  # noqa: E731
        expected = jax.jit(lambda key, elbo=elbo: elbo.loss(key, *rest))(keys.guide)
        np.testing.assert_allclose(jax.jit(losses)(keys, raw), expected, rtol=1e-6)


@pytest.mark.slow
def test_gradient_of_the_full_data_is_unbiased_over_minibatches_and_paths(double, encode_all):
    """Under a fixed key of the guide, the mean over the two others is the full-data gradient under that key."""
    problem, elbo = minibatched()
    full = program(network, problem.guide, *problem.args)
    full = type(full)(network, problem.guide, problem.args, {}, problem.params)
    assert_unbiased(gradients(problem, elbo, minibatch=DRAWS, path=DRAWS), exact(full, Trace_ELBO()), "gradient")


@pytest.mark.slow
def test_path_noise_is_independent_of_the_minibatch_noise(double, encode_all):
    """Its contribution, by differences under one minibatch, is uncorrelated with what the minibatch does."""
    problem, elbo = minibatched()
    both = gradients(problem, elbo, minibatch=DRAWS, path=DRAWS)
    minibatch = gradients(problem, RAD_ELBO(codec=Keep()), minibatch=DRAWS)
    assert_uncorrelated(both - minibatch, minibatch, "path and minibatch noise")


@pytest.mark.exhaustive
def test_fifty_thousand_particles_converge_to_the_exact_gradient(double, encode_all):
    """All particles share guide noise and data, so that only their paths differ: the error falls to its 224th."""
    problem = small_network(16)
    elbo = RAD_ELBO(codec=StochasticRound(bits=1))
    draws = gradients(problem, elbo, path=50_000)
    expected = exact(problem, Trace_ELBO())
    assert_unbiased(draws, expected, "gradient")
    one = np.sqrt(((draws - expected) ** 2).sum(1).mean())
    assert np.linalg.norm(draws.mean(0) - expected) < 1.5 * one / np.sqrt(len(draws))
