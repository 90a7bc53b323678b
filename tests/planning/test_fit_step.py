"""A whole step within a number of bytes, and the warning about budgets that are bad bargains."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import linen
from models import network_regression
from numpyro.contrib.module import flax_module
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from numpyro_rad import RAD_ELBO, BudgetError, rad
from numpyro_rad.errors import VarianceWarning
from numpyro_rad.planning.costs import CostModel

pytestmark = pytest.mark.in_one_go

X = np.random.default_rng(0).standard_normal((8192, 8)).astype(np.float32)
Y = np.sin(X.sum(1)).astype(np.float32)


def deep(x, y):
    return network_regression(x, y, hidden=(64,) * 3, scale=0.1)


class Normalized(linen.Module):
    @linen.compact
    def __call__(self, x):
        for _ in range(3):
            x = linen.BatchNorm(use_running_average=False)(jnp.tanh(linen.Dense(64)(x)))
        return linen.Dense(1)(x)[:, 0]


def normalized(x, y):
    """A network with mutable state, which cannot be traced without it."""
    network = flax_module("network", Normalized(), x, mutable=["batch_stats"])
    numpyro.sample("y", dist.Normal(network(x), 1.0).to_event(1), obs=y)


def prepared(loss, model=deep):
    guide = AutoNormal(deep) if model is deep else lambda x, y: None
    svi = SVI(model, guide, optax.adam(1e-3), loss)
    return svi, svi.init(jax.random.key(0), X, Y)


def step_bytes(svi, state):
    sizes = jax.jit(lambda state, *data: svi.update(state, *data)).lower(state, X, Y).compile().memory_analysis()
    step = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return step + sizes.temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize(("model", "share"), [(deep, 0.3), pytest.param(normalized, 0.6, marks=pytest.mark.exhaustive)])
def test_the_whole_step_fits(model, share, priced):
    """In slices, as users get it: without them three arrays of a layer's width alone are 0.8 of the exact step."""
    priced(most_slices=CostModel.most_slices)
    elbo = RAD_ELBO()
    svi, state = prepared(elbo, model)
    exact = step_bytes(*prepared(Trace_ELBO(), model))
    limit = int(share * exact)
    budget = elbo.fit_step(svi, state, limit, X, Y)
    assert svi.loss is elbo and elbo.planner.memory_budget is None and budget < limit
    svi.loss = elbo.replace(memory_budget=budget)
    assert step_bytes(svi, state) <= limit < exact
    state, loss = svi.update(state, X, Y)
    assert np.isfinite(loss)


def by_group(x, y):
    """A model that looks at its data."""
    offset = numpyro.sample("offset", dist.Normal(0.0, 1.0).expand([int(y.max()) + 1]).to_event(1))
    numpyro.sample("x", dist.Normal(jnp.tanh(offset[y]), 1.0).to_event(1), obs=x)


@pytest.mark.slow
def test_a_model_that_looks_at_its_data():
    """The data are constants of its program, and count all the same."""
    x, group = X[:4096].ravel(), np.arange(4096 * 8) % 7
    svi = SVI(by_group, AutoNormal(by_group), optax.adam(1e-3), RAD_ELBO())
    state = svi.init(jax.random.key(0), x, group)
    assert svi.loss.fit_step(svi, state, "1GiB", x, group) == 2**30
    with pytest.raises(BudgetError) as caught:
        svi.loss.fit_step(svi, state, x.nbytes, x, group)
    assert caught.value.smallest_bytes > x.nbytes + group.nbytes


@pytest.mark.slow
def test_a_step_that_cannot_fit_says_what_it_takes_and_changes_nothing():
    elbo = RAD_ELBO()
    before = elbo.planner
    svi, state = prepared(elbo)
    with pytest.raises(BudgetError, match=r"no plan makes one svi\.update fit") as caught:
        elbo.fit_step(svi, state, "10 kB", X, Y)
    assert caught.value.smallest_bytes > 10_000
    assert elbo.planner == before


def deep_sum(x, w):
    for _ in range(4):
        x = jnp.tanh(x @ w)
    return x.sum()


def test_a_budget_that_buys_mostly_noise_warns():
    x, w = X[:512, :8].repeat(8, 1), np.eye(64, dtype=np.float32)
    with pytest.raises(BudgetError) as caught:
        jax.grad(rad(deep_sum, memory_budget=0), argnums=2)(jax.random.key(0), x, w)
    least = caught.value.smallest_bytes
    with pytest.warns(VarianceWarning, match="times the variance of the exact gradient"):
        jax.grad(rad(deep_sum, memory_budget=least), argnums=2)(jax.random.key(0), x, w)
    jax.grad(rad(deep_sum, memory_budget=100 * least), argnums=2)(jax.random.key(0), x, w)  # warnings are errors here
