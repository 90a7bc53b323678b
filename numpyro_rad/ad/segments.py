"""Where to cut a program into segments that run again instead of storing all that they compute.

A loop stores its carry at the beginning of each segment of so many iterations, a chain of layers what one segment hands
to the next. The backward sweep runs a segment again when it comes to it, and only then holds what the segment stores:

    bytes = boundaries + (bytes of the whole) / n,        least where both are equal,

for one more forward run (Griewank and Walther 2008, ch. 12; Chen et al. 2016 for layers).
"""

from __future__ import annotations

import dataclasses
import math

from numpyro_rad.ad.graph import Equation, Graph, Scan, Value
from numpyro_rad.ad.loops import n_boundaries
from numpyro_rad.ad.plan import kept_bytes


def segment_lengths(node: Scan, tape_bytes: int, n_levels: int) -> tuple[int, ...] | None:
    """Lengths of segments, and of segments in them, for a loop whose whole tape takes so many bytes; None if that
    saves less than half.

    All levels and the tape of a segment of the last take about the same. Lengths without a shorter segment at the end
    are preferred: their program is smaller.
    """
    carry, length = max(1, node.carry_bytes), node.length
    ratio = max(1.0, tape_bytes / carry) ** (1 / (n_levels + 1))
    lengths: list[int] = []
    outer = length
    for level in range(1, n_levels + 1):
        ideal = length / ratio**level
        near = [m for m in range(1, outer // 2 + 1) if outer % m == 0 and ideal / 1.5 <= m <= 1.5 * ideal]
        inner = min(near, key=lambda m: abs(math.log(m / ideal)), default=max(1, round(ideal)))
        if inner > outer // 2:
            return None
        lengths.append(inner)
        outer = inner
    size = n_boundaries(length, lengths) * node.carry_bytes + tape_bytes * lengths[-1] / length
    return tuple(lengths) if size < tape_bytes / 2 else None


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
    """A graph cut into segments along its expensive steps.

    :ivar n_segments: how many there are.
    :ivar segment_of: values that belong to one segment alone, with its number. They follow from what is there when the
        segment runs again. All others are there from the beginning of the backward sweep, or are made of such.
    :ivar taken: what the segments that run again take from outside.
    :ivar again: the equations that run twice. The last segment does not: the backward sweep begins with it.
    """

    n_segments: int
    segment_of: dict[Value, int]
    taken: frozenset[Value]
    again: tuple[Equation, ...]


def cut_chain(graph: Graph, n_segments: int) -> Chain | None:
    """Segments of about equal bytes; None if the graph has too few expensive steps for so many.

    Control flow and what acts is never run again: what they return counts as given.
    """
    level: dict[Value, int] = dict.fromkeys(graph.inputs, 0)
    for equation in graph.equations:
        before = max((level[a] for a in equation.inputs if isinstance(a, Value)), default=0)
        level.update(dict.fromkeys(equation.outputs, before + equation.expensive))
    residuals = {r for edge in graph.edges for r in edge.residuals}
    weight = [0] * (1 + max(level.values(), default=0))
    for value in residuals:
        weight[level[value]] += kept_bytes(value)
    if len(weight) <= 2 * n_segments:
        return None
    total, done, at_level = sum(weight[1:]), 0, [-1]
    for size in weight[1:]:
        at_level.append(min(n_segments - 1, int(n_segments * done / max(total, 1))))
        done += size
    # What does not depend on an expensive step is cheap to make whenever it is wanted and belongs to no segment.
    given = {o for e in graph.equations if e.node is not None or e.acts for o in e.outputs}
    segment = {v: at_level[n] for v, n in level.items() if n and v not in given}
    crossing, taken, again = set(), set(), []
    for equation in graph.equations:
        here = max((segment.get(o, -1) for o in equation.outputs), default=-1)
        if here < 0:
            continue
        outside = {a for a in equation.inputs if isinstance(a, Value) and segment.get(a) != here}
        crossing |= outside
        if here < n_segments - 1:
            again.append(equation)
            taken |= outside
    segment_of = {v: s for v, s in segment.items() if v not in crossing}
    return Chain(n_segments, segment_of, frozenset(taken), tuple(again))
