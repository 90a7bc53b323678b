"""The decision problem behind a plan: what to store, what to make again, at the least cost within a number of bytes.

There are *values*, each of which may be kept, or made again from its operands by its *maker*; *demands* for values, to
be met by the value itself or by one of several codes of it; and a price on everything,

    minimize    sum_v keep_cost[v] K[v] + sum_m make_cost[m] M[m] + sum_d sum_c code_cost[d, c] X[d, c]
    subject to  sum_v keep_bytes[v] K[v] + sum_d sum_c code_bytes[d, c] X[d, c] <= budget,
                K[v] + M[maker of v] + sum_c X[d, c] >= 1   for each demand d for v,
                K[v] + M[maker of v] >= M[m]                for each operand v of each maker m,   all in {0, 1}.

Without the budget this is a minimum cut, and so is its Lagrangian relaxation, in which a byte has a price. ``solve``
looks for the price at which the budget is just met (a few cuts): that gives a bound on what any solution costs, and a
solution that is optimal for a slightly smaller budget. It spends what is left on upgrades, and hands what gap remains
to HiGHS as the mixed-integer program above (Fisher 1981 on Lagrangian relaxation; for recomputation alone Jain et al.,
"Checkmate", MLSys 2020).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow


@dataclasses.dataclass(frozen=True)
class Code:
    """One way to meet a demand without the value: its size (or whatever else the budget counts) and its cost."""

    bytes: float
    cost: float


@dataclasses.dataclass(frozen=True)
class Maker:
    """A step that makes values again from others."""

    operands: tuple[int, ...]
    cost: float


@dataclasses.dataclass(frozen=True)
class Demand:
    """Somebody needs ``value``; without ``codes`` exactly."""

    value: int
    codes: tuple[Code, ...] = ()


@dataclasses.dataclass
class Problem:
    """Values are numbered from 0.

    :ivar keep_bytes: bytes of each value stored exactly; 0 for values that are there anyway.
    :ivar keep_cost: cost of storing it and reading it back.
    :ivar maker: for each value the index of its maker, or -1.
    """

    keep_bytes: list[float] = dataclasses.field(default_factory=list)
    keep_cost: list[float] = dataclasses.field(default_factory=list)
    maker: list[int] = dataclasses.field(default_factory=list)
    makers: list[Maker] = dataclasses.field(default_factory=list)
    demands: list[Demand] = dataclasses.field(default_factory=list)

    def add_value(self, keep_bytes: float, keep_cost: float) -> int:
        """A value that nothing makes; its number."""
        self.keep_bytes.append(keep_bytes)
        self.keep_cost.append(keep_cost)
        self.maker.append(-1)
        return len(self.maker) - 1

    def without_codes(self) -> Problem:
        """The same with all demands to be met by their values."""
        return dataclasses.replace(self, demands=[Demand(d.value) for d in self.demands])

    def add_maker(self, values: Sequence[int], operands: Sequence[int], cost: float) -> None:
        """A step that makes all of ``values`` from ``operands``."""
        for value in values:
            self.maker[value] = len(self.makers)
        self.makers.append(Maker(tuple(dict.fromkeys(operands)), cost))


@dataclasses.dataclass(frozen=True)
class Solution:
    """A feasible choice.

    :ivar kept: values stored exactly.
    :ivar made: makers that run again.
    :ivar codes: for each demand the index of its code, or None: it reads the value.
    :ivar bound: no solution within the same bytes costs less than this.
    """

    kept: frozenset[int]
    made: frozenset[int]
    codes: tuple[int | None, ...]
    bytes: float
    cost: float
    bound: float = 0.0

    @property
    def gap(self) -> float:
        """How much dearer than the cheapest this may be, relative to its cost."""
        gap = (self.cost - self.bound) / self.cost if self.cost > 0 else 0.0
        return gap if gap > 1e-12 else 0.0  # rounding


class Infeasible(ValueError):
    """No solution takes as few bytes; ``smallest`` takes the fewest."""

    def __init__(self, smallest: Solution):
        super().__init__(f"at least {smallest.bytes} bytes are needed")
        self.smallest = smallest


GOOD_GAP = 5e-3
"""Solutions this close to the bound are not improved further."""

EXACT_LIMIT = 20_000
"""Problems with more binary unknowns than this are left to the relaxation."""


def smallest(problem: Problem) -> Solution:
    """The solution that takes the fewest bytes (the cheapest of those, to rounding)."""
    return _smallest(_Network(problem)).solution


def priced(problem: Problem, byte_price: float) -> Solution:
    """The solution of least ``cost + byte_price * bytes``."""
    return _Network(problem).cut(byte_price, 1.0).solution


def relaxed(problem: Problem, budget_bytes: float) -> Solution:
    """A solution within a budget from the relaxation alone: in milliseconds, mostly within a tenth of the cheapest.

    :param budget_bytes: an int, or infinity.
    :raises Infeasible: if there is none.
    """
    network = _Network(problem)
    rich = network.cut(0.0, 1.0)
    if rich.bytes <= budget_bytes:
        return dataclasses.replace(rich.solution, bound=rich.cost)
    poor = _smallest(network)
    if poor.bytes > budget_bytes:
        raise Infeasible(poor.solution)
    bound = rich.cost
    for _ in range(64):
        # A new cut at the price at which both ends cost the same lies below the line through them, or there is none.
        price = (poor.cost - rich.cost) / (rich.bytes - poor.bytes)
        new = network.cut(price, 1.0)
        at_line = poor.cost + price * poor.bytes
        value = new.cost + price * new.bytes
        bound = max(bound, min(value, at_line) - price * budget_bytes)
        if value >= at_line - 1e-9 * abs(at_line) or new.bytes in (poor.bytes, rich.bytes):
            break
        if new.bytes <= budget_bytes:
            poor = new
        else:
            rich = new
    return dataclasses.replace(_upgraded(problem, poor.solution, budget_bytes), bound=bound)


def solve(problem: Problem, budget_bytes: float, time_limit: float = 10.0) -> Solution:
    """The cheapest solution within a budget.

    :param budget_bytes: an int, or infinity.
    :param time_limit: seconds for the mixed-integer program; the best solution found is returned, with its bound.
    :raises Infeasible: if there is none.
    """
    best = relaxed(problem, budget_bytes)
    n_unknowns = len(problem.maker) + len(problem.makers) + sum(len(d.codes) for d in problem.demands)
    if best.gap <= GOOD_GAP or n_unknowns > EXACT_LIMIT:
        return best
    return _by_integer_program(problem, budget_bytes, best, time_limit)


# -- minimum cut -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Cut:
    """What a cut stands for, before what nobody needs is dropped; ``codes`` by the numbers of their demands."""

    problem: Problem
    kept: set[int]
    codes: dict[int, int]
    bytes: float
    cost: float

    @property
    def solution(self) -> Solution:
        return settled(self.problem, self.kept, [self.codes.get(i) for i in range(len(self.problem.demands))])


class _Network:
    """The minimum cut of a problem, for any price of a byte.

    Each value is a pair of nodes, *made* and *there*, joined by an arc with the price of keeping it; all values of one
    maker share their first node. A node on the sink's side is true: an arc from x to y is paid when y is true and x is
    not. Values that no demand leads to are left out.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        values, makers = _wanted(problem)
        self._values = np.array(values, dtype=np.int64)
        there = {v: 2 + i for i, v in enumerate(values)}
        made = {m: 2 + len(values) + i for i, m in enumerate(makers)}
        self.n_nodes = 2 + len(values) + len(makers)
        self._keep_bytes = np.array([problem.keep_bytes[v] for v in values], dtype=float)
        self._keep_cost = np.array([problem.keep_cost[v] for v in values], dtype=float)
        self._make_cost = np.array([problem.makers[m].cost for m in makers], dtype=float)
        coded = [i for i, d in enumerate(problem.demands) if d.codes]
        width = max((len(problem.demands[i].codes) for i in coded), default=1)
        self._coded = coded
        self._code_bytes, self._code_cost = np.full((2, len(coded), width), np.inf)
        for row, i in enumerate(coded):
            for column, code in enumerate(problem.demands[i].codes):
                self._code_bytes[row, column], self._code_cost[row, column] = code.bytes, code.cost
        keep = [(made[m] if (m := problem.maker[v]) >= 0 else _SOURCE, there[v]) for v in values]
        make = [(_SOURCE, made[m]) for m in makers]
        code = [(there[problem.demands[i].value], _SINK) for i in coded]
        must = {(there[v], made[m]) for m in makers for v in problem.makers[m].operands}
        must |= {(there[d.value], _SINK) for d in problem.demands if not d.codes}
        self._tails, self._heads = np.array([*keep, *make, *code, *sorted(must)], dtype=np.int32).reshape(-1, 2).T
        self._n_must = len(must)
        self._there = np.array([there[d.value] for d in problem.demands], dtype=np.int64)
        position = {m: i for i, m in enumerate(makers)}  # of the maker of each value; -1 for none
        self._maker_of = np.array([position.get(problem.maker[v], -1) for v in values], dtype=np.int64)

    @property
    def total_bytes(self) -> float:
        """Bytes of everything kept."""
        return float(self._keep_bytes.sum())

    @property
    def total_cost(self) -> float:
        """What everything costs together."""
        codes = np.where(np.isfinite(self._code_cost), self._code_cost, 0.0)
        return float(self._keep_cost.sum() + self._make_cost.sum() + codes.sum())

    def cut(self, byte_price: float, cost_weight: float) -> _Cut:
        """The choice of least ``byte_price * bytes + cost_weight * cost``."""
        best, cheapest = np.zeros(0, np.int64), np.zeros(0)
        if self._coded:
            with np.errstate(invalid="ignore"):
                prices = np.nan_to_num(byte_price * self._code_bytes + cost_weight * self._code_cost, nan=np.inf)
            best = prices.argmin(1)
            cheapest = prices[np.arange(len(best)), best]
        keep = byte_price * self._keep_bytes + cost_weight * self._keep_cost
        outside = self._source_side(np.concatenate([keep, cost_weight * self._make_cost, cheapest]))
        n = len(self._values)
        made = ~outside[2 + n :]
        kept = ~outside[2 : 2 + n] & ~np.append(made, False)[self._maker_of]
        rows = np.flatnonzero(outside[self._there[self._coded]]) if self._coded else np.zeros(0, np.int64)
        best = best[rows]
        size = self._keep_bytes[kept].sum() + self._code_bytes[rows, best].sum()
        cost = self._keep_cost[kept].sum() + self._make_cost[made].sum() + self._code_cost[rows, best].sum()
        codes = {self._coded[row]: k for row, k in zip(rows.tolist(), best.tolist(), strict=True)}
        return _Cut(self.problem, set(self._values[kept].tolist()), codes, float(size), float(cost))

    def _source_side(self, prices: np.ndarray) -> np.ndarray:
        """For each node whether it is on the source's side of the minimum cut (the smallest such side: ties are broken
        alike).
        """
        total = float(prices.sum())
        scale = 2**29 / total if total > 0 else 1.0  # SciPy's capacities are 32-bit integers
        infinite = np.full(self._n_must, 2**29 + len(prices) + 1)
        capacity = np.concatenate([np.ceil(prices * scale), infinite]).astype(np.int32)
        shape = (self.n_nodes, self.n_nodes)
        network = csr_array((capacity, (self._tails, self._heads)), shape=shape)
        left = (network - maximum_flow(network, _SOURCE, _SINK).flow).tocsr()
        left.data = np.maximum(left.data, 0)
        left.eliminate_zeros()
        outside = np.zeros(self.n_nodes, bool)
        outside[breadth_first_order(left, _SOURCE, return_predecessors=False)] = True
        return outside


_SOURCE, _SINK = 0, 1


def _smallest(network: _Network) -> _Cut:
    total = network.total_cost
    return network.cut(1.0, 1e-7 * max(network.total_bytes, 1.0) / total if total > 0 else 0.0)


def _wanted(problem: Problem) -> tuple[list[int], list[int]]:
    """Values and makers that some demand leads to."""
    values: set[int] = set()
    makers: set[int] = set()
    todo = [d.value for d in problem.demands]
    while todo:
        value = todo.pop()
        if value in values:
            continue
        values.add(value)
        maker = problem.maker[value]
        if maker >= 0 and maker not in makers:
            makers.add(maker)
            todo.extend(problem.makers[maker].operands)
    return sorted(values), sorted(makers)


def settled(problem: Problem, kept: set[int], codes: Sequence[int | None]) -> Solution:
    """The solution that keeps ``kept``, runs what then has to run again, and drops what nobody needs."""
    made: set[int] = set()
    used: set[int] = set()
    todo = [d.value for d, code in zip(problem.demands, codes, strict=True) if code is None]
    while todo:
        value = todo.pop()
        if value in used:
            continue
        used.add(value)
        if value in kept:
            continue
        maker = problem.maker[value]
        if maker < 0:
            raise ValueError(f"value {value} is needed, is not kept, and nothing makes it")
        if maker not in made:
            made.add(maker)
            todo.extend(problem.makers[maker].operands)
    kept = kept & used
    chosen = [d.codes[c] for d, c in zip(problem.demands, codes, strict=True) if c is not None]
    size = sum(problem.keep_bytes[v] for v in kept) + sum(c.bytes for c in chosen)
    parts = [problem.keep_cost[v] for v in sorted(kept)] + [problem.makers[m].cost for m in sorted(made)]
    return Solution(frozenset(kept), frozenset(made), tuple(codes), size, sum(parts) + sum(c.cost for c in chosen))


# -- repair and exact solution -----------------------------------------------------------------------------------------


def _upgraded(problem: Problem, solution: Solution, budget_bytes: float) -> Solution:
    """Spend what is left on better codes, and on keeping what is coded or made again.

    The order of the steps does not depend on the budget, and the first that does not fit ends them: with a larger
    budget more of the same sequence is taken, so more memory never costs more.
    """
    steps = []  # (cost per byte, bytes, change)
    for i, (demand, now) in enumerate(zip(problem.demands, solution.codes, strict=True)):
        if now is None:
            continue
        current = demand.codes[now]
        better = [(c.cost, c.bytes, k) for k, c in enumerate(demand.codes)]
        better.append((problem.keep_cost[demand.value], problem.keep_bytes[demand.value], -1))
        for cost, size, k in better:
            if cost < current.cost and size > current.bytes:
                rate = (cost - current.cost) / (size - current.bytes)
                steps.append((rate, size - current.bytes, i, k))
    steps.sort()
    codes, kept, left, done = list(solution.codes), set(solution.kept), budget_bytes - solution.bytes, set()
    for _, size, i, k in steps:
        if i in done:
            continue
        if size > left:
            break
        left -= size
        done.add(i)
        codes[i] = None if k < 0 else k
        if k < 0:
            kept.add(problem.demands[i].value)
    better = settled(problem, kept, codes)
    return better if better.cost <= solution.cost and better.bytes <= budget_bytes else solution


def _by_integer_program(problem: Problem, budget_bytes: float, best: Solution, time_limit: float) -> Solution:
    """The mixed-integer program of the module's docstring by HiGHS, if that improves ``best``."""
    values, makers = _wanted(problem)
    keep = {v: i for i, v in enumerate(values)}
    make = {m: len(values) + i for i, m in enumerate(makers)}
    cost = [*(problem.keep_cost[v] for v in values), *(problem.makers[m].cost for m in makers)]
    size = [*(problem.keep_bytes[v] for v in values), *([0] * len(makers))]
    rows: list[tuple[list[int], list[int]]] = []  # (unknowns with coefficient 1, with coefficient -1), sum >= bound
    least: list[float] = []

    def there(value: int) -> list[int]:
        maker = problem.maker[value]
        return [keep[value], make[maker]] if maker >= 0 else [keep[value]]

    for m in makers:
        for v in problem.makers[m].operands:
            rows.append((there(v), [make[m]]))
            least.append(0)
    for demand in problem.demands:
        unknowns = list(range(len(cost), len(cost) + len(demand.codes)))
        cost.extend(c.cost for c in demand.codes)
        size.extend(c.bytes for c in demand.codes)
        rows.append((there(demand.value) + unknowns, []))
        least.append(1)
    entries = [(i, j, s) for i, (plus, minus) in enumerate(rows) for s, js in ((1, plus), (-1, minus)) for j in js]
    i, j, s = (np.array(x) for x in zip(*entries, strict=True))
    cover = csr_array((s, (i, j)), shape=(len(rows), len(cost)))
    unit, scale = max(cost) or 1.0, max(budget_bytes, 1.0)
    result = milp(
        np.array(cost) / unit,
        integrality=np.ones(len(cost)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(cover, lb=np.array(least, float)),  # pyright: ignore[reportArgumentType]
            LinearConstraint(np.array(size, float)[None] / scale, ub=budget_bytes / scale),
        ],
        options={"time_limit": time_limit, "mip_rel_gap": GOOD_GAP},
    )
    bound = best.bound
    if result.mip_dual_bound is not None and np.isfinite(result.mip_dual_bound):
        bound = max(bound, result.mip_dual_bound * unit)
    if result.x is not None:
        chosen = result.x > 0.5
        codes: list[int | None] = []
        at = len(values) + len(makers)
        for demand in problem.demands:
            taken = [k for k in range(len(demand.codes)) if chosen[at + k]]
            codes.append(min(taken, key=lambda k: demand.codes[k].cost) if taken else None)
            at += len(demand.codes)
        found = settled(problem, {v for v in values if chosen[keep[v]]}, codes)
        if found.bytes <= budget_bytes and found.cost < best.cost:
            best = found
    return dataclasses.replace(best, bound=min(bound, best.cost))
