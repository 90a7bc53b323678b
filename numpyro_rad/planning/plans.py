"""The plans that can be asked for: of fewest bytes, within a budget, within a variance, or as they were saved.

Each poses the decision problem of the program (``decision``), the plain one or with loops and chains of layers cut into
segments, and takes the plan of its solution.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from numpyro_rad.ad import rules
from numpyro_rad.ad.codecs import Codec, Keep, RandomProjection, SampleAxis, SampledRound, StochasticRound
from numpyro_rad.ad.graph import Graph, Path, Scan, Value
from numpyro_rad.ad.plan import BudgetError, Plan, Prediction
from numpyro_rad.ad.segments import cut_chain
from numpyro_rad.planning import search, solver
from numpyro_rad.planning.decision import Decision, Wanted

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


SEGMENT_LEVELS = (1, 2, 3)
"""How often segments of loops are cut into segments: each level is one more run of the loop."""

CHAIN_LENGTHS = (2, 3, 4, 6, 8, 12, 16)
"""Numbers of segments that are tried for a program without loops."""


def untouched_plan(graph: Graph) -> Plan:
    """The plan that leaves the program to JAX's own reverse mode: every residual is stored."""
    decision = Decision(graph, Wanted(lambda path, value, repeat: ()))
    needed = {d.value for d in decision.problem.demands}
    plan = decision.plan(solver.settled(decision.problem, needed, decision.coded()))
    return dataclasses.replace(plan, untouched=True, predicted=Prediction(0.0, 0.0, None))


def make_plan(graph: Graph, wanted: Wanted) -> Plan:
    """The plan that stores the fewest bytes in one pass over the program, whatever else it costs."""
    decision = Decision(graph, wanted)
    return decision.plan(solver.smallest(decision.priced()))


def balanced_plan(graph: Graph, wanted: Wanted) -> Plan:
    """The plan of least cost where a share of the residuals' bytes is worth the same share of the step's time."""
    decision = Decision(graph, wanted)
    slices = graph.slices
    in_slices = slices.number * slices.bytes_each if slices is not None else 0
    return decision.plan(solver.priced(decision.priced(), 1 / max(1, decision.residual_bytes + in_slices)))


def plan_within(graph: Graph, budget_bytes: int, wanted: Wanted) -> Plan:
    """The plan of least cost that holds at most ``budget_bytes``, with what a slice holds while it runs.

    :raises BudgetError: if there is none; it names the smallest feasible budget.
    """
    decision, solution = solved_within(graph, budget_bytes, wanted)
    return decision.plan(solution)


def solved_within(graph: Graph, budget_bytes: int, wanted: Wanted) -> tuple[Decision, solver.Solution]:
    """The decision problem of :func:`plan_within` and its solution.

    Where one pass over a loop would cost more than to run it twice, or would not fit, cutting the loop into segments is
    tried as well.

    :raises BudgetError: if there is none; it names the smallest feasible budget.
    """
    in_slices = 0 if graph.slices is None else graph.slices.bytes_each
    best: tuple[Decision, solver.Solution] | None = None
    too_large: list[Plan] = []
    decisions = [Decision(graph, wanted)]
    for decision in decisions:  # grows while it is read
        try:
            solution = search.within(decision, budget_bytes - in_slices)
        except solver.Infeasible as error:
            solution = None
            too_large.append(decision.plan(error.smallest))
        if solution is not None and (best is None or solution.cost < best[1].cost):
            best = decision, solution
        if len(decisions) == 1 and (solution is None or solution.cost > decision.least_again()):
            decisions += [Decision(graph, wanted, cut) for cut in decision.segmentations(SEGMENT_LEVELS)]
            if solution is None or not decision.has_codes:
                # The compiler's own temporaries grow where layers run again: only where codes do not do it.
                chains = (cut_chain(graph, n) for n in CHAIN_LENGTHS)
                decisions += [Decision(graph, wanted, chain=chain) for chain in chains if chain is not None]
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


def plan_for_variance(graph: Graph, added_variance: float, wanted: Wanted) -> Plan:
    """The plan of fewest bytes (a share of them being worth the same share of the step's time) that adds at most so
    much variance, relative to that of the exact gradient.
    """
    decision = Decision(graph, dataclasses.replace(wanted, objective="time"))
    return decision.plan(search.least_bytes_at(decision, added_variance))


@dataclasses.dataclass(frozen=True)
class _PassThrough(Keep):
    """The array itself in the place of a code, to see what a code would do there."""

    exact = False


def all_coded(graph: Graph) -> Plan:
    """The plan in which all that may be coded is stored as an array of its own for each draw."""

    def codecs(path: Path, value: Value, repeat: int) -> tuple[Codec, ...]:
        carries = rules.is_real_float(value.aval.dtype) and value.aval.size  # of an empty one there is nothing to see
        return (_PassThrough(),) if carries else ()

    decision = Decision(graph, Wanted(codecs))
    needed = {d.value for d in decision.problem.demands if not d.codes}
    problem = dataclasses.replace(decision.problem, demands=[solver.Demand(v) for v in sorted(needed)])
    kept = set(solver.smallest(problem).kept)
    return decision.plan(solver.settled(decision.problem, kept, decision.coded()))


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
    wanted = Wanted(
        lambda path, value, repeat: (coded[path],) if path in coded else (),
        offload=lambda path, value: path in offloaded,
    )
    chain = cut_chain(graph, saved["chain"]) if saved.get("chain") else None
    decision = Decision(graph, wanted, cut, chain)
    numbers = {decision.number[values[path]] for path in kept} | decision.boundaries | decision.free
    try:
        solution = solver.settled(decision.problem, numbers, decision.coded())
    except ValueError as error:
        raise ValueError(f"{wrong} {error}.") from None
    return dataclasses.replace(decision.plan(solution), predicted=predicted)


def codec_from(fields: dict[str, Any]) -> Codec:
    """The codec of which a name and fields were saved."""
    kinds = {kind.__name__: kind for kind in (StochasticRound, SampledRound, SampleAxis, RandomProjection)}
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
