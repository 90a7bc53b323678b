"""How long the parts of a step take, by a cost model: what plans weigh against bytes and variance."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from numpyro_rad.ad.codecs import Codec
from numpyro_rad.ad.graph import Equation, Graph, Scan, Value
from numpyro_rad.ad.plan import kept_bytes
from numpyro_rad.planning.costs import CostModel


class Timing:
    """Nanoseconds of a program's parts.

    :ivar storing: what the exact step spends on its residuals.
    :ivar step: what the exact step takes, of the program in one go.
    """

    def __init__(self, graph: Graph, costs: CostModel) -> None:
        self._graph, self._costs = graph, costs
        storing, size = self._exact_storing()
        self._hold = costs.holding(size)
        self.storing = storing + self.holding(size)
        self.step = max(1.0, self._exact_step() if graph.slices is None else graph.slices.exact_step)

    def _exact_step(self) -> float:
        """Of a program in one go; its backward sweep has two products for each of the forward sweep, and no draws."""
        nothing_drawn = dataclasses.replace(self._costs, entry={**self._costs.entry, "random": 0.0})
        return self.forward(self._graph) + 2 * _forward(self._graph, 1, nothing_drawn) + self.storing

    def _exact_storing(self) -> tuple[float, int]:
        """How long storing all residuals takes, besides holding them, and their bytes."""
        time, size = 0.0, 0
        for graph, _, repeat in self._graph.places():
            own = {r for e in graph.edges for r in e.residuals if r in graph.producer}
            loops = [node for node in graph.control_flow if isinstance(node, Scan)]
            carried = sum(node.carry_bytes * node.length for node in loops) * repeat
            size += sum(map(kept_bytes, own)) * repeat + carried
            time += sum(map(self.keeping, map(kept_bytes, own))) * repeat
            time += self._costs.keep_per_byte * carried
        return time, size

    def forward(self, graph: Graph, repeat: int = 1) -> float:
        """To run a graph forward so many times."""
        return _forward(graph, repeat, self._costs)

    def making(self, equations: Iterable[Equation]) -> float:
        """To run equations that are no control flow."""
        return _making(equations, self._costs)

    def making_again(self, equation: Equation, repeat: int) -> float:
        """To run an equation that is no control flow so many times more than once."""
        return self.making([equation]) * repeat + self._costs.draw_start * equation.draws_bits

    def keeping(self, size: int) -> float:
        """To store so many bytes exactly and read them."""
        return self._costs.keep_per_byte * size + self._costs.keep_start

    def coding(self, codec: Codec, value: Value) -> float:
        """To encode and decode a value."""
        return self._costs.code_per_entry * codec.work * value.aval.size + self._costs.code_start * codec.start

    def holding(self, size: float) -> float:
        """What it takes besides that so many bytes are held from one sweep to the other."""
        return self._hold * size

    def offloading(self, value: Value) -> float:
        """To send a value to the host and fetch it."""
        return self._costs.offload_per_byte * kept_bytes(value)


def _forward(graph: Graph, repeat: int, costs: CostModel) -> float:
    own = _making((e for e in graph.equations if e.node is None), costs)
    bodies = [(b, repeat * e.node.repeats) for e in graph.equations if e.node is not None for b in e.node.bodies]
    return own * repeat + sum(_forward(b, times, costs) for b, times in bodies)


def _making(equations: Iterable[Equation], costs: CostModel) -> float:
    return sum(costs.nanoseconds(e.work) + costs.make_start for e in equations)


def launches(graph: Graph) -> int:
    """How many operations a step starts, those of iterations and of both sweeps counted."""
    return 3 * _launches(graph)


def _launches(graph: Graph) -> int:
    nodes = (e.node for e in graph.equations if e.node is not None)
    inside = sum(node.repeats * _launches(body) for node in nodes for body in node.bodies)
    return inside + sum(e.node is None for e in graph.equations)
