"""What follows from what: the values and equations from which the backward sweep makes what it needs again."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from numpyro_rad.ad.graph import ControlFlow, ControlFlowEdge, Edge, Equation, Graph, Scan, Value
from numpyro_rad.ad.plan import Plan

Draw = tuple[Value, int]
"""A coded value and the number of a group of its readers: one draw of its code."""


def recompute_leaves(graph: Graph, wanted: Iterable[Value], known: Iterable[Value]) -> set[Value]:
    """The known values and inputs from which ``wanted`` are computed again."""
    return _back_from(graph, wanted, set(known))[0]


def recompute_equations(graph: Graph, wanted: Iterable[Value], known: Iterable[Value]) -> list[Equation]:
    """The equations that make ``wanted`` from known values and inputs, in order."""
    _, again = _back_from(graph, wanted, set(known))
    return [e for e in graph.equations if e in again]


def _back_from(graph: Graph, wanted: Iterable[Value], known: set[Value]) -> tuple[set[Value], set[Equation]]:
    leaves: set[Value] = set()
    again: set[Equation] = set()
    todo, seen = list(wanted), set[Value]()
    while todo:
        value = todo.pop()
        if value in seen:
            continue
        seen.add(value)
        equation = graph.producer.get(value)
        if value in known or equation is None:
            leaves.add(value)
        else:
            again.add(equation)
            todo.extend(a for a in equation.inputs if isinstance(a, Value))
    return leaves, again


def read_outside(plan: Plan, node: ControlFlow) -> list[Value]:
    """Outer values that the bodies of control flow read on the way back."""
    found = dict.fromkeys(node.conditions)
    if isinstance(node, Scan) and node in plan.segments:
        found.update(dict.fromkeys(node.outside))
    for body, child in zip(node.bodies, plan.children[node], strict=True):
        for inner, outer in zip(body.inputs, node.operands, strict=True):
            if inner in child.reads and isinstance(outer, Value):
                found[outer] = None
    return list(found)


class Needs(NamedTuple):
    """What edges read, exactly and as draws of codes."""

    exact: set[Value]
    draws: list[Draw]

    @classmethod
    def of(cls, plan: Plan, edges: Iterable[Edge]) -> Needs:
        """What ``edges`` read under a plan."""
        exact: set[Value] = set()
        draws: dict[Draw, None] = {}
        for edge in edges:
            for residual, linear in zip(edge.residuals, edge.linear, strict=True):
                if linear and plan.estimated(residual):
                    draws[draw_for(plan, edge, residual)] = None
                else:
                    exact.add(residual)
            if isinstance(edge, ControlFlowEdge):
                exact.update(read_outside(plan, edge.node))
        return cls(exact, list(draws))

    def stored(self, graph: Graph, known: Collection[Value]) -> set[Value]:
        """The known values and inputs that all of it is made from, and what codes stand for."""
        return {value for value, _ in self.draws} | recompute_leaves(graph, self.exact, known)


def draw_for(plan: Plan, edge: Edge, residual: Value) -> Draw:
    """The draw that an edge reads in the place of a residual."""
    carrier = plan.carrier[residual]
    return carrier, next(i for i, group in enumerate(plan.encoded[carrier].readers) if edge in group)
