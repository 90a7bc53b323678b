"""Chains of layers cut into segments that run again: the same gradients and codes, fewer bytes held at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree
from programs import few, normal, temp_bytes

from numpyro_rad import Keep, StochasticRound, explain, rad
from numpyro_rad.ad import sweep
from numpyro_rad.ad.plan import kept_bytes
from numpyro_rad.ad.segments import cut_chain
from numpyro_rad.planning import solver, strategies
from numpyro_rad.planning.assembly import plan_of
from numpyro_rad.planning.problem import Cuts, PlanProblem
from numpyro_rad.planning.request import PlanRequest, uniform

KEY = jax.random.key(5)


pytestmark = [pytest.mark.in_one_go, pytest.mark.usefixtures("arrays_of_any_size_count")]


X, WS = normal(64, 16), [normal(16, 16, seed=i, scale=0.4) for i in range(12)]
PROGRAMS = {}


def program(f):
    PROGRAMS[f.__name__] = f
    return f


@program
def layers(x, ws):
    for w in ws:
        x = jax.nn.gelu(x @ w)
    return (x**2).sum()


@program
def skips_and_a_shared_weight(x, ws):
    """The first layer's output is read by every segment, and one weight by all layers."""
    first = jnp.tanh(x @ ws[0])
    h = first
    for w in ws[1:]:
        h = h + jnp.sin(h @ w + first @ ws[0])
    return (h * first).sum()


@program
def sampled_weights(x, ws):
    """Weights made from noise: nothing of them belongs to a segment."""
    for i, w in enumerate(ws):
        noise = jax.random.normal(jax.random.fold_in(KEY, i), w.shape)
        x = jax.nn.relu(x @ (w + 0.1 * noise)) + 0.1 * x
    return jnp.log1p(x**2).mean()


@program
def a_loop_between(x, ws):
    """A loop is never run again as part of a segment."""
    for w in ws[:6]:
        x = jnp.tanh(x @ w)
    x, sums = lax.scan(lambda c, w: (jnp.tanh(c @ w), c.sum()), x, jnp.stack(ws[6:9]))
    for w in ws[9:]:
        x = jnp.tanh(x @ w)
    return x.sum() + sums.sum()


@program
def branches(x, ws):
    for w in ws:
        x = lax.cond(x.sum() > 0, lambda x, w=w: jnp.sin(x @ w), lambda x: 0.5 * x, x)
        x = jnp.cos(x @ w)
    return x.sum()


def cut(monkeypatch, f, n_segments, codec, only=None):
    """The plan of fewest bytes with the chain in ``n_segments`` (None: as a whole), from now on that of every program.

    :param only: paths of the values that may be coded; None for all.
    """

    def codecs(path, value, repeat):
        return uniform(codec)(path, value, repeat) if only is None or path in only else ()

    def make_plan(graph, request):
        chain = cut_chain(graph, n_segments) if n_segments else None
        problem = PlanProblem(graph, PlanRequest(codecs, request.costs), Cuts(chain=chain))
        return plan_of(problem, solver.smallest(problem.timed))

    monkeypatch.setattr(strategies, "make_plan", make_plan)
    return rad(f, codec=codec).planned((X, WS), {}, (0, 1))[0]


FAST = ("layers", "skips_and_a_shared_weight")
CASES = few(PROGRAMS, *FAST, slow=2)


def coded(plan):
    return {(*p.path, v.number) for p in plan.walk() for v in p.encoded}


def gradient(f, **options):
    return ravel_pytree(jax.jit(jax.grad(rad(f, **options), argnums=(1, 2)))(KEY, X, WS))[0]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("n_segments", few([2, 3], 3))
def test_gradients_are_exact(monkeypatch, name, n_segments):
    f = PROGRAMS[name]
    plan = cut(monkeypatch, f, n_segments, codec=Keep())
    assert plan.n_chain_segments == n_segments and plan.runs_again
    exact = ravel_pytree(jax.jit(jax.grad(f, argnums=(0, 1)))(X, WS))[0]
    np.testing.assert_allclose(gradient(f, codec=Keep()), exact, rtol=2e-4, atol=2e-5 * float(jnp.abs(exact).max()))


def whole_and_cut(monkeypatch, f):
    """The 2-bit gradient of ``f`` in one pass, and a function for that in three segments, with the same codes."""
    codec = StochasticRound(2)
    paths = None
    for _ in range(4):  # what a boundary keeps need not be coded: until both plans code the same values
        paths = coded(cut(monkeypatch, f, 3, codec, paths)) & coded(cut(monkeypatch, f, None, codec, paths))
    assert len(paths) >= 12 and coded(cut(monkeypatch, f, None, codec, only=paths)) == paths
    whole = gradient(f, codec=codec)
    plan = cut(monkeypatch, f, 3, codec, only=paths)
    assert coded(plan) == paths and any(v in plan.encoded for values in plan.runs_again.values() for v in values)
    return whole, lambda: gradient(f, codec=codec)


@pytest.mark.parametrize("name", few(PROGRAMS, "skips_and_a_shared_weight", slow=3))
def test_codes_are_those_of_one_pass(monkeypatch, name):
    """The same codes are drawn when a segment runs again, so the estimate is the same one."""
    whole, again = whole_and_cut(monkeypatch, PROGRAMS[name])
    np.testing.assert_allclose(again(), whole, rtol=1e-3, atol=1e-4 * float(jnp.abs(whole).max()))


@pytest.mark.slow
def test_other_codes_when_a_segment_runs_again_are_caught(monkeypatch):
    whole, again = whole_and_cut(monkeypatch, layers)
    run_again = sweep._run_again
    monkeypatch.setattr(sweep, "_run_again", lambda plan, seed, *rest: run_again(plan, seed + 1, *rest))
    assert float(jnp.abs(again() - whole).max()) > 1e-2 * float(jnp.abs(whole).max())


def test_bytes_count_one_segment_at_a_time(monkeypatch):
    once = rad(layers, codec=Keep()).planned((X, WS), {}, (0, 1))[0]
    plan = cut(monkeypatch, layers, 3, codec=Keep())
    layer = X.nbytes
    assert once.stored_bytes >= 12 * layer
    assert 5 * layer <= plan.stored_bytes <= 7 * layer  # four layers of a segment, two boundaries
    late = {s: sum(kept_bytes(v) for v in plan.kept if plan.segment_of.get(v) == s) for s in range(3)}
    early = sum(kept_bytes(v) for v in plan.kept if v not in plan.segment_of)
    assert plan.stored_bytes == early + max(late.values())
    tape = jax.eval_shape(
        lambda *args: sweep.forward(plan, jnp.zeros(2, jnp.uint32), args)[1], *jax.tree.leaves((X, WS))
    )
    stored_forward = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tape))
    assert stored_forward == early + late[2]  # the last segment's are stored at once


def test_the_planner_cuts_where_an_exact_budget_asks_for_it():
    once = rad(layers, exact=True).planned((X, WS), {}, (0, 1))[0]
    budget = int(0.6 * once.stored_bytes)
    plan = rad(layers, memory_budget=budget, exact=True).planned((X, WS), {}, (0, 1))[0]
    assert plan.stored_bytes <= budget and plan.n_chain_segments > 1 and not plan.encoded
    shown = explain(rad(layers, memory_budget=budget, exact=True), KEY, X, WS, argnums=(0, 1))
    assert shown.stored_bytes == plan.stored_bytes < sum(r.stored_bytes for r in shown.rows)
    assert f"keep, segment 1 of {plan.n_chain_segments}" in shown.table()
    exact = ravel_pytree(jax.grad(layers, argnums=(0, 1))(X, WS))[0]
    found = gradient(layers, memory_budget=budget, exact=True)
    np.testing.assert_allclose(found, exact, rtol=2e-4, atol=2e-5 * float(jnp.abs(exact).max()))
    saved = plan.to_dict()
    again = rad(layers, plan=saved).planned((X, WS), {}, (0, 1))[0]
    assert again.to_dict() == saved and again.n_chain_segments == plan.n_chain_segments


def test_short_programs_are_not_cut():
    graph = rad(lambda x, w: jnp.tanh(x @ w).sum(), exact=True).planned((X, WS[0]), {}, (0, 1))[0].graph
    assert cut_chain(graph, 2) is None


def test_compiled_memory_falls():
    x, ws = normal(1024, 64), [normal(64, 64, seed=i, scale=0.125) for i in range(16)]
    exact = temp_bytes(jax.grad(layers, argnums=(0, 1)), x, ws)
    budget = 7 * x.nbytes
    ours = temp_bytes(jax.grad(rad(layers, memory_budget=budget, exact=True), argnums=(1, 2)), KEY, x, ws)
    assert ours < 0.45 * exact
