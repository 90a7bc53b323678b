"""Models as users of NumPyro write them, tiny: networks of other libraries, state, odd names and shapes, every ELBO.

Each is a function that makes a :class:`Case`; nothing is made when this file is imported. Like ``models.py`` it knows
nothing about the library: what trains here with an ELBO of NumPyro has to do everything else with one word changed.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import models
import modules
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from numpyro.infer.initialization import init_to_feasible

from examples.coverage import models as coverage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What SVI needs, and what is special.

    :ivar base: makes the ELBO of NumPyro.
    :ivar full: keyword arguments that replace those of ``kwargs`` where the full data are wanted.
    :ivar effects: counts what the model did besides returning a number; None if it does nothing else.
    :ivar no_k_hat: a word of the reason why there are no importance weights; empty if there are some.
    :ivar no_draws: a word of the reason why the guide has no draws for ArviZ.
    """

    model: Callable
    guide: Callable
    args: tuple = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    base: Callable = Trace_ELBO
    full: dict[str, Any] = dataclasses.field(default_factory=dict)
    key: Callable = jax.random.key
    effects: list | None = None
    no_k_hat: str = ""
    no_draws: str = ""


CASES: dict[str, Callable[[], Case]] = {}


def case(make):
    """Enter a function in ``CASES`` under its name, in words."""
    CASES[make.__name__.replace("_", " ")] = make
    return make


def normal(model, **options):
    """A mean-field guide that starts narrow: near a point where gradients are large but tame."""
    return AutoNormal(model, init_loc_fn=init_to_feasible, init_scale=0.05, **options)


def numbers(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


X, Y = numbers(12, 3), numbers(12)


def regression(x, y, predict, scale=0.5):
    """Observations around what ``predict`` makes of the inputs."""
    with numpyro.plate("points", len(x)):
        numpyro.sample("y", dist.Normal(predict(x), scale), obs=y)


def weights(name="w", *shape):
    shape = shape or (3,)
    return numpyro.sample(name, dist.Normal(0.0, 1.0).expand(shape).to_event(len(shape)))


# -- from the other files ----------------------------------------------------------------------------------------------


def covered(name, **changes):
    """A model of the coverage table, small."""
    problem = coverage.MODELS[name].make(small=True)
    base = lambda: Trace_ELBO(**problem.elbo)  # noqa: E731
    options = {"base": base, "args": problem.args, "kwargs": problem.settings, **changes}
    return Case(model=problem.model, guide=problem.guide, **options)


def known(name, **changes):
    """A model of ``models.py``."""
    problem = models.PROBLEMS[name]()
    return Case(model=problem.model, guide=problem.guide, **{"args": problem.args, "kwargs": problem.kwargs, **changes})


def of_module(make, **changes):
    """A model of ``modules.py``."""
    model, guide, args = make()
    return Case(model=model, guide=guide, args=args, **changes)


COVERED = ("low_rank_covariance",)
TREES = ("equinox", "random nnx", "random equinox", "plain", "inverse autoregressive flow", "block neural flow")
CASES |= {f"a tree of parameters: {name}": partial(of_module, modules.TREES[name]) for name in TREES}
CASES |= {f"mutable state: {name}": partial(of_module, modules.MUTABLE[name]) for name in ("plain", "flax", "nnx")}
CASES |= {name.replace("_", " "): partial(covered, name) for name in COVERED}


# -- local variables and minibatches -----------------------------------------------------------------------------------


@case
def networks_in_model_and_guide():
    """Local latent variables whose guide is a network that reads the data: parameters are tuples of tuples."""
    return known("autoencoder", args=(models.bars(6, 3),), kwargs={"hidden": 4})


@case
def partial_pooling_of_particles():
    """The Kullback-Leibler terms of TraceMeanField, for several particles at once."""
    return known("hierarchy", args=models.seasons(5, 2), base=lambda: TraceMeanField_ELBO(num_particles=2))


@case
def particles_one_after_the_other():
    def model(x, y):
        w = weights("w", 3, 2)
        regression(x, y, lambda x: jnp.tanh(x @ w).sum(-1))

    return Case(
        model=model,
        guide=normal(model),
        args=(X, Y),
        base=lambda: Trace_ELBO(num_particles=2, vectorize_particles=False),
    )


@case
def minibatches_of_a_plate():
    """The plate draws them; whoever needs all data gets them with ``batch_size=None``."""
    args = models.classes(24, 3)
    return known("linear model", args=args, kwargs={"batch_size": 8}, full={"batch_size": None})


@case
def enumerated_clusters():
    """Discrete assignments are summed out."""

    def model(y):
        weight = numpyro.sample("weight", dist.Dirichlet(jnp.ones(2)))
        loc = numpyro.sample("loc", dist.Normal(jnp.array([-1.0, 1.0]), 1.0).to_event(1))
        with numpyro.plate("points", len(y)):
            cluster = numpyro.sample("cluster", dist.Categorical(weight), infer={"enumerate": "parallel"})
            numpyro.sample("y", dist.Normal(loc[cluster], 0.5), obs=y)

    guide = normal(handlers.block(handlers.seed(model, 0), hide=["cluster"]))
    return Case(model=model, guide=guide, args=(Y,), base=TraceEnum_ELBO, no_k_hat="summed over")


# -- guides ------------------------------------------------------------------------------------------------------------


@case
def a_point():
    def model(x, y):
        w, scale = weights(), numpyro.sample("scale", dist.HalfNormal(1.0))
        regression(x, y, lambda x: x @ w, scale)

    return Case(model=model, guide=AutoDelta(model), args=(X, Y), no_k_hat="a point")


@case
def full_covariance():
    """A triangle of covariances, and sites that are functions of others."""

    def model(x, y):
        w = weights()
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
        numpyro.deterministic("length", jnp.linalg.norm(w))
        regression(x, y, lambda x: x @ w, scale)

    return Case(model=model, guide=AutoMultivariateNormal(model, init_scale=0.05), args=(X, Y))


# -- names, types and shapes -------------------------------------------------------------------------------------------


@case
def names_that_mean_something_elsewhere():
    def model(x, y):
        chain = numpyro.sample("chain", dist.Normal(0.0, 1.0))
        draw = weights("draw")
        deep, same = weights("net/layer.0", 3), weights("W", 3)
        numpyro.deterministic("step", chain)
        w = draw + deep + same + numpyro.sample("w", dist.Normal(0.0, 1.0))
        with numpyro.plate("draw of points", len(x)):
            numpyro.sample("<y>", dist.Normal(x @ w + chain, 0.5), obs=y)

    return Case(model=model, guide=normal(model), args=(X, Y))


@case
def empty_sites():
    """Groups of nothing: a site of no entries, a plate of no points, a parameter of no entries."""

    def model(x, y, z):
        w = weights()
        none = weights("none", 0)
        shift = numpyro.param("shift", jnp.zeros((0, 2)))
        regression(x, y, lambda x: x @ w + none.sum() + shift.sum())
        numpyro.sample("z", dist.Normal(jnp.zeros(len(z)), 1.0), obs=z)

    return Case(model=model, guide=normal(model), args=(X, Y, np.zeros(0, np.float32)))


@case
def half_precision():
    def model(x, y):
        w = numpyro.sample("w", dist.Normal(jnp.zeros(3, jnp.bfloat16), jnp.ones(3, jnp.bfloat16)).to_event(1))
        h = jnp.tanh(x.astype(jnp.bfloat16) @ w).astype(jnp.float32)
        regression(x, y, lambda _: h)

    return Case(model=model, guide=normal(model), args=(X, Y))


@case
def masked_sentinels():
    """Missing values are marked by a number that no likelihood may see, and masked."""

    def model(x, y):
        w = weights()
        seen = y > -900.0
        with numpyro.plate("points", len(x)), handlers.mask(mask=seen):
            numpyro.sample("y", dist.Normal(x @ w, 0.5), obs=jnp.where(seen, y, 0.0))

    return Case(model=model, guide=normal(model), args=(X, np.where(np.arange(12) % 3 == 0, np.float32(-999.0), Y)))


# -- arguments ---------------------------------------------------------------------------------------------------------


@case
def options_and_keyword_data():
    """Data by keyword, as NumPy of double precision; options that are strings, sizes, flags, None and tuples."""

    def model(data, kind="linear", hidden=(2,), scale=None, columns=(), verbose=False):
        x = jnp.stack([data["columns"][name] for name in columns], -1)
        w = weights("w", x.shape[-1], *hidden)
        scale = numpyro.sample("scale", dist.HalfNormal(1.0)) if scale is None else scale
        h = jnp.tanh(x @ w) if kind == "network" else x @ w
        regression(x, data["y"], lambda _: h.sum(-1), scale)

    data = {"y": Y.astype(np.float64), "columns": {"age": X[:, 0], "height": X[:, 1].astype(np.float64)}}
    kwargs = {"data": data, "kind": "network", "hidden": (4,), "scale": None, "columns": ("age", "height")}
    return Case(model=model, guide=normal(model), kwargs=kwargs)


# -- programs ----------------------------------------------------------------------------------------------------------


@case
def no_data():
    """The prior alone, with a hand-written guide whose scales are one parameter."""

    def model():
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        with numpyro.plate("many", 4):
            numpyro.sample("b", dist.Normal(a, 1.0))

    def guide():
        scale = numpyro.param("scale", jnp.full(5, 0.5), constraint=constraints.positive)
        numpyro.sample("a", dist.Normal(numpyro.param("a_loc", 0.3), scale[0]))
        with numpyro.plate("many", 4):
            numpyro.sample("b", dist.Normal(numpyro.param("b_loc", jnp.zeros(4)), scale[1:]))

    return Case(model=model, guide=guide)


@case
def importance_weighted():
    def model(x, y):
        w = weights()
        regression(x, y, lambda x: x @ w)

    return Case(model=model, guide=normal(model), args=(X, Y), base=lambda: RenyiELBO(0.5, 3))


@case
def a_model_that_prints():
    """Effects at top level, in a loop and in a branch, some of them in order; what they saw is counted."""
    seen = []

    def model(x, y):
        w = weights()
        jax.debug.callback(lambda w: seen.append("top"), w, ordered=True)

        def step(total, row):
            jax.debug.callback(lambda _: seen.append("row"), total)
            return total + jnp.tanh(row @ w), row @ w

        _, predicted = jax.lax.scan(step, 0.0, x)
        jax.lax.cond(w.sum() > -1e9, lambda: jax.debug.callback(lambda: seen.append("branch")), lambda: None)
        regression(x, y, lambda _: predicted)

    return Case(model=model, guide=normal(model), args=(X[:4], Y[:4]), effects=seen)
