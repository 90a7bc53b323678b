"""The plans that can be asked for: of fewest bytes, within a budget, within a variance, or as they were saved.

Each poses the planning problem of the program (``problem``), the plain one or with loops and chains of layers cut into
segments, and takes the plan of its solution.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from numpyro_rad.ad import primitives
from numpyro_rad.ad.codecs import Codec, PassThrough
from numpyro_rad.ad.floating import FloatRound
from numpyro_rad.ad.graph import Graph, Path, Scan, Value
from numpyro_rad.ad.plan import BudgetError, Plan, Prediction
from numpyro_rad.ad.rotation import RotatedRound
from numpyro_rad.ad.rounding import DitheredRound, SampledRound, StochasticRound
from numpyro_rad.ad.sampling import RandomProjection, SampleAxis
from numpyro_rad.ad.segments import cut_chain, segment_lengths
from numpyro_rad.planning import search, solver
from numpyro_rad.planning.assembly import plan_of
from numpyro_rad.planning.problem import Cuts, PlanProblem
from numpyro_rad.planning.request import PlanRequest

LADDER: tuple[Codec, ...] = (
    StochasticRound(bits=8),
    StochasticRound(bits=4),
    StochasticRound(bits=2),
    StochasticRound(bits=1),
    SampledRound(bits=2, size=2),
    SampledRound(bits=2, size=4),
    SampledRound(bits=2, size=8),
    SampledRound(bits=2, size=32),
)
"""Codecs by falling size: rounding first, rounding of a sampled part for about one bit and less."""

MEASURED: tuple[Codec, ...] = (
    *(DitheredRound(bits=bits) for bits in (4, 2, 1)),
    *(RotatedRound(bits=bits) for bits in (4, 3, 2, 1)),
    *(FloatRound(bits=bits) for bits in (8, 4)),
)
"""Chosen with a calibration only, for what they are worth depends on the data. With dither there is half the variance
where entries lie anywhere between the levels, and more where they lie on them (zeros behind a ReLU, one-hot vectors);
turned, less still at few bits, and more where groups are constant; as small floating-point numbers, a hundredth of it
and less where a few entries are much larger than those that matter, and several times as much elsewhere."""


SEGMENT_LEVELS = (1, 2, 3)
"""How often segments of loops are cut into segments: each level is one more run of the loop."""

EXACT_IS_WORTH = 0.01
"""Codes have to save so much of the step's time, or what is worth as much, where there is no budget."""

CHAIN_LENGTHS = (2, 3, 4, 6, 8, 12, 16)
"""Numbers of segments that are tried for a program without loops."""


def untouched_plan(graph: Graph) -> Plan:
    """The plan that leaves the program to JAX's own reverse mode: every residual is stored."""
    problem = PlanProblem(graph, PlanRequest(lambda path, value, repeat: ()))
    needed = {r.number for r in problem.residuals}
    plan = plan_of(problem, solver.settled(problem.timed, needed, problem.coded()))
    return dataclasses.replace(plan, untouched=True, predicted=Prediction(0.0, 0.0, None))


def make_plan(graph: Graph, request: PlanRequest) -> Plan:
    """The plan that stores the fewest bytes in one pass over the program, whatever else it costs."""
    problem = PlanProblem(graph, request)
    return plan_of(problem, solver.smallest(problem.priced()))


def balanced_plan(graph: Graph, request: PlanRequest) -> Plan:
    """The plan of least cost where a share of the residuals' bytes is worth the same share of the step's time."""
    return plan_of(*balanced(graph, request))


def balanced(
    graph: Graph, request: PlanRequest, exact_bytes: float | None = None
) -> tuple[PlanProblem, solver.Solution]:
    """The problem of :func:`balanced_plan` and its solution.

    :param exact_bytes: of all residuals; by default those of the graph.
    """
    whole = PlanProblem(graph, request.at_first)
    if exact_bytes is None:
        in_slices = 0 if graph.slices is None else graph.slices.exact_bytes
        exact_bytes = whole.residual_bytes + in_slices
    price = 1 / max(1, exact_bytes)
    best: list[tuple[float, PlanProblem, solver.Solution]] = []
    for problem in (whole, *(whole.cut(cuts) for cuts in _cut_loops(whole))):
        priced = problem.priced()
        for number, kind in enumerate((priced.without_codes(), priced) if problem.has_codes else (priced,)):
            solution = solver.priced(kind, price)
            cost = solution.cost + price * plan_of(problem, solution).stored_bytes
            best.append((cost + EXACT_IS_WORTH * number, problem, solution))
    return min(best, key=lambda found: found[0])[1:]


def plan_within(graph: Graph, budget_bytes: int, request: PlanRequest) -> Plan:
    """The plan of least cost that holds at most ``budget_bytes``, with what a slice holds while it runs.

    :raises BudgetError: if there is none; it names the smallest feasible budget.
    """
    return plan_of(*solved_within(graph, budget_bytes, request))


def solved_within(graph: Graph, budget_bytes: int, request: PlanRequest) -> tuple[PlanProblem, solver.Solution]:
    """The problem of :func:`plan_within` and its solution.

    :raises BudgetError: if there is none; it names the smallest feasible budget.
    """
    if request.first is not None:
        try:
            return solved_within(graph, budget_bytes, request.at_first)
        except BudgetError:
            pass
    in_slices = 0 if graph.slices is None else graph.slices.bytes_each
    best: tuple[PlanProblem, solver.Solution] | None = None
    too_large: list[Plan] = []

    def solve(problem: PlanProblem) -> solver.Solution | None:
        nonlocal best
        try:
            solution = search.within(problem, budget_bytes - in_slices)
        except solver.Infeasible as error:
            smallest = plan_of(problem, error.smallest)
            if smallest.stored_bytes + in_slices > budget_bytes:  # to the solver, branches share nothing
                too_large.append(smallest)
                return None
            solution = error.smallest
        if best is None or solution.cost < best[1].cost:
            best = problem, solution
        return solution

    whole = PlanProblem(graph, request)
    solution = solve(whole)
    # Where one pass over a loop costs more than to run it twice, or does not fit, segments are tried as well.
    if solution is None or solution.cost > whole.least_again():
        for cuts in (*_cut_loops(whole), *_cut_chains(whole, solution)):
            solve(whole.cut(cuts))
    if best is not None:
        return best
    smallest = min(too_large, key=lambda plan: plan.stored_bytes)
    least = smallest.stored_bytes + in_slices
    raise BudgetError(
        f"memory_budget={budget_bytes} bytes is too small: this program stores at least {least} "
        f"bytes between its sweeps{_binding(smallest)}. Try memory_budget={least} or more, a "
        "smaller minibatch or fewer particles.",
        least,
    )


def _cut_loops(problem: PlanProblem) -> Sequence[Cuts]:
    """Ways to cut the loops of the program into segments, and these into segments, such that all boundaries together
    take about as much as the tape of one segment: a tape of fewest bytes, of least cost, or without codes.
    """
    if not problem.loops:
        return []
    priced = problem.priced()
    exact = solver.smallest(priced.without_codes())
    tapes = [plan_of(problem, s) for s in (solver.smallest(priced), solver.priced(priced, 0.0), exact)]
    found: list[dict[Scan, tuple[int, ...]]] = []
    for n_levels, plan in itertools.product(SEGMENT_LEVELS, tapes):
        cut = {}
        for node, (child, *_) in plan.children.items():
            if isinstance(node, Scan) and node.repeatable:
                lengths = segment_lengths(node, child.stored_bytes, n_levels)
                if lengths is not None:
                    cut[node] = lengths
        found += [{node: lengths} for node, lengths in cut.items()] if len(cut) > 1 else []
        found.append(cut)
    return [Cuts(cut) for i, cut in enumerate(found) if cut and cut not in found[:i]]


def _cut_chains(problem: PlanProblem, solution: solver.Solution | None) -> Iterator[Cuts]:
    """Ways to cut the program itself. The compiler's own temporaries grow where layers run again: only where codes do
    not do it.
    """
    if solution is None or not problem.has_codes:
        chains = (cut_chain(problem.graph, n) for n in CHAIN_LENGTHS)
        yield from (Cuts(chain=chain) for chain in chains if chain is not None)


def plan_for_variance(graph: Graph, added_variance: float, request: PlanRequest) -> Plan:
    """The plan of fewest bytes (a share of them being worth the same share of the step's time) that adds at most so
    much variance, relative to that of the exact gradient.
    """
    problem = PlanProblem(graph, dataclasses.replace(request, objective="time"))
    return plan_of(problem, search.least_bytes_at(problem, added_variance))


def all_coded(graph: Graph) -> Plan:
    """The plan in which all that may be coded is stored as an array of its own for each draw, in all branches."""

    def codecs(path: Path, value: Value, repeat: int) -> tuple[Codec, ...]:
        is_float = primitives.is_real_float(value.aval.dtype)
        return (PassThrough(),) if is_float and value.aval.size else ()  # of an empty one there is nothing to see

    problem = PlanProblem(graph, PlanRequest(codecs))
    needed = {r.number for r in problem.residuals if not r.choices}
    exact = dataclasses.replace(problem.timed, demands=[solver.Demand(v) for v in sorted(needed)])
    kept = set(solver.smallest(exact).kept)
    return _apart(plan_of(problem, solver.settled(problem.timed, kept, problem.coded())))


def _apart(plan: Plan) -> Plan:
    """The same plan, with nothing shared between branches."""
    children = {node: tuple(map(_apart, plans)) for node, plans in plan.children.items()}
    return dataclasses.replace(plan, children=children, apart=True)


def restored(graph: Graph, saved: Mapping[str, Any]) -> Plan:
    """The plan that was saved by :meth:`Plan.to_dict`.

    :raises ValueError: if it was made for another program, or is no saved plan.
    """
    wrong = "plan: this is not what Plan.to_dict() returned:"
    try:
        program = saved["program"]
        kept = [tuple(path) for path in saved["kept"]]
        offloaded = {tuple(path) for path in saved["offloaded"]}
        coded = {tuple(e["path"]): codec_from(dict(e["codec"])) for e in saved["encoded"]}
        segments = {tuple(e["path"]): tuple(e["lengths"]) for e in saved["segments"]}
        predicted = None if saved["predicted"] is None else Prediction(**saved["predicted"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{wrong} {error!r} is missing or wrong.") from None
    if program != graph.fingerprint():
        raise ValueError(
            f"plan: it was made for another program (fingerprint {program}, here {graph.fingerprint()}). The model, "
            "the guide, the shapes of the data, the versions of JAX and NumPyro and the ELBO have to be the same; "
            "plan again with memory_budget= instead."
        )
    if saved.get("untouched"):
        return untouched_plan(graph)
    places = list(graph.places())
    nodes = {(*path, node.number): node for g, path, _ in places for node in g.control_flow}
    values = {(*path, v.number): v for g, path, _ in places for e in g.equations for v in e.outputs}
    values |= {(*path, v.number): v for g, path, _ in places for v in g.inputs}
    cut: dict[Scan, tuple[int, ...]] = {}
    for path, lengths in segments.items():
        node = nodes.get(path)
        if not isinstance(node, Scan):
            raise ValueError(f"{wrong} there is no loop {path}.")
        outer = (node.length, *lengths)
        falling = all(isinstance(m, int) and 0 < m < before for before, m in itertools.pairwise(outer))
        if not lengths or not falling:
            raise ValueError(f"{wrong} a loop of {outer[0]} iterations has no segments of {list(lengths)}.")
        cut[node] = lengths
    unknown = [path for path in (*kept, *offloaded, *coded) if path not in values]
    if unknown:
        raise ValueError(f"{wrong} there is no value {unknown[0]}.")
    request = PlanRequest(
        lambda path, value, repeat: (coded[path],) if path in coded else (),
        offload=lambda path, value: path in offloaded,
    )
    chain = cut_chain(graph, saved["chain"]) if saved.get("chain") else None
    problem = PlanProblem(graph, request, Cuts(cut, chain))
    numbers = {problem.number[values[path]] for path in kept} | problem.boundaries | problem.free
    try:
        solution = solver.settled(problem.timed, numbers, problem.coded())
    except ValueError as error:
        raise ValueError(f"{wrong} {error}.") from None
    return dataclasses.replace(plan_of(problem, solution), predicted=predicted)


def codec_from(fields: dict[str, Any]) -> Codec:
    """The codec of which a name and fields were saved."""
    known = (StochasticRound, DitheredRound, SampledRound, RotatedRound, FloatRound, SampleAxis, RandomProjection)
    kinds = {kind.__name__: kind for kind in known}
    return kinds[fields.pop("name")](**fields)


def _binding(plan: Plan) -> str:
    """The largest residuals of a plan, for an error message."""
    sizes = [(p.kept_bytes(v) * p.held, v, p) for p in plan.walk() for v in p.kept]
    sizes += [(e.stored_bytes * p.held, v, p) for p in plan.walk() for v, e in p.encoded.items()]
    largest = sorted(sizes, key=lambda s: -s[0])[:3]
    if not largest:
        return ""
    named = []
    for size, value, owner in largest:
        equation = owner.graph.producer.get(value)
        where = equation.line if equation is not None and equation.line else "an input"
        named.append(f"{size} for {tuple(value.aval.shape)} {value.aval.dtype} at {where}")
    return f" (the largest: {'; '.join(named)})"
