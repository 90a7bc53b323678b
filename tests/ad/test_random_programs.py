"""Generated programs: the promises of ``rad`` hold whatever is composed with whatever.

They are those of ``random_programs``. What ever failed is in ``NAMED``, made small.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.flatten_util import ravel_pytree
from programs import few
from random_programs import ARGS, INDEX, generate, loss, seeded
from zscores import bound, z_scores

from numpyro_rad import Keep, StochasticRound, rad
from numpyro_rad.ad.sweep import forward
from numpyro_rad.codecs import RandomProjection, SampleAxis
from numpyro_rad.planning import readers

pytestmark = pytest.mark.usefixtures("double", "encode_all")

DRAWS, CONFIRM = 1024, 16  # path keys, and how many times as many look again at a program that seems biased
LINEAR = [StochasticRound(2), SampleAxis(0.3), RandomProjection(0.3)]
EXACT_PROGRAMS, UNBIASED_PROGRAMS = 24, 8
ARGNUMS = tuple(range(len(ARGS)))


@st.composite
def programs(draw):
    return generate(lambda n: draw(st.integers(0, n - 1)))


# Checks


def compiled(f, *args):
    """Compiled quickly: most of the time of these tests goes to the compiler."""
    options = {"xla_llvm_disable_expensive_passes": True, "xla_backend_optimization_level": 0}
    return jax.jit(f, compiler_options=options)(*args)


def flat_gradient(f, codec=None):
    g = f if codec is None else lambda *args: rad(f, codec=codec)(args[0], *args[1:])
    argnums = tuple(n + (codec is not None) for n in ARGNUMS)
    return lambda *args: ravel_pytree(jax.grad(g, argnums)(*args))[0]


def check_exact(f, number=0):
    """The value to the bit, the exact gradient with ``Keep``, and the bytes of the tape."""
    key, keep = jax.random.key(number), rad(f, codec=Keep())

    def everything(*args):
        return f(*args), keep(key, *args), flat_gradient(f)(*args), flat_gradient(f, Keep())(key, *args)

    value, same, expected, got = compiled(everything, *ARGS, INDEX)
    assert np.isfinite(value) and value == same
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9 * max(1e-3, np.abs(expected).max()))
    for codec in (Keep(), StochasticRound(1), LINEAR[number % 3]):
        p = rad(f, codec=codec).planned((*ARGS, INDEX), {}, ARGNUMS)[0]
        if p.graph.slices is not None:  # what they add up is where results go
            continue
        inputs = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in p.graph.inputs]
        tape = jax.eval_shape(partial(forward, p), jax.ShapeDtypeStruct((2,), jnp.uint32), inputs)[1]
        assert p.stored_bytes == sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tape)), codec


def worst_z(f, codecs, draws=DRAWS, start=0):
    """For each codec the largest |z| over the entries of the gradient, in units of the bound for all programs."""

    def everything(keys, *args):
        estimates = [jax.vmap(lambda k, c=c: flat_gradient(f, c)(k, *args))(keys) for c in codecs]
        return flat_gradient(f)(*args), estimates

    keys = jax.random.split(jax.random.fold_in(jax.random.key(11), start), draws)
    expected, estimates = compiled(everything, keys, *ARGS, INDEX)
    limit = bound(expected.size * 2 * UNBIASED_PROGRAMS)
    result = []
    for each in estimates:
        rounding = np.abs(each.mean(0) - expected) < 1e-10 * np.abs(each).max()
        result.append(np.where(rounding, 0, np.abs(z_scores(each, expected))).max() / limit)
    return result


def check_unbiased(f, number=0):
    """Products of many estimates have heavy tails: what exceeds the bound is drawn again, more often."""
    for codec, z in zip(codecs := [StochasticRound(1), LINEAR[number % 3]], worst_z(f, codecs), strict=True):
        if not z < 1:
            (again,) = worst_z(f, [codec], DRAWS * CONFIRM, 1)
            assert again < 1, f"biased with {codec}: {z:.2f} and again {again:.2f} times the bound"


# Every program that ever failed, made small. What the name says went wrong.

NAMED = {}


def named(f):
    NAMED[f.__name__] = f
    return f


@named
def compiled_call_with_a_constant_array(x, w, b, t, index):
    """AssertionError with JAX 0.10: a closed jaxpr among the parameters of an equation lost its constants."""
    return jax.jit(lambda h: jnp.sin(jnp.where(np.arange(12) % 3 > 0, h, 0.5)))(x @ w).sum()


@named
def compiled_call_with_a_constant_array_in_a_loop(x, w, b, t, index):
    """The same in the body of a loop."""

    def step(h, _):
        return jax.jit(lambda h: jnp.sin(jnp.where(np.arange(12) % 3 > 0, h, 0.5)))(h @ w), None

    return lax.scan(step, x, None, length=2)[0].sum()


@named
def branch_that_stores_its_operand(x, w, b, t, index):
    """KeyError: what was encoded before the first expensive step of a branch waited for the last one."""
    h = jnp.tanh(x @ w)
    return lax.cond(index[0] > 0, lambda h: jnp.sin(h @ w) * h, lambda h: (h @ w) * h @ w, h).sum()


def with_budget(n):
    """Shrinking compiles hundreds of programs: add ``Phase.shrink`` by hand to make a failure small."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    checks += [HealthCheck.large_base_example, HealthCheck.filter_too_much]
    return settings(
        max_examples=n,
        phases=[Phase.generate],
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=checks,
    )


@pytest.mark.parametrize("name", few(NAMED, "compiled_call_with_a_constant_array", slow=2))
def test_named_programs(name):
    check_exact(NAMED[name])
    check_unbiased(NAMED[name])


@pytest.mark.parametrize("seed", few(range(4), 0, slow=0))
def test_fixed_programs(seed):
    check_exact(loss(seeded(seed)), seed)
    check_unbiased(loss(seeded(seed)), seed)


@pytest.mark.slow
def test_one_draw_for_two_readers_on_a_path_is_caught(monkeypatch):
    """``v`` scales ``w`` and again the way back from the product: one draw for both would give its mean square."""

    def twice(x, w, b, t, index):
        v = x @ w
        return ((v * b) @ w * v).sum()

    check_unbiased(twice)
    one_group = lambda graph, linear: {value: (frozenset(edges),) for value, edges in linear.items()}  # noqa: E731
    monkeypatch.setattr(readers, "disjoint_groups", one_group)
    with pytest.raises(AssertionError, match="biased"):
        check_unbiased(twice)


@pytest.mark.slow
@with_budget(EXACT_PROGRAMS)
@given(programs())
def test_generated_programs_are_exact(program):
    check_exact(loss(program), len(program))


@pytest.mark.slow
@with_budget(UNBIASED_PROGRAMS)
@given(programs())
def test_generated_programs_are_unbiased(program):
    check_unbiased(loss(program), len(program))
