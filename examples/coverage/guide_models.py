"""Guides beyond the mean field: full and low rank covariances, flows, annealed importance sampling, centring."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.handlers import reparam
from numpyro.infer.autoguide import (
    AutoBNAFNormal,
    AutoDAIS,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from numpyro.infer.initialization import init_to_value
from numpyro.infer.reparam import LocScaleReparam

from examples.coverage.problem import Problem, adam, arrays, example, sigmoid


def logistic(x, y):
    """Logistic regression with unknown shrinkage, the target of several guides below."""
    spread = numpyro.sample("spread", dist.HalfNormal(1.0))
    weights = numpyro.sample("weights", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
    with numpyro.plate("rows", x.shape[0]):
        numpyro.sample("y", dist.Bernoulli(logits=x @ (spread * weights)), obs=y)


def classes(rows: int, features: int, seed: int = 0) -> tuple[Any, ...]:
    """Inputs with correlated features, and classes: (rows, features) and (rows,)."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, features)) + rng.standard_normal((rows, 1))
    y = rng.random(rows) < sigmoid(x @ rng.standard_normal(features) / np.sqrt(features))
    return arrays(x, y.astype(int))


@example("AutoMultivariateNormal on a logistic regression (tutorial: variational inference in NumPyro)")
def full_covariance(small: bool = False) -> Problem:
    """A normal guide with a full covariance, several particles."""
    args = classes(30, 4) if small else classes(2_000, 200)
    guide = AutoMultivariateNormal(logistic, init_scale=0.05)
    return Problem(logistic, guide, args, optimizer=adam(), elbo={"num_particles": 2 if small else 8})


@example("AutoLowRankMultivariateNormal on a logistic regression (docs: automatic guides)")
def low_rank_covariance(small: bool = False) -> Problem:
    """A normal guide with a low rank plus diagonal covariance, in many dimensions."""
    args = classes(30, 5) if small else classes(2_000, 1_000)
    guide = AutoLowRankMultivariateNormal(logistic, init_scale=0.05, rank=2 if small else 30)
    return Problem(logistic, guide, args, optimizer=adam())


@example("AutoLaplaceApproximation (docs: automatic guides)")
def laplace(small: bool = False) -> Problem:
    """The point estimate around which a Laplace approximation is made; training has no noise."""
    args = classes(30, 4) if small else classes(60_000, 30)
    return Problem(logistic, AutoLaplaceApproximation(logistic), args, optimizer=adam())


@example("examples/neutra.py, inverse autoregressive flow")
def inverse_autoregressive_flow(small: bool = False) -> Problem:
    """An inverse autoregressive flow as guide of a regression, several particles."""
    args = classes(20, 3) if small else classes(1_000, 50)
    guide = AutoIAFNormal(logistic, num_flows=2, hidden_dims=[8, 8] if small else [128, 128])
    return Problem(logistic, guide, args, optimizer=adam(1e-3), elbo={"num_particles": 2 if small else 64})


@example("examples/neutra.py")
def block_neural_flow(small: bool = False) -> Problem:
    """A block neural autoregressive flow that learns a density in the shape of two moons."""

    def model():
        x = numpyro.sample("x", dist.Uniform(-4.0, 4.0).expand([2]).to_event(1))
        ring = 0.5 * ((jnp.linalg.norm(x) - 2.0) / 0.2) ** 2
        moons = -0.5 * ((x[0] + jnp.array([-2.0, 2.0])) / 0.6) ** 2
        numpyro.factor("moons", jnp.logaddexp(moons[0], moons[1]) - ring)

    guide = AutoBNAFNormal(model, num_flows=1, hidden_factors=[2, 2] if small else [32, 32])
    return Problem(model, guide, optimizer=adam(3e-3), elbo={"num_particles": 2 if small else 256})


@example("examples/dais_demo.py")
def annealed_importance_sampling(small: bool = False) -> Problem:
    """Differentiable annealed importance sampling: each leapfrog step differentiates the model once more."""
    args = classes(20, 3) if small else classes(5_000, 40)
    guide = AutoDAIS(logistic, K=2 if small else 8, eta_init=0.01, eta_max=0.1)
    return Problem(logistic, guide, args, optimizer=adam(1e-3))


@example("tutorial: variationally inferred parameterization")
def learned_centring(small: bool = False) -> Problem:
    """Eight schools whose degree of centring is learned with the guide; tiny on purpose."""

    def model(errors, effects):
        loc = numpyro.sample("loc", dist.Normal(0.0, 5.0))
        spread = numpyro.sample("spread", dist.HalfCauchy(5.0))
        with numpyro.plate("schools", errors.shape[0]), reparam(config={"effect": LocScaleReparam(None)}):
            effect = numpyro.sample("effect", dist.Normal(loc, spread))
        with numpyro.plate("observations", errors.shape[0]):
            numpyro.sample("observed", dist.Normal(effect, errors), obs=effects)

    rng = np.random.default_rng(1)
    errors = rng.uniform(9.0, 18.0, 8)
    return Problem(model, AutoNormal(model), arrays(errors, 8.0 + errors * rng.standard_normal(8)), optimizer=adam())


@example("examples/funnel.py")
def funnel(small: bool = False) -> Problem:
    """Neal's funnel, written with location and scale pulled out, under a full covariance; tiny on purpose."""

    def model(dimensions):
        y = numpyro.sample("y", dist.Normal(0.0, 3.0))
        with reparam(config={"x": LocScaleReparam(0.0)}):
            numpyro.sample("x", dist.Normal(jnp.zeros(dimensions), jnp.exp(y / 2.0)).to_event(1))

    guide = AutoMultivariateNormal(model, init_loc_fn=init_to_value(values={"y": 0.0}), init_scale=0.1)
    return Problem(model, guide, (), {"dimensions": 3 if small else 9}, adam())
