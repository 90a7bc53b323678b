"""``RAD_SVI`` before its first step: inside of transformations, with optimizers and budgets that cannot work."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoDelta, AutoNormal
from numpyro.optim import Minimize
from programs import few

from numpyro_rad import RAD_ELBO, RAD_SVI, BudgetError, StochasticRound

X = jnp.linspace(-1.0, 1.0, 24).reshape(8, 3)
Y = X.sum(1)


def model(x, y):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    numpyro.sample("y", dist.Normal(jnp.tanh(x @ w), 0.5), obs=y)


def svi_of(kind, optim=None, loss=None, guide=AutoNormal):
    return kind(model, guide(model), optax.adam(0.1) if optim is None else optim, RAD_ELBO() if loss is None else loss)


def over_seeds(svi):
    return jax.vmap(lambda key: svi.run(key, 4, X, Y, progress_bar=False))(jax.random.split(jax.random.key(0), 2))


def over_data(svi):
    return jax.vmap(lambda y: svi.run(jax.random.key(0), 4, X, y, progress_bar=False))(jnp.stack([Y, -Y]))


def compiled(svi):
    return jax.jit(lambda key: svi.run(key, 4, X, Y, progress_bar=False))(jax.random.key(0))


def in_a_loop(svi):
    def fit(count, key):
        return count + 1, svi.run(key, 4, X, Y, progress_bar=False)

    return jax.lax.scan(fit, 0, jax.random.split(jax.random.key(0), 2))[1]


@pytest.mark.parametrize(
    "transformed", few([over_seeds, over_data, compiled, in_a_loop], over_data, slow=3), ids=lambda f: f.__name__
)
def test_run_is_that_of_svi_inside_of_a_transformation(transformed):
    expected = transformed(svi_of(SVI))
    with pytest.warns(UserWarning, match=r"is SVI\.run, without the progress bar, tracking"):
        found = transformed(svi_of(RAD_SVI))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(tuple(found)), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)
    with pytest.raises(AttributeError, match="part of a transformation of JAX"):
        found.report()


def test_what_is_left_out_is_named(tmp_path):
    svi = svi_of(RAD_SVI)

    def fit(key):
        return svi.run(key, 2, X, Y, checkpoint=tmp_path / "fit", stop="converged", validate=(X, Y)).losses

    with pytest.warns(UserWarning, match="stop=, checkpoint=, validate="):
        jax.vmap(fit)(jax.random.split(jax.random.key(0), 2))
    assert not (tmp_path / "fit").exists()
    with pytest.raises(ValueError, match="there is no host"):
        jax.vmap(lambda key: svi.run(key, 2, batches=[(X, Y)]))(jax.random.split(jax.random.key(0), 2))


@pytest.mark.parametrize(
    "optim",
    (
        optax.lbfgs(),
        optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)),
        optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1), opaque_mode=True),
    ),
    ids=("lbfgs", "backtracking", "sam"),
)
def test_optimizers_that_evaluate_the_loss_again_are_refused(optim):
    svi = svi_of(RAD_SVI, optim)
    for start in (lambda: svi.init(jax.random.key(0), X, Y), lambda: svi.run(jax.random.key(0), 2, X, Y)):
        with pytest.raises(TypeError, match=r"cannot take a step of SVI.*evaluate the loss again need"):
            start()


def test_an_optimizer_that_takes_no_value_of_the_loss():
    optim = optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1))
    svi = svi_of(RAD_SVI, optim)
    with pytest.raises(TypeError, match=r"optax.GradientTransformation\(optimizer.init, optimizer.update\)"):
        svi.init(jax.random.key(0), X, Y)
    svi = svi_of(RAD_SVI, optax.GradientTransformation(optim.init, optim.update))
    assert np.isfinite(svi.run(jax.random.key(0), 2, X, Y, progress_bar=False).losses).all()


@pytest.mark.parametrize(
    "optim", (optax.sgd(0.1), numpyro.optim.Adam(0.1), optax.adamw(optax.cosine_decay_schedule(0.1, 9)))
)
def test_others_are_taken(optim):
    svi_of(RAD_SVI, optim).init(jax.random.key(0), X, Y)


def test_line_searches_want_exact_gradients(encode_all):
    svi = svi_of(RAD_SVI, Minimize(), RAD_ELBO(codec=StochasticRound(4)), AutoDelta)
    with pytest.warns(UserWarning, match=r"evaluates the loss several times.*RAD_ELBO\(exact=True\)"):
        svi.init(jax.random.key(0), X, Y)
    svi_of(RAD_SVI, Minimize(), RAD_ELBO(exact=True), AutoDelta).init(jax.random.key(0), X, Y)


def test_an_impossible_budget_is_refused_before_anything_is_measured(monkeypatch):
    svi = svi_of(RAD_SVI, loss=RAD_ELBO(memory_budget="1B"))
    monkeypatch.setattr(RAD_ELBO, "calibrate", lambda *args, **kwargs: pytest.fail("it calibrates"))
    for start in (lambda: svi.init(jax.random.key(0), X, Y), lambda: svi.run(jax.random.key(0), 2, X, Y)):
        with pytest.raises(BudgetError, match="memory_budget=1 bytes is too small"):
            start()
