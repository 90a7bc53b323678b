"""Who reads which residual, and how: exactly, or as an estimate that several readers may share.

Two readers may share a draw of a code unless a path of the graph runs through both: on such a path the product of two
uses of one draw would be biased.
"""

from __future__ import annotations

import dataclasses

from numpyro_rad.ad.graph import Edge, Graph, Value
from numpyro_rad.ad.plan import carrier_of


@dataclasses.dataclass(frozen=True, eq=False)
class Readers:
    """The readers of the residuals of a graph.

    :ivar exact: what must be exact, for some reader is not linear in it.
    :ivar carrier: for each residual that may be estimated, the value that stands for it in storage.
    :ivar groups: for each such value that need not be exact, its readers in groups that may share a draw.
    """

    exact: frozenset[Value]
    carrier: dict[Value, Value]
    groups: dict[Value, tuple[frozenset[Edge], ...]]

    @classmethod
    def of(cls, graph: Graph) -> Readers:
        """The readers in a graph, those in the bodies of its control flow left out."""
        exact = {condition for node in graph.control_flow for condition in node.conditions}
        linear: dict[Value, set[Edge]] = {}
        carrier: dict[Value, Value] = {}
        for edge in graph.edges:
            for residual, is_linear in zip(edge.residuals, edge.linear, strict=True):
                if is_linear:
                    carrier.setdefault(residual, carrier_of(graph, residual))
                    linear.setdefault(carrier[residual], set()).add(edge)
                else:
                    exact.add(residual)
        return cls(frozenset(exact), carrier, disjoint_groups(graph, linear))

    @property
    def stored(self) -> list[Value]:
        """What the backward sweep asks for, in the order of the program."""
        return sorted(self.exact | set(self.groups), key=lambda v: v.number)


def disjoint_groups(graph: Graph, linear: dict[Value, set[Edge]]) -> dict[Value, tuple[frozenset[Edge], ...]]:
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
