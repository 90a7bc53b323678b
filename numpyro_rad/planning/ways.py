"""Ways through a program under a memory budget: left to JAX, planned in one go, or with a part of it in slices.

What the two sweeps hold is known to the byte; what a compiled gradient takes besides (buffers of convolutions, results
that wait for their readers) is known to the compiler alone. So it is asked, of the program that is left to JAX and of
the way that is chosen, and where that would take more than the budget another way is taken.

Slices compute nothing twice, add no variance and store the gradient of the part alone; what they cost is to start each
kernel more often. They compete, as few as it takes, with the best plan for the program in one go.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax

from numpyro_rad.ad import _jax
from numpyro_rad.ad.graph import Graph
from numpyro_rad.ad.linearize import graph_of_both, linearize, with_tangents
from numpyro_rad.ad.plan import BudgetError, Plan
from numpyro_rad.ad.slices import MOST_UNROLLED, Part, find
from numpyro_rad.planning import solver, strategies
from numpyro_rad.planning.assembly import plan_of
from numpyro_rad.planning.costs import CostModel
from numpyro_rad.planning.problem import PlanProblem
from numpyro_rad.planning.request import PlanRequest, any_of
from numpyro_rad.planning.timing import Timing

SLACK = 1.1
"""A compiled gradient may take so many times the budget before another way is tried."""

WORTH = 0.01
"""More slices than it takes are worth their trouble where they save so much of the time of a step."""

TRIES = 4
"""So many ways are compiled, at most."""


@dataclasses.dataclass(frozen=True)
class Way:
    """How to go through a program.

    :ivar graph: its linearized graph, with the part in slices that shall be.
    :ivar held_bytes: what a plan for it may hold; None where there is no budget.
    :ivar plan: the plan by the model of variance without data, where it is known already; one that leaves the program
        to JAX's own reverse mode is meant as it is.
    """

    graph: Graph
    held_bytes: int | None = None
    plan: Plan | None = None


def in_slices(jaxpr: _jax.Jaxpr, active: Sequence[bool], n_slices: int, costs: CostModel) -> Graph:
    """The linearized graph of a program in which what can be run in slices is run in so many."""
    if n_slices == 1:
        return linearize(jaxpr, active)
    both, has_tangent = with_tangents(jaxpr, active)
    part = find(both, active)
    if part is None:
        return graph_of_both(both, has_tangent, active)
    return _cut(part, n_slices, has_tangent, active, costs)


def _cut(part: Part, n_slices: int, has_tangent: Sequence[bool], active: Sequence[bool], costs: CostModel) -> Graph:
    both, slices = part.cut(n_slices, functools.partial(exact_plan, costs=costs))
    graph = graph_of_both(both, has_tangent, active)
    # each slice writes its gradient, reads it and what was added up before, and writes the sum
    adding = 1.5 * costs.keep_per_byte * part.gradient_bytes
    graph.slices = dataclasses.replace(slices, nanoseconds=slices.nanoseconds + slices.number * adding)
    return graph


def exact_plan(graph: Graph, costs: CostModel) -> tuple[Plan, float]:
    """The plan of a slice, in which nothing is random and what is cheap is computed again, and what it takes for that
    and to be started, without what is held: that memory is the same for all slices.
    """
    problem = PlanProblem(graph, PlanRequest(any_of(()), costs))
    solution = solver.smallest(problem.priced())
    plan = plan_of(problem, solution)
    time = problem.nanoseconds(solution) - problem.timing.holding(plan.stored_bytes)
    inner = graph.slices.nanoseconds if graph.slices is not None else 0.0
    return plan, time + costs.slice_start * problem.timing.launches + inner


def _of_slices(graph: Graph, costs: CostModel) -> float:
    """Nanoseconds that the slices of a graph take more than the whole; 0 where it has none."""
    if graph.slices is None:
        return 0.0
    return graph.slices.nanoseconds + costs.holding(graph.slices.bytes_each) * graph.slices.bytes_each


class Search:
    """For the way of least time and variance through a program within a budget.

    :param active: which inputs of the program are differentiated.
    :param request: from a graph to what its plan is chosen from.
    :param costs: what work costs.
    :param taken: from a plan to the temporary memory of the compiled gradient; None where nobody knows.
    """

    def __init__(
        self,
        jaxpr: _jax.Jaxpr,
        active: Sequence[bool],
        budget_bytes: int,
        request: Callable[[Graph], PlanRequest],
        costs: CostModel,
        taken: Callable[[Plan], int | None],
    ) -> None:
        self._active, self._budget, self._request, self._taken = active, budget_bytes, request, taken
        self._costs = costs
        self._both, self._has_tangent = with_tangents(jaxpr, active)
        self._whole = graph_of_both(self._both, self._has_tangent, active)

    @functools.cached_property
    def _step(self) -> float:
        """Nanoseconds of an exact step."""
        return Timing(self._whole, self._costs).step

    def way(self, may_be_untouched: bool) -> Way:
        """The best way that was found.

        :param may_be_untouched: whether the program may be left to JAX.
        """
        # among several devices a slice of a sharded axis would be fetched from all of them, and the compiler would
        # have to know how the operands are sharded
        if self._costs.most_slices == 1 or jax.device_count() > 1:
            return Way(self._whole, self._budget)
        if may_be_untouched:
            plan = strategies.untouched_plan(self._whole)
            if plan.stored_bytes <= self._budget:
                taken = self._taken(plan)
                if taken is not None and taken <= self._budget:
                    return Way(self._whole, self._budget, plan)
        part = find(self._both, self._active)
        if part is not None and part.gradient_bytes > self._budget:
            part = None
        sliced = self._fewest(part) if part is not None else None
        if part is not None and sliced is not None:
            sliced = self._faster(part, sliced)
        found: list[tuple[float, Way]] = []
        priced = [self._priced(graph, self._budget) for graph in (self._whole, sliced) if graph is not None]
        for _, way in sorted(priced, key=lambda pair: pair[0]):
            found.append((self._excess(way), way))
            if found[-1][0] <= 1:
                return way
        excess, way = next(((e, w) for e, w in found if w.graph is sliced), found[-1])
        for _ in range(TRIES - len(found)):
            smaller = self._smaller(way, excess, part)
            if smaller is None:
                break
            way, excess = smaller, self._excess(smaller)
            found.append((excess, way))
            if excess <= 1:
                return way
        return min(found, key=lambda pair: pair[0])[1]

    def _smaller(self, way: Way, excess: float, part: Part | None) -> Way | None:
        """A way that takes less: more slices, or if there are none fewer bytes to hold."""
        slices = way.graph.slices
        if slices is None:
            return self._priced(way.graph, int(self._budget / excess))[1] if excess < math.inf else None
        assert part is not None
        times = min(excess, self._costs.most_slices)
        graph = self._fewest(part, max(2 * slices.number, _power_of_two(times * slices.number)))
        more = graph is not None and graph.slices is not None and graph.slices.number > slices.number
        return self._priced(graph, self._budget)[1] if graph is not None and more else None

    def _excess(self, way: Way) -> float:
        """How many times more than it may the compiled gradient of a way takes; infinite where no plan is feasible."""
        return math.inf if way.plan is None else (self._taken(way.plan) or 0) / (SLACK * self._budget)

    def _priced(self, graph: Graph, held_bytes: int) -> tuple[float, Way]:
        """The best plan for a graph, and its time and variance beyond what the products of the program take."""
        try:
            problem, solution = strategies.solved_within(graph, held_bytes, self._request(graph))
        except BudgetError:
            return math.inf, Way(graph, held_bytes)
        nanoseconds = problem.nanoseconds(solution) + _of_slices(graph, self._costs)
        cost = nanoseconds / self._step + problem.together(solution).total
        return cost, Way(graph, held_bytes, plan_of(problem, solution))

    def _most(self, part: Part) -> int:
        return MOST_UNROLLED if part.slow_in_loops else self._costs.most_slices

    def _faster(self, part: Part, graph: Graph) -> Graph:
        """Twice as many slices, and twice as many again, as long as the smaller memory saves more time than starting
        them takes."""
        while True:
            slices = graph.slices
            assert slices is not None
            held, half = (self._costs.holding(size) * size for size in (slices.bytes_each, slices.bytes_each / 2))
            if held - half < WORTH * self._step or 2 * slices.number > self._most(part):
                return graph
            more = _cut(part, 2 * slices.number, self._has_tangent, self._active, self._costs)
            assert more.slices is not None
            saved = _of_slices(graph, self._costs) - _of_slices(more, self._costs)
            if more.slices.number < 2 * slices.number or saved < WORTH * self._step:
                return graph
            graph = more

    def _fewest(self, part: Part, number: int = 2) -> Graph | None:
        """As few slices, from a number on, as leave room to keep exactly what is stored outside of them, or else for
        codes of it."""
        coded = None
        while number <= self._most(part):
            graph = _cut(part, number, self._has_tangent, self._active, self._costs)
            assert graph.slices is not None
            room = self._budget - exact_plan(graph, self._costs)[0].stored_bytes
            if graph.slices.bytes_each <= room:
                return graph
            smallest = strategies.make_plan(graph, self._request(graph)).stored_bytes
            if coded is None and graph.slices.bytes_each + smallest <= self._budget:
                coded = graph
            if graph.slices.number < number:  # the axis is too short
                break
            number = max(2 * number, _power_of_two(number * graph.slices.bytes_each / room) if room > 0 else 0)
        return coded


def _power_of_two(at_least: float) -> int:
    number = 1
    while number < at_least:
        number *= 2
    return number
