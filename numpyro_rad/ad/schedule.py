"""The order of both sweeps, in *stages*; no array is touched here.

Forward, a stage is what can be done before the next expensive step (a contraction, a loop): what is only there for that
step waits for its stage, so a sampled weight and its log density live where the weight is used. Backward, an edge
belongs to the stage in which the cotangent of one of its inputs can first be complete; prior, guide and layer of one
weight then meet in one stage, where the weight is made again once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from numpyro_rad.ad.graph import Atom, Edge, Equation, Graph, Value
from numpyro_rad.ad.plan import Plan, kept_bytes

ORDERED_FROM = 2**20
"""Bodies of loops whose values take fewer bytes than this, all together, are left to the compiler's own order. There is
next to no memory to be gained, and barriers would keep it from fusing small operations: that may double their time."""


def is_ordered(plan: Plan) -> bool:
    """Whether the compiler is held to the order of the stages."""
    return plan.repeat <= 1 or plan.computed_bytes >= ORDERED_FROM


def forward_stages(plan: Plan, quiet: bool) -> list[list[Equation]]:
    """The needed equations of the primal program in stages, expensive steps last in each.

    :param quiet: whether what acts is not needed where nobody reads its results.
    """
    graph = plan.graph
    live: set[Atom] = {*graph.outputs, *plan.kept, *plan.encoded}
    equations = []
    for equation in reversed(graph.equations):
        acts = equation.acts and not quiet
        if acts or any(o in live for o in equation.outputs) or equation.node in plan.children:
            live.update(equation.inputs)
            equations.append(equation)
    equations.reverse()
    producer = {o: e for e in equations for o in e.outputs}
    earliest: dict[Equation, int] = {}

    def after(equation: Equation, stage: dict[Equation, int]) -> int:
        makers = [producer[a] for a in equation.inputs if a in producer]  # type: ignore[index]
        return max((stage[m] + m.expensive for m in makers), default=0)

    latest_act = 0
    for equation in equations:
        earliest[equation] = after(equation, earliest)
        if equation.acts:
            latest_act = earliest[equation] = max(latest_act, earliest[equation])
    wanted: dict[Value, int] = {}  # stage of the first expensive step that a value leads to
    stage: dict[Equation, int] = {}
    for equation in reversed(equations):
        if equation.expensive:
            stage[equation] = earliest[equation]
        else:
            stages = [wanted[o] for o in equation.outputs if o in wanted]
            if not stages:
                continue
            stage[equation] = min(stages)
        for atom in equation.inputs:
            if isinstance(atom, Value):
                wanted[atom] = min(stage[equation], wanted.get(atom, stage[equation]))
    for equation in equations:
        if equation not in stage:  # leads to no expensive step: as soon as its operands are there
            stage[equation] = after(equation, stage)
    result: list[list[Equation]] = [[] for _ in range(1 + max(stage.values(), default=-1))]
    for expensive in (False, True):
        for equation in equations:
            if equation.expensive == expensive:
                result[stage[equation]].append(equation)
    return [s for s in result if s]


def leading_to_expensive(stage: Sequence[Equation]) -> set[Atom]:
    """What the expensive steps of a stage follow from."""
    found: set[Atom] = set()
    for equation in reversed(stage):
        if equation.expensive or any(o in found for o in equation.outputs):
            found.update(equation.inputs)
    return found


def backward_stages(graph: Graph, arriving: Collection[Value]) -> list[list[Edge]]:
    """Edges in stages, in the order in which they are pulled back.

    :param arriving: the tangent outputs whose cotangents are not zero.
    """
    complete: dict[Value, int] = dict.fromkeys(arriving, 0)  # first stage at which a cotangent can be complete
    live = []
    for edge in reversed(graph.edges):
        stages = [complete[o] for o in edge.outputs if o in complete]
        if not stages:
            continue
        live.append(edge)
        ready = max(stages) + edge.expensive
        for tangent in edge.inputs:
            complete[tangent] = max(ready, complete.get(tangent, 0))
    # Each edge waits until a cotangent that it adds to is needed: by the edge that made the tangent or, for the inputs
    # of the graph, when the last contribution arrives. It does not where that is smaller than what it waits with: a
    # weight that many layers share, or that is a slice of one array, would keep the cotangents of all layers alive.
    producer = {o: e for e in live for o in e.outputs}
    stage: dict[Edge, int] = {}
    for edge in reversed(live):
        needed = [stage[producer[t]] - producer[t].expensive if t in producer else complete[t] for t in edge.inputs]
        stage[edge] = min(needed, default=0)
        if sum(kept_bytes(t) for t in edge.inputs) < sum(kept_bytes(t) for t in edge.outputs):
            first = max(complete[o] for o in edge.outputs if o in complete) + edge.expensive
            stage[edge] = min(stage[edge], first)
    result: dict[int, list[Edge]] = {}
    for edge in live:
        result.setdefault(stage[edge], []).append(edge)
    ordered = [result[k] for k in sorted(result)]
    if graph.slices is None:
        return ordered
    # With the cotangent of the part's end those of all that it takes are complete: the parts of the program that made
    # it come one after the other.
    return [group for stage_edges in ordered for group in _one_by_one(stage_edges)]


def _one_by_one(stage: list[Edge]) -> list[list[Edge]]:
    """A stage in groups, in the order in which they are pulled back: edges that share a large tangent are together."""
    group: dict[Value, list[Edge]] = {}
    of_edge: dict[Edge, list[Edge]] = {}
    for edge in stage:
        found = [group[t] for t in (*edge.inputs, *edge.outputs) if t in group]
        members = [*dict.fromkeys(e for each in found for e in each), edge]
        of_edge.update(dict.fromkeys(members, members))
        large = [t for e in members for t in (*e.inputs, *e.outputs) if t.aval.size > 1]
        group.update(dict.fromkeys(large, members))
    givers: dict[Value, set[Edge]] = {}  # which edges of the stage add to a cotangent
    for edge in stage:
        for tangent in edge.inputs:
            givers.setdefault(tangent, set()).add(edge)
    waiting = list({id(m): m for m in of_edge.values()}.values())
    ordered: list[list[Edge]] = []
    pulled: set[Edge] = set()
    while waiting:
        ready = [m for m in waiting if all(givers.get(o, set()) <= pulled | set(m) for e in m for o in e.outputs)]
        if not ready:
            return [stage]
        for members in ready:
            ordered.append([e for e in stage if e in members])
            pulled.update(members)
        waiting = [m for m in waiting if not pulled.issuperset(m)]
    result: list[list[Edge]] = []
    size = ORDERED_FROM
    for members in ordered:
        if size >= ORDERED_FROM:
            result.append([])
            size = 0
        result[-1] += members
        size += sum(kept_bytes(t) for t in {t for e in members for t in e.inputs})
    return result
