"""From a solution of the planning problem to the plan that it stands for."""

from __future__ import annotations

import dataclasses
import math

from numpyro_rad.ad.codecs import Codec, InResult, Offload
from numpyro_rad.ad.graph import ControlFlow, Graph, Path, Scan, Value
from numpyro_rad.ad.plan import Encoded, Plan, Prediction, keep_codec
from numpyro_rad.ad.recompute import recompute_leaves
from numpyro_rad.planning import solver
from numpyro_rad.planning.problem import PlanProblem


def plan_of(problem: PlanProblem, solution: solver.Solution) -> Plan:
    """The plan that stores what a solution says, with the time and variance that it is expected to take."""
    variance = float(problem.together(solution).total)  # a sum of nothing is an int, in files another number
    timing = problem.timing
    predicted = Prediction(
        float((problem.nanoseconds(solution) - timing.storing) / timing.step),
        variance,
        solution.gap if solution.bound > 0 or not solution.cost else None,
    )
    return dataclasses.replace(_Assembly(problem, solution).plan(problem.graph, 1, 1, ()), predicted=predicted)


class _Assembly:
    """The choices of a solution, by graph."""

    def __init__(self, problem: PlanProblem, solution: solver.Solution) -> None:
        self._problem, self._kept = problem, solution.kept
        self._encoded: dict[Graph, dict[Value, Encoded]] = {}
        for residual, choice in problem.chosen(solution).items():
            assert residual.graph is not None and residual.value is not None
            self._encoded.setdefault(residual.graph, {})[residual.value] = choice.entry

    def plan(self, graph: Graph, repeat: int, held: int, path: Path) -> Plan:
        """The plan of a graph, which runs so often, is held so often at once, and lies in the control flow ``path``."""
        problem, cuts = self._problem, self._problem.cuts
        encoded = dict(sorted(self._encoded.get(graph, {}).items(), key=lambda item: item[0].number))
        readers = problem.readers[graph]
        needed = readers.exact | {v for pair in readers.carrier.items() if pair[1] not in encoded for v in pair}
        children: dict[ControlFlow, tuple[Plan, ...]] = {}
        for node in graph.control_flow:
            inside = held * cuts.held_iterations(node)
            children[node] = tuple(
                self.plan(body, repeat * node.repeats, inside, (*path, node.number, i))
                for i, body in enumerate(node.bodies)
            )
            for child in children[node]:
                outer = dict(zip(child.graph.inputs, node.operands, strict=True))
                needed |= {o for v in child.reads if isinstance(o := outer[v], Value)}
            if isinstance(node, Scan) and node in cuts.loops:
                needed |= set(node.outside)
        own = {v for e in graph.equations for v in e.outputs} | problem.carried.get(graph, set())
        stored = {v for v in own if problem.number[v] in self._kept or v in problem.offloadable}
        chain, segment = cuts.chain if graph is problem.graph else None, cuts.segment_of
        if chain is not None:
            needed |= chain.taken
            early = stored - set(segment)
            again = {v for v in (*stored, *encoded) if segment.get(v, math.inf) < chain.n_segments - 1}
            made_of = {a for v in again for a in graph.producer[v].inputs if isinstance(a, Value)}
            needed |= recompute_leaves(graph, made_of, early)
        leaves = recompute_leaves(graph, needed, stored)

        def exactly(value: Value) -> Codec:
            if problem.number[value] not in self._kept:
                return Offload()
            return InResult() if value in graph.gradients else keep_codec(value)

        keeps = {v: exactly(v) for v in sorted(stored & leaves, key=lambda v: v.number)}
        return Plan(
            graph,
            repeat,
            held,
            path,
            keeps,
            encoded,
            readers.carrier,
            children,
            segments={node: lengths for node, lengths in cuts.loops.items() if node in children},
            segment_of={v: segment[v] for v in (*keeps, *encoded) if v in segment},
            n_chain_segments=chain.n_segments if chain is not None else 0,
            reads=frozenset(leaves - stored) & frozenset(graph.inputs),
        )
