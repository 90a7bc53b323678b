"""Loops cut into segments: the same value, gradient and codes as in one pass, for about the root of the bytes."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from programs import few, normal, planned, positions, temp_bytes
from zscores import assert_unbiased

from numpyro_rad import RAD_ELBO, BudgetError, Keep, StochasticRound, explain, rad
from numpyro_rad.ad import loops, sweep
from numpyro_rad.ad.graph import Scan
from numpyro_rad.codecs import SampleAxis
from numpyro_rad.planning import strategies

KEY = jax.random.key(3)
LENGTH = 16
CUTS = [(4,), (5,), (1,), (7, 3, 2)]  # even, with a shorter segment at the end, single iterations, nested unevenly


pytestmark = [pytest.mark.in_one_go, pytest.mark.usefixtures("arrays_of_any_size_count")]


# Programs: loops of LENGTH iterations

PROGRAMS = {}
H, W, XS = normal(4, 8), normal(8, 8, scale=0.4), normal(LENGTH, 4, 8, seed=1)


def program(*args):
    def register(f):
        PROGRAMS[f.__name__] = (f, args)
        return f

    return register


@program(H, W)
def carry_alone(h, w):
    return (lax.scan(lambda h, _: (jnp.tanh(h @ w), None), h, None, length=LENGTH)[0] ** 2).sum()


@program(H, W)
def counted_loop(h, w):
    return (lax.fori_loop(0, LENGTH, lambda i, h: jnp.sin(h @ w) + 0.1 * i, h) ** 2).sum()


def stacked(h, w, xs, reverse):
    """Stacked inputs and outputs, and a constant."""

    def step(h, x):
        h = jnp.tanh(h @ w + x)
        return h, (h.sum(), jnp.sin(h @ w))

    h, (sums, ys) = lax.scan(step, h, xs, reverse=reverse)
    return (h**2).sum() + (sums * jnp.arange(1.0, LENGTH + 1)).sum() + (ys * xs).sum()


@program(H, W, XS)
def stacked_forward(h, w, xs):
    return stacked(h, w, xs, reverse=False)


@program(H, W, XS)
def stacked_reverse(h, w, xs):
    return stacked(h, w, xs, reverse=True)


@program(H, W, XS)
def unrolled(h, w, xs):
    return lax.scan(lambda h, x: (jnp.tanh(h @ w) * x, None), h, xs, unroll=2)[0].sum()


@program(H, W, XS)
def mapped(h, w, xs):
    """Nothing is carried: each iteration may run again for itself."""
    return jax.lax.map(lambda x: jnp.sin(jnp.tanh((h + x) @ w) @ w).sum(), xs).sum()


def noisy(h, w, key):
    def step(carry, _):
        h, key = carry
        key, here = jax.random.split(key)
        return (jnp.tanh(h @ w + jax.random.normal(here, h.shape)), key), h.sum()

    (h, _), sums = lax.scan(step, (h, key), None, length=LENGTH)
    return (h**2).sum() + sums.sum()


@program(H, W)
def typed_key_in_the_carry(h, w):
    return noisy(h, w, jax.random.key(1))


@program(H, W)
def raw_key_in_the_carry(h, w):
    return noisy(h, w, jax.random.PRNGKey(1))


@program(H, W)
def integers_in_the_carry(h, w):
    def step(carry, _):
        h, i, on = carry
        h = jnp.where(on, jnp.tanh(h @ w), jnp.sin(h @ w.T)) * (0.4 + 0.1 * (i % 3))
        return (h, i + 1, ~on), i * h.mean()

    (h, _, _), ys = lax.scan(step, (h, jnp.int32(0), jnp.bool_(True)), None, length=LENGTH)
    return h.sum() + ys.sum()


@program(H, W, XS)
def nested_scan(h, w, xs):
    def inner(h, x):
        h = jnp.tanh(h @ w + x)
        return h, h.sum()

    def outer(h, x):
        h, ys = lax.scan(inner, h, jnp.stack([x, -x, x * x, x]))
        return h, ys.sum()

    h, ys = lax.scan(outer, h, xs)
    return (h**2).sum() + ys.sum()


@program(H, W)
def cond_in_the_body(h, w):
    def step(h, i):
        return lax.cond(i % 3 == 0, lambda h: jnp.tanh(h @ w), lambda h: h * jnp.sin(h @ w), h), h.sum()

    h, ys = lax.scan(step, h, jnp.arange(LENGTH))
    return h.sum() + ys.sum()


@program(H, W, XS)
def two_loops(h, w, xs):
    h, ys = lax.scan(lambda h, x: (jnp.tanh(h @ w + x), h), h, xs)
    return (lax.scan(lambda h, y: (jnp.tanh(h @ w.T + y), None), h, ys, reverse=True)[0] ** 2).sum()


@program(H, W)
def half_precision_carry(h, w):
    def step(h, _):
        return jnp.tanh(h.astype(jnp.float32) @ w).astype(jnp.bfloat16), None

    return lax.scan(step, h.astype(jnp.bfloat16), None, length=LENGTH)[0].astype(jnp.float32).sum()


def cuts(plan):
    """The lengths of the segments of each loop that is cut."""
    return sorted(m for p in plan.walk() for m in p.segments.values())


def cut(f, args, lengths=(LENGTH // 4,), **options):
    """A saved plan with its first loop cut, all else alike."""
    plan = planned(f, args, **options)
    saved = plan.to_dict()
    first = next(node for node in plan.children if isinstance(node, Scan))
    return {**saved, "segments": [{"path": (first.number,), "lengths": lengths}]}


def smallest_budget(f, args, **options):
    with pytest.raises(BudgetError) as info:
        planned(f, args, memory_budget=0, **options)
    return info.value.smallest_bytes


def gradient(f, args, key=KEY, **options):
    value, found = jax.jit(jax.value_and_grad(rad(f, **options), positions(args, 1)))(key, *args)
    return value, ravel_pytree(found)[0]


def exact_gradient(f, args):
    value, found = jax.jit(jax.value_and_grad(f, positions(args)))(*args)
    return value, ravel_pytree(found)[0]


def assert_close(actual, expected, rtol=2e-5):
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * np.abs(expected).max())


TOLERANCE = {"half_precision_carry": 2e-2}  # XLA may skip a rounding to half precision in one program and not another


# Values and gradients


@pytest.mark.parametrize("name", few(PROGRAMS, *list(PROGRAMS)[::5], slow=5))
def test_exact_gradient(name):
    """Cut by hand in one of four ways, and by the planner under the tightest budget."""
    f, args = PROGRAMS[name]
    value, expected = exact_gradient(f, args)
    budget = smallest_budget(f, args, exact=True)
    tight = planned(f, args, exact=True, memory_budget=budget)
    assert tight.stored_bytes <= budget < planned(f, args, exact=True).stored_bytes
    assert cuts(tight) and not any(p.encoded for p in tight.walk())
    lengths = CUTS[list(PROGRAMS).index(name) % len(CUTS)]
    for options in ({"plan": cut(f, args, lengths, codec=Keep())}, {"exact": True, "memory_budget": budget}):
        found = gradient(f, args, **options)
        np.testing.assert_allclose(found[0], value, rtol=TOLERANCE.get(name, 1e-6))
        assert_close(found[1], expected, TOLERANCE.get(name, 2e-5))


FULL_PRECISION = [n for n in PROGRAMS if n != "half_precision_carry"]


@pytest.mark.parametrize("name", few(FULL_PRECISION, "carry_alone", slow=5))
def test_codes_are_those_of_the_loop_in_one_pass(name):
    """Under a rounding and a sampling codec in turn."""
    f, args = PROGRAMS[name]
    codec = (StochasticRound(4), SampleAxis(0.3))[list(PROGRAMS).index(name) % 2]
    whole, parts = planned(f, args, codec=codec), cut(f, args, codec=codec)
    assert any(p.encoded for p in whole.walk()) and not cuts(whole)
    assert cuts(planned(f, args, plan=parts)) and planned(f, args, plan=parts).to_dict()["encoded"]
    value, expected = gradient(f, args, plan=whole.to_dict())
    found = gradient(f, args, plan=parts)
    np.testing.assert_allclose(found[0], value, rtol=1e-6)
    assert_close(found[1], expected, 1e-4)
    assert np.abs(found[1] - exact_gradient(f, args)[1]).max() > 1e-3 * np.abs(expected).max()  # codes are at work


@pytest.mark.parametrize("lengths", few(CUTS, CUTS[-1], slow=3), ids=str)
@pytest.mark.parametrize("name", few(["stacked_forward", "stacked_reverse"], "stacked_reverse", slow=0))
@pytest.mark.usefixtures("ordered")
def test_every_cut_has_the_codes_and_the_gradient_of_the_whole(name, lengths):
    f, args = PROGRAMS[name]
    value, expected = gradient(f, args, codec=StochasticRound(2))
    assert np.abs(expected - exact_gradient(f, args)[1]).max() > 1e-2 * np.abs(expected).max()
    parts = cut(f, args, lengths, codec=StochasticRound(2))
    assert cuts(planned(f, args, plan=parts)) == [lengths]
    found = gradient(f, args, plan=parts)
    np.testing.assert_allclose(found[0], value, rtol=1e-6)
    assert_close(found[1], expected, 1e-4)


def test_codes_that_follow_the_place_in_a_segment_are_caught(monkeypatch):
    f, args = PROGRAMS["stacked_forward"]
    parts, cut_in_two = cut(f, args, codec=StochasticRound(2)), loops._cut
    _, expected = gradient(f, args, codec=StochasticRound(2))

    def numbered_from_zero(steps, length, reverse):
        numbers = {(LENGTH,): lambda i: i % length}  # those of the iterations
        return cut_in_two(jax.tree.map(lambda a: numbers.get(a.shape, lambda a: a)(a), steps), length, reverse)

    monkeypatch.setattr(loops, "_cut", numbered_from_zero)
    with pytest.raises(AssertionError):
        assert_close(gradient(f, args, plan=parts)[1], expected, 1e-4)


def test_segments_in_the_wrong_order_are_caught(monkeypatch):
    f, args = PROGRAMS["stacked_forward"]
    parts, cut_in_two = cut(f, args, codec=Keep()), loops._cut
    flip = partial(jax.tree.map, lambda a: jnp.flip(a, 0))
    monkeypatch.setattr(loops, "_cut", lambda *given: flip(cut_in_two(*given)))
    with pytest.raises(AssertionError):
        assert_close(gradient(f, args, plan=parts)[1], exact_gradient(f, args)[1])


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("stacked_reverse", StochasticRound(2)),
        pytest.param("cond_in_the_body", SampleAxis(0.3), marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_unbiased(name, codec, draws=2048):
    f, args = PROGRAMS[name]
    one = jax.grad(rad(f, plan=cut(f, args, codec=codec)), positions(args, 1))
    keys = jax.random.split(jax.random.key(7), draws)
    found = np.asarray(jax.jit(jax.vmap(lambda key: ravel_pytree(one(key, *args))[0]))(keys))
    assert found.std(0).max() > 1e-3 * np.abs(found).max()
    assert_unbiased(found, exact_gradient(f, args)[1], f"gradient of {name} in segments")


def test_same_key_same_gradient():
    f, args = PROGRAMS["stacked_forward"]
    parts = cut(f, args, codec=StochasticRound(2))
    one = jax.jit(lambda *args: jax.grad(rad(f, plan=parts), (1, 2, 3))(*args)[1])
    first, again, other = (one(jax.random.key(k), *args) for k in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.slow
def test_under_vmap():
    f, (h, w, xs) = PROGRAMS["stacked_reverse"]
    many = jnp.stack([h, 2 * h, -h])
    parts = cut(f, (h, w, xs), codec=StochasticRound(4))
    one = jax.value_and_grad(rad(f, plan=parts), (1, 2, 3))
    keys = jax.random.split(KEY, 3)
    values, found = jax.jit(jax.vmap(lambda key, h: one(key, h, w, xs)))(keys, many)
    alone = jax.jit(one)
    for i in range(3):
        value, expected = alone(keys[i], many[i], w, xs)
        np.testing.assert_allclose(values[i], value, rtol=1e-5)
        assert_close(ravel_pytree(jax.tree.map(lambda a, i=i: a[i], found))[0], ravel_pytree(expected)[0], 1e-4)


def test_exact_gradient_of_a_vmapped_loop():
    """Particles side by side in one loop: the loop is cut, not each particle's."""

    def f(hs, w):
        return jax.vmap(carry_alone, (0, None))(hs, w).sum()

    args = (jnp.stack([H, 2 * H, -H]), W)
    budget = smallest_budget(f, args, exact=True)
    assert cuts(planned(f, args, exact=True, memory_budget=budget))
    assert_close(gradient(f, args, exact=True, memory_budget=budget)[1], exact_gradient(f, args)[1])


def test_without_jit():
    f, args = PROGRAMS["stacked_forward"]
    parts = cut(f, args, codec=Keep())
    found = jax.grad(rad(f, plan=parts), positions(args, 1))(KEY, *args)
    assert_close(ravel_pytree(found)[0], exact_gradient(f, args)[1])


# A model


def series(returns):
    """A random walk of log-volatilities, drawn step by step by NumPyro's scan."""
    spread = numpyro.sample("spread", dist.HalfNormal(0.5))
    mix = numpyro.param("mix", W)

    def step(h, observed):
        h = numpyro.sample("h", dist.Normal(jnp.tanh(h @ mix), spread).to_event(1))
        numpyro.sample("return", dist.Normal(0.0, jnp.exp(h / 2)).to_event(1), obs=observed)
        return h, h

    scan(step, jnp.zeros(8), returns)


@pytest.mark.slow
def test_scan_of_a_model(particles=2):
    returns = normal(LENGTH, 8, seed=5)
    guide = AutoNormal(series)
    svi = SVI(series, guide, optax.adam(1e-2), Trace_ELBO(num_particles=particles))
    params = svi.get_params(svi.init(jax.random.key(0), returns))
    operands = (KEY, params, series, guide, returns)
    with pytest.raises(BudgetError) as info:
        RAD_ELBO(num_particles=particles, exact=True, memory_budget=0).plan(*operands)
    elbo = RAD_ELBO(num_particles=particles, exact=True, memory_budget=info.value.smallest_bytes)
    assert cuts(elbo.plan(*operands)[0])

    def of(elbo):
        return jax.jit(jax.value_and_grad(lambda params: elbo.loss(KEY, params, series, guide, returns)))(params)

    (value, found), (expected_value, expected) = of(elbo), of(svi.loss)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    for name in expected:
        assert_close(found[name], expected[name])


# Bytes


def test_a_cut_loop_stores_its_carries():
    f, args = PROGRAMS["carry_alone"]
    budget = smallest_budget(f, args, exact=True)
    plan = planned(f, args, exact=True, memory_budget=budget)
    ((node, (*lengths, last)),) = plan.segments.items()
    (child,) = plan.children[node]
    counts = [-(-a // b) for a, b in itertools.pairwise((LENGTH, *lengths, last))]
    assert node.carry_bytes == H.nbytes and plan.boundary_bytes(node) == sum(counts) * H.nbytes
    assert child.held == last and child.repeat == LENGTH
    # and the last carry, for its square
    assert plan.stored_bytes == sum(counts) * H.nbytes + child.stored_bytes + H.nbytes
    inputs = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in plan.graph.inputs]
    tape = jax.eval_shape(partial(sweep.forward, plan), jax.ShapeDtypeStruct((2,), jnp.uint32), inputs)[1]
    assert sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tape)) == counts[0] * H.nbytes + H.nbytes
    shown = explain(rad(f, exact=True, memory_budget=budget), KEY, *args, argnums=positions(args))
    assert f"{' x '.join(map(str, counts))} segments of {last}" in shown.table()
    assert sum(r.stored_bytes for r in shown.rows) == shown.stored_bytes == plan.stored_bytes


@pytest.mark.parametrize("length", [13, 127])
def test_a_prime_number_of_iterations_is_cut_unevenly(length):
    def f(h, w):
        return lax.scan(lambda h, _: (jnp.tanh(h @ w), None), h, None, length=length)[0].sum()

    budget = smallest_budget(f, (H, W), exact=True)
    plan = planned(f, (H, W), exact=True, memory_budget=budget)
    assert cuts(plan) and plan.stored_bytes < planned(f, (H, W), exact=True).stored_bytes * 4 * length**-0.5
    assert_close(gradient(f, (H, W), exact=True, memory_budget=budget)[1], exact_gradient(f, (H, W))[1])


@pytest.mark.parametrize("n_levels", [1, 2, 3])
def test_bytes_grow_like_a_root_of_the_length(monkeypatch, n_levels):
    """(levels + 1) times the (levels + 1)st root of the bytes of all iterations, each of which stores two states."""
    monkeypatch.setattr(strategies, "SEGMENT_LEVELS", (n_levels,))

    def least(length):
        def f(h, w):
            return lax.scan(lambda h, _: (jnp.tanh(h @ w), None), h, None, length=length)[0].sum()

        return smallest_budget(f, (H, W), exact=True) / H.nbytes

    for length in (256, 1024, 4096, 40_960):
        ideal = (n_levels + 1) * (2 * length) ** (1 / (n_levels + 1))
        assert 0.99 * ideal <= least(length) < 1.1 * ideal, length


def test_more_levels_only_for_fewer_bytes():
    """Each level is one more forward run."""

    def f(h, w):
        return (lax.scan(lambda h, _: (jnp.tanh(h @ w), None), h, None, length=1000)[0] ** 2).sum()

    whole = planned(f, (H, W), exact=True).stored_bytes
    budgets = {budget: planned(f, (H, W), exact=True, memory_budget=int(budget * whole)) for budget in (0.1, 0.04)}
    depths = {budget: [len(m) for m in cuts(plan)] for budget, plan in budgets.items()}
    assert depths == {0.1: [1], 0.04: [2]}
    least = planned(f, (H, W), exact=True, memory_budget=smallest_budget(f, (H, W), exact=True))
    assert [len(m) for m in cuts(least)] == [3]


def test_ample_budgets_do_not_cut():
    f, args = PROGRAMS["stacked_forward"]
    ample = planned(f, args, codec=Keep()).stored_bytes
    assert not cuts(planned(f, args, exact=True, memory_budget=2 * ample))
    assert not cuts(planned(f, args, exact=True))


@pytest.mark.parametrize(
    ("name", "exact"),
    [
        ("stacked_forward", True),
        ("nested_scan", False),
        ("typed_key_in_the_carry", False),
        ("two_loops", True),
        pytest.param("stacked_forward", False, marks=pytest.mark.exhaustive),
        pytest.param("nested_scan", True, marks=pytest.mark.exhaustive),
        pytest.param("typed_key_in_the_carry", True, marks=pytest.mark.exhaustive),
        pytest.param("two_loops", False, marks=pytest.mark.exhaustive),
    ],
)
def test_budgets_are_met_and_more_never_costs_more(name, exact):
    f, args = PROGRAMS[name]
    least, most = smallest_budget(f, args, exact=exact), planned(f, args, codec=Keep()).stored_bytes
    costs = []
    for budget in np.unique(np.geomspace(least, most + 1, 10).astype(int)).tolist():
        plan = planned(f, args, memory_budget=budget, exact=exact)
        assert plan.stored_bytes <= budget
        costs.append(plan.predicted.added_seconds + plan.predicted.added_variance)
    assert all(b <= a + 0.005 * abs(a) for a, b in itertools.pairwise(costs)), costs
    with pytest.raises(BudgetError, match=f"{least} bytes"):
        planned(f, args, memory_budget=least - 1, exact=exact)


def test_compiled_memory_of_a_long_loop():
    """1024 steps of 32 KiB each: 32 MiB for jax.grad, 2 MiB in 32 segments."""

    def f(h, w):
        return (lax.scan(lambda h, _: (jnp.tanh(h @ w), None), h, None, length=1024)[0] ** 2).sum()

    h, w = normal(128, 64), normal(64, 64, scale=0.1)
    budget = smallest_budget(f, (h, w), exact=True)
    exact = temp_bytes(jax.grad(f, (0, 1)), h, w)
    temp = temp_bytes(partial(jax.grad(rad(f, exact=True, memory_budget=budget), (1, 2)), KEY), h, w)
    assert exact > 1024 * h.nbytes
    assert temp < exact / 5
    assert temp < 2 * budget
    assert_close(gradient(f, (h, w), exact=True, memory_budget=budget)[1], exact_gradient(f, (h, w))[1])
