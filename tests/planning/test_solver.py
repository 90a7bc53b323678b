"""The solver against brute force on small random problems, and what it promises on large ones.

Brute force tries every set of kept values with every set of makers whose operands are then there, and every choice of
codes for the demands that are left.
"""

import dataclasses
import itertools
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from numpyro_rad.planning import solver
from numpyro_rad.planning.solver import GOOD_GAP, Code, Demand, Infeasible, Problem, priced, settled, smallest, solve

SLACK = 1e-6
"""Relative: a cut is found with capacities of 29 bits."""


def brute_force(problem):
    """All solutions worth having: (bytes, cost) of which none is dominated, by falling bytes."""
    n_values, n_makers = len(problem.maker), len(problem.makers)
    points = set()
    for kept in itertools.product((False, True), repeat=n_values):
        for made in itertools.product((False, True), repeat=n_makers):
            there = [k or (m >= 0 and made[m]) for k, m in zip(kept, problem.maker, strict=True)]
            if any(on and not all(there[v] for v in m.operands) for on, m in zip(made, problem.makers, strict=True)):
                continue
            size = sum(itertools.compress(problem.keep_bytes, kept))
            cost = sum(itertools.compress(problem.keep_cost, kept))
            cost += sum(m.cost for m in itertools.compress(problem.makers, made))
            choices = [[(0, 0.0)] if there[d.value] else [(c.bytes, c.cost) for c in d.codes] for d in problem.demands]
            for chosen in itertools.product(*choices):
                points.add((size + sum(b for b, _ in chosen), cost + sum(c for _, c in chosen)))
    front, best = [], np.inf
    for size, cost in sorted(points):
        if cost < best:
            front.append((size, cost))
            best = cost
    return front


def optimum(front, budget):
    """The least cost within a budget, or None."""
    return min((cost for size, cost in front if size <= budget), default=None)


sizes = st.integers(0, 40)
costs = st.floats(0, 10, allow_subnormal=False).map(lambda x: round(x, 3))


@st.composite
def problems(draw, most_values=8):
    """Values in a row, some made from earlier ones, some by a maker of two; demands for some, with codes or without."""
    problem = Problem()
    for _ in range(draw(st.integers(1, most_values))):
        problem.add_value(draw(sizes), draw(costs))
    n = len(problem.maker)
    v = 0
    while v < n:
        width = draw(st.integers(1, 2))
        if draw(st.booleans()):
            operands = draw(st.lists(st.integers(0, v - 1), max_size=2)) if v else []
            problem.add_maker(range(v, min(v + width, n)), operands, draw(costs))
        v += width
    for _ in range(draw(st.integers(1, 4))):
        codes = draw(st.lists(st.builds(Code, sizes, costs), max_size=3))
        problem.demands.append(Demand(draw(st.integers(0, n - 1)), tuple(codes)))
    return problem


thorough = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
budgets = st.floats(0, 1)


def check(problem, solution, budget=np.inf):
    """The solution is one, counts itself right, and is within the budget."""
    there = {v for v, m in enumerate(problem.maker) if v in solution.kept or m in solution.made}
    assert all(set(problem.makers[m].operands) <= there for m in solution.made)
    codes = [d.codes[c] for d, c in zip(problem.demands, solution.codes, strict=True) if c is not None]
    assert all(d.value in there for d, c in zip(problem.demands, solution.codes, strict=True) if c is None)
    size = sum(problem.keep_bytes[v] for v in solution.kept) + sum(c.bytes for c in codes)
    cost = sum(problem.keep_cost[v] for v in solution.kept) + sum(problem.makers[m].cost for m in solution.made)
    assert solution.bytes == size <= budget
    assert solution.cost == pytest.approx(cost + sum(c.cost for c in codes), rel=1e-9, abs=1e-12)
    assert 0 <= solution.gap <= 1


def between(front, share):
    """A budget between nothing and the most that is of use."""
    return int(front[-1][0] * 1.1 * share)


@thorough
@given(problems(), budgets)
def test_the_optimum_within_any_budget(problem, share):
    front = brute_force(problem)
    for budget in (between(front, share), front[0][0], front[-1][0]):
        best = optimum(front, budget)
        if best is None:
            with pytest.raises(Infeasible) as info:
                solve(problem, budget)
            assert info.value.smallest.bytes == front[0][0] > budget
            continue
        found = solve(problem, budget)
        check(problem, found, budget)
        assert best * (1 - SLACK) - SLACK <= found.cost <= best * (1 + GOOD_GAP) + SLACK
        assert found.bound <= best * (1 + SLACK) + SLACK
        assert solve(problem, budget) == found


@thorough
@given(problems())
def test_fewest_bytes(problem):
    front = brute_force(problem)
    found = smallest(problem)
    check(problem, found)
    assert found.bytes == front[0][0]
    assert solve(problem, np.inf).cost == pytest.approx(front[-1][1], rel=SLACK, abs=SLACK)


@thorough
@given(problems(), st.floats(0, 5))
def test_least_cost_at_a_price(problem, price):
    front = brute_force(problem)
    found = priced(problem, price)
    check(problem, found)
    best = min(cost + price * size for size, cost in front)
    assert found.cost + price * found.bytes == pytest.approx(best, rel=SLACK, abs=SLACK)


@thorough
@given(problems())
def test_more_memory_never_costs_more(problem):
    front = brute_force(problem)
    found = [solve(problem, budget).cost for budget in range(int(front[0][0]), int(front[-1][0]) + 1, 5)]
    assert all(b <= a * (1 + GOOD_GAP) + SLACK for a, b in itertools.pairwise(found))


@thorough
@given(problems(), budgets)
def test_the_relaxation_alone(problem, share):
    front = brute_force(problem)
    budget = max(between(front, share), front[0][0])
    best = optimum(front, budget)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solver, "EXACT_LIMIT", 0)
        patch.setattr(solver, "milp", None)
        found = solve(problem, budget)
    check(problem, found, budget)
    assert found.cost >= best * (1 - SLACK) - SLACK
    assert found.bound <= best * (1 + SLACK) + SLACK


def knapsack(n=12, seed=0):
    """Values that are kept or coded at one size: the relaxation fills the budget badly."""
    rng = np.random.default_rng(seed)
    problem = Problem()
    for _ in range(n):
        v = problem.add_value(int(rng.integers(50, 150)), 0.0)
        problem.demands.append(Demand(v, (Code(1, float(rng.integers(5, 15))),)))
    return problem


def test_the_integer_program_improves_on_the_relaxation(monkeypatch):
    problem, budget = knapsack(), 450
    best = optimum(brute_force(problem), budget)
    found = solve(problem, budget)
    assert found.cost == pytest.approx(best, rel=GOOD_GAP)
    assert found.gap <= GOOD_GAP
    monkeypatch.setattr(solver, "EXACT_LIMIT", 0)
    relaxed = solve(problem, budget)
    assert relaxed.cost > best * (1 + GOOD_GAP)
    assert relaxed.bound <= best * (1 + SLACK)
    assert relaxed.gap > GOOD_GAP


@pytest.mark.parametrize("wrong", ["no_bound", "cost_blind", "over_budget"])
def test_brute_force_catches_a_wrong_solver(monkeypatch, wrong):
    """Planted errors: a bound above the optimum, prices without cost, upgrades that ignore the budget."""
    cut, upgraded = solver._Network.cut, solver._upgraded
    if wrong == "no_bound":
        monkeypatch.setattr(
            solver, "_by_integer_program", lambda p, budget, best, t: dataclasses.replace(best, bound=best.cost)
        )
    elif wrong == "cost_blind":
        monkeypatch.setattr(solver._Network, "cut", lambda n, price, weight: cut(n, max(price, 1.0), weight * 1e-6))
    else:
        monkeypatch.setattr(solver, "_upgraded", lambda p, s, budget: upgraded(p, s, budget * 2))
        monkeypatch.setattr(solver, "EXACT_LIMIT", 0)
    with pytest.raises(AssertionError):
        for seed in range(8):
            problem = knapsack(8, seed)
            front = brute_force(problem)
            for budget in range(200, 600, 100):
                best = optimum(front, budget)
                found = solve(problem, budget)
                check(problem, found, budget)
                assert found.bound <= best * (1 + SLACK)
                assert found.cost <= best * (1 + GOOD_GAP) + (wrong == "over_budget") * best


def layered(n_layers=250, seed=0):
    """Layers of a network: four demands for each, two of them for values that are made from the layer's output."""
    rng = np.random.default_rng(seed)
    problem = Problem()
    before = problem.add_value(0, 0.0)  # the input
    for _ in range(n_layers):
        width = int(rng.integers(1, 64)) * 4096
        product = problem.add_value(width, width * 1e-9)
        active, derivative, mask = (problem.add_value(w, w * 1e-9) for w in (width, width, width // 32))
        problem.add_maker([product], [before], width * 1e-6)
        problem.add_maker([active, derivative], [product], width * 1e-8)
        problem.add_maker([mask], [product], width * 1e-8)
        for value in (product, active, derivative, mask):
            rounded = [Code(width * bits // 32, width * 1e-9 * (1 + 30 * rng.random() / 4**bits)) for bits in (8, 4, 2)]
            problem.demands.append(Demand(value, () if value == mask else tuple(rounded)))
        before = active
    return problem


def test_a_thousand_demands_are_solved_in_seconds():
    problem = layered()
    assert len(problem.demands) == 1000
    most, least = priced(problem, 0.0), smallest(problem)
    assert least.bytes < most.bytes / 4
    seconds, found = [], []
    for share in (0.1, 0.5):
        budget = int(least.bytes + share * (most.bytes - least.bytes))
        begin = time.process_time()
        found.append(solve(problem, budget))
        seconds.append(time.process_time() - begin)
        check(problem, found[-1], budget)
        assert found[-1].gap < 0.05
    assert found[1].cost < found[0].cost
    assert max(seconds) < 30


def test_a_time_limit_of_nothing_leaves_a_solution(monkeypatch):
    problem, budget = knapsack(200), 8000
    found = solve(problem, budget, time_limit=1e-9)
    check(problem, found, budget)
    assert np.isfinite(found.bound) and found.bound <= solve(problem, budget).cost * (1 + SLACK)
    monkeypatch.setattr(solver, "EXACT_LIMIT", 0)
    assert found.cost <= solve(problem, budget).cost


def test_errors_name_the_fewest_bytes():
    problem = Problem()
    value = problem.add_value(100, 1.0)
    problem.demands.append(Demand(value, (Code(30, 1.0),)))
    with pytest.raises(Infeasible, match="at least 30 bytes") as info:
        solve(problem, 29)
    assert isinstance(info.value, ValueError) and info.value.smallest.codes == (0,)


def test_an_empty_problem_costs_nothing():
    found = solve(Problem(), 0)
    assert (found.bytes, found.cost, found.gap) == (0, 0, 0)


def test_what_nothing_makes_has_to_be_kept():
    problem = Problem()
    value = problem.add_value(8, 0.0)
    problem.demands.append(Demand(value))
    with pytest.raises(ValueError, match="nothing makes it"):
        settled(problem, set(), [None])
