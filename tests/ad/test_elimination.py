"""An array that reaches a scalar in many ways needs one coefficient for it, and the gradient stays what it was.

Each program names the arrays that its tangent program reads, and how many there are if ``collect`` does nothing: that
is how each could fail. The gradients are JAX's, in double precision.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from programs import few, numbers
from zscores import assert_unbiased

from numpyro_rad import Keep, StochasticRound, rad
from numpyro_rad.ad import linearize
from numpyro_rad.ad.graph import Value

ROWS, CLASSES = 40, 5
KEY = jax.random.key(3)
LARGE = 20  # elements: what has fewer is a parameter


pytestmark = [pytest.mark.in_one_go, pytest.mark.usefixtures("double")]


X, Y = numbers(ROWS, 3), numbers(ROWS)
W, WIDE = numbers(3, seed=1), numbers(3, CLASSES, seed=1)
CODES = np.random.default_rng(0).integers(CLASSES, size=ROWS)
CUTS = np.linspace(-1.0, 1.0, CLASSES - 1)

PROGRAMS = {}


def program(*args, shapes, before):
    """Register a function with its arguments, the shapes of its coefficients, and their number without ``collect``."""

    def register(f):
        PROGRAMS[f.__name__] = (f, args, shapes, before)
        return f

    return register


@program(W, 1.3, shapes=[(ROWS,)], before=8)
def chosen_terms(w, shape):
    """Two log densities of one pre-activation, one of them chosen; the coefficient of a scalar is a scalar."""
    scale = jnp.exp(X @ w)
    hazard = (np.abs(Y) / scale) ** shape
    return jnp.where(Y > 0, jnp.log(shape / scale) + (shape - 1) * jnp.log(np.abs(Y) / scale) - hazard, -hazard).sum()


@program(W, shapes=[(ROWS,)], before=3)
def several_sums(w):
    eta = X @ w
    return jnp.tanh(eta).sum() - 2.0 * jnp.mean(jnp.exp(eta)) + 0.5 * jnp.sum((jnp.sin(eta) - Y) ** 2)


@program(W, 0.7, shapes=[(ROWS,)], before=3)
def scale_parameter(w, scale):
    return -0.5 * (((Y - X @ w) / scale) ** 2).sum() - ROWS * jnp.log(scale)


@program(W, CUTS, shapes=[(ROWS, 1)], before=6)
def rearranged(w, cuts):
    """Broadcast, pad, slice and gather between one elementwise step and the next."""
    below = jax.nn.sigmoid(cuts - (X @ w)[:, None])
    below = jnp.concatenate([jnp.zeros((ROWS, 1)), below, jnp.ones((ROWS, 1))], 1)
    between = jnp.clip(below[:, 1:] - below[:, :-1], 1e-9, 1.0)
    return jnp.log(jnp.take_along_axis(between, CODES[:, None], 1)).sum()


@program(WIDE, numbers(CLASSES), shapes=[(ROWS, CLASSES)], before=4)
def mixture(w, logits):
    eta = X @ w
    return jax.nn.logsumexp(jax.nn.log_softmax(logits) - 0.5 * (Y[:, None] - eta) ** 2 + jnp.tanh(eta), axis=1).sum()


@program(WIDE, 0.2, shapes=[(ROWS,)], before=3)
def sum_of_rows(w, shift):
    """The coefficient of the sums is smaller than that of what is summed, so the sum stays as it is."""
    rows = (X @ w * numbers(ROWS, CLASSES, seed=7)).sum(1)
    return jnp.sum(jnp.tanh(rows) * jnp.exp(shift * rows))


@program(W, shapes=[(ROWS,)], before=4)
def mixed_precision(w):
    eta = X @ w
    return jnp.tanh(eta).sum() + (jnp.sin(eta).astype(jnp.float32) ** 2 + jnp.cos(eta).astype(jnp.float32)).sum()


@program(W, 0.9, shapes=[(ROWS,), (ROWS,)], before=4)
def loop(w, rate):
    """In the body of a loop, whose log densities are scalars; the state needs a coefficient of its own."""

    def step(z, y):
        eta = jnp.tanh(rate * (numbers(ROWS, ROWS, seed=5) / 7) @ z)
        return eta, jnp.sum(jnp.where(eta > 0, jnp.sin(eta) * y - eta**2, jnp.exp(eta) * rate))

    return lax.scan(step, X @ w, numbers(4, ROWS, seed=2))[1].sum()


def graphs(f, args):
    planned = rad(f, codec=Keep()).planned(args, {}, tuple(range(len(args))))[0]
    return [p.graph for p in planned.walk()]


def coefficients(f, args):
    """Shapes of the large residuals of elementwise steps and rearrangements that are no data."""
    return [
        residual.aval.shape
        for graph in graphs(f, args)
        for residual in {r for e in graph.edges if not e.expensive for r in e.residuals}
        if residual.aval.size >= LARGE and residual not in graph.inputs
    ]


@pytest.mark.parametrize("name", PROGRAMS)
def test_fewest_coefficients(name, monkeypatch):
    f, args, shapes, before = PROGRAMS[name]
    assert coefficients(f, args) == shapes
    monkeypatch.setattr(linearize, "collect", lambda *args, **kwargs: None)
    assert len(coefficients(f, args)) == before


@pytest.mark.parametrize("name", PROGRAMS)
def test_exact_gradient(name):
    f, args, *_ = PROGRAMS[name]
    argnums = tuple(range(len(args)))
    expected = jax.jit(jax.grad(f, argnums))(*args)
    actual = jax.jit(lambda *args: jax.grad(rad(f, codec=Keep()), tuple(a + 1 for a in argnums))(KEY, *args))(*args)
    rtol = 1e-5 if name == "mixed_precision" else 1e-11
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol), actual, expected)


@pytest.mark.parametrize("name", few(PROGRAMS, *list(PROGRAMS)[::3], slow=5))
@pytest.mark.usefixtures("encode_all")
def test_unbiased(name):
    f, args, *_ = PROGRAMS[name]
    argnums = tuple(range(len(args)))
    codec = StochasticRound(bits=1)

    def flat(gradient):
        return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(gradient)])

    draw = jax.grad(rad(f, codec=codec), tuple(a + 1 for a in argnums))
    draws = jax.jit(jax.vmap(lambda key: flat(draw(key, *args))))(jax.random.split(KEY, 1000))
    assert np.std(draws, 0).max() > 0
    assert_unbiased(draws, flat(jax.grad(f, argnums)(*args)))


def test_mask_silences_infinite_derivatives():
    eye = np.eye(ROWS)

    def f(x):
        x = eye @ x
        return jnp.where(x > 0, jnp.sqrt(x), 0.0).sum() + jnp.where(x > 0, jnp.log(x), jnp.sin(x)).sum()

    def safe(x):
        y = jnp.where(x > 0, x, 1.0)
        return jnp.where(x > 0, jnp.sqrt(y), 0.0).sum() + jnp.where(x > 0, jnp.log(y), jnp.sin(x)).sum()

    x = Y.copy()
    x[:5] = 0.0
    assert coefficients(f, (x,)) == [(ROWS,)]
    np.testing.assert_allclose(jax.grad(rad(f, codec=Keep()), 1)(KEY, x), jax.grad(safe)(x), rtol=1e-12)


def test_coefficient_waits_for_no_later_value():
    """The early sum is multiplied by what a later contraction gives; its coefficient must not follow from that."""

    def f(w, v):
        eta = X @ w
        early = jnp.sum(jnp.tanh(eta) * jnp.exp(eta)) + jnp.sum(jnp.cos(eta))
        return early * jnp.sum(jnp.sin(jnp.tanh(eta) @ v))

    (graph,) = graphs(f, (W, numbers(ROWS, ROWS)))
    contractions = [e.outputs[0] for e in graph.equations if e.expensive]
    (early,) = [e.residuals[0] for e in graph.edges if e.name == "weighted sum" and e.inputs[0].aval.shape == (ROWS,)]
    todo, seen = [early], set()
    while todo:
        value = todo.pop()
        seen.add(value)
        if value in graph.producer:
            todo += [a for a in graph.producer[value].inputs if isinstance(a, Value) and a not in seen]
    assert contractions[0] in seen
    assert not seen & set(contractions[1:])


def test_vectors_keep_their_coefficients():
    """Where nothing ends in a scalar there is nothing to collect."""

    def f(w):
        eta = X @ w
        return jnp.tanh(eta) * jnp.exp(eta), jnp.sin(eta)

    assert not [e for g in graphs(f, (W,)) for e in g.edges if e.name == "weighted sum"]
    assert len(coefficients(f, (W,))) == 2
