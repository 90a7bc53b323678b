"""Programs made at random, from integers that somebody chooses: hypothesis, or a generator with a fixed seed.

A program is a list of instructions ``(name, i, j, k, body)`` over a growing list of arrays: ``i`` and ``j`` choose
operands (0 is the newest, so that a value is read again and again), ``k`` chooses a variant, and ``body`` is the
program inside a loop, a branch or a call. Every instruction makes its operands fit, so that every list is a program.
"""

import random
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

LARGEST = 144  # entries of an array
SHAPES = [(6, 12), (12, 12), (12,), (3, 4, 6)]
ARGS = tuple(np.random.default_rng([3, *s]).standard_normal(s) * 0.6 for s in SHAPES)
INDEX = np.array([1, 0, 2], np.int32)  # an argument that is not differentiated


# Instructions: each gets two arrays, its variant, a function that runs its body, and integers that are data


def numbers(shape, seed=0):
    """Constants of order one."""
    return np.cos(np.arange(1.0, 1 + int(np.prod(shape))) * (1 + seed)).reshape(shape) + 0.1


def fit(x, shape):
    """``x`` in another shape, by the structural operations that do it."""
    size = int(np.prod(shape))
    if x.ndim <= len(shape) and all(m in (1, n) for m, n in zip(x.shape[::-1], shape[::-1], strict=False)):
        return x if x.shape == tuple(shape) else jnp.broadcast_to(x, shape)
    if x.size >= size:
        return x.reshape(-1)[:size].reshape(shape)
    return jnp.take(x.reshape(-1), np.arange(size) % x.size).reshape(shape)


def limited(x):
    """At most three axes and not too many entries."""
    while x.ndim > 3 or x.size > LARGEST:
        x = x.mean(int(np.argmax(x.shape))) if x.ndim > 1 else x[:LARGEST]
    return x


def matrix(x):
    return x.reshape(-1, x.shape[-1])


def unary(a, b, k, inner, index):
    f = [jnp.tanh, jnp.sin, lambda x: jnp.exp(jnp.tanh(x)), jax.nn.softplus, jax.nn.gelu, jax.nn.relu, jnp.square]
    return [*f, jax.nn.sigmoid, jnp.abs, lax.stop_gradient, lambda x: jnp.log1p(x * x), lambda x: -x / 2][k % 12](a)


def binary(a, b, k, inner, index):
    b = fit(b, a.shape)
    mask = (np.arange(a.size) * 7 % 3 > 0).reshape(a.shape)
    f = [jnp.add, jnp.multiply, jnp.subtract, jnp.maximum, lambda a, b: jnp.where(mask, a, b), jnp.multiply]
    return [*f, lambda a, b: a / (1 + b * b), lambda a, b: a * jnp.where(mask, b, 0.5)][k % 8](a, b)


def with_itself(a, b, k, inner, index):
    """A value times something linear in it, and a cotangent (that of ``b``) that meets one value twice."""
    m, c, axis = matrix(a), fit(b, a.shape), k % a.ndim
    f = [lambda: a * jnp.cumsum(a, axis), lambda: a * a.sum(axis, keepdims=True), lambda: m @ m.T, lambda: m.T @ m]
    f += [lambda: jnp.cumsum(c * a, axis) * a, lambda: (c * a).reshape(-1).cumsum().reshape(a.shape) * a]
    return [*f, lambda: fit(b, (3, m.shape[0])) @ m @ m.T, lambda: (c * a).mean(axis, keepdims=True) * a][k % 8]()


def contraction(a, b, k, inner, index):
    m = matrix(a)
    n = m.shape[1]
    f = [lambda: m @ fit(b, (n, 4 + 4 * (k % 3))), lambda: jnp.dot(m, numbers((n, 12))) / n]
    f += [lambda: m.T @ fit(b, m.shape)]
    f += [lambda: jnp.einsum("bij,bjk->bik", fit(a, (3, 4, 2)), fit(b, (3, 2, 5)))]
    f += [lambda: jnp.einsum("ijk,kjl->il", fit(a, (3, 2, 4)), fit(b, (4, 2, 5)))]
    f += [lambda: jnp.einsum("bi,bij->bj", fit(a, (4, 3)), fit(b, (4, 3, 5))), lambda: jnp.outer(a[0], b[0])]
    return f[k % 7]() * 0.5


def structural(a, b, k, inner, index):
    n, axis, i = a.shape[0], k % a.ndim, index[k % 3]
    rows = fit(b, (3, *a.shape[1:]))
    f = [lambda: a.T, lambda: a.reshape(-1), lambda: a[: (n + 1) // 2], lambda: jnp.flip(a, axis)]
    f += [lambda: lax.dynamic_slice_in_dim(a, i, (n + 1) // 2), lambda: jnp.concatenate([a, fit(b, a.shape)], axis)]
    f += [lambda: jnp.broadcast_to(a, (2, *a.shape)), lambda: a[index % n]]
    f += [lambda: jnp.take(a, index, axis, mode="clip")]
    f += [lambda: jnp.pad(a, ((1, 0),) * a.ndim), lambda: jnp.cumsum(a, axis), lambda: a[..., ::2]]
    f += [lambda: a.at[index % n].add(rows), lambda: jnp.zeros_like(a).at[np.array([0, 0, 0])].add(rows)]
    f += [lambda: lax.dynamic_update_slice_in_dim(a, rows[:1], i, 0), lambda: jnp.swapaxes(a, 0, -1)]
    return f[k % 16]()


def reduction(a, b, k, inner, index):
    axis = k // 8 % a.ndim
    f = [jnp.sum, jnp.mean, jnp.max, jax.nn.softmax, jax.nn.logsumexp, jnp.min, lambda x, _: x.mean(), jnp.prod]
    return f[k % 8](a if k % 8 != 7 else jnp.tanh(a), axis)


def linear_algebra(a, b, k, inner, index):
    m = fit(a, (4, 4))
    m = m @ m.T / 4 + 4 * jnp.eye(4)
    return jnp.linalg.cholesky(m) if k % 2 else jnp.linalg.solve(m, fit(b, (4, 2)))


def scan(a, b, k, inner, index):
    """Carry, stacked inputs and outputs, and a constant from outside."""

    def step(h, x):
        out, other = inner([b, x, h])
        return (jnp.tanh(fit(out, h.shape)) if k // 4 % 2 else 0.5 * fit(out, h.shape) + 0.5 * h), other

    last, ys = lax.scan(step, fit(a, (3, 4)), fit(b if k % 2 else a, (2 + k % 3, 4)), reverse=k // 8 % 2 == 1)
    return last, ys


def loop(a, b, k, inner, index):
    return lax.fori_loop(0, 2 + k % 3, lambda i, h: jnp.tanh(fit(inner([b, h])[0], h.shape)) + 0.1 * i * h, a)


def branch(a, b, k, inner, index):
    branches = [lambda a, b: fit(inner([b, a])[0], a.shape), lambda a, b: a * fit(b, a.shape), lambda a, b: jnp.sin(a)]
    if k % 2:
        return lax.cond(index[k % 3] > 0, *branches[:2], a, b)
    return lax.switch(index[k % 3], branches, a, b)


def call(a, b, k, inner, index):
    """A body called directly, compiled, rematerialized or for each row."""
    wrap = [jax.jit, jax.checkpoint, partial(jax.vmap, in_axes=(0, None)), lambda f: jax.jit(jax.checkpoint(f))]
    return wrap[k % 4](lambda a, b: inner([b, a])[0])(a, b)


@jax.custom_jvp
def own_jvp(x):
    return jnp.sin(x) * x


own_jvp.defjvp(lambda x, t: (own_jvp(x[0]), t[0] * jnp.exp(-(x[0] ** 2)) + 2 * x[0] * t[0]))


@jax.custom_vjp
def own_vjp(x, y):
    return jnp.tanh(x * y)


own_vjp.defvjp(lambda x, y: (own_vjp(x, y), (x, y)), lambda r, ct: (3 * ct * r[1], ct * r[0] + jnp.cumsum(ct, 0)))


def custom(a, b, k, inner, index):
    return own_jvp(a) if k % 2 else own_vjp(a, fit(b, a.shape))


STRAIGHT = [unary] * 4 + [binary] * 4 + [with_itself] * 3 + [contraction] * 3 + [structural] * 4 + [reduction] * 2
STRAIGHT += [custom]
NESTED = [scan, scan, loop, branch, branch, call, call]
INSTRUCTIONS = {f.__name__: f for f in [*STRAIGHT, *NESTED, linear_algebra]}
DEGREES = {"binary": 2, "with_itself": 3, "contraction": 2, "custom": 2, "scan": 2, "loop": 2, "branch": 2, "call": 2}


def generate(choose, depth=0):
    """A program; ``choose(n)`` draws an integer below n."""
    program = []
    for _ in range(4 + choose(5) if depth == 0 else 1 + choose(3)):
        kinds = STRAIGHT if depth == 2 or choose(8 if depth else 3) else NESTED
        f = linear_algebra if depth == 0 and not choose(16) else kinds[choose(len(kinds))]
        body = generate(choose, depth + 1) if f in NESTED else ()
        program.append((f.__name__, choose(4), choose(6), choose(48), body))
    return tuple(program)


def run(program, values, index, degree=1):
    """All values of a program and which of them nobody reads. Polynomials of high degree are brought back by tanh."""
    values = [(v, degree) for v in values]
    read = set(range(len(values)))
    for name, i, j, k, body in program:
        i, j = (len(values) - 1 - n % len(values) for n in (i, j))
        read |= {i, j}
        (a, p), (b, q) = values[i], values[j]

        def inner(arrays, body=body):
            results, _ = run(body, arrays, index, 2)
            return limited(results[-1]), limited(results[-2])

        outs = INSTRUCTIONS[name](jnp.atleast_1d(a), jnp.atleast_1d(b), k, inner, index)
        degree = max(p, q, {1: max(p, q), 2: p + q, 3: 2 * p + q}[DEGREES.get(name, 1)])
        if name == "unary" and k % 12 == 6:
            degree = 2 * p
        for out in outs if isinstance(outs, tuple) else (outs,):
            values.append((limited(out), degree) if degree <= 4 else (jnp.tanh(limited(out)), 1))
    return [v for v, _ in values], [v for n, (v, _) in enumerate(values) if n not in read]


def loss(program):
    def f(*args):
        x, w, *_, index = args
        leaves = run(program, [*args[:-1], x @ w], index)[1]  # a product, so that not everything can be made again
        return sum(((jnp.sin(v) if n % 3 else v) * numbers(v.shape, n)).sum() for n, v in enumerate(leaves))

    return f


def seeded(seed):
    return generate(random.Random(seed).randrange)
