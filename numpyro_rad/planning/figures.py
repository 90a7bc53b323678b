"""``plan_figure``: a picture of a plan. When it holds how many bytes, and what other budgets would cost.

Time is the order of the program: the equations of the forward sweep, then the edges of the backward sweep, a loop being
as long as all its iterations together. Each sweep is one unit long.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from numpyro_rad.ad import _jax
from numpyro_rad.ad.graph import ControlFlow, ControlFlowEdge, Edge, Equation, Graph, Scan, Value
from numpyro_rad.ad.plan import BudgetError, Plan
from numpyro_rad.ad.recompute import Needs, recompute_leaves
from numpyro_rad.mistakes import kwargs_checked
from numpyro_rad.planning.explain import plan_of, planner_of
from numpyro_rad.planning.planner import Planner, parse_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe-Ito colours, which stay apart for colour-blind readers; lines differ in their dashes as well.
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#555555"

N_BUDGETS = 8
"""Budgets that are tried for the trade-off unless they are given."""


@dataclasses.dataclass(frozen=True)
class _Change:
    """``delta`` bytes more, evenly between two times."""

    start: float
    end: float
    delta: float


@kwargs_checked
def plan_figure(
    target: Any,
    *args: Any,
    argnums: int | Sequence[int] = 0,
    budgets: Sequence[int | str] | None = None,
    **kwargs: Any,
) -> Figure:
    """Draw the plan for ``target``: the bytes that it holds over time, and what it trades for them.

    On the left the bytes stored for the backward sweep, beside those of all residuals stored exactly. On the right the
    predicted added time and added variance of the best plan within each of several budgets, and those of this plan.
    Traces the program, plans once for each budget and runs nothing. Needs matplotlib (``numpyro_rad[plots]``).

    :param target: as for :func:`explain`: an ``SVI``, a ``RAD_ELBO``, or what :func:`numpyro_rad.rad` returned.
    :param args: as for :func:`explain`.
    :param argnums: as for :func:`explain`.
    :param budgets: numbers of bytes to plan for, as in ``memory_budget=``; those that are too small are left out.
        Default: from the smallest feasible one to all residuals stored exactly.
    :return: a figure of matplotlib, for a notebook or ``savefig``.
    :raises ImportError: without matplotlib.
    :raises TypeError: if ``target`` is none of these.
    :raises BudgetError: if no plan meets the budget of ``target``.

    Example::

        plan_figure(RAD_ELBO(memory_budget="64MiB"), key, params, model, guide, x, y).savefig("plan.png")
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plan_figure draws with matplotlib: pip install numpyro_rad[plots]") from error
    plan, labels = plan_of(target, args, argnums, kwargs)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_timeline(left, plan)
    called = dict(zip(plan.graph.tangent_inputs, labels, strict=True))
    candidates = list(_candidates(planner_of(target), plan, called, budgets))
    _draw_trade_off(right, plan, candidates)
    return figure


# -- bytes over time -------------------------------------------------------------------------------------------------


def timeline(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Times from 0 to 2 and the bytes that the plan holds then; a time stands twice where bytes jump."""
    return _added_up(_changes(plan))


def exact_timeline(graph: Graph) -> tuple[np.ndarray, np.ndarray]:
    """The same for all residuals of a program, each stored exactly."""
    return _added_up(_exact_changes(graph))


def _added_up(changes: Iterator[_Change]) -> tuple[np.ndarray, np.ndarray]:
    found = list(changes)
    times = np.unique([0.0, 1.0, 2.0, *(t for c in found for t in (c.start, c.end))])
    before, after = np.zeros(len(times)), np.zeros(len(times))
    for c in found:
        if c.end > c.start:
            share = np.clip((times - c.start) / (c.end - c.start), 0.0, 1.0)
            before, after = before + c.delta * share, after + c.delta * share
        else:
            before, after = before + c.delta * (times > c.start), after + c.delta * (times >= c.start)
    return np.repeat(times, 2), np.column_stack([before, after]).ravel()


def _changes(plan: Plan) -> Iterator[_Change]:
    """What a plan stores when it is there, and drops after its last reader."""
    graph = plan.graph
    made, read = _clock(graph)
    last: dict[Value, float] = {}
    for edge in reversed(graph.edges):
        wanted = Needs.of(plan, [edge]).exact
        last.update(dict.fromkeys(recompute_leaves(graph, wanted, plan.kept), read[edge][1]))
    for value in plan.kept:
        yield from _stay(_there(graph, made, value), last.get(value, 1.0), plan.kept_bytes(value))
    for value, entry in plan.encoded.items():
        for group in entry.readers:
            yield from _stay(_there(graph, made, value), max(read[e][1] for e in group), entry.bytes_each)
    forward, backward = _loops(graph, made, read)
    for node in plan.children:
        tape = plan.tapes_bytes(node)
        if isinstance(node, Scan) and node in plan.segments:  # one segment at a time, and only on the way back
            yield from _stay(backward[node][0], backward[node][1], tape)
            tape = plan.boundary_bytes(node)
        yield from _through(forward[node], backward[node], tape)


def _exact_changes(graph: Graph) -> Iterator[_Change]:
    made, read = _clock(graph)
    last = {r: read[edge][1] for edge in reversed(graph.edges) for r in edge.residuals}
    for value, end in last.items():
        if value in graph.producer:
            yield from _stay(_there(graph, made, value), end, _jax.aval_bytes(value.aval))
    forward, backward = _loops(graph, made, read)
    for node in backward:
        tape = _exact_tape(node)
        yield from _through(forward[node], backward[node], tape)


def _exact_tape(node: ControlFlow) -> int:
    """Bytes of all residuals of control flow, of all iterations together."""
    total = 0
    for body in node.bodies:
        there = {r for e in body.edges for r in e.residuals if r in body.producer or r in node.carry}
        total += sum(_jax.aval_bytes(v.aval) for v in there) + sum(map(_exact_tape, body.control_flow))
    return total * node.repeats


def _stay(start: float, end: float, size: int) -> Iterator[_Change]:
    yield _Change(start, start, size)
    yield _Change(end, end, -size)


def _through(forward: tuple[float, float], backward: tuple[float, float], size: int) -> Iterator[_Change]:
    """What a loop fills on its way forward and empties on its way back."""
    yield _Change(forward[0], forward[1], size)
    yield _Change(backward[0], backward[1], -size)


def _there(graph: Graph, made: dict[Equation, tuple[float, float]], value: Value) -> float:
    """When a value is computed; inputs are there from the beginning."""
    return made[graph.producer[value]][1] if value in graph.producer else 0.0


Spans = dict[Any, tuple[float, float]]


def _clock(graph: Graph) -> tuple[Spans, Spans]:
    """Beginning and end of each equation in the forward sweep, and of each edge in the backward sweep."""
    return _spans(graph.equations, 0.0), _spans(graph.edges[::-1], 1.0)


def _spans(steps: Sequence[Equation | Edge], begin: float) -> Spans:
    ends = np.cumsum([0, *(_duration(step) for step in steps)])
    ends = begin + ends / max(1, ends[-1])
    return {step: (float(a), float(b)) for step, a, b in zip(steps, ends, ends[1:], strict=False)}


def _duration(step: Equation | Edge) -> int:
    """In steps of the program: 1, or those of all iterations of a loop."""
    node = step.node if isinstance(step, Equation | ControlFlowEdge) else None
    if node is None:
        return 1
    inner = (body.equations if isinstance(step, Equation) else body.edges for body in node.bodies)
    return max(1, node.repeats * max(sum(map(_duration, steps)) for steps in inner))


def _loops(graph: Graph, made: Spans, read: Spans) -> tuple[Spans, Spans]:
    """When control flow runs forward, and when backward."""
    forward = {e.node: made[e] for e in graph.equations if e.node is not None}
    return forward, {e.node: read[e] for e in graph.edges if isinstance(e, ControlFlowEdge)}


# -- other budgets ---------------------------------------------------------------------------------------------------


def _candidates(
    planner: Planner, plan: Plan, names: dict[Value, str], budgets: Sequence[int | str] | None
) -> Iterator[Plan]:
    """The plans for other budgets, from the same codes and prices."""
    exact = planner.exact or (planner.codec is not None and planner.codec.exact)
    within = dataclasses.replace(planner, codec=None, added_variance=None, plan=None, memory_budget=0, exact=exact)
    if budgets is None:
        try:
            least = _quietly(within, plan.graph, names).stored_bytes
        except BudgetError as error:
            least = error.smallest_bytes
        most = max(least, plan.stored_bytes, int(exact_timeline(plan.graph)[1].max()))
        budgets = [int(b) for b in np.ceil(np.geomspace(max(1, least), max(1, most), N_BUDGETS))]
    for budget in sorted({parse_bytes(b, "budgets") for b in budgets}):
        with contextlib.suppress(BudgetError):
            yield _quietly(dataclasses.replace(within, memory_budget=budget), plan.graph, names)


def _quietly(planner: Planner, graph: Graph, names: dict[Value, str]) -> Plan:
    """A plan without warnings: nobody asked to train with it, and what it costs is drawn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return planner(graph, names)


# -- drawing ---------------------------------------------------------------------------------------------------------


def _unit(most: float) -> tuple[str, int]:
    """The largest unit of which there is at least one."""
    units = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("bytes", 1))
    return next((name, scale) for name, scale in units if most >= scale or scale == 1)


def _draw_timeline(axes: Axes, plan: Plan) -> None:
    everything, held = exact_timeline(plan.graph), timeline(plan)
    name, scale = _unit(max(everything[1].max(), held[1].max()))
    axes.plot(everything[0], everything[1] / scale, "--", color=_GREY, label="every residual stored exactly")
    axes.plot(held[0], held[1] / scale, "-", color=_BLUE, label="this plan")
    axes.fill_between(held[0], held[1] / scale, color=_BLUE, alpha=0.2, linewidth=0)
    axes.axvline(1.0, color="0.75", linewidth=1, zorder=0)
    axes.set_xlim(0, 2)
    axes.set_ylim(0, 1.3 * axes.dataLim.y1 or 1)  # with room for the legend
    axes.set_xticks([0.5, 1.5], ["forward sweep", "backward sweep"])
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("order of the program")
    axes.set_ylabel(f"bytes held for the backward sweep ({name})")
    axes.set_title("bytes held over time", fontsize=11)
    _finish(axes)


def _draw_trade_off(axes: Axes, plan: Plan, candidates: Sequence[Plan]) -> None:
    from matplotlib.ticker import LogLocator

    name, scale = _unit(max([plan.stored_bytes, *(p.stored_bytes for p in candidates)]))
    priced = [(p.stored_bytes / scale, p.predicted) for p in candidates if p.predicted is not None and p.stored_bytes]
    lines = (("added_seconds", _BLUE, "o-", "added time"), ("added_variance", _ORANGE, "D--", "added variance"))
    for field, color, line, label in lines:
        points = [(x, getattr(p, field)) for x, p in priced]
        axes.plot(*np.array(points).reshape(-1, 2).T, line, color=color, markersize=4, label=label)
        if plan.predicted is not None:
            y = getattr(plan.predicted, field)
            look = {"markersize": 15, "markeredgecolor": "black", "clip_on": False, "zorder": 4}
            axes.plot([plan.stored_bytes / scale], [y], "*", color=color, **look)
    axes.axvline(plan.stored_bytes / scale, color=_GREY, linewidth=1, linestyle=":", label="this plan")
    if plan.stored_bytes:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:.3g}")
        axes.xaxis.set_minor_formatter(lambda x, _: "")
    axes.set_yscale("symlog", linthresh=1e-3)  # exact plans add no variance
    axes.set_ylim(0, 3 * axes.dataLim.y1 or 1)
    axes.set_xlabel(f"bytes held for the backward sweep ({name}, log scale)")
    axes.set_ylabel("added time / time of the exact step,\nadded variance / variance of its gradient")
    axes.set_title("what other budgets would cost (predicted)", fontsize=11)
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
