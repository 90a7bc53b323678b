"""Decide for each residual whether it is alive anyway, recomputed, kept exactly, or encoded.

All four are weighed in one minimum cut. Each primal value is a pair of nodes joined by an arc whose capacity is what
keeping the value costs; operands of a cheap equation have arcs of infinite capacity to its results (whoever has the
operands can make the result); what cannot be made again hangs on the source. A residual whose pullback is linear in it
ends in an arc to the sink whose capacity is the size of its code; any other in an infinite one. The cheapest cut is
then the least number of stored bytes,

    minimize  sum_{v kept} bytes(v) + sum_{r encoded} bytes(code(r))   subject to   every residual can be had.

Inputs of the program hang on nothing: they are alive in both sweeps and cost no storage. ``make_plan`` solves this for
one choice of codecs; ``plan_within`` searches that choice under a byte budget.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Iterable, Iterator

import jax.numpy as jnp
import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from numpyro_rad import _jax, rules
from numpyro_rad.codecs import BitMask, Codec, Keep, SampleAxis, StochasticRound
from numpyro_rad.graph import Edge, Graph, Split, Value

SMALL_BYTES = 64
"""Values of up to this size (PRNG keys, scalars) are kept rather than made again: chains of key splits stay short."""

SMALL_DRAW_BYTES = 4096
"""Random numbers of up to this size (over all iterations) are kept too: drawing them again takes long to compile."""

LEAST_ENCODED_BYTES = 8192
"""Residuals below this size (over all iterations of the loops around them) are not worth their added variance."""

Path = tuple[int, ...]
Policy = Callable[[Path, Value, int], Codec | None]
"""From a residual's path (loop numbers, then its own) and its number of repetitions to its codec; None: keep
exactly."""


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


def uniform(codec: Codec) -> Policy:
    """One codec wherever it may be used and saves something; everything else exact."""

    def policy(path: Path, value: Value, repeat: int) -> Codec | None:
        exact_bytes = _jax.aval_bytes(value.aval)
        if codec.exact or exact_bytes * repeat < LEAST_ENCODED_BYTES:
            return None
        return codec if codec.supports(value.aval.shape, value.aval.dtype) else None

    return policy


def make_plan(
    graph: Graph, policy: Policy, free: Iterable[Value] | None = None, repeat: int = 1, path: Path = ()
) -> Plan:
    """The plan of least stored bytes for the codecs that ``policy`` names.

    :param graph: a linearized computational graph.
    :param policy: the codec for each residual.
    :param free: inputs that the backward sweep can have at no cost; all of them by default.
    :param repeat: how often the graph runs.
    :param path: numbers of the control flow around it.
    """
    free_inputs = set(graph.inputs if free is None else free)
    regenerable = _regenerable(graph, free_inputs)
    children: dict[Split, tuple[Plan, ...]] = {}
    exact: set[Value] = set()
    for edge in graph.edges:
        if edge.split is not None:
            plans, needed = _plan_split(edge.split, policy, regenerable, repeat, path)
            children[edge.split] = plans
            exact.update(needed)
    linear: dict[Value, set[Edge]] = {}
    carrier: dict[Value, Value] = {}
    for edge in graph.edges:
        for residual, is_linear in zip(edge.residuals, edge.linear, strict=True):
            if is_linear:
                carrier.setdefault(residual, _carrier(graph, residual))
                linear.setdefault(carrier[residual], set()).add(edge)
            else:
                exact.add(residual)
    groups = _disjoint_groups(graph, linear)
    candidates: dict[Value, Encoded] = {}
    for value, readers in groups.items():
        codec = policy((*path, value.number), value, repeat)
        if codec is not None:
            size = codec.stored_bytes(value.aval.shape, value.aval.dtype)
            candidates[value] = Encoded(codec, readers, size)
    kept, encoded_values = _minimum_cut(graph, repeat, free_inputs, exact, set(linear), candidates)
    encoded = {v: e for v, e in candidates.items() if v in encoded_values}
    needed = exact | {v for v in linear if v not in encoded}
    inputs = set(graph.inputs) - kept  # an input of a loop body that was kept there is not read outside as well
    reads = frozenset(v for v in recompute_leaves(graph, needed, kept) if v in inputs)
    keeps = {v: keep_codec(v) for v in sorted(kept, key=lambda v: v.number)}
    return Plan(graph, repeat, path, keeps, encoded, carrier, children, reads)


def _plan_split(
    node: Split, policy: Policy, regenerable: set[Value], repeat: int, path: Path
) -> tuple[tuple[Plan, ...], set[Value]]:
    """Plans of the bodies of control flow and the outer values that they need on the way back."""
    skip = 1 if node.kind == "cond" else 0  # the index of a cond is no input of its branches
    operands = node.operands[skip:]
    plans = []
    needed = {a for a in node.operands[:skip] if isinstance(a, Value)}
    for number, body in enumerate(node.bodies):
        free = set()
        for i, (inner, outer) in enumerate(zip(body.inputs, operands, strict=True)):
            constant = node.kind == "scan" and i < node.params["primal_counts"][0]
            carried = node.kind == "scan" and not constant and i < sum(node.params["primal_counts"])
            if constant or (not carried and (not isinstance(outer, Value) or outer in regenerable)):
                free.add(inner)
        times = repeat * (node.params["length"] if node.kind == "scan" else 1)
        plan = make_plan(body, policy, free, times, (*path, node.number, number))
        plans.append(plan)
        position = {v: i for i, v in enumerate(body.inputs)}
        for inner in plan.reads:
            outer = operands[position[inner]]
            if isinstance(outer, Value):
                needed.add(outer)
    return tuple(plans), needed


def _is_made_again(graph: Graph, value: Value, repeat: int) -> bool:
    """Whether the backward sweep may compute ``value`` from the operands of its equation."""
    equation = graph.producer.get(value)
    if equation is None or not equation.cheap:
        return False
    size = _jax.aval_bytes(value.aval)
    if not equation.inputs:
        return True
    return size > SMALL_BYTES and not (equation.draws_bits and size * repeat <= SMALL_DRAW_BYTES)


def _regenerable(graph: Graph, free_inputs: set[Value]) -> set[Value]:
    """Values that follow cheaply from the free inputs and from small values."""
    known = set(free_inputs)
    for equation in graph.equations:
        if equation.cheap and all(not isinstance(a, Value) or a in known for a in equation.inputs):
            known.update(equation.outputs)
        known.update(o for o in equation.outputs if _jax.aval_bytes(o.aval) <= SMALL_BYTES)
    return known


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


def _minimum_cut(
    graph: Graph,
    repeat: int,
    free: set[Value],
    exact: set[Value],
    linear: set[Value],
    candidates: dict[Value, Encoded],
) -> tuple[set[Value], set[Value]]:
    """Values to keep and values to encode; see the module's docstring."""
    nodes: dict[Value, int] = {}
    arcs: list[tuple[int, int, int]] = []  # (tail, head, bytes); -1 bytes for infinite
    source, sink, todo = 0, 1, sorted(exact | linear, key=lambda v: v.number)

    def number(value: Value) -> int:
        """The first of the two nodes of a value; new ones are visited later."""
        if value not in nodes:
            nodes[value] = 2 + 2 * len(nodes)
            todo.append(value)
        return nodes[value]

    visited = set()
    while todo:
        value = todo.pop()
        if value in visited:
            continue
        visited.add(value)
        entry = number(value)
        if value in free:
            continue
        arcs.append((entry, entry + 1, kept_bytes(value)))
        if _is_made_again(graph, value, repeat):
            operands = graph.producer[value].inputs
            arcs.extend((number(a) + 1, entry, -1) for a in operands if isinstance(a, Value))
        else:
            arcs.append((source, entry, -1))
    for value in exact | linear:
        size = candidates[value].stored_bytes if value in candidates and value not in exact else -1
        arcs.append((nodes[value] + 1, sink, size))
    reached = _source_side(arcs, 2 + 2 * len(nodes), source, sink)
    kept = {v for v, n in nodes.items() if n in reached and n + 1 not in reached and v not in free}
    encoded = {v for v in candidates if v not in exact and nodes[v] + 1 in reached and v not in free}
    return kept, encoded


def _source_side(arcs: list[tuple[int, int, int]], n_nodes: int, source: int, sink: int) -> set[int]:
    """Nodes on the source's side of a minimum cut."""
    if not arcs:
        return {source}
    total = sum(size for _, _, size in arcs if size > 0) + 1
    unit = max(1, -(-total // 2**29))  # SciPy's capacities are 32-bit
    infinite = total // unit + len(arcs) + 1
    merged: dict[tuple[int, int], int] = {}
    for tail, head, size in arcs:
        capacity = infinite if size < 0 else -(-size // unit)
        merged[tail, head] = min(infinite, merged.get((tail, head), 0) + capacity)
    tails, heads = np.array(list(merged), dtype=np.int32).T
    network = csr_array((np.array(list(merged.values()), dtype=np.int32), (tails, heads)), shape=(n_nodes, n_nodes))
    left = (network - maximum_flow(network, source, sink).flow).tocsr()
    left.data = np.maximum(left.data, 0)
    left.eliminate_zeros()
    reached, todo = {source}, [source]
    while todo:
        node = todo.pop()
        for head in left.indices[left.indptr[node] : left.indptr[node + 1]].tolist():
            if head not in reached:
                reached.add(head)
                todo.append(head)
    return reached


# -- budgets ---------------------------------------------------------------------------------------------------------

LADDER: tuple[Codec, ...] = (
    Keep(),
    StochasticRound(bits=8),
    StochasticRound(bits=4),
    StochasticRound(bits=2),
    StochasticRound(bits=1),
    SampleAxis(keep=1 / 64),
)
"""Codecs by falling size: rounding first, sampling only below one bit (it adds far more variance at equal bytes)."""


def plan_within(graph: Graph, budget_bytes: int) -> Plan:
    """A plan that stores at most ``budget_bytes``, bytes spent where the variance falls fastest.

    The largest rung of ``LADDER`` that fits everywhere is refined residual by residual: each step takes the upgrade
    with the largest fall of relative variance per byte that still fits.

    :raises BudgetError: if even the smallest rung does not fit.
    """
    plans: list[tuple[Codec, Plan]] = []
    for rung in LADDER:
        plan = make_plan(graph, uniform(rung))
        if plan.stored_bytes <= budget_bytes:
            return _spend(graph, plan, rung, budget_bytes)
        plans.append((rung, plan))
    smallest = min((plan for _, plan in plans), key=lambda plan: plan.stored_bytes)
    raise BudgetError(
        f"memory_budget={budget_bytes} bytes is too small: this program stores at least {smallest.stored_bytes} bytes "
        f"between its sweeps{_binding(smallest)}. Try memory_budget={smallest.stored_bytes} or more, a smaller "
        "minibatch or fewer particles.",
        smallest.stored_bytes,
    )


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


def _spend(graph: Graph, plan: Plan, rung: Codec, budget_bytes: int) -> Plan:
    """Upgrade residuals of ``plan`` one at a time while the budget allows."""
    level = LADDER.index(rung)
    if level == 0:
        return plan
    entries: dict[Path, tuple[Value, int, Encoded]] = {
        (*p.path, v.number): (v, p.repeat, e) for p in plan.walk() for v, e in p.encoded.items()
    }
    levels: dict[Path, int] = dict.fromkeys(entries, level)
    left = budget_bytes - plan.stored_bytes

    def upgrade(key: Path) -> tuple[float, Path, int]:
        """Change of relative variance per byte by the next upgrade of a residual, and its bytes."""
        value, repeat, entry = entries[key]
        shape, dtype = value.aval.shape, value.aval.dtype
        now, better = LADDER[levels[key]], LADDER[levels[key] - 1]
        extra = (better.stored_bytes(shape, dtype) - now.stored_bytes(shape, dtype)) * repeat * len(entry.readers)
        return (better.relative_variance(shape) - now.relative_variance(shape)) / max(extra, 1), key, extra

    best_first = [upgrade(key) for key in entries]
    heapq.heapify(best_first)
    while best_first:
        _, key, extra = heapq.heappop(best_first)
        if extra <= left:
            left -= extra
            levels[key] -= 1
            if levels[key]:
                heapq.heappush(best_first, upgrade(key))
    base = uniform(rung)

    def policy(path: Path, value: Value, repeat: int) -> Codec | None:
        codec = base(path, value, repeat)
        if codec is None or path not in levels:
            return codec
        chosen = LADDER[levels[path]]
        return None if chosen.exact else chosen

    refined = make_plan(graph, policy)
    return refined if refined.stored_bytes <= budget_bytes else plan
