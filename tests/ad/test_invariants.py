"""What is the same in every iteration of a loop runs once: bytes, values and gradients beside those of JAX itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.linalg import expm
from programs import normal

from numpyro_rad import Keep, StochasticRound, rad
from numpyro_rad.ad import invariants

ARGS = normal(12, 12, scale=0.1), normal(3, 12)
LENGTH = 20


def loop(step, begin, length=LENGTH):
    end, ys = jax.lax.scan(step, begin, None, length=length)
    return jnp.sum(end) + sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(ys))


def weights(w, x):
    """A product of two functions of constants, written where it is used."""
    return loop(lambda h, _: (jnp.tanh(h @ (jnp.tanh(w) @ jnp.cos(w))), h.sum()), x)


def exponential(w, x):
    """What takes long, behind calls."""
    return loop(lambda h, _: (jnp.sin(h @ expm(w - w.T)), None), x)


def stacked(w, x):
    """NumPyro's ``scan`` stacks the parameters of every distribution, whether they move or not."""
    return loop(lambda h, _: (jnp.tanh(h @ w), jnp.exp(w)), x)


def carried(w, x):
    """A carry that is handed on as it came is a constant."""

    def step(carry, _):
        w, h = carry
        return (w, jnp.tanh(h @ jnp.exp(w))), None

    (w, h), _ = jax.lax.scan(step, (w, x), None, length=LENGTH)
    return jnp.sum(h) + jnp.sum(w)


def nested(w, x):
    """Out of the inner loop, the branch around it and the outer loop."""

    def outer(h, _):
        def inner(h, _):
            return jnp.tanh(h @ (jnp.sin(w) @ w)), None

        long = lambda h: jax.lax.scan(inner, h, None, length=4)[0]  # noqa: E731
        return jax.lax.cond(h.sum() > -1e9, long, lambda h: h, h), None

    return loop(outer, x, 5)


@jax.jit
def called(w, x):
    """In a jitted step of a jitted function, from the last iteration to the first."""

    @jax.jit
    def step(h, row):
        return jnp.tanh(h @ jnp.tanh(w) + row), None

    return jnp.sum(jax.lax.scan(step, x, normal(LENGTH, 12), reverse=True)[0])


PROGRAMS = [weights, exponential, stacked, carried, nested, called]


def temporary_bytes(f):
    step = jax.jit(jax.value_and_grad(f, argnums=(0, 1))).lower(*ARGS).compile()
    return step.memory_analysis().temp_size_in_bytes, *step(*ARGS)


@pytest.mark.in_one_go
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_about_the_memory_of_jax(program):
    bytes_of_jax, value, gradient = temporary_bytes(program)
    ours = rad(program, codec=Keep())
    taken, own_value, own_gradient = temporary_bytes(lambda *args: ours(jax.random.key(0), *args))
    assert taken <= 1.3 * bytes_of_jax
    np.testing.assert_array_equal(own_value, value)
    for own, theirs in zip(own_gradient, gradient, strict=True):
        np.testing.assert_allclose(own, theirs, rtol=2e-5, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.slow
def test_left_in_loops_they_take_more(monkeypatch):
    """The comparison can tell."""
    bytes_of_jax, *_ = temporary_bytes(exponential)
    monkeypatch.setattr("numpyro_rad.ad.linearize.hoist", lambda jaxpr: jaxpr)
    taken, *_ = temporary_bytes(lambda *args: rad(exponential, codec=Keep())(jax.random.key(0), *args))
    assert taken > 4 * bytes_of_jax


def test_they_are_read_exactly(arrays_of_any_size_count):
    """A code of a weight would be the same in every iteration, and products of it with itself biased."""
    f = rad(weights, codec=StochasticRound(1))
    found = jax.jit(jax.vmap(lambda key: jax.grad(f, argnums=1)(key, *ARGS)))(jax.random.split(jax.random.key(3), 512))
    exact = jax.grad(weights)(*ARGS)
    error = found.std(0, ddof=1) / 512**0.5 + 1e-5 * np.abs(exact).max()
    assert (np.abs(found.mean(0) - exact) / error).max() < 5


def test_what_acts_or_only_rearranges_stays():
    def f(w, x):
        def step(h, _):
            jax.debug.callback(lambda _: None, w)
            wide = jnp.broadcast_to(w[0], (50, 12))
            return jnp.tanh(h + wide.sum(0)), None

        return loop(step, x)

    def names(jaxpr):
        return [e.primitive.name for e in jaxpr.jaxpr.eqns]

    program = jax.make_jaxpr(f)(*ARGS)
    assert "debug_callback" not in names(invariants.hoist(program))
    assert "reduce_sum" in names(invariants.hoist(jax.make_jaxpr(lambda w, x: f(w, x) * 1.0)(*ARGS)))
    program = jax.make_jaxpr(lambda w, x: loop(lambda h, _: (jnp.tanh(h @ w.T), None), x))(*ARGS)
    assert "transpose" not in names(invariants.hoist(program))
