"""What a program may take at sight is no less than what its linearized graph stores."""

import jax
import jax.numpy as jnp
import pytest
from random_programs import ARGS, INDEX, loss, seeded

from numpyro_rad.ad import _jax, bounds
from numpyro_rad.ad.linearize import linearize
from numpyro_rad.planning import strategies


def traced(f, *args):
    return _jax.closed(jax.make_jaxpr(f)(*args))


def stored(jaxpr, active):
    return strategies.untouched_plan(linearize(jaxpr, active)).stored_bytes


def matrices(x, w):
    for _ in range(3):
        x = jnp.tanh(x @ w)
    return (x * jnp.exp(-x)).sum()


def gathered(x, index):
    """The numbers that are picked are many, and nothing of them is stored but where they are."""
    return jnp.tanh(x)[index * 2].sum()


def recurrent(x, w):
    return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w) * c, None), x, None, 7)[0].sum()


def chosen(x, w):
    return jax.lax.cond(x.sum() > 0, lambda: jnp.tanh(x @ w), lambda: jnp.sin(x)).sum()


def factored(x, w):
    return jnp.linalg.cholesky(x @ x.T + jnp.eye(len(x))).sum() + jnp.sort(w[0] * 2).prod() + w.max()


X, W, MANY = jnp.ones((8, 8)), jnp.ones((8, 8)), jnp.zeros(1000, jnp.int32)
PROGRAMS = {
    "matrices": (matrices, X, W),
    "gathered": (gathered, X[0], MANY),
    "recurrent": (recurrent, X, W),
    "chosen": (chosen, X, W),
    "factored": (factored, X, W),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_less_than_the_graph_stores(name):
    f, *args = PROGRAMS[name]
    jaxpr, active = traced(f, *args), [jnp.issubdtype(a.dtype, jnp.floating) for a in args]
    assert stored(jaxpr, active) <= bounds.residual_bytes(jaxpr, active)


def test_random_programs():
    active = [True] * len(ARGS) + [False]
    for seed in range(12):
        jaxpr = traced(loss(seeded(seed)), *ARGS, INDEX)
        assert stored(jaxpr, active) <= bounds.residual_bytes(jaxpr, active), seed


def test_products_are_not_forgotten(monkeypatch):
    """What the tests above would say of a bound that takes products to store nothing."""
    jaxpr = traced(matrices, X, W)
    free = {name: bounds.primitives.Traits(structural=True) for name in ("dot_general", "tanh", "exp", "mul")}
    known = bounds.primitives.of
    monkeypatch.setattr(bounds.primitives, "of", lambda name: free.get(name) or known(name))
    assert bounds.residual_bytes(jaxpr, [True, True]) < stored(jaxpr, [True, True])


def test_moved_and_added_entries_cost_nothing():
    """A thousand picked entries: their places, and the derivative of the few that they were picked from."""
    jaxpr = traced(gathered, X[0], MANY)
    assert bounds.residual_bytes(jaxpr, [True, False]) <= 4 * 1000 * 2 + 4 * 8 + 100
    assert bounds.computed_bytes(jaxpr) > 2 * bounds.residual_bytes(jaxpr, [True, False])


def test_iterations_count():
    def f(x):
        return jax.lax.scan(lambda c, _: (jnp.sin(c), jnp.cos(c)), x, None, 10)

    assert bounds.computed_bytes(traced(f, jnp.ones(8))) == 10 * 2 * 32 + (1 + 10) * 32
    assert bounds.residual_bytes(traced(f, jnp.ones(8)), [True]) == 10 * 2 * 32


def test_what_is_not_differentiated_stores_nothing():
    assert bounds.residual_bytes(traced(matrices, X, W), [False, False]) == 0
    assert bounds.residual_bytes(traced(lambda x: (x > 0).sum() + jnp.argmax(x), X[0]), [True]) <= 4 * 4 * 9
