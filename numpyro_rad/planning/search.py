"""Looking for the best plan, though what a code costs depends on the others: errors multiply.

Prices are what each code changes in a plan that is at hand (``noise``). By them the problem is solved (``solver``), its
solution gives new prices, and after a few rounds the best of all solutions, judged by what its codes do together, is
taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from numpyro_rad.planning import solver
from numpyro_rad.planning.assembly import plan_of
from numpyro_rad.planning.noise import Effects
from numpyro_rad.planning.problem import PlanProblem

ROUNDS = 4
"""So often codes are priced. Two more rounds changed the cost of a Transformer's plans by less than a hundredth where
its codes add less than the gradient's own variance."""

FEW_CODES = 100
"""Problems with so many codes are solved exactly in each round, others only in the last."""

FIRST_LIMIT = 1.0
"""The first solution, priced by what codes add alone, may be full of codes of great variance. In its effects they count
with this relative variance at most, or the second would avoid all of them."""

MOST_VARIANCE = 10.0
"""Nobody can use a gradient with so many times the variance, and where errors multiply prices of more mean nothing."""


def within(problem: PlanProblem, budget_bytes: float) -> solver.Solution:
    """The solution of least cost within a budget.

    :raises solver.Infeasible: if there is none.
    """
    few = sum(len(d.codes) for d in problem.timed.demands) <= FEW_CODES
    solve = solver.solve if few else solver.relaxed
    prices: Effects | None = None
    found: list[tuple[solver.Solution, Effects | None]] = []
    for _ in range(ROUNDS):
        solution = _fitting(problem, solve, prices, budget_bytes)
        effects = problem.together(solution)
        again = any((s.kept, s.codes) == (solution.kept, solution.codes) for s, _ in found)
        found.append((problem.judged(solution, effects), prices))
        if again or abs(found[-1][0].cost - solution.cost) <= solver.GOOD_GAP * solution.cost:
            break
        prices = prices.towards(effects, 0.5) if prices is not None else problem.together(solution, FIRST_LIMIT)
    best, prices = min(found, key=lambda pair: pair[0].cost)
    if few:
        return best
    solution = _fitting(problem, solver.solve, prices, budget_bytes)
    solution = problem.judged(solution, problem.together(solution))
    return solution if solution.cost <= best.cost else best


def _fitting(
    problem: PlanProblem,
    solve: Callable[[solver.Problem, float], solver.Solution],
    prices: Effects | None,
    budget_bytes: float,
) -> solver.Solution:
    """A solution whose plan fits into a budget."""
    priced, budget = problem.priced(prices), budget_bytes
    for _ in range(4):
        try:
            solution = solve(priced, budget)
        except solver.Infeasible:
            break
        if not problem.cuts:
            return solution
        excess = plan_of(problem, solution).stored_bytes / max(1, budget_bytes)
        if excess <= 1:
            return solution
        budget *= 0.99 / excess  # the problem takes segments to be equal, and the largest one counts
    smallest = solver.smallest(priced)
    if plan_of(problem, smallest).stored_bytes <= budget_bytes:
        return smallest
    raise solver.Infeasible(smallest)


def least_bytes_at(problem: PlanProblem, added_variance: float) -> solver.Solution:
    """The solution of fewest bytes (and least time) that adds at most so much variance: in the problem the two change
    places.
    """
    best = solver.priced(_swapped(problem, problem.added(None)).without_codes(), 0.0)
    added_variance = min(added_variance, MOST_VARIANCE)
    prices, allowed = None, added_variance
    for n in range(3 * ROUNDS):
        added = problem.added(prices)
        try:
            solution = solver.solve(_swapped(problem, added), allowed)
        except solver.Infeasible:  # so little that a cut cannot tell it from zero
            break
        effects = problem.together(solution)
        total = effects.total
        if total <= added_variance:
            if solution.cost < best.cost:
                best = solution
            spent = sum(a[k] for a, k in zip(added, solution.codes, strict=True) if k is not None)
            if total >= 0.9 * min(spent, added_variance):
                break
            allowed *= min(2.0, 0.98 * added_variance / total)  # what two codes do together counts twice in prices
        elif n > 1:  # now prices do not change by orders of magnitude any more
            allowed *= max(0.3, 0.95 * added_variance / total)
        prices = problem.together(solution, FIRST_LIMIT) if prices is None else prices.towards(effects, 1 / (n + 1))
    return dataclasses.replace(solver.settled(problem.timed, set(best.kept), best.codes), bound=best.bound)


def _swapped(problem: PlanProblem, added: list[list[float]]) -> solver.Problem:
    """The problem with bytes, at the price that makes all residuals worth one step, among its costs, and such variances
    of codes in the place of bytes.
    """
    old = problem.timed
    unit = 1 / max(1, problem.residual_bytes)
    costs = [c + unit * b for c, b in zip(old.keep_cost, old.keep_bytes, strict=True)]
    demands = []
    for demand, variances in zip(old.demands, added, strict=True):
        codes = zip(demand.codes, variances, strict=True)
        demands.append(solver.Demand(demand.value, tuple(solver.Code(v, c.cost + unit * c.bytes) for c, v in codes)))
    return solver.Problem([0] * len(costs), costs, old.maker, old.makers, demands)
