"""Decide for each residual whether it is alive anyway, recomputed, kept exactly, or encoded, and with which codec.

All values of a program, those of the bodies of its loops included, form one decision problem (``solver``): a cheap
equation makes its results again from its operands, inputs of the program are alive in both sweeps and cost nothing,
anything else has to be kept to be had. A residual whose pullback is linear in it may be replaced by a code.

Bytes are what the budget counts. The cost of a choice is what it adds to the exact step, in two parts that are
comparable because the work that a gradient takes is its time times its variance:

    cost = seconds added / seconds of the exact step + variance added / variance of the exact gradient.

Both are predictions: seconds from ``rules.nanoseconds``, variance from a ``VarianceModel``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import jax.numpy as jnp

from numpyro_rad import _jax, rules, solver
from numpyro_rad.codecs import BitMask, Codec, Keep, SampleAxis, StochasticRound
from numpyro_rad.graph import Edge, Equation, Graph, Split, Value

SMALL_BYTES = 64
"""Values of up to this size (PRNG keys, scalars) are kept rather than made again: chains of key splits stay short."""

SMALL_DRAW_BYTES = 4096
"""Random numbers of up to this size (over all iterations) are kept too: drawing them again takes long to compile."""

LEAST_ENCODED_BYTES = 8192
"""Residuals below this size (over all iterations of the loops around them) are not worth their added variance."""

Path = tuple[int, ...]
Codecs = Callable[[Path, Value, int], tuple[Codec, ...]]
"""From a residual's path (loop numbers, then its own) and its number of repetitions to the codecs that it may have
besides being exact."""

VarianceModel = Callable[[Path, Value, Codec, int], float]
"""From a residual's path, the residual, its codec and the number of independent draws to the variance that they add to
the gradient, relative to the variance of the exact gradient."""


class BudgetError(ValueError):
    """No plan stores as little as the budget asks for.

    :ivar int smallest_bytes: the smallest budget that is feasible.
    """

    def __init__(self, message: str, smallest_bytes: int):
        super().__init__(message)
        self.smallest_bytes = smallest_bytes

    def __reduce__(self):
        return type(self), (self.args[0], self.smallest_bytes)


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """A stored random code: one draw for each group of readers, no two of which lie on one path."""

    codec: Codec
    readers: tuple[frozenset[Edge], ...]
    bytes_each: int

    @property
    def stored_bytes(self) -> int:
        return self.bytes_each * len(self.readers)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a plan is expected to cost, in its own model of time and variance.

    :ivar added_seconds: time for encoding, decoding, storing and recomputing, relative to that of the exact step.
    :ivar added_variance: variance added to the gradient, relative to that of the exact gradient.
    :ivar gap: how much less, relative to the sum of both, another plan for the same bytes could cost at best.
    """

    added_seconds: float
    added_variance: float
    gap: float


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What one graph stores between its sweeps, and the plans of the bodies of its control flow.

    :ivar kept: values stored exactly and how (``BitMask`` for booleans).
    :ivar encoded: values stored as random codes.
    :ivar carrier: for each residual that may be estimated, the value that stands for it in storage: itself, or a
        smaller one of which it is a linear rearrangement.
    :ivar reads: inputs of the graph that the backward sweep needs.
    :ivar repeat: how often the graph runs in one call (the product of the lengths of the scans around it).
    """

    graph: Graph
    repeat: int
    path: Path
    kept: dict[Value, Codec]
    encoded: dict[Value, Encoded]
    carrier: dict[Value, Value]
    children: dict[Split, tuple[Plan, ...]]
    reads: frozenset[Value]
    predicted: Prediction | None = None

    @property
    def stored_bytes(self) -> int:
        """Bytes stored between the sweeps by one call, inputs and the path key not counted."""
        own = sum(kept_bytes(v) for v in self.kept) + sum(e.stored_bytes for e in self.encoded.values())
        return own * self.repeat + sum(p.stored_bytes for plans in self.children.values() for p in plans)

    def walk(self) -> Iterator[Plan]:
        """This plan and all plans inside it."""
        yield self
        for plans in self.children.values():
            for plan in plans:
                yield from plan.walk()

    def estimated(self, residual: Value) -> bool:
        """Whether readers that may take an estimate of ``residual`` get one."""
        return self.carrier.get(residual) in self.encoded


def kept_bytes(value: Value) -> int:
    """Bytes of ``value`` stored exactly."""
    return keep_codec(value).stored_bytes(value.aval.shape, value.aval.dtype)


def keep_codec(value: Value) -> Codec:
    """The exact codec for a value: one bit for a boolean."""
    return BitMask() if value.aval.dtype == bool else Keep()


def uniform(codec: Codec) -> Codecs:
    """One codec wherever it may be used and saves something; everything else exact."""
    return _any_of((codec,))


def _any_of(codecs: tuple[Codec, ...]) -> Codecs:
    """All codecs wherever they may be used and save something."""

    def choices(path: Path, value: Value, repeat: int) -> tuple[Codec, ...]:
        shape, dtype, exact_bytes = value.aval.shape, value.aval.dtype, _jax.aval_bytes(value.aval)
        if exact_bytes * repeat < LEAST_ENCODED_BYTES:
            return ()
        fit = (c for c in codecs if not c.exact and c.supports(shape, dtype))
        return tuple(c for c in fit if c.stored_bytes(shape, dtype) < exact_bytes)

    return choices


def equal_shares(graph: Graph) -> VarianceModel:
    """The variance model without data: every code has an equal share in the gradient.

    If all residuals were coded with relative variance v each, the gradient would get v times its squared norm, which
    is also taken for the variance of the exact gradient (on image classification at usual batch sizes it is).
    """
    n_residuals = max(1, len({r for g in _graphs(graph) for e in g.edges for r in e.residuals}))

    def variance(path: Path, value: Value, codec: Codec, n_draws: int) -> float:
        return codec.relative_variance(value.aval.shape) / n_residuals

    return variance


def _graphs(graph: Graph) -> Iterator[Graph]:
    """A graph and those of the bodies of its control flow."""
    yield graph
    for edge in graph.edges:
        for body in edge.split.bodies if edge.split else ():
            yield from _graphs(body)


def _is_made_again(equation: Equation, value: Value, repeat: int) -> bool:
    """Whether the backward sweep may compute ``value`` from the operands of its equation."""
    if not equation.cheap:
        return False
    size = _jax.aval_bytes(value.aval)
    if not equation.inputs:
        return True
    return size > SMALL_BYTES and not (equation.draws_bits and size * repeat <= SMALL_DRAW_BYTES)


def _length(node: Split | None) -> int:
    """How often a body of control flow runs in one run of it, for all that is known."""
    return node.params["length"] if node is not None and node.kind == "scan" else 1


def _is_carried(node: Split, position: int) -> bool:
    """Whether this input of a body is the loop's carry."""
    if node.kind != "scan":
        return False
    n_consts, n_carry = node.params["primal_counts"]
    return n_consts <= position < n_consts + n_carry


def _carrier(graph: Graph, residual: Value) -> Value:
    """The smallest value of which ``residual`` is a linear rearrangement (the earliest among equals)."""
    best = value = residual
    while True:
        equation = graph.producer.get(value)
        if equation is None or equation.name not in rules.PASSES_ESTIMATE:
            return best
        operands = [a for a in equation.inputs if isinstance(a, Value)]
        if len(operands) != 1 or len(equation.inputs) != 1 or not rules.is_real_float(operands[0].aval.dtype):
            return best
        if jnp.promote_types(operands[0].aval.dtype, value.aval.dtype) != value.aval.dtype:
            return best  # rounding an estimate to a narrower dtype would bias it
        (value,) = operands
        if value.aval.dtype.itemsize >= best.aval.dtype.itemsize and value.aval.size <= best.aval.size:
            best = value


def _disjoint_groups(graph: Graph, linear: dict[Value, set[Edge]]) -> dict[Value, tuple[frozenset[Edge], ...]]:
    """For each stored value, its readers in groups such that no path of the graph runs through two of one group."""
    shared = [edges for edges in linear.values() if len(edges) > 1]
    reach = _reachable(graph) if shared else {}
    number = {e: i for i, e in enumerate(graph.edges)}
    result = {}
    for value, edges in linear.items():
        groups: list[list[Edge]] = []
        for edge in sorted(edges, key=number.__getitem__):
            for group in groups:
                if not any(reach[e] >> number[edge] & 1 for e in group):
                    group.append(edge)
                    break
            else:
                groups.append([edge])
        result[value] = tuple(frozenset(g) for g in groups)
    return result


def _reachable(graph: Graph) -> dict[Edge, int]:
    """For each edge, the set of edges on paths that leave it, as the bits of an integer."""
    consumers: dict[Value, list[Edge]] = {}
    for edge in graph.edges:
        for tangent in edge.inputs:
            consumers.setdefault(tangent, []).append(edge)
    number = {e: i for i, e in enumerate(graph.edges)}
    reach: dict[Edge, int] = {}
    for edge in reversed(graph.edges):
        bits = 0
        for out in edge.outputs:
            for consumer in consumers.get(out, ()):
                bits |= reach[consumer] | 1 << number[consumer]
        reach[edge] = bits
    return reach


def recompute_leaves(graph: Graph, wanted: Iterable[Value], known: Iterable[Value]) -> set[Value]:
    """The known values and inputs from which ``wanted`` are computed again."""
    known = set(known)
    leaves, todo, seen = set(), list(wanted), set()
    while todo:
        value = todo.pop()
        if value in seen:
            continue
        seen.add(value)
        equation = graph.producer.get(value)
        if value in known or equation is None:
            leaves.add(value)
        else:
            todo.extend(a for a in equation.inputs if isinstance(a, Value))
    return leaves


# -- the decision problem ----------------------------------------------------------------------------------------------

KEEP_NANOSECONDS_PER_BYTE = 0.1  # written once, read once
CODE_NANOSECONDS_PER_ENTRY = 1.0  # encoding and decoding
# What it takes to start the kernels of each, in every iteration of the loops around it
KEEP_START, CODE_START, MAKE_START = 500.0, 8000.0, 200.0


class _Decision:
    """The decision problem of a graph and of all graphs inside it, and the plan that a solution of it stands for."""

    def __init__(self, graph: Graph, codecs: Codecs, variance: VarianceModel) -> None:
        self.graph, self.codecs, self.variance = graph, codecs, variance
        self.problem = solver.Problem()
        self.number: dict[Value, int] = {}
        self.carrier: dict[Graph, dict[Value, Value]] = {}
        self.exact: dict[Graph, set[Value]] = {}
        self.carried: dict[Graph, set[Value]] = {}
        self.demands: list[tuple[Graph, Value, tuple[Encoded, ...]]] = []
        self.added: list[tuple[float, ...]] = []  # variance added by each code of each demand
        self.step = 3 * max(1.0, self._forward_nanoseconds(graph, 1))  # the backward sweep has two products for each
        for value in graph.inputs:
            self.number[value] = self.problem.add_value(0, 0.0)
        self._add(graph, 1, ())

    def _forward_nanoseconds(self, graph: Graph, repeat: int) -> float:
        own = sum(e.nanoseconds + MAKE_START for e in graph.equations if e.split is None)
        bodies = [
            (b, repeat * _length(e.split)) for e in graph.equations if e.split is not None for b in e.split.bodies
        ]
        return own * repeat + sum(self._forward_nanoseconds(b, times) for b, times in bodies)

    def _add(self, graph: Graph, repeat: int, path: Path) -> None:
        problem = self.problem
        for equation in graph.equations:
            operands = [self.number[a] for a in equation.inputs if isinstance(a, Value)]
            for value in equation.outputs:
                size = kept_bytes(value) * repeat
                cost = (KEEP_NANOSECONDS_PER_BYTE * size + KEEP_START * repeat) / self.step
                self.number[value] = problem.add_value(size, cost)
            made = [v for v in equation.outputs if _is_made_again(equation, v, repeat)]
            if made:
                cost = (equation.nanoseconds + MAKE_START) * repeat / self.step
                problem.add_maker([self.number[v] for v in made], operands, cost)
        exact, linear, carrier = self._readers(graph)
        self.exact[graph], self.carrier[graph] = exact, carrier
        groups = _disjoint_groups(graph, linear)
        for value in sorted(exact | set(linear), key=lambda v: v.number):
            choices: tuple[Encoded, ...] = ()
            if value not in exact:
                shape, dtype = value.aval.shape, value.aval.dtype
                choices = tuple(
                    Encoded(c, groups[value], c.stored_bytes(shape, dtype))
                    for c in self.codecs((*path, value.number), value, repeat)
                )
            self._demand(graph, value, choices, repeat, path)
        for edge in graph.edges:
            if edge.split is not None:
                self._add_bodies(edge.split, repeat, path)

    def _demand(self, graph: Graph, value: Value, choices: tuple[Encoded, ...], repeat: int, path: Path) -> None:
        codes, added = [], []
        for entry in choices:
            draws = len(entry.readers)
            variance = self.variance((*path, value.number), value, entry.codec, draws)
            nanoseconds = (CODE_NANOSECONDS_PER_ENTRY * value.aval.size + CODE_START) * repeat * draws
            added.append(variance)
            codes.append(solver.Code(entry.stored_bytes * repeat, nanoseconds / self.step + variance))
        self.demands.append((graph, value, choices))
        self.added.append(tuple(added))
        self.problem.demands.append(solver.Demand(self.number[value], tuple(codes)))

    def _readers(self, graph: Graph) -> tuple[set[Value], dict[Value, set[Edge]], dict[Value, Value]]:
        """What must be exact, who may read an estimate of what, and what stands for it in storage."""
        exact: set[Value] = set()
        linear: dict[Value, set[Edge]] = {}
        carrier: dict[Value, Value] = {}
        for edge in graph.edges:
            if edge.split is not None and edge.split.kind == "cond" and isinstance(edge.split.operands[0], Value):
                exact.add(edge.split.operands[0])  # which branch was taken
            for residual, is_linear in zip(edge.residuals, edge.linear, strict=True):
                if is_linear:
                    carrier.setdefault(residual, _carrier(graph, residual))
                    linear.setdefault(carrier[residual], set()).add(edge)
                else:
                    exact.add(residual)
        return exact, linear, carrier

    def _add_bodies(self, node: Split, repeat: int, path: Path) -> None:
        operands = node.operands[1:] if node.kind == "cond" else node.operands
        for number, body in enumerate(node.bodies):
            times = repeat * _length(node)
            for i, (inner, outer) in enumerate(zip(body.inputs, operands, strict=True)):
                if _is_carried(node, i):  # there in one iteration only
                    size = kept_bytes(inner) * times
                    cost = (KEEP_NANOSECONDS_PER_BYTE * size + KEEP_START * times) / self.step
                    self.number[inner] = self.problem.add_value(size, cost)
                    self.carried.setdefault(body, set()).add(inner)
                elif isinstance(outer, Value):
                    self.number[inner] = self.number[outer]
                else:
                    self.number[inner] = self.problem.add_value(0, 0.0)
            self._add(body, times, (*path, node.number, number))

    @property
    def residual_bytes(self) -> int:
        """Bytes of all residuals stored exactly."""
        return sum(self.problem.keep_bytes[d.value] for d in self.problem.demands)

    # -- from a solution to a plan

    def plan(self, solution: solver.Solution) -> Plan:
        """The plan that stores what the solution says."""
        variance = sum(a[c] for a, c in zip(self.added, solution.codes, strict=True) if c is not None)
        predicted = Prediction(solution.cost - variance, variance, solution.gap)
        chosen: dict[Graph, dict[Value, Encoded]] = {}
        for (graph, value, choices), code in zip(self.demands, solution.codes, strict=True):
            if code is not None:
                chosen.setdefault(graph, {})[value] = choices[code]
        plan = self._plan_of(self.graph, 1, (), solution.kept, chosen)
        return dataclasses.replace(plan, predicted=predicted)

    def _plan_of(
        self, graph: Graph, repeat: int, path: Path, kept: frozenset[int], chosen: dict[Graph, dict[Value, Encoded]]
    ) -> Plan:
        encoded = chosen.get(graph, {})
        carrier = self.carrier[graph]
        needed = self.exact[graph] | {v for v in carrier.values() if v not in encoded}
        children: dict[Split, tuple[Plan, ...]] = {}
        for edge in graph.edges:
            if edge.split is None:
                continue
            node, times = edge.split, repeat * _length(edge.split)
            children[node] = tuple(
                self._plan_of(body, times, (*path, node.number, i), kept, chosen) for i, body in enumerate(node.bodies)
            )
            operands = node.operands[1:] if node.kind == "cond" else node.operands
            for plan in children[node]:
                outer = dict(zip(plan.graph.inputs, operands, strict=True))
                needed |= {o for v in plan.reads if isinstance(o := outer[v], Value)}
        own = {v for e in graph.equations for v in e.outputs} | self.carried.get(graph, set())
        stored = {v for v in own if self.number[v] in kept}
        needed |= {r for r, c in carrier.items() if c not in encoded}
        leaves = recompute_leaves(graph, needed, stored)
        reads = frozenset(v for v in leaves if v in set(graph.inputs) and v not in stored)
        keeps = {v: keep_codec(v) for v in sorted(stored & leaves, key=lambda v: v.number)}
        return Plan(
            graph,
            repeat,
            path,
            keeps,
            dict(sorted(encoded.items(), key=lambda p: p[0].number)),
            carrier,
            children,
            reads,
        )


# -- what to ask for -------------------------------------------------------------------------------------------------

LADDER: tuple[Codec, ...] = (
    StochasticRound(bits=8),
    StochasticRound(bits=4),
    StochasticRound(bits=2),
    StochasticRound(bits=1),
    SampleAxis(keep=1 / 64),
)
"""Codecs by falling size: rounding first, sampling only below one bit (it adds far more variance at equal bytes)."""


def make_plan(graph: Graph, codecs: Codecs, variance: VarianceModel | None = None) -> Plan:
    """The plan that stores the fewest bytes, whatever else it costs.

    :param graph: a linearized computational graph.
    :param codecs: what each residual may be coded with.
    :param variance: prices the codes; :func:`equal_shares` by default.
    """
    decision = _Decision(graph, codecs, variance or equal_shares(graph))
    return decision.plan(solver.smallest(decision.problem))


def balanced_plan(graph: Graph, codecs: Codecs, variance: VarianceModel | None = None) -> Plan:
    """The plan of least cost where a share of the residuals' bytes is worth the same share of the step's time."""
    decision = _Decision(graph, codecs, variance or equal_shares(graph))
    return decision.plan(solver.priced(decision.problem, 1 / max(1, decision.residual_bytes)))


def plan_within(
    graph: Graph, budget_bytes: int, codecs: Codecs | None = None, variance: VarianceModel | None = None
) -> Plan:
    """The plan of least cost that stores at most ``budget_bytes``.

    :raises BudgetError: if there is none; it names the smallest feasible budget.
    """
    decision = _Decision(graph, codecs or _any_of(LADDER), variance or equal_shares(graph))
    try:
        return decision.plan(solver.solve(decision.problem, budget_bytes))
    except solver.Infeasible as error:
        smallest = decision.plan(error.smallest)
        raise BudgetError(
            f"memory_budget={budget_bytes} bytes is too small: this program stores at least {smallest.stored_bytes} "
            f"bytes between its sweeps{_binding(smallest)}. Try memory_budget={smallest.stored_bytes} or more, a "
            "smaller minibatch or fewer particles.",
            smallest.stored_bytes,
        ) from None


def _binding(plan: Plan) -> str:
    """The largest residuals of a plan, for an error message."""
    sizes = [(kept_bytes(v) * p.repeat, v, p) for p in plan.walk() for v in p.kept]
    sizes += [(e.stored_bytes * p.repeat, v, p) for p in plan.walk() for v, e in p.encoded.items()]
    largest = sorted(sizes, key=lambda s: -s[0])[:3]
    if not largest:
        return ""
    named = []
    for size, value, owner in largest:
        equation = owner.graph.producer.get(value)
        where = equation.line if equation is not None and equation.line else "an input"
        named.append(f"{size} for {tuple(value.aval.shape)} {value.aval.dtype} at {where}")
    return f" (the largest: {'; '.join(named)})"
