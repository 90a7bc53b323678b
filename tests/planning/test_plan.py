"""The plan: what it counts is what the tape holds, it is the cheapest there is, and no budget is ever exceeded."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core as jex_core
from jax.interpreters import ad, mlir
from programs import few, normal, temp_bytes

import numpyro_rad
from numpyro_rad import BudgetError, Keep, StochasticRound, explain, rad
from numpyro_rad.ad import _jax, plan, schedule
from numpyro_rad.ad.linearize import linearize
from numpyro_rad.ad.sweep import forward
from numpyro_rad.codecs import RandomProjection, SampleAxis
from numpyro_rad.planning import costs, problem, solver
from numpyro_rad.planning.readers import disjoint_groups
from numpyro_rad.planning.request import PlanRequest, uniform
from numpyro_rad.planning.strategies import make_plan

pytestmark = [pytest.mark.in_one_go, pytest.mark.usefixtures("no_residual_is_too_small")]

KEY = jax.random.key(0)
X = np.random.default_rng(0).standard_normal((16, 32)).astype(np.float32)
W = np.random.default_rng(1).standard_normal((32, 32)).astype(np.float32) * 0.3
WIDE = np.random.default_rng(2).standard_normal((32, 64)).astype(np.float32) * 0.3  # too large for a draw to be kept


def planned(f, *args, codec=None, argnums=None, **options):
    """The plan of `f` differentiated with respect to all (or some) of its arguments."""
    argnums = tuple(range(len(args))) if argnums is None else argnums
    return rad(f, codec=codec, **options).planned(args, {}, argnums)[0]


def table(f, *args, argnums=None, **options):
    return explain(rad(f, **options), KEY, *args, argnums=tuple(range(len(args))) if argnums is None else argnums)


def gelu_network(x, w):
    for _ in range(3):
        x = jax.nn.gelu(x @ w)
    return (x**2).sum()


def relu_network(x, w):
    for _ in range(3):
        x = jax.nn.relu(x @ w)
    return x.sum()


def recurrence(x, w):
    def step(h, x):
        h = jnp.tanh(h @ w + x)
        return h, jnp.maximum(h, 0.1 * h).sum()

    h, ys = lax.scan(step, x, jnp.stack([x, x @ w, x]))
    return h.sum() + ys.sum()


def scan_over_computed(x, w):
    def step(c, y):
        return c @ jnp.linalg.cholesky(jnp.eye(32) * 9 + jnp.outer(y, y) * 0.1), None

    return lax.scan(step, jnp.eye(32), x @ w)[0].sum()


def conditional(x, w):
    cases = [lambda h: jnp.tanh(h @ w) @ w, lambda h: jax.nn.relu(h @ w), lambda h: h]
    return lax.switch(jnp.argmax(x[0]) % 3, cases, jnp.sin(x @ w)).sum()


def scan_of_cond(x, w):
    def step(h, i):
        return lax.cond(i > 1, lambda h: jnp.tanh(h @ w), lambda h: h * jnp.sin(h), h), None

    return lax.scan(step, x, jnp.arange(3))[0].sum()


def sampled_weights(loc, scale, key=KEY):
    x = X
    for layer_key in jax.random.split(key, 3):
        w = loc + jnp.exp(scale) * jax.random.normal(layer_key, loc.shape)
        x = jax.nn.gelu(x @ w) @ w.T
    return x.sum()


def linear_algebra(x, w):
    return jnp.linalg.slogdet(w @ w.T + 4 * jnp.eye(32))[1] + jnp.linalg.solve(w + 9 * jnp.eye(32), x.T).sum()


PROGRAMS = {
    f.__name__: (f, args)
    for f, *args in (
        (gelu_network, X, W),
        (relu_network, X, W),
        (recurrence, X, W),
        (scan_over_computed, X, W),
        (conditional, X, W),
        (scan_of_cond, X, W),
        (sampled_weights, WIDE, WIDE),
        (linear_algebra, X, W),
    )
}

BRANCHES = ("conditional", "scan_of_cond")
"""Programs with branches, which share what is stored; each has rows of its own."""


# Bytes


@pytest.mark.parametrize("options", ({}, {"exact": True}, {"memory_budget": 0}), ids=str)
@pytest.mark.parametrize(
    "f", (lambda x, w: 2 * x.sum() + w.sum(), lambda x, w: (x @ w).sum()), ids=("linear", "bilinear")
)
def test_predictions_are_floats(f, options):
    """Also of plans that code nothing: files have 0 and 0.0 as different numbers."""
    predicted = planned(f, X, W, **options).predicted
    assert (type(predicted.added_seconds), type(predicted.added_variance)) == (float, float)


@pytest.mark.parametrize(
    "codec", [Keep(), StochasticRound(4), *few([SampleAxis(0.1), RandomProjection(0.1)], SampleAxis(0.1))], ids=str
)
@pytest.mark.parametrize("name", PROGRAMS)
def test_stored_bytes_are_those_of_the_tape(name, codec):
    f, args = PROGRAMS[name]
    p = planned(f, *args, codec=codec)
    seed = jax.ShapeDtypeStruct((2,), jnp.uint32)
    inputs = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in p.graph.inputs]
    tape = jax.eval_shape(partial(forward, p), seed, inputs)[1]
    assert p.stored_bytes == sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tape))
    shown = explain(rad(f, codec=codec), KEY, *args, argnums=tuple(range(len(args))))
    rows = sum(r.stored_bytes for r in shown.rows)
    assert shown.stored_bytes == p.stored_bytes and (
        rows == p.stored_bytes or (name in BRANCHES and rows > p.stored_bytes)
    )


def eight_networks(x, w):
    """Of which one runs, each as deep as its number."""

    def network(depth):
        def run(x):
            for i in range(depth):
                x = jnp.sin(x @ (w + i))
            return (lax.scan(lambda h, y: (jnp.tanh(h + y), None), x[0], x)[0] @ w).sum()

        return run

    return lax.switch(jnp.argmax(x[0]) % 8, [network(depth) for depth in range(1, 9)], x)


@pytest.mark.parametrize("options", ({"exact": True}, {"codec": StochasticRound(4)}), ids=str)
def test_branches_store_as_much_as_the_largest_of_them(options):
    p = planned(eight_networks, X, W, **options)
    (plans,) = p.children.values()
    sizes = [plan.stored_bytes for plan in plans]
    assert sizes == sorted(sizes) and p.stored_bytes == p.tapes_bytes(*p.children) + 4 == sizes[-1] + 4
    if "exact" in options:
        g = jax.jit(jax.grad(partial(rad(eight_networks, **options), KEY), 1))
        assert g.lower(X, W).compile().memory_analysis().temp_size_in_bytes < 0.8 * temp_bytes(
            jax.grad(eight_networks, 1), X, W
        )
        for depth in range(8):
            x = jnp.asarray(X).at[0, depth].set(9.0)
            np.testing.assert_allclose(g(x, W), jax.grad(eight_networks, 1)(x, W), rtol=1e-4, atol=1e-4)


def test_the_smallest_budget_that_is_named_is_met_where_branches_share():
    with pytest.raises(BudgetError) as caught:
        planned(eight_networks, X, W, memory_budget=100, exact=True)
    least = caught.value.smallest_bytes
    assert planned(eight_networks, X, W, memory_budget=least, exact=True).stored_bytes <= least


def test_what_a_loop_keeps_of_its_inputs_is_not_kept_outside_as_well():
    """Stacked inputs that cannot be made again: they are kept as a whole or slice by slice, not both."""
    y_bytes = X.nbytes

    def f(x, w):  # the carry of each step, (4, 8), and the slice of y, (8, 4), are read by the two products
        return lax.scan(lambda c, y: (c @ y.reshape(8, 4) @ jnp.ones((4, 8)), None), jnp.ones((4, 8)), x @ w)[0].sum()

    p = planned(f, X, W, codec=Keep())
    (inner,) = [q for q in p.walk() if q.repeat == 16]
    assert sum(plan.kept_bytes(v) for v in p.kept) in (0, y_bytes)
    assert p.stored_bytes <= 2 * y_bytes
    assert p.stored_bytes == inner.stored_bytes + sum(plan.kept_bytes(v) for v in p.kept)


def test_compiled_memory_of_a_deep_network():
    """8 layers on 1024 rows of 256 features: a layer's activations are 1 MiB. Bounds have a third to spare."""

    def f(x, ws):
        for w in ws:
            x = jax.nn.gelu(x @ w)
        return x.sum()

    x, ws = jnp.zeros((1024, 256)), [jnp.zeros((256, 256))] * 8
    exact = temp_bytes(jax.value_and_grad(f, 1), x, ws)
    temp = {}
    for codec in (Keep(), StochasticRound(4), StochasticRound(2)):
        temp[codec] = temp_bytes(partial(numpyro_rad.value_and_grad(f, 1, codec=codec), KEY), x, ws)
    assert temp[Keep()] < 0.7 * exact
    assert temp[StochasticRound(4)] < 0.4 * exact
    assert temp[StochasticRound(2)] < 0.35 * exact
    assert temp[StochasticRound(2)] < temp[StochasticRound(4)] < temp[Keep()]


# The minimum cut


def random_program(seed):
    """A few steps, cheap or not, on values of different sizes, some reduced and some joined."""
    rng = np.random.default_rng(seed)
    steps = [(int(rng.integers(6)), *rng.integers(0, 100, 2).tolist()) for _ in range(3)]

    def f(x, w):
        values = [x @ w]  # nothing of what follows is free
        for kind, first, second in steps:
            a, b = values[first % len(values)], values[second % len(values)]
            values.append(
                [
                    lambda a, b: jnp.tanh(a),
                    lambda a, b: a * b.mean(),
                    lambda a, b: jnp.broadcast_to(a.sum(0), a.shape) * b if a.shape == b.shape else jnp.sin(a),
                    lambda a, b: a @ jnp.ones((a.shape[1], 40), a.dtype),
                    lambda a, b: a[:, : max(20, a.shape[1] // 2)] ** 2,
                    lambda a, b: jax.nn.relu(a) @ jnp.cos(a).T @ b,
                ][kind](a, b)
            )
        return sum(v.sum() for v in values[1:])

    return f


def cheapest(p, codec):
    """Fewest bytes by trying everything: any set of kept values, codes for the residuals that it does not give."""
    graph, free = p.graph, set(p.graph.inputs)
    exact, linear = set(), {}
    for edge in graph.edges:
        for residual, on in zip(edge.residuals, edge.linear, strict=True):
            if on:
                linear.setdefault(p.carrier[residual], set()).add(edge)
            else:
                exact.add(residual)
    policy = uniform(codec)
    groups = disjoint_groups(graph, linear)
    sizes = {}
    for value, readers in groups.items():
        for chosen in policy((value.number,), value, 1) if value not in exact else ():
            sizes[value] = chosen.stored_bytes(value.aval.shape, value.aval.dtype) * len(readers)

    def makers(value):
        equation = graph.producer.get(value)
        if equation is None or not problem._is_made_again(equation, value, 1):
            return None
        return [a for a in equation.inputs if hasattr(a, "aval")]

    ancestors, todo = [], list(exact | set(linear))
    while todo:
        value = todo.pop()
        if value not in ancestors and value not in free:
            ancestors.append(value)
            todo.extend(makers(value) or [])
    if len(ancestors) > 13:
        return None  # too many to try
    best = np.inf
    for kept in itertools.product([False, True], repeat=len(ancestors)):
        known = free | set(itertools.compress(ancestors, kept))
        stored = sum(plan.kept_bytes(v) for v in itertools.compress(ancestors, kept))
        if stored >= best:
            continue
        obtainable = {}

        def can_make(value, known=known, obtainable=obtainable):
            if value not in obtainable:
                operands = makers(value)
                obtainable[value] = value in known or (operands is not None and all(map(can_make, operands)))
            return obtainable[value]

        for value in exact | set(linear):
            if not can_make(value):
                stored += sizes.get(value, np.inf) if value not in exact else np.inf
        best = min(best, stored)
    return best


@pytest.mark.parametrize("codec", [Keep(), StochasticRound(4), SampleAxis(0.4)], ids=str)
def test_minimum_cut_is_the_cheapest_of_all_plans(codec):
    compared = 0
    for seed in range(16):
        p = planned(random_program(seed), X, W, codec=codec)
        best = cheapest(p, codec)
        if best is not None:
            assert p.stored_bytes == best, f"program {seed}"
            compared += 1
    assert compared >= 8


# What is stored


def test_relu_stores_masks():
    shown = table(relu_network, X, W, codec=StochasticRound(4))
    assert sum(r.stored_bytes for r in shown.rows if r.decision == "1-bit mask") == 3 * X.size // 8


def test_relu_masks_take_a_bit_each_when_all_else_is_exact():
    def f(x):  # its pullback reads nothing but masks
        for w in (W, W, W):
            x = jax.nn.relu(x @ w)
        return x.sum()

    assert planned(f, X, codec=Keep()).stored_bytes == 3 * X.size // 8


def is_small(value):
    return plan.kept_bytes(value) <= problem.SMALL_BYTES


def test_sampled_weights_are_made_again_and_their_keys_are_stored():
    for codec in (Keep(), StochasticRound(2)):
        p = planned(sampled_weights, WIDE, WIDE, codec=codec)
        stored = [*p.kept, *p.encoded]
        assert all(v.aval.shape not in (WIDE.shape, WIDE.T.shape) for v in stored), "a weight or its noise is stored"
        keys = [v for v in p.kept if is_small(v)]
        assert 1 <= len(keys) <= 2 * 3


def test_a_chain_of_key_splits_is_kept_short():
    """A new key for each layer out of the last: every key is stored, none is made again from the first."""

    def f(loc):
        key, x = jax.random.key(0), X
        for _ in range(4):
            key, layer_key = jax.random.split(key)
            w = loc + jax.random.normal(layer_key, loc.shape)
            x = jnp.tanh(x @ w) @ w.T
        return x.sum()

    p = planned(f, WIDE, codec=StochasticRound(2))
    assert 4 <= len([v for v in p.kept if is_small(v)]) <= 2 * 4


def test_what_follows_from_the_inputs_is_never_stored():
    def f(x, w):
        scale = jnp.exp(w) / (1 + jnp.exp(w)).sum(0)
        return (jnp.sin(x) * jnp.where(x > 0, x, jnp.cumsum(x, 0))) @ (scale + jax.random.normal(KEY, w.shape))

    for codec in (Keep(), StochasticRound(4)):
        p = planned(f, X, WIDE, codec=codec)
        assert all(is_small(v) for v in p.kept) and not p.encoded


def test_readers_off_each_others_path_share_one_copy():
    def parallel(x, w):
        h = jnp.tanh(x @ w)
        return (h @ w).sum() + (h @ w.T).sum()

    def stacked(x, w):
        h = jnp.tanh(x @ w)
        g = h.T @ h
        return (w @ g @ g).sum()

    shared = planned(parallel, X, W, codec=StochasticRound(2))
    readers = [e.readers for e in shared.encoded.values()]
    assert sorted(len(edges) for groups in readers for edges in groups) == [1, 2]
    assert all(len(groups) == 1 for groups in readers)
    apart = planned(stacked, X, W, codec=StochasticRound(2))
    assert max(len(e.readers) for e in apart.encoded.values()) > 1


def test_small_residuals_stay_exact():
    p = planned(lambda x, w: jnp.tanh(x[:2] @ w).sum(), X, W, codec=StochasticRound(2), costs=costs.CPU)
    assert not p.encoded and p.kept


# Budgets


def n_barriers(f, *args, **options):
    text = str(jax.make_jaxpr(jax.grad(rad(f, **options), 1))(KEY, *args))
    return text.count("optimization_barrier[") + text.count("= optimization_barrier ")


def test_small_bodies_of_loops_are_left_in_the_order_of_the_compiler(monkeypatch):
    large = np.tile(X, (2**20 // X.nbytes, 1))
    free, in_order = (n_barriers(recurrence, x, W, codec=StochasticRound(4)) for x in (X, large))
    network = n_barriers(gelu_network, X, W, codec=StochasticRound(4))
    monkeypatch.setattr(schedule, "ORDERED_FROM", 0)
    assert 0 < free < in_order == n_barriers(recurrence, X, W, codec=StochasticRound(4))
    assert 0 < network == n_barriers(gelu_network, X, W, codec=StochasticRound(4))


BUDGETED = ["gelu_network", "relu_network", "recurrence", "scan_of_cond", "sampled_weights"]


def smallest_budget(f, args):
    with pytest.raises(BudgetError) as info:
        planned(f, *args, memory_budget=0)
    return info.value.smallest_bytes


@pytest.mark.parametrize("name", few(BUDGETED, "gelu_network"))
def test_no_budget_is_exceeded_and_more_never_makes_it_worse(name):
    f, args = PROGRAMS[name]
    least, most = smallest_budget(f, args), planned(f, *args, codec=Keep()).stored_bytes
    costs = []
    for budget in np.unique(np.geomspace(least, most + 1, 16).astype(int)).tolist():
        p = planned(f, *args, memory_budget=budget)
        assert p.stored_bytes <= budget
        if not p.n_chain_segments:  # chains are cut only where codes alone do not fit: another kind of plan
            costs.append(p.predicted.added_seconds + p.predicted.added_variance)
    assert all(b <= a * (1 + solver.GOOD_GAP) for a, b in itertools.pairwise(costs)), costs
    assert costs[-1] < costs[0] / 2


@pytest.mark.parametrize("name", BUDGETED)
def test_smallest_feasible_budget(name):
    f, args = PROGRAMS[name]
    least = smallest_budget(f, args)
    assert planned(f, *args, memory_budget=least).stored_bytes <= least
    with pytest.raises(BudgetError, match=f"{least} bytes") as info:
        planned(f, *args, memory_budget=least - 1)
    assert info.value.smallest_bytes == least
    assert "test_plan.py:" in str(info.value)


@pytest.mark.slow
def test_budget_holds_for_the_gradient_itself():
    f, args = PROGRAMS["gelu_network"]
    least = smallest_budget(f, args)
    gradient = jax.grad(rad(f, memory_budget=least), 2)(KEY, *args)
    assert np.isfinite(gradient).all()
    with pytest.raises(BudgetError):
        jax.grad(rad(f, memory_budget=least - 1), 2)(KEY, *args)
    rad(f, memory_budget=0)(KEY, *args)  # the value needs no plan


@pytest.mark.parametrize(
    ("text", "number"),
    [("64MiB", 64 * 2**20), ("1.5 kB", 1500), ("100000", 100000), (" 2KiB ", 2048), ("1e5B", 100000), ("1GB", 10**9)],
)
def test_budgets_in_words(text, number):
    assert (
        planned(gelu_network, X, W, memory_budget=text).stored_bytes
        == planned(gelu_network, X, W, memory_budget=number).stored_bytes
    )


@pytest.mark.parametrize(
    ("budget", "error", "says"),
    [
        (-1, ValueError, "negative"),
        ("-5MiB", ValueError, "negative"),
        ("lots", ValueError, "cannot be read"),
        ("64 mebibytes", ValueError, "cannot be read"),
        ("", ValueError, "cannot be read"),
        ("nan", ValueError, "cannot be read"),
        ("1e999", ValueError, "cannot be read"),
        (1.5, TypeError, "number of bytes is expected"),
        (True, TypeError, "number of bytes is expected"),
        ([64], TypeError, "number of bytes is expected"),
    ],
)
def test_bad_budgets(budget, error, says):
    for make in (rad, numpyro_rad.grad, numpyro_rad.value_and_grad):
        with pytest.raises(error, match=says):
            make(gelu_network, memory_budget=budget)


def test_bad_options():
    with pytest.raises(ValueError, match="exclude each other"):
        rad(gelu_network, codec=Keep(), memory_budget="1MiB")
    for codec in ("4-bit", 4, StochasticRound):
        with pytest.raises(TypeError, match="is not a codec"):
            rad(gelu_network, codec=codec)


@pytest.mark.parametrize(
    "f", [lambda x: x, lambda x: (x.sum(), x), lambda x: x.sum() * 1j, lambda x: jnp.argmax(x), lambda x: None]
)
def test_loss_that_is_no_real_scalar(f):
    with pytest.raises(TypeError, match="real scalar"):
        numpyro_rad.grad(f)(KEY, jnp.ones(3))


@pytest.mark.parametrize(
    "key",
    [
        0,
        1.5,
        None,
        "key",
        np.zeros(2, np.float32),
        np.zeros(2, np.int32),
        np.zeros((3, 2), np.uint32),
        jax.random.split(KEY),
    ],
    ids=str,
)
def test_wrong_keys(key):
    with pytest.raises(TypeError, match="one JAX PRNG key"):
        numpyro_rad.grad(gelu_network)(key, X, W)
    with pytest.raises(TypeError, match="one JAX PRNG key"):
        rad(gelu_network)(key, X, W)


# Determinism


def test_the_plan_is_the_same_in_every_trace():
    for f, args in PROGRAMS.values():
        first, second = (str(table(f, *args, codec=StochasticRound(2))) for _ in range(2))
        assert first == second
    f, args = PROGRAMS["gelu_network"]
    assert str(table(f, *args, memory_budget=6000)) == str(table(f, *args, memory_budget=6000))


# Numbers that are none


@pytest.mark.parametrize("codec", [Keep(), StochasticRound(4), SampleAxis(0.1), RandomProjection(0.1)], ids=str)
@pytest.mark.parametrize("bad", few([np.nan, np.inf], np.inf, slow=0))
def test_nan_and_infinity_reach_the_gradient(codec, bad):
    def f(w, x):
        h = (x @ w) ** 3  # infinite in one row
        return (h @ w).sum()

    x = X.copy()
    x[3, 5] = bad
    for seed in range(3):
        gradient = jax.jit(jax.grad(rad(f, codec=codec), 1))(jax.random.key(seed), W, x)
        assert np.isnan(gradient).any()
        assert not np.isfinite(gradient[5]).any()


# The table


def test_table_shows_the_program():
    def f(params, x):
        h = jnp.tanh(x @ params["first"])  # here is the residual
        return (h @ params["second"]).sum()

    line = f.__code__.co_firstlineno + 1
    big = np.ones((64, 32), np.float32)
    shown = table(f, {"first": W, "second": W}, big, argnums=0, codec=StochasticRound(4))
    encoded = [r for r in shown.rows if r.decision == "4-bit"]
    assert {r.line for r in encoded} == {f"test_plan.py:{line}"}
    assert {r.site for r in encoded} == {"0.first", "0.second"}
    assert {(r.shape, r.dtype, r.exact_bytes) for r in encoded} == {((64, 32), "float32", 64 * 32 * 4)}
    assert all(0 < r.relative_variance < 0.1 for r in encoded)
    assert shown.exact_bytes == sum(r.exact_bytes for r in shown.rows if r.operation != "recomputation")
    text = shown.table()
    assert f"test_plan.py:{line}" in text and "64x32" in text and "4-bit" in text and "safe default" not in text
    assert text.splitlines()[-4].startswith("total")


def test_table_multiplies_by_the_length_of_loops():
    shown = table(recurrence, X, W, codec=StochasticRound(4))
    assert any(r.shape == (3, *X.shape) and r.decision == "4-bit" for r in shown.rows)


def test_table_lists_what_took_the_safe_default():
    def f(x, w):
        return lax.linalg.triangular_solve(jnp.tril(jnp.tanh(w @ w)) + 9 * jnp.eye(32), x).sum()

    shown = table(f, X, W, codec=StochasticRound(4))
    line = f.__code__.co_firstlineno + 1
    assert shown.defaults == (f"triangular_solve (test_plan.py:{line})",)
    assert f"safe default (no rule, or none that is unbiased): triangular_solve (test_plan.py:{line})" in shown.table()
    assert all(r.relative_variance == 0 for r in shown.rows if r.operation == "triangular_solve")
    assert any("custom_linear_solve" in d for d in table(linear_algebra, X, W).defaults)


def unknown_primitive():
    """y = sin(a) * x as a primitive of its own, with a linear tangent part that nobody has heard of."""
    primal, linear = jex_core.Primitive("unheard_of"), jex_core.Primitive("unheard_of_linear")
    for p, formula in ((primal, lambda a, x: jnp.sin(a) * x), (linear, lambda a, t: jnp.sin(a) * t)):
        p.def_impl(formula)
        p.def_abstract_eval(lambda a, x: jax.core.ShapedArray(x.shape, x.dtype))
        mlir.register_lowering(p, mlir.lower_fun(formula, multiple_results=False))
    ad.primitive_jvps[primal] = lambda primals, tangents: (
        primal.bind(*primals),
        linear.bind(primals[0], ad.instantiate_zeros(tangents[1])),
    )
    ad.primitive_transposes[linear] = lambda ct, a, t: [None, linear.bind(a, ct)]
    return primal


def test_unknown_primitive_takes_the_safe_default():
    primitive = unknown_primitive()

    def f(x, w):
        h = jnp.tanh(x @ w)
        return (primitive.bind(lax.stop_gradient(h), jnp.exp(x @ w)) @ w).sum()

    shown = table(f, X, W, codec=StochasticRound(4))
    assert any("unheard_of_linear" in d for d in shown.defaults)
    rows = [r for r in shown.rows if r.operation == "unheard_of_linear"]
    assert rows and all(r.relative_variance == 0 for r in rows)
    got = jax.grad(rad(f, codec=Keep()), (1, 2))(KEY, X, W)
    for a, b in zip(got, jax.grad(f, (0, 1))(X, W), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_explain_rejects_what_has_no_plan():
    with pytest.raises(TypeError, match="explain needs a RAD_ELBO, an SVI that has one, or the result of rad"):
        explain(jax.grad(gelu_network), KEY, X, W)


def test_explain_counts_arguments_from_the_end_too():
    assert str(table(gelu_network, X, W, argnums=-1)) == str(table(gelu_network, X, W, argnums=1))
    assert table(gelu_network, X, W, argnums=-1).rows


def test_dead_edges_and_unused_inputs_need_nothing():
    jaxpr, _, _ = _jax.trace(lambda x, w: (x @ w).sum() + 0 * jnp.tanh(x @ w @ w).sum(), X, W)
    p = make_plan(linearize(jaxpr, [False, False]), PlanRequest(uniform(Keep())))
    assert p.stored_bytes == 0 and not p.graph.edges


def test_weights_of_all_layers_in_one_array_take_no_more_than_apart():
    """What a layer adds to their cotangent is added at once: to wait would keep the cotangents of all layers alive."""
    x, ws = normal(2048, 32), normal(8, 32, 32, scale=0.2)

    def stacked(ws):
        h = x
        for i in range(len(ws)):
            h = h + jax.nn.gelu(h) @ ws[i]
        return (h**2).sum()

    def temp(f, args):
        return temp_bytes(jax.grad(partial(rad(f, codec=StochasticRound(4)), KEY)), args)

    together, apart = temp(stacked, ws), temp(stacked, list(ws))
    assert together < 1.5 * apart
