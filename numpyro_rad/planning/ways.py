"""Ways through a program under a memory budget: left to JAX, planned in one go, or with a part of it in slices.

What the two sweeps hold is known to the byte; what a compiled gradient takes besides (buffers of convolutions, results
that wait for their readers) is known to the compiler alone. So it is asked, of the program that is left to JAX and of
the way that is chosen, and where that would take more than the budget another way is taken.

Slices compute nothing twice, add no variance and store the gradient of the part alone; what they cost is to start each
kernel more often. They compete, as few as it takes, with the best plan for the program in one go. Without a budget as
many compete as are worth it, a share of the residuals' bytes being worth the same share of the step's time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

from numpyro_rad.ad import _jax
from numpyro_rad.ad.convolutions import fast_in_loops
from numpyro_rad.ad.graph import Graph
from numpyro_rad.ad.linearize import graph_of_both, linearize, with_tangents
from numpyro_rad.ad.parts import Part, find
from numpyro_rad.ad.plan import BudgetError, Plan
from numpyro_rad.ad.slices import PlannedSlice, cut_all
from numpyro_rad.planning import solver, strategies
from numpyro_rad.planning.assembly import plan_of
from numpyro_rad.planning.costs import CostModel
from numpyro_rad.planning.problem import PlanProblem
from numpyro_rad.planning.request import PlanRequest, any_of
from numpyro_rad.planning.timing import Timing, launches

WORTH = 0.01
"""More slices are worth their trouble where they save so much of the time of a step, or what is worth as much."""

TRIES = 4
"""So many ways are compiled, at most."""

_SHARES = (1.0, 0.25, 0.0625)
"""What all bytes of residuals are worth without a budget, as a share of the step's time: less where plans take long."""


@dataclasses.dataclass(frozen=True)
class Way:
    """How to go through a program.

    :ivar graph: its linearized graph, with the part in slices that shall be.
    :ivar held_bytes: what a plan for it may hold; None where there is no budget.
    :ivar plan: the plan by the model of variance without data, where it is known already; one that leaves the program
        to JAX's own reverse mode is meant as it is.
    :ivar exact: the time of the exact step in one go, where there are slices.
    """

    graph: Graph
    held_bytes: int | None = None
    plan: Plan | None = None
    exact: Timing | None = None

    def timed(self, plan: Plan, costs: CostModel) -> Plan:
        """A plan for its graph, whose time is compared with that of the exact step in one go."""
        if self.exact is None or plan.predicted is None:
            return plan
        own = Timing(self.graph, costs)
        taken = plan.predicted.added_seconds * own.step + own.storing + _of_slices(self.graph, costs)
        added = (taken - self.exact.storing) / self.exact.step
        return dataclasses.replace(plan, predicted=dataclasses.replace(plan.predicted, added_seconds=added))


def in_slices(jaxpr: _jax.Jaxpr, active: Sequence[bool], n_slices: int, costs: CostModel) -> Way:
    """The way through a program in which what can be run in slices is run in so many."""
    if n_slices == 1:
        return Way(linearize(jaxpr, active))
    both, has_tangent = with_tangents(jaxpr, active)
    part, whole = find(both, active), graph_of_both(both, has_tangent, active)
    if part is None:
        return Way(whole)
    exact, devices = Timing(whole, costs), _jax.devices_of(v.aval for v in jaxpr.jaxpr.invars)
    return Way(_cut(part, whole, exact, n_slices, has_tangent, active, costs, devices=devices), exact=exact)


def _cut(
    part: Part,
    whole: Graph,
    exact: Timing,
    n_slices: int,
    has_tangent: Sequence[bool],
    active: Sequence[bool],
    costs: CostModel,
    room: float = math.inf,
    devices: int = 1,
) -> Graph:
    """The graph of a program with a part of it in slices.

    :param whole: its graph in one go.
    :param exact: the time of an exact step of that.
    :param devices: over how many it is spread.
    """
    plan = functools.partial(planned_slice, costs=costs, room=room)
    both, slices = cut_all(part, active, n_slices, plan, devices)
    if costs.platform == "cpu":
        both = fast_in_loops(both)
    graph = graph_of_both(both, has_tangent, active)
    adding = _adding(part, costs)
    graph.slices = dataclasses.replace(
        slices,
        nanoseconds=slices.nanoseconds + slices.number * adding,
        nanoseconds_each=slices.nanoseconds_each + adding,
        exact_bytes=max(0, whole.residual_bytes - graph.residual_bytes),
        exact_step=exact.step,
        program=whole.fingerprint(),
    )
    return graph


def _adding(part: Part, costs: CostModel) -> float:
    """Nanoseconds that a slice takes to write its gradient, read it and what was added up before, and write the sum."""
    return 1.5 * costs.keep_per_byte * part.gradient_bytes


def exact_plan(graph: Graph, costs: CostModel) -> tuple[Plan, float]:
    """The plan in which nothing is random and what is cheap is computed again, and the nanoseconds of that, without
    what is held: in a slice, that memory is the same for all of them.
    """
    problem = PlanProblem(graph, PlanRequest(any_of(()), costs))
    return _timed(problem, solver.smallest(problem.priced()))


def _timed(problem: PlanProblem, solution: solver.Solution) -> tuple[Plan, float]:
    """A plan, and its nanoseconds without what is held."""
    plan = plan_of(problem, solution)
    return plan, problem.nanoseconds(solution) - problem.timing.holding(plan.stored_bytes)


def planned_slice(graph: Graph, costs: CostModel, room: float) -> PlannedSlice:
    """How a slice runs, given its graph: in one pass, or where that holds more than there is room for with its loops in
    segments.
    """
    plan, again = exact_plan(graph, costs)
    if plan.stored_bytes > room:
        with contextlib.suppress(BudgetError):  # then it takes more slices
            plan, again = _timed(*strategies.solved_within(graph, int(room), PlanRequest(any_of(()), costs)))
    inner = graph.slices.nanoseconds if graph.slices is not None else 0.0
    return PlannedSlice(plan, again + inner, costs.slice_start * launches(graph), Timing(graph, costs).forward(graph))


def _of_slices(graph: Graph, costs: CostModel) -> float:
    """Nanoseconds that the slices of a graph take more than the whole; 0 where it has none."""
    if graph.slices is None:
        return 0.0
    return graph.slices.nanoseconds + costs.holding(graph.slices.bytes_each) * graph.slices.bytes_each


class Search:
    """For the way of least time and variance through a program within a budget, or without one of least time, variance
    and memory.

    :param active: which inputs of the program are differentiated.
    :param budget_bytes: None for no budget.
    :param request: from a graph to what its plan is chosen from.
    :param costs: what work costs.
    :param taken: from a plan to the temporary memory of a compiled step; None where nobody knows.
    """

    def __init__(
        self,
        jaxpr: _jax.Jaxpr,
        active: Sequence[bool],
        budget_bytes: int | None,
        request: Callable[[Graph], PlanRequest],
        costs: CostModel,
        taken: Callable[[Plan], int | None],
    ) -> None:
        self._active, self._request, self._costs, self._taken = active, request, costs, taken
        self._budget_bytes = budget_bytes
        # which axes are sharded only the compiler will know: a slice of such an axis would be fetched from all devices
        self._may_slice = costs.most_slices > 1 and _jax.devices_of(v.aval for v in jaxpr.jaxpr.invars) == 1
        self._both, self._has_tangent = with_tangents(jaxpr, active)
        self._whole = graph_of_both(self._both, self._has_tangent, active)

    @functools.cached_property
    def _exact(self) -> Timing:
        """Of an exact step."""
        return Timing(self._whole, self._costs)

    @functools.cached_property
    def _part(self) -> Part | None:
        """What can be run in slices."""
        return find(self._both, self._active)

    @property
    def _budget(self) -> int:
        assert self._budget_bytes is not None
        return self._budget_bytes

    def way(self, may_be_untouched: bool) -> Way:
        """The best way that was found.

        :param may_be_untouched: whether the program may be left to JAX.
        """
        if self._budget_bytes is None:
            return self._balanced()
        if not self._may_slice:
            return Way(self._whole, self._budget)
        if may_be_untouched:
            plan = strategies.untouched_plan(self._whole)
            if plan.stored_bytes <= self._budget:
                taken = self._taken(plan)
                if taken is not None and taken <= self._budget:
                    return Way(self._whole, self._budget, plan)
        sliced = self._fewest() if self._part is not None else None
        if sliced is not None:
            sliced = self._better(sliced)
        priced = [self._priced(graph, self._budget) for graph in (self._whole, sliced) if graph is not None]
        open_ways = [found for found in priced if found[0] < math.inf]
        tried: list[tuple[float, float, Way]] = []

        def turn(found: tuple[float, Way]) -> tuple[int, float]:
            """Two ways in slices or in one go are tried before all others of the other kind have had their turn."""
            sliced = found[1].graph.slices is not None
            return sum((way.graph.slices is not None) == sliced for _, _, way in tried) // 2, found[0]

        while open_ways and len(tried) < TRIES:
            cost, way = min(open_ways, key=turn)
            open_ways.remove((cost, way))
            excess = self._excess(way)
            if excess <= 1:
                return way
            tried.append((excess, cost, way))
            smaller = self._smaller(way, excess)
            if smaller is not None:
                open_ways.append(smaller)
        # where nothing fits, the least of memory x (time and variance)
        return min(tried, key=lambda found: found[0] ** 2 * (1 + found[1]))[2] if tried else priced[-1][1]

    def _balanced(self) -> Way:
        """The way to take where no option says what matters: what memory is worth is known, so that the compiler need
        not be asked.
        """
        untouched = strategies.untouched_plan(self._whole)
        size = untouched.stored_bytes
        if size < self._costs.untouched_bytes:
            return Way(self._whole, plan=untouched)

        def balanced(graph: Graph, exact_bytes: float) -> tuple[float, Way]:
            cost, way = self._costing(graph, *strategies.balanced(graph, self._request(graph), exact_bytes))
            assert way.plan is not None
            return cost + way.plan.peak_bytes / exact_bytes, way

        part = self._part if self._may_slice else None
        if part is not None and part.again:  # a third forward sweep takes more time than memory is worth
            part = None
        tried = self._cut(self._foretold(part, size)) if part is not None and self._starts_in_time(part) else None
        for share in _SHARES:
            exact_bytes = max(1, size) / share
            ways = [balanced(self._whole, exact_bytes)]
            if tried is not None:
                ways.append(balanced(self._better(tried, least=2, exact_bytes=exact_bytes), exact_bytes))
            ways = [(cost, way) for cost, way in ways if self._added_time(way) <= self._costs.most_added_time]
            if ways:
                return min(ways, key=lambda pair: pair[0])[1]
        return Way(self._whole, plan=untouched)

    @staticmethod
    def _added_time(way: Way) -> float:
        assert way.plan is not None and way.plan.predicted is not None
        return way.plan.predicted.added_seconds

    def _starts_in_time(self, part: Part) -> bool:
        """Whether two slices take less time to start than the step takes: else nothing can be gained."""
        return 2 * self._costs.slice_start * len(part.steps) < self._exact.step

    def _smaller(self, way: Way, excess: float) -> tuple[float, Way] | None:
        """A way that takes less, and its cost: fewer bytes to hold, where most of them are held outside of slices, or
        more slices.
        """
        slices, plan = way.graph.slices, way.plan
        assert plan is not None and way.held_bytes is not None
        in_slices = 0 if slices is None else slices.bytes_each
        found = None
        if 2 * in_slices < plan.peak_bytes:
            least = strategies.make_plan(way.graph, self._request(way.graph).at_first).stored_bytes + in_slices
            held = max(least, int(plan.peak_bytes / excess))
            if held < plan.peak_bytes:
                found = self._priced(way.graph, held)
        if found is None and slices is not None:
            number = max(2 * slices.number, _power_of_two(min(excess, self._costs.most_slices) * slices.number))
            graph = self._fewest(number)
            if graph is not None and graph.slices is not None and graph.slices.number > slices.number:
                found = self._priced(graph, way.held_bytes - in_slices + graph.slices.bytes_each)
        return found if found is not None and found[0] < math.inf else None

    def _excess(self, way: Way) -> float:
        """How many times more than it may the compiled step of a way takes."""
        assert way.plan is not None
        return (self._taken(way.plan) or 0) / max(1, self._budget)

    def _priced(self, graph: Graph, held_bytes: int) -> tuple[float, Way]:
        """The best plan for a graph, and its time and variance beyond what the products of the program take."""
        try:
            problem, solution = strategies.solved_within(graph, held_bytes, self._request(graph))
        except BudgetError:
            return math.inf, Way(graph, held_bytes)
        return self._costing(graph, problem, solution, held_bytes)

    def _costing(
        self, graph: Graph, problem: PlanProblem, solution: solver.Solution, held_bytes: int | None = None
    ) -> tuple[float, Way]:
        """What a solution takes in time and variance, and the way that it stands for."""
        way = Way(graph, held_bytes, exact=None if graph.slices is None else self._exact)
        plan = way.timed(plan_of(problem, solution), self._costs)
        nanoseconds = problem.nanoseconds(solution) + _of_slices(graph, self._costs)
        cost = nanoseconds / self._exact.step + problem.together(solution).total
        return cost, dataclasses.replace(way, plan=plan)

    # -- how many slices

    @functools.cached_property
    def _halved(self) -> Graph:
        """The graph of the program with its part in two slices, however much they hold."""
        assert self._part is not None
        return _cut(self._part, self._whole, self._exact, 2, self._has_tangent, self._active, self._costs)

    @functools.cached_property
    def _room(self) -> int:
        """Bytes of the budget that an exact plan for the rest of the program leaves to a slice."""
        return self._budget - exact_plan(self._halved, self._costs)[0].stored_bytes

    def _cut(self, number: int) -> Graph:
        """The graph of the program with its part in so many slices."""
        assert self._part is not None
        room = math.inf
        if self._budget_bytes is not None:
            room = max(0, self._room)
            if number == 2 and self._halved.slices is not None and self._halved.slices.bytes_each <= room:
                return self._halved
        # a smaller slice at the end would be compiled besides
        even = (n for n in range(number, number * 5 // 4 + 1) if self._part.size % n == 0)
        return _cut(
            self._part, self._whole, self._exact, next(even, number), self._has_tangent, self._active, self._costs, room
        )

    def _better(self, graph: Graph, least: int | None = None, exact_bytes: float = math.inf) -> Graph:
        """The same part in as many slices as take least time, foretold from how many there are.

        :param least: number of slices; by default as many as there are.
        :param exact_bytes: of all residuals, a share of which is worth the same share of the step's time.
        """
        slices = graph.slices
        assert slices is not None
        best = self._best(least or slices.number, slices.nanoseconds_each, slices.bytes_in_all, exact_bytes)
        return graph if best == slices.number else self._cut(best)

    def _foretold(self, part: Part, exact_bytes: float) -> int:
        """How many slices are worth it, about, before any was planned: to plan them twice takes as long again."""
        starts = self._costs.slice_start * launches(self._whole) * part.share
        size = exact_plan(self._whole, self._costs)[0].stored_bytes * part.share
        return self._best(2, starts + _adding(part, self._costs), size, exact_bytes)

    def _best(self, least: int, each: float, size: float, exact_bytes: float) -> int:
        """How many slices take least time, at least so many.

        :param each: nanoseconds that one more takes.
        :param size: what all of them hold.
        :param exact_bytes: as for :meth:`_better`.
        """

        def cost(number: int) -> float:
            held = size / number
            return (number * each + self._costs.holding(held) * held) / self._exact.step + held / exact_bytes

        best = number = least
        while 2 * number <= self._costs.most_slices:
            number *= 2
            if cost(number) <= cost(best) - WORTH:
                best = number
        return best

    def _fewest(self, number: int = 2) -> Graph | None:
        """As few slices, from a number on, as leave room to keep exactly what is stored outside of them, or else for
        codes of it."""
        coded = None
        while number <= self._costs.most_slices:
            graph = self._cut(number)
            assert graph.slices is not None
            if graph.slices.bytes_each <= self._room:
                return graph
            smallest = strategies.make_plan(graph, self._request(graph)).stored_bytes
            if coded is None and graph.slices.bytes_each + smallest <= self._budget:
                coded = graph
            if graph.slices.number < number:  # the axis is too short
                break
            number *= 2
            if self._room > 0:
                number = max(number, _power_of_two(number / 2 * graph.slices.bytes_each / self._room))
        return coded


def _power_of_two(at_least: float) -> int:
    number = 1
    while number < at_least:
        number *= 2
    return number
