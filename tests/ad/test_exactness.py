"""With ``codec=Keep()`` the randomized derivative is the exact one, whatever the program and whatever is around it.

The slow twin is JAX itself: the same function without ``rad``. Values are compared bit by bit where the compiler gets
the same program, gradients in double precision to rounding. ``PROGRAMS`` has one small function for each family of
primitives and each construct that may stand inside ``rad``; ``WRAPPERS`` are what may stand around it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from programs import few, numbers, positions

import numpyro_rad
from numpyro_rad import Keep, StochasticRound, rad

KEY = jax.random.key(7)  # the path key: no value or exact gradient may depend on it

pytestmark = pytest.mark.usefixtures("double", "ordered")
DOUBLE = {"rtol": 1e-10, "atol": 1e-12}
SINGLE = {"rtol": 2e-5, "atol": 1e-6}


def positive_definite(x):
    return x @ x.T + 3 * jnp.eye(len(x))


# Programs: name -> (function, arguments to differentiate, further arguments)

PROGRAMS = {}


def program(*args, data=(), name=None):
    """Register a function under its name: ``args`` are differentiated, ``data`` are not."""

    def register(f):
        PROGRAMS[name or f.__name__] = (f, args, data)
        return f

    return register


def elementwise(name, f, shift=0.0, scale=1.0):
    program(numbers(2, 5, scale=scale, shift=shift), name=name)(f)


elementwise("gelu", jax.nn.gelu)
elementwise("exact_gelu", lambda x: jax.nn.gelu(x, approximate=False))
elementwise("softplus_silu", lambda x: jax.nn.silu(jax.nn.softplus(x) - 0.5))
elementwise("relu_abs", lambda x: jnp.abs(jax.nn.relu(x) - 0.3) * x)
elementwise("clip", lambda x: jnp.clip(x * x, 0.2, 1.5) + jnp.clip(x, -0.5, 0.5))
elementwise("max_min", lambda x: jnp.maximum(x, 0.1 * x) * jnp.minimum(x, x**2))
elementwise("where", lambda x: jnp.where(x > 0, jnp.exp(x), x**3))
elementwise("tanh_powers", lambda x: jnp.tanh(x) ** 3 + (x**2 + 1.0) ** 1.5 + lax.rsqrt(x**2 + 1))
elementwise("lgamma", lambda x: lax.lgamma(x) + lax.digamma(x) + jnp.log1p(x) - lax.lgamma(2 * x), 5.0)
elementwise("erf_inv", lambda x: lax.erf_inv(jnp.tanh(x)) + lax.erf(x))
elementwise("logit", lambda x: jax.scipy.special.logit(jax.nn.sigmoid(x)) * jax.nn.log_sigmoid(x))
elementwise(
    "trigonometry", lambda x: jnp.sin(x) * jnp.cos(2 * x) + jnp.arctan2(x, 2 + x**2) - jnp.arcsinh(x) / (1 + x**2)
)
elementwise("constant_factors", lambda x: -(2.0 - x / 4) * 3 / (x * np.arange(1.0, 6.0) + 20) - x)
elementwise("two_uses", lambda x: jnp.tanh(x) * jnp.exp(jnp.tanh(x)) + jnp.exp(x))
elementwise("rounding", lambda x: x * jnp.round(x) + jnp.sign(x) * x + jnp.floor(x))
elementwise("stop_gradient", lambda x: x * lax.stop_gradient(jnp.exp(x)))
elementwise("safe_root", lambda x: jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0))
elementwise("masked_infinity", lambda x: jnp.sqrt(jax.nn.relu(x)) + jnp.log(2 * jnp.where(x > 0, x, 0.0) + (x <= 0)))
elementwise("softmax", lambda x: jax.nn.softmax(jax.nn.log_softmax(x, 0) * x))
elementwise("logsumexp", lambda x: jax.nn.logsumexp(x * x, axis=0) + jax.nn.logsumexp(x, axis=1).sum())
elementwise("reductions", lambda x: x.sum(0) * x.max(0) + x.min(0) - x.mean() + jnp.prod(x, 0))
elementwise("cumulative", lambda x: jnp.cumsum(x, 1) * jnp.cumprod(x, 1) + lax.cumlogsumexp(x, 1) - lax.cummax(x, 1))
elementwise("sorting", lambda x: jnp.sort(x, 1)[:, ::2] * jnp.sort(x, 1)[:, 1:4] + lax.top_k(x, 3)[0])
elementwise("indexing", lambda x: x[0, 1:4] * x[1, ::-1][:3] + jnp.pad(x, ((0, 0), (1, 2)))[1, :3] + x.ravel()[2:5])
elementwise(
    "scatter", lambda x: (jnp.zeros((4, 5)).at[jnp.array([1, 1])].add(x) * jnp.ones((4, 5)).at[2].set(x[0])) ** 2
)
elementwise("scatter_mul", lambda x: jnp.ones((2, 5)).at[:, 1].multiply(x[:, 0]) * jnp.zeros((2, 5)).at[0].max(x[1]))
elementwise("broadcasting", lambda x: x[:, None] * x[None] + jnp.broadcast_to(x[0], (2, 2, 5)) * x.mean())
elementwise("shapes", lambda x: jnp.concatenate([x.T @ x, x.reshape(5, 2) @ x], 0).swapaxes(0, 1)[::-1] ** 2)
elementwise("layer_norm", lambda x: (x - x.mean(1, keepdims=True)) * lax.rsqrt(x.var(1, keepdims=True) + 1e-3))
elementwise("fft", lambda x: jnp.abs(jnp.fft.rfft(x)) ** 2 + jnp.fft.irfft(jnp.fft.rfft(x, n=6) * 1j, n=4)[:, :3])
elementwise("complex", lambda x: jnp.real(jnp.exp(1j * x) * lax.complex(x, x**2)) + jnp.imag(jnp.conj(1j * x) * x))
elementwise("residual_connections", lambda x: functools.reduce(lambda h, _: h + jnp.tanh(h @ h.T @ h), range(3), x))
elementwise("diamond", lambda x: (lambda h: jnp.sin(h) * jnp.cos(h) + h * jnp.sin(h).sum())(x @ x.T))
elementwise("shared_in_contractions", lambda x: (lambda h: (h @ h.T) @ (h @ h.T).T @ h)(jnp.tanh(x)))
elementwise("nested_jit", lambda x: jax.jit(lambda y: jax.jit(jnp.tanh)(y @ y.T) * jnp.exp(-(y[:, :2] ** 2)))(x))
elementwise("checkpoint", lambda x: jnp.sin(jax.checkpoint(lambda y: jnp.tanh(y @ y.T) @ y)(x)))
elementwise("vmap_inside", lambda x: jax.vmap(lambda row: jnp.outer(row, jnp.tanh(row)) @ row)(x))
elementwise("grad_inside", lambda x: jax.grad(lambda y: (jnp.tanh(y) ** 3).sum())(x) * x)
elementwise("jvp_inside", lambda x: jax.jvp(lambda y: jnp.sin(y @ y.T), (x,), (jnp.cos(x),))[1])
elementwise("constant_result", lambda x: {"one": jnp.ones(3), "x": x * 2, "int": jnp.arange(3), "none": None})
elementwise("map", lambda x: lax.map(lambda row: jnp.tanh(row) * row.sum(), x))
elementwise("fori_loop", lambda x: lax.fori_loop(0, 3, lambda i, h: jnp.sin(h) + i * x, x))
elementwise("cond", lambda x: lax.cond(x.sum() > 0, lambda y: jnp.tanh(y @ y.T), lambda y: (y**2)[:, :2] * x[0, 0], x))
elementwise(
    "switch", lambda x: [lax.switch(i, [jnp.sin, lambda y: y * x, jnp.zeros_like], x @ x.T @ x) for i in range(3)]
)
elementwise("vmapped_cond", lambda x: jax.vmap(lambda r: lax.cond(r[0] > 0, jnp.exp, jnp.sin, r * r))(x))
elementwise("zero_gradient", lambda x: jnp.zeros(3) + x[0, 0] * 0)
elementwise("identity", lambda x: x)


@program(numbers(3, 2, 4), numbers(3, 4, 5, seed=1))
def batched_dot(a, b):
    return jnp.tanh(lax.dot_general(a, b, (((2,), (1,)), ((0,), (0,)))))


@program(numbers(2, 3, 4), numbers(4, 3, 2, seed=1), numbers(3, 5))
def einsum(a, b, c):
    return jnp.einsum("ijk,kjl,jm->mil", a, jnp.sin(b), c) + jnp.einsum("ijk,kji,jm->m", a, b, c)[:, None, None]


@program(numbers(2, 3, 8), numbers(4, 3, 3, seed=1))
def convolution(x, kernel):
    h = jax.nn.gelu(lax.conv_general_dilated(x, kernel, (2,), "SAME"))  # (2, 4, 4)
    return lax.conv_general_dilated(h, kernel.swapaxes(0, 1)[:, :, :2], (1,), [(1, 0)], rhs_dilation=(2,))


@program(numbers(4, 6), numbers(6, 6, seed=1, scale=0.5), numbers(6))
def dense_network(x, w, b):
    h = jax.nn.gelu(x @ w + b)
    return jax.nn.relu(h @ w.T + b) @ w[:, :2]


@program(numbers(3, 4), numbers(4, 2), numbers(3, 2, seed=2))
def scale_and_location(loc, w, x):
    return jnp.square((x - loc @ w) / jax.nn.softplus(loc @ w)) + jnp.log(jax.nn.softplus(loc @ w))


@program(numbers(6, 3), data=(np.array([0, 2, 2, 5]), np.array([True, False, True, True])))
def gather_with_mask(table, index, mask):
    rows = table[index] * mask[:, None]
    return jnp.tanh(rows) * index[:, None] + lax.dynamic_slice(table, (index[1], 0), (4, 3)) ** 2


@program(numbers(5, 3))
def dynamic_update(x):
    return jnp.sin(lax.dynamic_update_slice(x, x[:2] ** 2, (jnp.argmax(x[:, 0]) // 2, 0))) * x


@program(numbers(4, 4), numbers(4, 2))
def cholesky(x, b):
    factor = jnp.linalg.cholesky(positive_definite(x))
    return lax.linalg.triangular_solve(factor, b, left_side=True, lower=True) + jnp.log(jnp.diag(factor)).sum()


@program(numbers(4, 4), numbers(4, 2))
def linear_solve(x, b):
    a = positive_definite(x)
    return jnp.linalg.solve(a, jnp.tanh(b)) * jnp.linalg.slogdet(a)[1] + jax.scipy.linalg.cho_solve((a, False), b)


@program(numbers(3, 3))
def decompositions(x):
    values, vectors = jnp.linalg.eigh(positive_definite(x))
    return jnp.log(values) @ vectors**2 + jnp.linalg.svd(x, compute_uv=False) + jnp.linalg.qr(x)[1] ** 2


@program(numbers(3), numbers(3, 3, scale=0.5), numbers(5, 3))
def recurrence(h, w, xs):
    """Carry, constants, stacked inputs and outputs, something computed from each outside."""

    def step(h, x):
        h = jnp.tanh(h @ jnp.sin(w) + x)
        return h, h * x

    last, ys = lax.scan(step, h, jnp.exp(xs) - 1)
    return last, jnp.tanh(ys)


@program(numbers(3), numbers(3, 3, scale=0.5), numbers(5, 3))
def reverse_unrolled_scan(h, w, xs):
    return lax.scan(lambda h, x: (jnp.sin(w @ h) * x, h.sum()), h, xs, reverse=True, unroll=2)


@program(numbers(3), numbers(4, 2, 3))
def nested_scan(h, xs):
    def outer(h, rows):
        h, ys = lax.scan(lambda h, x: (jnp.tanh(h * x) + h[0], h * h), h, rows)
        return h, ys.sum() * h

    return lax.scan(outer, h, xs)


@program(numbers(4, 3), numbers(3, 3))
def scan_over_computed(x, w):
    """Stacked inputs that cannot be made again cheaply, read where the pullback is not linear in them."""

    def step(c, y):
        return c @ jnp.linalg.cholesky(jnp.eye(3) * 4 + jnp.outer(y, y)), jnp.sin(y) * c

    return lax.scan(step, jnp.eye(3), x @ w)


@program(numbers(3), numbers(3, 3))
def short_scans(h, w):
    def step(h, _):
        return jnp.sin(w @ h), h

    return [lax.scan(step, h, None, length=n) for n in (0, 1)]


@program(numbers(3), data=(np.arange(1, 5),))
def scan_with_integers(h, xs):
    def step(carry, x):
        h, count = carry
        return (jnp.sin(h) * x + count, count + 1), x * 2

    return lax.scan(step, (h, jnp.int32(1)), xs)


@program(numbers(3), numbers(2, 3))
def scan_of_cond(h, xs):
    def step(h, x):
        h = lax.cond(
            x[0] > 0, lambda a: jnp.tanh(a * x), lambda a: lax.scan(lambda c, y: (c * y, c), a, x[:, None])[0], h
        )
        return h, h**2

    return lax.scan(step, h, xs)


@program(numbers(3), data=(5,))
def while_not_differentiated(x, n):
    """Its condition and its carry have no tangents: a stopping time, say."""
    steps = lax.while_loop(lambda s: s[0] < n, lambda s: (s[0] + 1, s[1] * 2), (0, 1))
    halvings = lax.while_loop(lambda v: v > 0.1, lambda v: v / 2, lax.stop_gradient(x).max())
    return x**2 * steps[1] * halvings


@program(numbers(2, 3), numbers(3, 3))
def custom_vjp(x, w):
    @jax.custom_vjp
    def f(x, w):
        return jnp.sin(x @ w), w.sum()

    f.defvjp(lambda x, w: (f(x, w), (x, w)), lambda r, ct: (5.0 * ct[0] @ r[1], r[0].T @ ct[0] + 7 * ct[1]))
    a, b = f(jnp.tanh(x), w)
    a = jax.checkpoint(lambda a: jnp.cos(f(a, w)[0]))(a)
    return lax.scan(lambda c, row: (f(c, w)[0], None), a, w)[0] * b


@program(numbers(2, 3))
def custom_jvp(x):
    @jax.custom_jvp
    def f(x, y):
        return jnp.sin(x) @ y.T

    f.defjvp(lambda p, t: (f(*p), (3.0 * t[0]) @ p[1].T + p[0] @ t[1].T))
    return f(jnp.tanh(x), x**2)


@program(numbers(2, 3), numbers(2, 3), data=(jax.random.key_data(jax.random.key(3)),))
def sampled_weights(loc, log_scale, raw_key):
    """A key among the arguments in either form, reparameterized draws, splits."""
    noise, other = jax.random.split(raw_key)
    w = loc + jnp.exp(log_scale) * jax.random.normal(noise, loc.shape)
    return w @ w.T + jax.random.gumbel(jax.random.fold_in(jax.random.wrap_key_data(other), 3), (2, 2)) * loc[0, 0]


@program(numbers(3, shift=3.0, scale=0.3))
def gamma_draws(concentration):
    key = jax.random.key(0)
    return jax.random.gamma(key, concentration) ** 2


@program(np.float64(0.7), np.float64(1.3))
def scalars(x, y):
    return jnp.sin(x) * y + 3.0, y


@program({"w": numbers(3, 2), "b": [numbers(2), np.float64(0.5)]}, (numbers(4, 3),))
def pytrees(params, data):
    return {"y": jnp.tanh(data[0] @ params["w"] + params["b"][0]), "z": params["b"][1] ** 2}


@program(np.zeros((0, 3)), np.zeros((4, 0)), numbers(3))
def empty_arrays(x, y, z):
    return jnp.tanh(x @ z[:, None]).sum() + (y @ jnp.zeros((0, 3)) + 1) * z + jnp.concatenate([x, x]).sum(0) * z


@program(numbers(3, 4).astype(np.float32), numbers(4, 2))
def mixed_precision(x, w):
    h = jnp.tanh(x @ w.astype(jnp.float32))
    return (h.astype(jnp.float64) @ w.T) ** 2


@program(numbers(2, 3) + 1j * numbers(2, 3, seed=1))
def complex_arguments(z):
    return jnp.abs(jnp.tanh(z) @ z.conj().T) ** 2


NAMES = sorted(PROGRAMS)
WITHOUT_GRADIENT = {"zero_gradient"}


# Comparing


def loss_of(f):
    """A scalar from whatever ``f`` returns, its entries weighted differently."""

    def loss(*args):
        total = jnp.zeros(())
        for leaf in jax.tree.leaves(f(*args)):
            x = jnp.abs(leaf) if jnp.iscomplexobj(leaf) else leaf
            total += (x * jnp.cos(1 + jnp.arange(x.size).reshape(x.shape))).sum()
        return total

    return loss


def exactly(f):
    """The twin of ``rad(f)`` that ignores the key."""
    return lambda key, *args: f(*args)


def with_keep(f):
    return rad(f, codec=Keep())


def in_slices(f):
    return rad(f, exact=True, slices=3)


def assert_close(got, expected, what, **tolerance):
    got, expected = jax.tree.leaves(got), jax.tree.leaves(expected)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), what
        np.testing.assert_allclose(a, b, err_msg=what, **tolerance)


# Wrappers: (make, f, args, data) -> gradients, where ``make`` is ``exactly``, ``with_keep`` or ``in_slices``


def vmap_over_data(make, f, args, data):
    """A batch of two: as given and scaled."""
    batch = jax.tree.map(lambda x: jnp.stack([x, 1.1 * x]).astype(x.dtype), args)
    gradient = jax.value_and_grad(make(f), positions(args, 1))
    axes = (None, *(0 for _ in args), *(None for _ in data))
    return jax.vmap(gradient, axes)(KEY, *batch, *data)


def vmap_over_keys(make, f, args, data):
    gradient = jax.value_and_grad(make(f), positions(args, 1))
    return jax.vmap(lambda key: gradient(key, *args, *data))(jax.random.split(KEY, 2))


def scan_around(make, f, args, data):
    """Two steps of gradient descent."""

    def step(args, key):
        value, gradients = jax.value_and_grad(make(f), positions(args, 1))(key, *args, *data)
        return jax.tree.map(lambda x, g: x - (0.01 * g).astype(x.dtype), args, gradients), value

    return lax.scan(step, jax.tree.map(jnp.asarray, args), jax.random.split(KEY, 2))


def checkpoint_around(make, f, args, data):
    return jax.grad(jax.checkpoint(make(f)), positions(args, 1))(KEY, *args, *data)


def closed_over(make, f, args, data):
    """Everything closed over, differentiated by the transformation outside; a factor shows that outside tracers do."""

    def outer(factor, *args):
        scaled = jax.tree.map(lambda x: (x * factor).astype(x.dtype), args)
        return make(lambda: f(*scaled, *data))(KEY) * factor

    return jax.grad(outer, (0, *positions(args, 1)))(1.1, *args)


def through_scan_of_cond(make, f, args, data):
    """Called in the branch of a conditional in the body of a loop, and the loop is differentiated."""

    def outer(*args):
        def step(total, x):
            return lax.cond(x[0] > 0, lambda: total + make(f)(x[1], *args, *data), lambda: total * 2), None

        return lax.scan(step, jnp.zeros(()), (jnp.array([1, -1, 1]), jax.random.split(KEY, 3)))[0]

    return jax.grad(outer, tuple(range(len(args))))(*args)


def rerun_in_python(make, f, args, data):
    """Without the compiler, loops and branches included."""
    with jax.disable_jit():
        return jax.value_and_grad(make(f), positions(args, 1))(KEY, *args, *data)


def eager(make, f, args, data):
    """Operation by operation, as in a notebook."""
    return jax.value_and_grad(make(f), positions(args, 1))(KEY, *args, *data)


WRAPPERS = (vmap_over_data, vmap_over_keys, scan_around, checkpoint_around, closed_over, through_scan_of_cond)


def compiled(f):
    """``f`` without arguments, compiled in one go; what the compiler could polish is not what is looked at."""
    return jax.jit(f, compiler_options={"xla_llvm_disable_expensive_passes": True})


@pytest.mark.parametrize("name", few(NAMES, *NAMES[::4], slow=6))
def test_value_is_the_same_to_the_bit(name):
    f, args, data = PROGRAMS[name]
    args = jax.tree.map(jnp.asarray, (*args, *data))
    expected = jax.jit(f)(*args)
    got = jax.jit(with_keep(f))(KEY, *args)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)
        np.testing.assert_array_equal(a, b)


def check(name, wrappers, make=with_keep):
    """Compare with JAX under wrappers that are compiled as one program: most of the time goes to the compiler."""
    f, args, data = PROGRAMS[name]
    loss = loss_of(f)
    single = any(x.dtype == np.float32 for x in jax.tree.leaves(args))
    expected = compiled(lambda: [w(exactly, loss, args, data) for w in wrappers])()
    got = compiled(lambda: [w(make, loss, args, data) for w in wrappers])()
    for wrapper, a, b in zip(wrappers, got, expected, strict=True):
        assert_close(a, b, wrapper.__name__, **(SINGLE if single else DOUBLE))
    gradients = [np.asarray(g) for g in jax.tree.leaves(expected)]
    assert any((g != 0).any() for g in gradients) or name in WITHOUT_GRADIENT, "there is no gradient to compare"


@pytest.mark.parametrize("name", few(NAMES, *NAMES[3::6], "custom_jvp", "einsum", "short_scans", slow=4))
def test_exact(name):
    """Under jit, and under one wrapper each, in turn."""
    check(name, [eager, WRAPPERS[NAMES.index(name) % len(WRAPPERS)]])  # eager inside jit is jit


@pytest.mark.parametrize("name", few(NAMES, slow=8))
def test_exact_under_every_wrapper(name):
    check(name, WRAPPERS)


@pytest.mark.parametrize("name", few(NAMES, slow=16))
def test_exact_in_slices_under_every_wrapper(name):
    """Those that have no part to cut are as they are in one go."""
    check(name, WRAPPERS, in_slices)


WITHOUT_COMPILER = [
    *[(name, eager) for name in ("scan_of_cond", "custom_vjp", "sampled_weights", "pytrees")],
    *[(name, rerun_in_python) for name in ("recurrence", "nested_jit")],
    *[
        pytest.param(*case, marks=pytest.mark.exhaustive)
        for case in (("dense_network", eager), ("scan_of_cond", rerun_in_python))
    ],
]


@pytest.mark.parametrize(("name", "wrapper"), WITHOUT_COMPILER)
def test_exact_without_the_compiler(name, wrapper):
    f, args, data = PROGRAMS[name]
    loss = loss_of(f)
    assert_close(wrapper(with_keep, loss, args, data), wrapper(exactly, loss, args, data), name, **DOUBLE)


TWICE = [
    "gelu",
    "where",
    "dense_network",
    "recurrence",
    "cond",
    "einsum",
    "shared_in_contractions",
    "residual_connections",
]


@pytest.mark.parametrize("name", few(TWICE, *TWICE[::2], slow=9))
def test_gradient_of_the_gradient(name):
    """An exact plan can be differentiated again: both sweeps are ordinary programs, barriers included."""
    f, args, data = PROGRAMS[name]

    def outer(make):
        gradient = jax.grad(make(loss_of(f)), positions(args, 1))
        return jax.grad(lambda *args: sum((g**3).sum() for g in gradient(KEY, *args, *data)), tuple(range(len(args))))

    expected = compiled(outer(exactly))(*args)
    assert_close(compiled(outer(with_keep))(*args), expected, name, **DOUBLE)
    assert all((np.asarray(g) != 0).any() for g in expected)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_gradient_of_a_randomized_gradient_is_refused(wrap):
    """Codes are integers: JAX would take their derivative for zero, without a word."""
    x, w = numbers(128, 64), numbers(64, 64)
    f = rad(lambda w: jnp.sin(jnp.tanh(x @ w) @ w).sum(), codec=StochasticRound(4))
    gradient = wrap(jax.grad(lambda w: f(KEY, w)))
    assert np.isfinite(gradient(w)).all()
    with pytest.raises(NotImplementedError, match=r"differentiated once more.*Keep\(\)"):
        wrap(jax.grad(lambda w: (gradient(w) ** 2).sum()))(w)


def test_hessian_vector_product_by_reverse_over_reverse():
    f, (x,), _ = PROGRAMS["shared_in_contractions"]
    v = numbers(2, 5, seed=5)

    def product(g):
        return jax.grad(lambda x: (jax.grad(g, 1)(KEY, x) * v).sum())(x)

    exact = jax.jvp(jax.grad(loss_of(f)), (x,), (v,))[1]
    np.testing.assert_allclose(jax.jit(lambda: product(with_keep(loss_of(f))))(), exact, **DOUBLE)


# Loops without a static length


def halve(x):
    return lax.while_loop(lambda v: v.max() > 1, lambda v: v / 2, x)


def test_while_runs_when_it_is_not_differentiated():
    x = jnp.array([3.0, 5.0])
    np.testing.assert_array_equal(with_keep(halve)(KEY, x), halve(x))
    np.testing.assert_array_equal(jax.jit(with_keep(halve))(KEY, x), halve(x))
    g = with_keep(lambda x, w: (halve(x) * w).sum())
    np.testing.assert_array_equal(jax.grad(g, 2)(KEY, x, 1 + x), halve(x))


def test_while_with_a_moving_carry_gets_the_error_of_jax():
    with pytest.raises(ValueError, match=r"Reverse-mode differentiation does not work for lax\.while_loop"):
        jax.grad(with_keep(lambda x: halve(x).sum()), 1)(KEY, jnp.array([3.0, 5.0]))


# Half precision


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    """Within the rounding of the dtype: the fused derivative rounds once where JAX rounds at each step."""

    def f(w, x):
        return (jax.nn.gelu(x @ w) @ w.T).astype(jnp.float32).sum()

    w, x = jnp.asarray(numbers(6, 6, scale=0.4), dtype), jnp.asarray(numbers(4, 6), dtype)
    value, got = jax.jit(jax.value_and_grad(with_keep(f), (1, 2)))(KEY, w, x)
    expected = jax.jit(jax.grad(f, (0, 1)))(w, x)
    assert value.dtype == jnp.float32
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype == dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() < 16 * float(jnp.finfo(dtype).eps) * np.abs(b).max()


def test_single_precision_value_and_gradient():
    f, args, _ = PROGRAMS["dense_network"]
    args = [jnp.asarray(a, jnp.float32) for a in args]
    value, got = jax.jit(jax.value_and_grad(with_keep(loss_of(f)), (1, 2, 3)))(KEY, *args)
    expected_value, expected = jax.jit(jax.value_and_grad(loss_of(f), (0, 1, 2)))(*args)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    assert_close(got, expected, "float32", **SINGLE)


# Calling conventions


@pytest.mark.parametrize("key", [jax.random.key(1), jax.random.PRNGKey(1), jax.random.key(1, impl="rbg")])
def test_kinds_of_keys_and_keys_as_arguments(key):
    x = numbers(3)

    def f(x, key):
        return (jax.random.normal(key, (3,)) * x**2).sum()

    got = jax.jit(jax.grad(with_keep(f), 1))(key, x, key)
    np.testing.assert_allclose(got, jax.grad(f)(x, key), **DOUBLE)


def product(a, b, *, power=1, shift=None):
    value = ((a * b["w"]) ** power).sum()
    return value if shift is None else value + shift.sum()


@pytest.mark.parametrize("argnums", [0, 1, (0,), (1, 0), -1, (0, -1), [0, 1]])
def test_argnums_are_counted_without_the_key(argnums):
    a, b = numbers(3), {"w": numbers(3, seed=1), "b": numbers(2)}
    expected = jax.grad(product, argnums)(a, b, power=2)
    got = numpyro_rad.grad(product, argnums, codec=Keep())(KEY, a, b, power=2)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    assert_close(got, expected, "argnums", **DOUBLE)


def test_keyword_arguments_are_passed_and_may_be_differentiated_outside():
    a, b, shift = numbers(3), {"w": numbers(3, seed=1)}, numbers(2)
    g = rad(product, codec=Keep())
    np.testing.assert_array_equal(g(KEY, a, b=b, power=3), product(a, b, power=3))
    np.testing.assert_array_equal(jax.grad(lambda s: g(KEY, a, b, shift=s) * 2)(shift), [2.0, 2.0])


def test_auxiliary_output():
    def f(x):
        return (x**2).sum(), {"twice": 2 * x, "n": 3}

    x = numbers(3)
    (value, aux), gradient = numpyro_rad.value_and_grad(f, has_aux=True, codec=Keep())(KEY, x)
    np.testing.assert_allclose(value, f(x)[0])
    np.testing.assert_array_equal(gradient, 2 * x)
    np.testing.assert_array_equal(aux["twice"], 2 * x)
    assert aux["n"] == 3
    gradient, aux = numpyro_rad.grad(f, has_aux=True, codec=Keep())(KEY, x)
    np.testing.assert_array_equal(gradient, 2 * x)
    np.testing.assert_array_equal(aux["twice"], 2 * x)


def test_arrays_that_are_not_differentiated_pass_through():
    """Integers, booleans and keys among the outputs, and a gradient through the rest of them."""
    key = jax.random.key(3)

    def f(x, n):
        return x * n, n + 1, x > 0, key

    x = numbers(3)
    outs, pullback = jax.vjp(lambda x: with_keep(f)(KEY, x, 2), x)
    assert all(isinstance(o, jax.Array) for o in outs)
    assert [o.dtype for o in outs[1:3]] == [jnp.asarray(2).dtype, bool] and outs[3] == key
    zero = [np.zeros(o.shape, jax.dtypes.float0) for o in outs[1:]]
    np.testing.assert_array_equal(pullback((jnp.ones(3), *zero))[0], [2.0, 2.0, 2.0])


def test_constant_value():
    for compile in (jax.jit, lambda f: f):
        value, gradient = compile(numpyro_rad.value_and_grad(lambda x: 2.0))(KEY, numbers(3))
        assert isinstance(value, jax.Array) and value == 2.0
        np.testing.assert_array_equal(gradient, np.zeros(3))


def test_only_some_outputs_are_used():
    """The cotangent of an unused output is a symbolic zero, also inside loops and branches."""
    f, args, _ = PROGRAMS["recurrence"]
    for use in (lambda out: out[0].sum(), lambda out: out[1].sum()):
        got = jax.grad(lambda *a, use=use: use(with_keep(f)(KEY, *a)), (0, 1, 2))(*args)
        expected = jax.grad(lambda *a, use=use: use(f(*a)), (0, 1, 2))(*args)
        assert_close(got, expected, "partial use", **DOUBLE)


def test_inner_and_outer_differentiation_at_once():
    """A gradient inside a loss whose closed-over parameter is differentiated outside: bilevel optimization."""
    x, scale = numbers(3), 0.7

    def outer(make):
        def loss(scale):
            step = jax.grad(make(lambda x: jnp.sum(jnp.tanh(scale * x) ** 2)), 1)(KEY, x)
            return jnp.sum((x - 0.1 * step) ** 2)

        return jax.grad(loss)(scale)

    np.testing.assert_allclose(outer(with_keep), outer(exactly), **DOUBLE)


@pytest.mark.parametrize("f", [lambda h: h.sum() ** 2, lambda h: h.sum() * jnp.sin(h).sum()], ids=["waist", "stage"])
def test_gradients_of_slices(f):
    """Forward and backward together, and again on the way back: for the latter there is a primitive of our own."""
    x, w = numbers(12, 4), numbers(4, 4)

    def loss(w):
        return f(jnp.tanh(x @ w) @ w)

    got = jax.jit(jax.grad(lambda w: rad(loss, exact=True, slices=3)(KEY, w)))(w)
    np.testing.assert_allclose(got, jax.grad(loss)(w), rtol=1e-4, atol=1e-5)
