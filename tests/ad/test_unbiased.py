"""The mean of the randomized gradient over path keys is the exact gradient: z-scores, and planted biases they catch.

Each test vmaps the gradient over ``DRAWS`` path keys and compares the mean of every entry with JAX's gradient. The
biases planted below are the mistakes that randomized AD invites: rounding to nearest, one draw read twice on one path,
an estimate where the pullback is not linear, one draw for all iterations, an estimate rounded on the way. Each moves
some mean by a tenth of the spread of a draw or more, which with 4096 draws is a z-score above 6; the bound is near 4.5.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree
from programs import few, normal, positions
from zscores import assert_unbiased, assert_uncorrelated, bound, z_scores

from numpyro_rad import Keep, StochasticRound, explain, rad
from numpyro_rad.ad import control, primitives
from numpyro_rad.ad.seeds import fold
from numpyro_rad.codecs import Codec, RandomProjection, SampleAxis, SampledRound
from numpyro_rad.planning import readers

pytestmark = pytest.mark.usefixtures("no_residual_is_too_small")

DRAWS = 4096
ROUNDING = [StochasticRound(bits) for bits in (8, 4, 2, 1)]
SAMPLING = [
    SampleAxis(0.15),
    SampleAxis(0.15, "shared"),
    SampleAxis(0.15, centred=True),
    RandomProjection(0.15),
    SampledRound(),
]
CODECS = [*ROUNDING, *SAMPLING]


# Programs: name -> (function, arguments, residuals that must be encoded)

PROGRAMS = {}


def program(*args, encoded):
    def register(f):
        PROGRAMS[f.__name__] = (f, args, encoded)
        return f

    return register


X, W, V = normal(6, 12), normal(12, 12, scale=0.3), normal(12, 12, seed=1, scale=0.3)


@program(X, W, V, encoded=4)
def gelu_network(x, w, v):
    return jnp.sin(jax.nn.gelu(jax.nn.gelu(x @ w) @ v) @ w).sum()


@program(X, W, V, encoded=2)
def relu_network(x, w, v):
    return jnp.sin(jax.nn.relu(jax.nn.relu(x @ w) @ v) @ w).sum()


@program(X, W, normal(6, 12, seed=4), encoded=1)
def two_readers_on_one_path(x, w, c):
    """The cotangent of c passes h twice, once in another shape: one draw would put E[h_hat**2] in the place of h**2."""
    h = jnp.tanh(x @ w)  # (6, 12)
    once = (h * c).reshape(-1)
    twice = (once * h.reshape(-1)).reshape(6, 12)
    return (twice @ w).sum()


@program(X, W, normal(12, 6, seed=4), encoded=2)
def stacked_contractions(x, w, c):
    """The products on the way to c hold h h.T, whose diagonal is a sum of squares."""
    h = jnp.tanh(x @ w)
    return jnp.sin(c @ h @ h.T @ h).sum()


@program(X, W, V, encoded=2)
def parallel_readers(x, w, v):
    """No path runs through two readers of h: one stored copy for all of them."""
    h = jnp.tanh(x @ w)
    return jnp.sin(h @ v).sum() + (h @ v.T).sum() * 0.5 + ((h @ w) ** 2).sum() * 0.1


@program(X, W, V, encoded=4)
def residual_connections(x, w, v):
    for weights in (w, v, w.T):
        x = x + jnp.tanh(x @ weights)
    return (x**2).sum()


@program(X, W, encoded=2)
def elementwise_diamond(x, w):
    h = x @ w
    return jnp.sin((jnp.sin(h) * jnp.cos(h) + h * jnp.exp(-(h**2))) @ w).sum()


@program(normal(4, 12), normal(5, 4, 6, seed=2), W, normal(6, 12), encoded=2)
def recurrent_network(h, xs, u, w):
    def step(h, x):
        h = jnp.tanh(h @ u + x @ w)
        return h, h.sum() * 0.1

    h, ys = lax.scan(step, h, xs)
    return (h**2).sum() + ys.sum()


@program(X, W, V, encoded=2)
def conditional(x, w, v):
    h = jnp.tanh(x @ w)
    cases = [lambda h: jnp.sin(h @ v) @ w, lambda h: (h @ w) ** 2]
    return sum(lax.switch(i, cases, h * (i + 1)).sum() for i in range(2))


@program(X, W, normal(3, 1, 12, seed=2), encoded=1)
def broadcast_carriers(x, w, c):
    """What is stored is the array before it was broadcast."""
    s = jnp.tanh(x @ w)
    return jnp.sin((s[None] * jnp.broadcast_to(c, (3, 6, 12))) @ w).sum()


@program(normal(3, 4, 12), normal(3, 12, 12, scale=0.3), normal(3, 12, 5), encoded=2)
def batched_contractions(x, w, v):
    return jnp.sin(jnp.einsum("bij,bjk->ibk", jnp.tanh(jnp.einsum("bij,bjk->bik", x, w)), v)).sum()


@program(normal(2, 3, 16), normal(4, 3, 3, seed=1, scale=0.5), normal(3, 4, 3, seed=2, scale=0.5), encoded=2)
def convolutional_network(x, first, second):
    h = jnp.tanh(lax.conv_general_dilated(x, first, (2,), "SAME"))
    return jnp.sin(lax.conv_general_dilated(h, second, (1,), "SAME")).sum()


@program(X, W, normal(12, 3, seed=2), encoded=1)
def triangular_system(x, w, b):
    h = jnp.tanh(x @ w)
    factor = jnp.eye(12) + jnp.tril(h.T @ h) * 0.3
    return jax.scipy.linalg.solve_triangular(factor, b, lower=True).sum()


@program(normal(4, 12), jnp.ones((5, 1)) * normal(1, 12, seed=3), W, encoded=1)
def product_over_time(c, xs, w):
    """All steps have the same coefficients, so that a draw shared by two of them shows."""
    return (lax.scan(lambda c, y: (c * y, None), c, jnp.tanh(xs @ w))[0] ** 2).sum()


def gradients(f, args, codec, draws=DRAWS, start=0):
    """(draws, parameters): flat gradients with respect to all arguments, one path key each."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(5), start), draws)
    gradient = jax.grad(rad(f, codec=codec), positions(args, 1))
    return np.asarray(jax.jit(jax.vmap(lambda key: ravel_pytree(gradient(key, *args))[0]))(keys))


def exact_gradient(f, args):
    return np.asarray(ravel_pytree(jax.jit(jax.grad(f, positions(args)))(*args))[0])


def assert_encoded(f, args, codec, at_least):
    table = explain(rad(f, codec=codec), jax.random.key(0), *args, argnums=positions(args))
    rows = [r for r in table.rows if r.decision == str(codec) and r.relative_variance > 0]
    assert len(rows) >= at_least, f"only {len(rows)} residuals are encoded, so there is nothing to test:\n{table}"


def worst_z(name, codec):
    """Largest |z| over the entries of the gradient, in units of the bound: above 1 is biased."""
    f, args, _ = PROGRAMS[name]
    z = z_scores(gradients(f, args, codec), exact_gradient(f, args))
    return np.abs(z).max() / bound(z.size)


def check(name, codec):
    f, args, encoded = PROGRAMS[name]
    assert_encoded(f, args, codec, encoded)
    draws = gradients(f, args, codec)
    assert draws.std(0).max() > 1e-4 * np.abs(draws).max(), "the gradient does not vary: nothing was encoded"
    assert_unbiased(draws, exact_gradient(f, args), f"gradient of {name} with {codec}")


@pytest.mark.parametrize("name", few(PROGRAMS, "gelu_network", "parallel_readers", "triangular_system", slow=3))
def test_unbiased(name):
    """Each program under one rounding and one linear codec, in turn."""
    number = list(PROGRAMS).index(name)
    check(name, ROUNDING[1 + number % 3])
    check(name, SAMPLING[(number + 1) % len(SAMPLING)])


@pytest.mark.parametrize("codec", few(CODECS, *CODECS[::2], slow=4), ids=str)
def test_every_codec_is_unbiased(codec):
    check("gelu_network", codec)


# Two readers need two codes, which together are larger than the array itself: it is kept.
KEPT = [("two_readers_on_one_path", codec) for codec in (StochasticRound(8), SampleAxis(0.15, centred=True))]


PAIRS = [(n, c) for n in PROGRAMS for c in CODECS if (n, c) not in KEPT]


@pytest.mark.parametrize("pair", few(PAIRS, slow=8), ids=str)
def test_every_program_with_every_codec_is_unbiased(pair):
    check(*pair)


# Planted biases


@dataclasses.dataclass(frozen=True)
class RoundToNearest(Codec):
    """Multiples of a quarter: smaller error than any unbiased code of that size, and the wrong mean."""

    def encode(self, seed, x):
        return (jnp.round(x * 4).astype(jnp.int8),)

    def decode(self, seed, code, like):
        return code[0].astype(like.dtype) / 4

    def stored_bytes(self, shape, dtype):
        return int(np.prod(shape))

    def relative_variance(self, shape):
        return 0.01

    def __str__(self):
        return "nearest"


def test_rounding_to_nearest_is_caught():
    assert worst_z("gelu_network", RoundToNearest()) > 1


def one_group_for_all_readers(graph, linear):
    return {value: (frozenset(edges),) for value, edges in linear.items()}


@pytest.mark.parametrize(
    "name", few(["two_readers_on_one_path", "stacked_contractions"], "two_readers_on_one_path", slow=0)
)
def test_one_draw_for_two_readers_on_a_path_is_caught(name, monkeypatch):
    assert worst_z(name, StochasticRound(1)) < 1
    monkeypatch.setattr(readers, "disjoint_groups", one_group_for_all_readers)
    assert worst_z(name, StochasticRound(1)) > 1


def test_an_estimate_that_is_not_read_linearly_is_caught(monkeypatch):
    f, args, _ = PROGRAMS["triangular_system"]
    table = explain(rad(f, codec=StochasticRound(2)), jax.random.key(0), *args, argnums=positions(args))
    readers = [r for r in table.rows if r.operation == "triangular_solve"]
    assert readers and all(r.decision in ("keep", "recompute") for r in readers)
    monkeypatch.setitem(primitives._REGISTRY, "triangular_solve", primitives.Traits(bilinear=True))
    assert worst_z("triangular_system", StochasticRound(2)) > 1


def test_the_same_draw_in_every_iteration_is_caught(monkeypatch):
    def without_the_index(seed, *numbers):
        return fold(seed, *[n for n in numbers if isinstance(n, int)])

    monkeypatch.setattr(control, "fold", without_the_index)
    assert worst_z("product_over_time", StochasticRound(1)) > 1


# Rounding an estimate would bias it


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_estimates_are_not_rounded_to_half_precision(dtype):
    """The half-precision copy of a value has a code of its own: an estimate of the value, rounded, has another mean."""

    def f(x, w, v):
        h = jnp.tanh(x @ w)
        return lax.dot(h.astype(dtype), v, preferred_element_type=jnp.float32).sum()

    args = (X, W, V)
    assert_encoded(f, args, StochasticRound(8), 2)
    exact = gradients(f, args, Keep(), draws=1)[0]  # compiled like the others: XLA may skip the rounding of values
    assert_unbiased(gradients(f, args, StochasticRound(8)), exact, f"gradient through {jnp.dtype(dtype).name}")


# Path keys


def test_value_does_not_depend_on_the_path_key():
    f, args, _ = PROGRAMS["gelu_network"]
    g = jax.jit(jax.vmap(lambda key: jax.value_and_grad(rad(f, codec=StochasticRound(1)), 1)(key, *args)))
    values, draws = g(jax.random.split(jax.random.key(0), 8))
    assert len(np.unique(np.asarray(values))) == 1
    np.testing.assert_allclose(values[0], f(*args), rtol=1e-6)
    assert len(np.unique(np.asarray(draws).reshape(8, -1), axis=0)) == 8


def test_same_key_same_gradient():
    f, args, _ = PROGRAMS["recurrent_network"]
    g = jax.jit(jax.grad(rad(f, codec=StochasticRound(2)), 3))
    for key in (jax.random.key(1), jax.random.PRNGKey(2)):
        np.testing.assert_array_equal(g(key, *args), g(key, *args))
    np.testing.assert_array_equal(g(jax.random.key(1), *args), g(jax.random.PRNGKey(1), *args))
    assert (g(jax.random.key(1), *args) != g(jax.random.key(2), *args)).any()


@pytest.mark.parametrize("codec", [StochasticRound(2), SampleAxis(0.3)], ids=str)
def test_particles_have_noise_of_their_own(codec):
    """Two particles side by side in one program, with the same parameters and the same data."""
    x, w = X, W
    both = jnp.stack([w, w])

    def f(w):
        return jax.vmap(lambda w: jnp.sin(jnp.tanh(x @ w) @ w).sum())(w).sum()

    assert_encoded(f, (both,), codec, 2)
    draws = gradients(f, (both,), codec).reshape(DRAWS, 2, -1)
    assert_unbiased(draws[:, 0], exact_gradient(f, (both,)).reshape(2, -1)[0])
    assert_uncorrelated(draws[:, 0], draws[:, 1], "particles")


def test_error_of_the_mean_falls_with_the_root_of_the_number_of_particles():
    f, args, _ = PROGRAMS["gelu_network"]
    exact = exact_gradient(f, args)
    draws = gradients(f, args, StochasticRound(1))

    def error(particles):
        return ((draws.reshape(-1, particles, draws.shape[1]).mean(1) - exact) ** 2).sum(1).mean()

    for particles in (4, 64):  # 1024 and 64 means of a sum of about 400 squares
        assert error(particles) * particles == pytest.approx(error(1), rel=0.15)
