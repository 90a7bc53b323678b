"""In how many slices to run the part of a program in which an axis stays to itself (``ad.slices``).

Slices compute nothing twice, add no variance and store the gradient of the part alone. So where a program does not fit
into a budget as it is, slices come first, as few as it takes; whatever else there is to store is planned as always.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax

from numpyro_rad.ad import _jax
from numpyro_rad.ad.graph import Graph
from numpyro_rad.ad.linearize import graph_of_both, linearize, with_tangents
from numpyro_rad.ad.plan import Plan
from numpyro_rad.ad.slices import MOST_UNROLLED, Part, find
from numpyro_rad.planning import decision, plans

MOST_SLICES = 64
"""Slices that are tried of themselves, at most."""


def exact_plan(graph: Graph) -> Plan:
    """The plan of a slice: nothing in it is random, and what is cheap is computed again."""
    return plans.make_plan(graph, decision.Wanted(decision.any_of(())))


def graph_of(jaxpr: _jax.Jaxpr, active: Sequence[bool], n_slices: int) -> Graph:
    """The linearized graph of a program in which what can be run in slices is run in so many."""
    if n_slices == 1:
        return linearize(jaxpr, active)
    both, has_tangent = with_tangents(jaxpr, active)
    part = find(both, active)
    return graph_of_both(both, has_tangent, active) if part is None else _cut(part, n_slices, has_tangent, active)


def _cut(part: Part, n_slices: int, has_tangent: Sequence[bool], active: Sequence[bool]) -> Graph:
    both, slices = part.cut(n_slices, exact_plan)
    graph = graph_of_both(both, has_tangent, active)
    graph.slices = slices
    return graph


def graph_within(
    jaxpr: _jax.Jaxpr, active: Sequence[bool], budget_bytes: int, smallest: Callable[[Graph], int]
) -> Graph:
    """The linearized graph of a program, with as few slices as make it fit into a budget.

    :param smallest: the fewest bytes that a plan for a graph stores.
    """
    both, has_tangent = with_tangents(jaxpr, active)
    whole = graph_of_both(both, has_tangent, active)
    # among several devices a slice of a sharded axis would be fetched from all of them
    if MOST_SLICES == 1 or jax.device_count() > 1 or plans.untouched_plan(whole).stored_bytes <= budget_bytes:
        return whole
    part = find(both, active)
    if part is None or part.gradient_bytes > budget_bytes:
        return whole
    most = MOST_UNROLLED if part.slow_in_loops else MOST_SLICES
    number, coded = 2, None
    while number <= most:
        graph = _cut(part, number, has_tangent, active)
        assert graph.slices is not None
        room = budget_bytes - exact_plan(graph).stored_bytes
        if graph.slices.bytes_each <= room:
            return graph
        if coded is None and graph.slices.bytes_each + smallest(graph) <= budget_bytes:
            coded = graph  # what is left to store outside of the slices fits as codes
        if graph.slices.number < number:  # the axis is too short
            break
        number = max(2 * number, _power_of_two(number * graph.slices.bytes_each / room) if room > 0 else 0)
    return whole if coded is None else coded


def _power_of_two(at_least: float) -> int:
    number = 1
    while number < at_least:
        number *= 2
    return number
