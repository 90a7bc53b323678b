"""One case per primitive, and a test that fails for a primitive without one.

A case is a small function of arrays in which the primitive occurs. ``loss_of`` stands it between two nonlinear layers,

    loss(w, v) = sum(sin(case(tanh(x @ w)) @ v)),

so that the primitive's operands and results are both functions of parameters that are neither alive nor cheap to make
again: whatever the primitive's derivative reads has to be recomputed, kept or encoded, and a mistake in any of the
three shows in the gradient. ``test_exact`` compares value and ``Keep()`` gradient with JAX; ``test_unbiased`` the mean
of 2-bit gradients. Which primitives a case covers is read off its traced programs, never off its label.
"""

import dataclasses
import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import sparse
from jax.extend import core as jex_core
from jax.extend import random as jex_random
from jax.flatten_util import ravel_pytree
from jax.interpreters import ad, batching, mlir
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from programs import few, numbers
from zscores import assert_unbiased

from numpyro_rad import RAD_ELBO, Keep, StochasticRound, explain, rad
from numpyro_rad.ad import primitives

KEY = jax.random.key(7)  # the path key

pytestmark = pytest.mark.usefixtures("double", "ordered")
CODEC = StochasticRound(2)
DRAWS = 1024
REFERENCES = tuple(map(int, jax.__version__.split(".")[:2])) >= (0, 11)  # whether mutable arrays are differentiated


# Cases: label -> (function, inputs). A label is the primitive's name, then perhaps a colon and what is special.


@dataclasses.dataclass(frozen=True)
class Input:
    """An operand ``tanh(x @ w)``, moved into an interval and converted; complex ones have two such parts."""

    shape: tuple[int, ...]
    low: float = -0.9
    high: float = 0.9
    dtype: str = "float64"

    def of(self, moving):
        h = (self.low + self.high) / 2 + (self.high - self.low) / 2 * jnp.tanh(moving).reshape(self.shape)
        if self.dtype == "bool":
            return h > 0
        if self.dtype.startswith("int"):
            return jnp.round(5 * h).astype(self.dtype)
        if self.dtype.startswith("complex"):
            return lax.complex(h, jnp.cos(2 * h)).astype(self.dtype)
        return h.astype(self.dtype)


MATRIX = Input((4, 6))
UNIT = Input((4, 6), 0.1, 0.9)
POSITIVE = Input((4, 6), 0.5, 2.5)
LARGE = Input((4, 6), 1.5, 3.0)
INTEGER = Input((4, 6), dtype="int32")
BOOLEAN = Input((4, 6), dtype="bool")
COMPLEX = Input((4, 6), dtype="complex128")
SQUARE = Input((4, 4))
VECTOR = Input((6,))
DTYPES = ("float32", "bfloat16", "float16", "complex64", "complex128")

CASES = {}


def case(label, f, *inputs):
    assert label not in CASES, label
    CASES[label] = (f, inputs or (MATRIX,))


def family(names, *inputs):
    """Functions of ``jax.lax`` by name, those that this JAX has."""
    for name in names.split():
        if hasattr(lax, name):
            case(name, getattr(lax, name), *inputs)


def in_dtypes(label, f, *inputs, dtypes=DTYPES):
    for dtype in dtypes:
        case(f"{label}: {dtype}", f, *(dataclasses.replace(i, dtype=dtype) for i in inputs))


# Elementwise

family(
    "abs acos asin asinh atan atanh bessel_i0e bessel_i1e cbrt ceil cos cosh erf erf_inv erfc exp exp2 expm1", MATRIX
)
family("floor logistic neg one_minus_square round sign sin sinh square stop_gradient tan tanh", MATRIX)
family("digamma lgamma log log1p log2 rsqrt sqrt", POSITIVE)
family("acosh", LARGE)
family("add atan2 max min mul sub", MATRIX, MATRIX)
for compare in (lax.eq, lax.ge, lax.gt, lax.le, lax.lt, lax.ne):
    case(compare.__name__, lambda x, n, m, f=compare: x * f(n * 0.5, m * 0.5), MATRIX, INTEGER, INTEGER)
family("div rem", MATRIX, LARGE)
family("pow", POSITIVE, MATRIX)
family("igamma igammac", POSITIVE, POSITIVE)
family("population_count", INTEGER)
family("mulhi", INTEGER, INTEGER)
family("imag real conj", COMPLEX)
family("complex", MATRIX, MATRIX)

if lax.nextafter_p in ad.primitive_jvps:
    case("nextafter", lax.nextafter, MATRIX, MATRIX)
else:
    case("nextafter", lambda x, y: x * lax.nextafter(*map(lax.stop_gradient, (x, y))), MATRIX, MATRIX)
case("is_finite", lambda x: x * lax.is_finite(1 / jnp.round(x)))
in_dtypes("sin", lax.sin, MATRIX)
in_dtypes("mul", lax.mul, MATRIX, MATRIX)
in_dtypes("div", lax.div, MATRIX, LARGE)
in_dtypes("abs", lax.abs, MATRIX, dtypes=["complex64", "int32"])
in_dtypes("exp", lambda z: lax.exp(z) * z, MATRIX)
in_dtypes("logistic", lax.logistic, MATRIX, dtypes=["bfloat16", "float16"])
in_dtypes("add", lambda x: x + 1.5, MATRIX, dtypes=["bfloat16", "complex64"])  # a weak type meets a strong one
in_dtypes("pow", lambda x: x**2.5 + x ** jnp.int32(2), POSITIVE, dtypes=["float32", "complex64"])
in_dtypes("sign", lambda x: lax.sign(x), MATRIX, dtypes=["int32"])
in_dtypes("mul", lambda n, x: n * n + n, MATRIX, MATRIX, dtypes=["int32"])
case("mul: of integers and reals", lambda n, x: n * x, INTEGER, MATRIX)
case("mul: of booleans and reals", lambda b, x: b * x, BOOLEAN, MATRIX)
case("mul: by a number of Python", lambda x: 2 * x * 3.0, MATRIX)
case("mul: broadcast", lambda x, y: x * y[:, :1] + x * y[0], MATRIX, MATRIX)
case("mul: of one with itself", lambda x: x * x * x)
case("add_any", lambda x: lax.sin(x) * lax.exp(x))
case("and", lambda a, b: a & b, BOOLEAN, BOOLEAN)
case("or", lambda a, b: a | b, BOOLEAN, BOOLEAN)
case("xor", lambda a, b: (a ^ b) & 6, INTEGER, INTEGER)
case("not", lambda a: ~a, BOOLEAN)
case("shift_left", lambda n: lax.shift_left(n, jnp.int32(2)), INTEGER)
case("shift_right_arithmetic", lambda n: lax.shift_right_arithmetic(n, jnp.int32(1)), INTEGER)
case("shift_right_logical", lambda n: lax.shift_right_logical(n, jnp.int32(28)), INTEGER)
case("eq_to", lambda x, n, m: x * lax.eq_to_p.bind(n * 0.5, m * 0.5), MATRIX, INTEGER, INTEGER)
case("le_to", lambda x, n, m: x * lax.le_to_p.bind(n * 0.5, m * 0.5), MATRIX, INTEGER, INTEGER)
case("lt_to", lambda x, n, m: x * lax.lt_to_p.bind(n * 0.5, m * 0.5), MATRIX, INTEGER, INTEGER)
case("clamp", lambda x, y: lax.clamp(-0.3 + 0.1 * y, x, 0.5 + 0.1 * y), MATRIX, MATRIX)
case("clamp: scalar bounds", lambda x: lax.clamp(jnp.float64(-0.3), x, jnp.float64(0.5)))
case("select_n", lambda x, y: lax.select(x > y, x, lax.sin(y)), MATRIX, MATRIX)
case("select_n: of three", lambda n, x: lax.select_n(jnp.clip(n, 0, 2), x, lax.sin(x), x), INTEGER, MATRIX)
case("select_n: by one predicate", lambda x: lax.select(x[0, 0] > 0, x, -x))
case("select_n: safe root", lambda x: jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0))
case("integer_pow", lambda x: lax.integer_pow(x, 3) + lax.integer_pow(x, -2), POSITIVE)
case("reduce_precision", lambda x: lax.reduce_precision(x, 8, 7))
case("convert_element_type", lambda x: lax.sin(x.astype(jnp.float32)).astype(jnp.float64) * x)
case("convert_element_type: to half", lambda x: lax.sin(x.astype(jnp.bfloat16)).astype(jnp.float16))
case("convert_element_type: to complex", lambda x: x.astype(jnp.complex64) * 1j)
case("convert_element_type: to integers", lambda x: (3 * x).astype(jnp.int8) * x)
case("bitcast_convert_type", lambda x: lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32) >> 16)
case("polygamma", lambda x: lax.polygamma(jnp.full((4, 6), 2.0), x), POSITIVE)
case("zeta", lambda x: x * lax.zeta(jnp.full((4, 6), 2.5), lax.stop_gradient(x)), POSITIVE)
case("regularized_incomplete_beta", lambda x: lax.betainc(jnp.full((4, 6), 1.5), jnp.full((4, 6), 0.7), x), UNIT)
case("random_gamma", lambda a: jax.random.gamma(jax.random.key(1), a), POSITIVE)
case("random_gamma: log", lambda a: jax.random.loggamma(jax.random.key(1), a), POSITIVE)
if hasattr(lax, "polynomial"):
    case("polynomial", lambda x, c: lax.polynomial(x, [c, 2 * x, 0.5]), MATRIX, MATRIX)

# Rearrangements

case("reshape", lambda x: x.reshape(3, 8))
case("reshape: with dimensions", lambda x: lax.reshape(x, (8, 3), (1, 0)))
case("transpose", lambda x: x.T)
case("broadcast_in_dim", lambda x: lax.broadcast_in_dim(x, (4, 2, 6), (0, 2)))
case("broadcast_in_dim: of size one", lambda x: lax.expand_dims(x, (1,)))
case("squeeze", lambda x: lax.squeeze(x, (1,)), Input((4, 1, 6)))
case("rev", lambda x: lax.rev(x, (0, 1)))
case("copy", lambda x: jnp.copy(x))
case("concatenate", lambda x, y: lax.concatenate([x, y, x], 0), MATRIX, Input((2, 6)))
case("slice", lambda x: lax.slice(x, (1, 0), (4, 6), (2, 3)))
case("split", lambda x: [lax.sin(p) for p in lax.split(x, (2, 4), 1)])
case("pad", lambda x, y: lax.pad(x, y[0], ((1, 2, 1), (-1, 0, 0))), MATRIX, VECTOR)
case("iota", lambda x: x * lax.iota(jnp.float64, 6) + lax.broadcasted_iota(jnp.int32, (4, 6), 1))
case("dynamic_slice", lambda x, n: lax.dynamic_slice(x, (n[0, 0], n[0, 1]), (2, 3)), MATRIX, INTEGER)
case(
    "dynamic_update_slice",
    lambda x, y, n: lax.dynamic_update_slice(x, lax.sin(y), (n[0, 0], n[0, 1])),
    MATRIX,
    Input((2, 3)),
    INTEGER,
)
case("empty", lambda x: lax.dynamic_update_slice(lax.empty((4, 6), x.dtype), x, (0, 0)))
if hasattr(lax, "tile"):
    case("tile", lambda x: lax.tile(x, (2, 1)))
    case("stack", lambda x, y: lax.stack([x, y, x], 1), MATRIX, MATRIX)
    case("unstack", lambda x: [lax.sin(row) for row in lax.unstack(x, 0)])

ROWS = np.array([3, 0, 0, 2])
case("gather", lambda x: x[ROWS])
case("gather: out of bounds", lambda x: x.at[ROWS + 2].get(mode="fill", fill_value=0.5))
case("gather: clipped", lambda x, n: x.at[n[0], n[1]].get(mode="clip"), MATRIX, INTEGER)
case("gather: along an axis", lambda x: jnp.take_along_axis(x, jnp.argsort(x, axis=1)[:, :3], 1))
case("gather: diagonal", lambda x: jnp.diagonal(x), SQUARE)
case("scatter", lambda x, y: x.at[np.array([0, 2])].set(y), MATRIX, Input((2, 6)))
case("scatter: unique", lambda x, y: x.at[np.array([0, 2])].set(y, unique_indices=True), MATRIX, Input((2, 6)))
case("scatter-add", lambda x, y: x.at[ROWS].add(lax.sin(y)), MATRIX, MATRIX)
case("scatter-add: dropped", lambda x, y: x.at[ROWS + 1].add(y, mode="drop"), MATRIX, MATRIX)
case("scatter-sub", lambda x, y: x.at[ROWS].subtract(y), MATRIX, MATRIX)
case("scatter-mul", lambda x, y: x.at[np.array([1, 3])].multiply(y, unique_indices=True), MATRIX, Input((2, 6)))
case("scatter-min", lambda x, y: x.at[np.array([1, 3])].min(y), MATRIX, Input((2, 6)))
case("scatter-max", lambda x, y: x.at[np.array([1, 3])].max(y), MATRIX, Input((2, 6)))

# Reductions, cumulative operations, sorting, windows

case("reduce_sum", lambda x: jnp.sum(x, 1))
case("reduce_max", lambda x: jnp.max(x, 1))
case("reduce_min", lambda x: jnp.min(x, 1))
case("reduce_prod", lambda x: jnp.prod(x, 1), POSITIVE)
case("reduce_and", lambda b, x: x * jnp.all(b, 0), Input((2, 6), dtype="bool"), MATRIX)
case("reduce_or", lambda b, x: x * jnp.any(b, 0), Input((2, 6), dtype="bool"), MATRIX)
case("reduce_xor", lambda n: lax.reduce_xor(n, (1,)), INTEGER)
case("reduce", lambda x: lax.reduce(x, 0.0, lambda a, b: a + b + a * b, (1,)))
case("argmax", lambda x: x * jnp.argmax(x, 1)[:, None])
case("argmin", lambda x: x * jnp.argmin(x, 0))
case("cumsum", lambda x: lax.cumsum(x, 1))
case("cumprod", lambda x: lax.cumprod(x, 1), POSITIVE)
case("cummax", lambda x: lax.cummax(x, 1))
case("cummin", lambda x: lax.cummin(x, 1, reverse=True))
case("cumlogsumexp", lambda x: lax.cumlogsumexp(x, 1))
in_dtypes("reduce_sum", lambda x: jnp.sum(x, 1), MATRIX)
in_dtypes("cumsum", lambda x: lax.cumsum(x, 1), MATRIX, dtypes=["bfloat16", "complex64", "int32"])
case("sort", lambda x: lax.sort(x, dimension=1))
case("sort: by two keys", lambda n, x: lax.sort((n, x, lax.sin(x)), dimension=1, num_keys=2), INTEGER, MATRIX)
case("top_k", lambda x: lax.top_k(x, 3))
case("approx_top_k", lambda x: lax.approx_max_k(x, 3))

IMAGE = Input((2, 4, 6, 3))  # batch, height, width, channels
WINDOW, STRIDES = (1, 2, 3, 1), (1, 2, 1, 1)
case("reduce_window_sum", lambda x: lax.reduce_window(x, 0.0, lax.add, WINDOW, STRIDES, "SAME"), IMAGE)
case("reduce_window_max", lambda x: lax.reduce_window(x, -jnp.inf, lax.max, WINDOW, STRIDES, "VALID"), IMAGE)
case("reduce_window_min", lambda x: lax.reduce_window(x, jnp.inf, lax.min, WINDOW, STRIDES, "VALID"), IMAGE)
case(
    "reduce_window",
    lambda x: x[1:, 1:] * lax.reduce_window(lax.stop_gradient(x), 1.0, lax.mul, (2, 2), (1, 1), "VALID"),
)
case("select_and_gather_add", lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (2, 2), (2, 2), "SAME"))
case("select_and_scatter_add", lambda x: lax.reduce_window(x, jnp.inf, lax.min, (2, 2), (2, 3), "SAME"))

# Contractions and convolutions


def contract(contracting, batch=((), ()), **options):
    return lambda a, b: lax.dot_general(a, b, (contracting, batch), **options)


in_dtypes("dot_general", lax.dot, MATRIX, Input((6, 3)), dtypes=["float64", *DTYPES])
case("dot_general: batch", contract(((2,), (1,)), ((0,), (0,))), Input((3, 2, 4)), Input((3, 4, 5)))
case("dot_general: late batch", contract(((0,), (1,)), ((2,), (0,))), Input((2, 4, 3)), Input((3, 2, 5)))
case("dot_general: two contracted", contract(((0, 2), (2, 1))), Input((2, 4, 3)), Input((5, 3, 2)))
case("dot_general: outer", contract(((), ())), VECTOR, Input((4,)))
case("dot_general: inner", contract(((0,), (0,))), VECTOR, VECTOR)
case("dot_general: of one with itself", lambda x: x @ x.T @ x)
case("dot_general: integers", lambda n, x: n @ x, INTEGER, Input((6, 3)))
case("dot_general: highest", contract(((1,), (0,)), precision=lax.Precision.HIGHEST), MATRIX, Input((6, 3)))
case("dot_general: matrix and vector", lambda x, y: [x @ y, y @ x.T], MATRIX, VECTOR)
in_dtypes(
    "dot_general: summed in single",
    contract(((1,), (0,)), preferred_element_type=jnp.float32),
    MATRIX,
    Input((6, 3)),
    dtypes=["bfloat16", "float16"],
)
case("dot_general: einsum", lambda a, b: jnp.einsum("ijk,kl,jm->mil", a, b, b), Input((2, 6, 6)), Input((6, 6)))
SIZES = np.array([1, 0, 3], np.int32)
case("ragged_dot_general", lambda a, b: lax.ragged_dot(a, b, SIZES), MATRIX, Input((3, 6, 5)))

POSITIONS = np.array([[0, 1], [1, 3], [2, 2], [2, 0], [4, 3], [0, 3]])
case("bcoo_dot_general", lambda d, b: sparse.BCOO((d, POSITIONS), shape=(5, 4)) @ b, VECTOR, MATRIX)

SIGNAL, KERNEL = Input((2, 4, 8)), Input((6, 4, 3))  # batch, channels, space and out, in, space


def convolve(strides=(1,), padding="SAME", **options):
    return lambda x, k: lax.conv_general_dilated(x, k, strides, padding, **options)


in_dtypes("conv_general_dilated", convolve(), SIGNAL, KERNEL, dtypes=["float64", "float32", "bfloat16", "complex64"])
case("conv_general_dilated: strides", convolve((2,), [(1, 2)]), SIGNAL, KERNEL)
case("conv_general_dilated: negative padding", convolve((1,), [(-1, 2)]), SIGNAL, KERNEL)
case("conv_general_dilated: kernel dilation", convolve(rhs_dilation=(2,)), SIGNAL, KERNEL)
case("conv_general_dilated: input dilation", convolve(padding=[(2, 1)], lhs_dilation=(2,)), SIGNAL, KERNEL)
case("conv_general_dilated: feature groups", convolve(feature_group_count=2), SIGNAL, Input((6, 2, 3)))
case("conv_general_dilated: depthwise", convolve(feature_group_count=4), SIGNAL, Input((8, 1, 3)))
case("conv_general_dilated: batch groups", convolve(batch_group_count=2), SIGNAL, KERNEL)
case("conv_general_dilated: window reversal", convolve(dimension_numbers=None), SIGNAL, Input((4, 4, 1)))
case(
    "conv_general_dilated: channels last",
    convolve((1, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")),
    IMAGE,
    Input((2, 3, 3, 4)),
)
case(
    "conv_general_dilated: odd dimension numbers",
    convolve((1, 1), "SAME", dimension_numbers=("CWNH", "WOIH", "HNCW"), rhs_dilation=(1, 2)),
    Input((3, 6, 2, 4)),
    Input((3, 5, 3, 2)),
)
case(
    "conv_general_dilated: transposed",
    lambda x, k: lax.conv_transpose(x, k, (2, 2), "SAME"),
    IMAGE,
    Input((3, 3, 3, 2)),
)
case("conv_general_dilated: three dimensions", convolve((1, 1, 1)), Input((1, 2, 2, 3, 4)), Input((2, 2, 2, 2, 2)))

# Linear algebra and Fourier transforms


def positive_definite(x):
    return x @ x.T + 2 * jnp.eye(len(x))


def triangular_solve(**options):
    return lambda a, b: lax.linalg.triangular_solve(a + 2 * jnp.eye(4), b, lower=True, **options)


def custom_solve(a, b):
    a = positive_definite(a)
    return lax.custom_linear_solve(lambda x: a @ x, b, lambda _, y: jnp.linalg.inv(a) @ y, symmetric=True)


case("cholesky", lambda a: lax.linalg.cholesky(positive_definite(a)), SQUARE)
case(
    "cholesky: complex",
    lambda a: lax.linalg.cholesky(a @ a.conj().T + 3 * jnp.eye(4)),
    Input((4, 4), dtype="complex128"),
)
case("triangular_solve", triangular_solve(left_side=True), SQUARE, MATRIX)
case("triangular_solve: from the right", triangular_solve(transpose_a=True), SQUARE, Input((6, 4)))
case("triangular_solve: unit diagonal", triangular_solve(left_side=True, unit_diagonal=True), SQUARE, MATRIX)
case("eigh", lambda a: (lambda v, w: w @ jnp.diag(jnp.exp(v)) @ w.T)(*jnp.linalg.eigh(positive_definite(a))), SQUARE)
case("eig", lambda a: jnp.linalg.eigvals(a + jnp.diag(jnp.arange(4.0))), SQUARE)
case("svd", lambda a: jnp.linalg.svd(a, full_matrices=False)[0] ** 2, MATRIX)
case("svd: values", lambda a: jnp.linalg.svd(a, compute_uv=False), MATRIX)
case("qr", lambda a: jnp.linalg.qr(a + 2 * jnp.eye(4)), SQUARE)
case("lu", lambda a: lax.linalg.lu(a + 2 * jnp.eye(4))[0], SQUARE)
case("lu: determinant", lambda a: jnp.linalg.slogdet(a + 2 * jnp.eye(4)), SQUARE)
case("schur", lambda a: a * lax.linalg.schur(lax.stop_gradient(a))[0], SQUARE)
case("householder_product", lambda a: a * lax.linalg.householder_product(*map(lax.stop_gradient, (a, a[0]))), SQUARE)
case(
    "tridiagonal_solve",
    lambda d, b: lax.linalg.tridiagonal_solve(d[0], d[1] + 4, d[2], b),
    Input((3, 6)),
    Input((6, 2)),
)
case("custom_linear_solve", custom_solve, SQUARE, MATRIX)
case("custom_linear_solve: solve", lambda a, b: jnp.linalg.solve(a + 2 * jnp.eye(4), b), SQUARE, MATRIX)
case("fft", lambda z: jnp.fft.fft(z), COMPLEX)
case("fft: real", lambda x: jnp.abs(jnp.fft.rfft(x)) + jnp.fft.irfft(jnp.fft.rfft(x) * 1j, n=7)[:, :4])
case("fft: two dimensions", lambda z: jnp.fft.ifft2(z), Input((4, 6), dtype="complex64"))

# Random bits: keys of the old and of the new kind. The values are what differs, the gradient is that of their use

RAW = np.array([3, 5], np.uint32)
case("random_bits", lambda x: x * jax.random.uniform(jax.random.key(1), (4, 6)))
case("random_bits: raw key", lambda x: x + jax.random.normal(jnp.asarray(RAW), (4, 6)))
case("random_bits: rbg", lambda x: x * jax.random.bernoulli(jax.random.key(1, impl="rbg"), 0.5, (4, 6)))
case("random_bits: reparameterized", lambda x: jax.random.t(jax.random.key(1), 3 + x, (4, 6)))
case("random_split", lambda x: x * jax.random.uniform(jax.random.split(jax.random.key(1), 2)[1], (4, 6)))
case(
    "random_fold_in",
    lambda x, n: x * jax.random.uniform(jax.random.fold_in(jax.random.key(1), n[0, 0])),
    MATRIX,
    INTEGER,
)
case("random_seed", lambda x, n: x * jax.random.uniform(jax.random.key(n[0, 0])), MATRIX, INTEGER)
case("random_wrap", lambda x: x * jax.random.uniform(jax.random.wrap_key_data(jnp.asarray(RAW))))
case("random_unwrap", lambda x, n: x * (jax.random.key_data(jax.random.key(n[0, 0])) % 7)[1], MATRIX, INTEGER)
case(
    "threefry2x32",
    lambda x, n: x * (jex_random.threefry_2x32(RAW, n.astype("uint32").ravel()).reshape(4, 6) % 5),
    MATRIX,
    INTEGER,
)

# Calls, control flow, and what only leaves a mark in the program


@jax.custom_jvp
def tripled(x):
    return jnp.sin(x) * 2


tripled.defjvp(lambda p, t: (tripled(*p), 3 * jnp.cos(p[0]) * t[0]))


@jax.custom_vjp
def clipped(x, w):
    return jnp.sin(x) @ w


clipped.defvjp(lambda x, w: (clipped(x, w), (x, w)), lambda r, ct: (5 * ct @ r[1].T, jnp.tanh(r[0].T @ ct)))


def optimized(x):
    f = jax.custom_vjp(lambda x: jnp.sin(x) * 2)
    f.defvjp(lambda x: (jnp.sin(x) * 2, x), lambda x, ct: (3 * ct * jnp.cos(x),), optimize_remat=True)
    return f(x)


@jax.custom_batching.custom_vmap
def batched_by_hand(x):
    return jnp.sin(x) * x


batched_by_hand.def_vmap(lambda size, batched, x: (jnp.sin(x) * x, True))


def recurrence(h, xs):
    return lax.scan(lambda h, x: (jnp.tanh(h @ h.T @ h + x), h[0]), h, xs)


def reference(x):
    """Mutable arrays, made and read inside."""
    ref = jax.new_ref(jnp.zeros((4, 6)))
    ref[...] = jnp.sin(x)
    ref[0] = x[1] * ref[2]
    return ref[...]


def frozen(x):
    ref = jax.new_ref(jnp.sin(x))
    jax.ref.addupdate(ref, (0,), x[1])
    return jax.freeze(ref)


def branches(n, x):
    return lax.switch(n[0, 0] + 1, [jnp.sin, lambda x: x @ x.T @ x, lambda x: x], x)


def on_one_device():
    mesh = jax.make_mesh((1,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def called(x):
    """A call that JAX's own passes make."""
    primitive = jex_core.primitives.closed_call_p
    return primitive.bind(x, call_jaxpr=jax.make_jaxpr(lambda x: [jnp.sin(x) * x])(np.zeros((4, 6))))


case("jit", lambda x: jax.jit(lambda x: jax.jit(jnp.sin)(x) * x)(x))
if jex_core.primitives.closed_call_p.name == "eval_jaxpr":
    case("eval_jaxpr", called)
case("custom_jvp_call", tripled)
case("custom_vjp_call", clipped, MATRIX, Input((6, 3)))
case("custom_vmap_call", lambda x: x * batched_by_hand(lax.stop_gradient(x)))
case("remat2", jax.checkpoint(lambda x: jnp.sin(x @ x.T) @ x))
case("remat_opt", optimized)
case("scan", recurrence, SQUARE, Input((3, 4, 4)))
case(
    "scan: reversed",
    lambda h, xs: lax.scan(lambda h, x: (jnp.sin(h * x), h), h, xs, reverse=True),
    SQUARE,
    Input((3, 4, 4)),
)
case("cond", branches, INTEGER, MATRIX)
case("while", lambda n, x: x * lax.while_loop(lambda k: k < 3, lambda k: k + 2, n), Input((), dtype="int32"), MATRIX)
case("scan: of static length", lambda x: lax.fori_loop(0, 3, lambda i, h: jnp.sin(h) + i * x, x))
case(
    "linear_call",
    lambda x: jax.custom_derivatives.linear_call(lambda s, t: s * t, lambda s, t: s * t, np.arange(6.0), x),
)
case("composite", lambda x: x * lax.composite(lambda x: jnp.sin(x) * x, "rad.test")(lax.stop_gradient(x)))
case("name", lambda x: checkpoint_name(jnp.sin(x), "here") * x)
case("optimization_barrier", lambda x: (lambda a, b: a * b)(*lax.optimization_barrier((jnp.sin(x), x))))
if REFERENCES:
    case("new_ref", reference)
    case("freeze", frozen)
case(
    "pure_callback",
    lambda x: x * jax.pure_callback(np.sin, jax.ShapeDtypeStruct((4, 6), x.dtype), lax.stop_gradient(x)),
)
case("debug_callback", lambda x: (jax.debug.callback(lambda: None), x)[1])
case("debug_print", lambda x: (jax.debug.print("{:.0f}", x[0, 0]), x)[1])
case("device_put", lambda x: jax.device_put(jnp.sin(x), jax.devices()[0]) * x)
case("sharding_constraint", lambda x: lax.with_sharding_constraint(jnp.sin(x), on_one_device()) * x)
case("dce_sink", lambda x: (lax.dce_sink(x), x)[1])

# Composites


def attention(**options):
    return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, **options)


def normalized(x, axis):
    return (x - x.mean(axis, keepdims=True)) * lax.rsqrt(x.var(axis, keepdims=True) + 1e-3)


HEADS = Input((2, 4, 2, 3))  # batch, time, heads, features
case("model: attention", attention(), HEADS, HEADS, HEADS)
case("model: causal attention", attention(is_causal=True, scale=0.7), HEADS, HEADS, HEADS)
case("model: layer norm", lambda x, s: normalized(x, 1) * (1 + s), MATRIX, VECTOR)
case("model: batch norm", lambda x, s: normalized(x, (0, 1, 2)) * s + s, IMAGE, Input((3,)))
case("model: embedding", lambda t, n: t[jnp.abs(n)] * jnp.sqrt(6.0), Input((8, 6)), INTEGER)
case("model: logsumexp", lambda x: jax.nn.logsumexp(x, 1))
case("model: softmax", lambda x: jax.nn.softmax(x) * jax.nn.log_softmax(x, 0))
case("model: average pooling", lambda x: lax.reduce_window(x, 0.0, lax.add, WINDOW, STRIDES, "VALID") / 6, IMAGE)
case("model: gelu", lambda x, w: jax.nn.gelu(x @ w) @ w.T, MATRIX, Input((6, 6)))
case("model: glu", lambda x: jax.nn.glu(jax.nn.silu(x)))
case(
    "model: cross entropy", lambda x, n: jnp.take_along_axis(jax.nn.log_softmax(x), jnp.abs(n) % 6, 1), MATRIX, INTEGER
)

# Primitives without a case. Names that an installed JAX does not have are nobody's business.

EXCLUDED = {}


def excluded(reason, names):
    EXCLUDED.update(dict.fromkeys(names.split(), reason))


excluded(
    "collectives and sharding: several devices, shard_map or an explicit mesh",
    """all_gather all_gather_invariant all_gather_reduced all_to_all inspect_sharding pbroadcast pbroadcast_dynamic
    ppermute preduced psum psum_invariant pvary ragged_all_to_all reduce_scatter reduced_vary_cast reduced_vary_cast_p
    unreduced_psum unreduced_reduce_scatter vary_unreduced_cast vary_unreduced_cast_p""",
)
if not REFERENCES:
    excluded("mutable arrays, refused with JAX 0.10", "new_ref freeze get swap addupdate")
excluded("layouts and memory spaces", "layout_constraint relayout with_memory_space_constraint")
excluded("made by JAX's own passes only", "closed_call stage")
if "eval_jaxpr" not in CASES:
    excluded("made by JAX's own passes only", "eval_jaxpr")
excluded(
    "experimental sparse arrays (imported by NumPyro), one of which has a case, and checkify",
    """bcoo_extract bcoo_fromdense bcoo_sort_indices bcoo_spdot_general bcoo_sum_duplicates
    bcoo_todense bcoo_transpose bcsr_dot_general bcsr_extract bcsr_fromdense bcsr_todense check coo_fromdense coo_matmat
    coo_matvec coo_todense csr_fromdense csr_matmat csr_matvec csr_todense spsolve todense""",
)
excluded("foreign code, which JAX refuses to differentiate", "ffi_call io_callback")
excluded("mutable arrays that JAX's own passes make", "accum_grad_in_ref empty_ref free_ref run_state")
excluded("no public function: experimental types", "call_hi_primitive from_edtype to_edtype tie")
excluded("experimental logs and boxes", "box_get box_set log_extend log_read new_box new_log")


# Programs


def weights_of(label):
    """Parameters of the layer in front of the case and of the layer behind it."""
    f, inputs = CASES[label]
    first = [numbers(3, max(1, int(np.prod(i.shape[1:]))), seed=n + 1) * 0.6 for n, i in enumerate(inputs)]
    widths = jax.eval_shape(lambda: [_matrix(y) for y in jax.tree.leaves(_run(f, inputs, first))])
    second = [numbers(w.shape[1], 2, seed=n + 50) / np.sqrt(w.shape[1]) for n, w in enumerate(widths)]
    return first, second


def _run(f, inputs, weights):
    rows = [i.shape[0] if i.shape else 1 for i in inputs]
    return f(*(i.of(numbers(r, 3, seed=99) @ w) for i, r, w in zip(inputs, rows, weights, strict=True)))


def _matrix(y):
    """A result as a real matrix."""
    if jnp.iscomplexobj(y):
        y = jnp.stack([y.real, y.imag], -1)
    return jnp.atleast_1d(y).reshape(-1, y.shape[-1] if y.ndim else 1).astype(jnp.float64)


def loss_of(label):
    f, inputs = CASES[label]

    def loss(first, second):
        results = jax.tree.leaves(_run(f, inputs, first))
        return sum(jnp.sin(_matrix(y) @ v).sum() for y, v in zip(results, second, strict=True))

    return loss


def equations(jaxpr, flags):
    """Every equation of a jaxpr and of the jaxprs inside it, and whether it depends on a flagged input."""
    moving = {v for v, on in zip(jaxpr.invars, flags, strict=True) if on}
    for equation in jaxpr.eqns:
        operands = [not isinstance(v, jex_core.Literal) and v in moving for v in equation.invars]
        yield equation, any(operands)
        if any(operands):
            moving.update(equation.outvars)
        for inner in jex_core.jaxprs_in_params(equation.params):
            inner = getattr(inner, "jaxpr", inner)
            n = len(inner.invars)  # a conditional has its predicate in front; while loops mix what they like
            yield from equations(inner, operands[-n:] if n <= len(operands) else [any(operands)] * n)


@functools.cache
def programs_of(label):
    """Equations of the case's JVP, of the case itself and of its gradient, and which are about tangents."""
    loss, weights = loss_of(label), weights_of(label)
    leaves = len(jax.tree.leaves(weights))
    both = jax.make_jaxpr(lambda w, t: jax.jvp(loss, w, t))(weights, weights).jaxpr
    found = list(equations(both, [False] * leaves + [True] * leaves))
    for f in (loss, jax.grad(loss, (0, 1))):
        found += equations(jax.make_jaxpr(f)(*weights).jaxpr, [False] * leaves)
    return found


@functools.cache
def primitives_of(label, tangent=False):
    """Names of the primitives that occur in the programs of a case, or of those with a tangent operand."""
    return frozenset(e.primitive.name for e, moves in programs_of(label) if moves or not tangent)


def rounding_of(label):
    """How far two ways to compute a case may be apart: some units of its coarsest floating-point dtype."""
    dtypes = {getattr(v.aval, "dtype", None) for e, _ in programs_of(label) for v in e.outvars}
    eps = max(float(jnp.finfo(d).eps) for d in dtypes if d is not None and jnp.issubdtype(d, jnp.inexact))
    return (8 if eps > 1e-4 else 256) * eps


# Every primitive has a case

KNOWN_TO_JAX = {p.name for p in ad.primitive_jvps}  # before any test registers one of its own


def of_primal_programs():
    return primitives.names(lambda t: t.cheap or t.calls) | KNOWN_TO_JAX | of_tangent_programs()


def of_tangent_programs():
    linear = primitives.names(lambda t: t.bilinear or t.structural or t.passes_estimate or t.splits or t.coefficient)
    return linear - {"empty", "iota"}  # no operands


def without_a_case(names, tangent):
    installed = {o.name for o in gc.get_objects() if isinstance(o, jex_core.Primitive)}
    covered = set().union(*(primitives_of(label, tangent) for label in CASES))
    return sorted((names & installed) - covered - EXCLUDED.keys())


@pytest.mark.slow
def test_every_primitive_has_a_case():
    missing = without_a_case(of_primal_programs(), tangent=False)
    assert not missing, f"add a case (or a line to EXCLUDED, with the reason) for {', '.join(missing)}"
    missing = without_a_case(of_tangent_programs(), tangent=True)
    assert not missing, f"add a case in which the derivative contains {', '.join(missing)}"


@pytest.mark.slow
@pytest.mark.parametrize("trait", ["cheap", "bilinear", "structural", "passes_estimate", "splits"])
def test_a_primitive_without_a_case_is_caught(trait, monkeypatch):
    new = jex_core.Primitive("without_a_case")
    for name in (new.name, "name_of_another_jax"):
        monkeypatch.setitem(primitives._REGISTRY, name, primitives.Traits(**{trait: True}))
    with pytest.raises(AssertionError, match=r"(for|contains) without_a_case\b"):
        test_every_primitive_has_a_case()


@pytest.mark.slow
def test_a_rule_for_tangents_is_not_covered_by_the_primal_program(monkeypatch):
    monkeypatch.setitem(primitives._REGISTRY, "erf", primitives.elementwise(structural=True))
    with pytest.raises(AssertionError, match=r"derivative contains erf\b"):
        test_every_primitive_has_a_case()


@pytest.mark.slow
def test_nothing_with_a_case_is_excluded():
    assert not EXCLUDED.keys() & set().union(*map(primitives_of, CASES))


# Values and gradients


def compiled(f):
    """What the compiler could polish is not what is looked at."""
    return jax.jit(f, compiler_options={"xla_llvm_disable_expensive_passes": True, "xla_backend_optimization_level": 0})


NAMED = {label.split(":")[0]: label for label in reversed(CASES)}  # the first case of each primitive
FIRST = sorted(NAMED.values())
# Rules hold for families of primitives, so that some of each stand for the rest.
USUAL = {*FIRST[::4], "cond", "custom_vjp_call", "mul", "scan", "scatter"}


def cases():
    """With old versions the first case of each primitive; with new ones some of them, and slowly all others but those
    that differ in their dtypes alone."""
    if OLD:
        return FIRST
    alike = {n for n in CASES if n not in FIRST and n.rpartition(": ")[2] in DTYPES}
    marks = {n: pytest.mark.exhaustive if n in alike else pytest.mark.slow for n in CASES if n not in USUAL}
    return [pytest.param(n, marks=marks.get(n, ())) for n in CASES]


OLD = jax.__version_info__ < (0, 11)


@pytest.mark.parametrize("label", cases())
def test_exact(label):
    name = label.split(":")[0]
    assert name == "model" or name in primitives_of(label), f"{name} does not occur in its case"
    loss, weights = loss_of(label), weights_of(label)
    keep = rad(loss, codec=Keep())

    @compiled
    def run(first, second):
        exact = jax.value_and_grad(loss, (0, 1))(first, second)
        got = jax.value_and_grad(keep, (1, 2))(KEY, first, second)
        return loss(first, second), keep(KEY, first, second), exact, got

    plain, value, exact, got = run(*weights)
    np.testing.assert_array_equal(value, plain)
    np.testing.assert_allclose(
        got[0], plain, rtol=1e-12, atol=rounding_of(label)
    )  # the forward sweep, fused its own way
    assert any(np.any(g != 0) for g in jax.tree.leaves(exact[1]))
    got, exact = jax.tree.leaves(got[1]), jax.tree.leaves(exact[1])
    assert [(g.shape, g.dtype) for g in got] == [(g.shape, g.dtype) for g in exact]
    a, b = (np.concatenate([g.ravel() for g in leaves]) for leaves in (got, exact))
    assert np.isfinite(b).all()
    np.testing.assert_allclose(a, b, rtol=0, atol=rounding_of(label) * np.abs(b).max())


REPRESENTATIVE = {NAMED[name] for name in of_tangent_programs() if name in NAMED} | {"mul: broadcast"}
NOT_VMAPPED = {"ragged_dot_general", "linear_call"}  # JAX vmaps the one over some operands only, the other not at all
# Nothing is encoded, so test_exact says it all: programs with mutable arrays run as a whole, and a determinant is one
# number.
NOT_ENCODED = {"new_ref", "freeze", "lu: determinant"}
LEAST_ENCODED = {"dot_general": 2, "conv_general_dilated": 1, "elementwise": 2}  # with the layers around the case


def assert_encoded(label, randomized, weights):
    """The case itself, where it is bilinear in real arrays, reads estimates; so does what is around any case."""
    table = explain(randomized, KEY, *weights, argnums=(0, 1))
    operations = [r.operation for r in table.rows if r.relative_variance > 0]
    name = label.split(":")[0]
    if primitives.of(name).bilinear and all(i.dtype in ("float64", "float32") for i in CASES[label][1]):
        names = ("mul", "elementwise") if name == "mul" else (name,)
        count = sum(operation in names for operation in operations)
        assert count >= LEAST_ENCODED[names[-1]], f"{name} reads no estimate:\n{table}"
    assert operations, f"nothing is encoded, so there is nothing to test:\n{table}"


ENCODED = [n for n in CASES if n not in NOT_ENCODED]


@pytest.mark.parametrize("label", few(ENCODED, *[n for n in ENCODED if n in REPRESENTATIVE][::5], slow=8))
@pytest.mark.usefixtures("no_residual_is_too_small")
def test_unbiased(label):
    loss, weights = loss_of(label), weights_of(label)
    randomized = rad(loss, codec=CODEC)
    assert_encoded(label, randomized, weights)

    @jax.jit
    def draw(keys, first, second):
        exact = ravel_pytree(jax.grad(loss, (0, 1))(first, second))[0]
        gradient = jax.grad(randomized, (1, 2))

        def one(key):
            return ravel_pytree(gradient(key, first, second))[0]

        return exact, lax.map(one, keys) if label in NOT_VMAPPED else jax.vmap(one)(keys)

    exact, draws = draw(jax.random.split(jax.random.key(5), DRAWS), *weights)
    assert draws.std(0).max() > 1e-4 * np.abs(draws).max(), "the gradient does not vary"
    # Cotangents in half precision are rounded to nearest, differently for each draw; up to three times in a row here.
    half = label.rpartition(": ")[2]
    rounding = float(jnp.finfo(half).eps) if half in ("bfloat16", "float16") else 0.0
    assert_unbiased(draws, exact, f"gradient of {label}", rounding)


@pytest.mark.parametrize("number", [0.7, 2, True, 0.5 + 1j], ids=str)
def test_numbers_of_python_stay_weak(number):
    """As an argument and as the result."""

    def f(x):
        return x * x + 1

    value, got = jax.jit(f)(number), jax.jit(rad(f, codec=Keep()))(KEY, number)
    assert (got.dtype, got.weak_type, got) == (value.dtype, value.weak_type, value)


def test_gradient_of_a_number_of_python_is_weak():
    gradient = jax.jit(jax.grad(rad(lambda x: x * x, codec=Keep()), 1))(KEY, 0.7)
    assert gradient.weak_type


@pytest.mark.parametrize("key", [KEY, RAW, jax.random.key(1, impl="rbg")], ids=["typed", "raw", "rbg"])
def test_kinds_of_path_keys(key):
    loss, weights = loss_of("dot_general: float64"), weights_of("dot_general: float64")
    got = compiled(jax.grad(rad(loss, codec=Keep()), (1, 2)))(key, *weights)
    np.testing.assert_allclose(ravel_pytree(got)[0], ravel_pytree(jax.grad(loss, (0, 1))(*weights))[0], atol=1e-12)


@pytest.mark.skipif(REFERENCES, reason="this JAX differentiates mutable arrays")
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_mutable_arrays_are_refused_where_jax_cannot_differentiate_them(wrap):
    with pytest.raises(NotImplementedError, match=r"mutable array.*x\.at"):
        jax.grad(lambda x: rad(wrap(reference))(KEY, x).sum())(jnp.ones((4, 6)))


# A primitive that nobody has heard of


def unknown_primitive():
    """``sin(x) + x**2``, whose tangent is a new primitive as well: one that is linear in its second operand."""
    curve, slope = jex_core.Primitive("unknown_curve"), jex_core.Primitive("unknown_slope")
    values = {curve: lambda x: jnp.sin(x) + x**2, slope: lambda x, t: (jnp.cos(x) + 2 * x) * t}
    for primitive, value in values.items():
        primitive.def_impl(value)
        primitive.def_abstract_eval(lambda x, *_: x)
        mlir.register_lowering(primitive, mlir.lower_fun(value, multiple_results=False))

    def batched(primitive, operands, axes):
        size = next(x.shape[a] for x, a in zip(operands, axes, strict=True) if a is not None)
        moved = [batching.bdim_at_front(x, a, size) for x, a in zip(operands, axes, strict=True)]
        return primitive.bind(*moved), 0

    for primitive in values:
        batching.primitive_batchers[primitive] = functools.partial(batched, primitive)
    ad.defjvp(curve, lambda t, x: slope.bind(x, t))
    ad.defjvp(slope, lambda u, x, t: u * t * (2 - jnp.sin(x)), lambda u, x, t: slope.bind(x, u))
    ad.primitive_transposes[slope] = lambda ct, x, t: [None, slope.bind(x, ct)]
    return curve


@pytest.mark.usefixtures("no_residual_is_too_small")
@pytest.mark.slow
def test_unknown_primitive():
    """A model with it trains: its residual is exact, whatever is encoded around it, and the table says so."""
    curve = unknown_primitive()
    x = jnp.asarray(numbers(16, 3))
    y = jnp.sin(x[:, 0]) + x[:, 1]

    def model(x, y):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 4]).to_event(2))
        v = numpyro.sample("v", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        numpyro.sample("y", dist.Normal(curve.bind(jnp.tanh(x @ w)) @ v, 0.3).to_event(1), obs=y)

    guide = AutoNormal(model, init_scale=0.1)
    svi = SVI(model, guide, optax.adam(0.02), RAD_ELBO(codec=CODEC))
    state = svi.init(jax.random.key(0), x, y)
    params = svi.get_params(state)

    def gradient(elbo):
        return jax.jit(jax.grad(lambda p: elbo.loss(KEY, p, model, guide, x, y)))(params)

    exact, kept = gradient(Trace_ELBO()), gradient(RAD_ELBO(codec=Keep()))
    for name, expected in exact.items():
        np.testing.assert_allclose(kept[name], expected, rtol=1e-10, atol=1e-10, err_msg=name)

    table = explain(RAD_ELBO(codec=CODEC), KEY, params, model, guide, x, y)
    assert any(d.startswith("unknown_slope (test_primitives.py:") for d in table.defaults)
    assert {r.decision for r in table.rows if r.operation == "unknown_slope"} <= {"keep", "recompute"}
    assert any(r.decision == str(CODEC) for r in table.rows)

    losses = svi.run(jax.random.key(1), 300, x, y, progress_bar=False, init_state=state).losses
    assert np.isfinite(losses).all() and losses[-20:].mean() < 0.25 * losses[:20].mean()
