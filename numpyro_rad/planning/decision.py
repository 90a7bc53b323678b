"""Decide for each residual whether it is alive anyway, recomputed, kept exactly, or encoded, and with which codec.

All values of a program, those of the bodies of its loops included, form one decision problem (``solver``): a cheap
equation makes its results again from its operands, inputs of the program are alive in both sweeps and cost nothing,
anything else has to be kept to be had. A residual whose pullback is linear in it may be replaced by a code.

Bytes are what the budget counts. The cost of a choice is the time and the variance that it takes, in two parts that
are comparable because the work that a gradient takes is its time times its variance:

    cost = seconds / seconds of the exact step + variance added / variance of the exact gradient.

Both are predictions: seconds from a ``CostModel``, variance from a ``VarianceModel``.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

from numpyro_rad.ad import _jax
from numpyro_rad.ad.codecs import Codec, Offload
from numpyro_rad.ad.graph import ControlFlow, Edge, Equation, Graph, Path, Scan, Value
from numpyro_rad.ad.loops import n_boundaries
from numpyro_rad.ad.plan import (
    Encoded,
    Plan,
    Prediction,
    carrier_of,
    keep_codec,
    kept_bytes,
)
from numpyro_rad.ad.recompute import recompute_leaves
from numpyro_rad.ad.segments import Chain, segment_lengths
from numpyro_rad.planning import solver
from numpyro_rad.planning.costs import CPU, CostModel
from numpyro_rad.planning.noise import CodeNoise, Effects, EqualShares, Flow

SMALL_BYTES = 64
"""Values of up to this size (PRNG keys, scalars) are kept rather than made again: chains of key splits stay short."""

SMALL_DRAW_BYTES = 4096
"""Random numbers of up to this size (over all iterations) are kept too: drawing them again takes long to compile."""

Codecs = Callable[[Path, Value, int], tuple[Codec, ...]]
"""From a residual's path (loop numbers, then its own) and its number of repetitions to the codecs that it may have
besides being exact."""

MayOffload = Callable[[Path, Value], bool]
"""From a value's path and the value to whether it may wait on the host."""

_OBJECTIVES = {"balanced": (1.0, 1.0), "time": (1.0, 1e-3), "variance": (1e-3, 1.0)}  # weights of time and variance
OBJECTIVES = tuple(_OBJECTIVES)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What plans are chosen from, and by what.

    :ivar codecs: what each residual may be coded with.
    :ivar costs: what work costs. Where it does not matter, for plans that nothing chooses, it need not be said.
    :ivar flow: what codes do to the gradient; None for the model without data.
    :ivar offload: which values of the program, outside of its loops, may wait in the memory of the host.
    :ivar objective: ``"balanced"`` for the sum of added time and added variance; ``"time"`` or ``"variance"`` for that
        one, the other deciding between equals.
    """

    codecs: Codecs
    costs: CostModel = CPU
    flow: Flow | None = None
    objective: str = "balanced"
    offload: MayOffload = lambda path, value: False


def uniform(codec: Codec, least_bytes: int = 0) -> Codecs:
    """One codec wherever it may be used and saves something; everything else exact."""
    return any_of((codec,), least_bytes)


def any_of(codecs: tuple[Codec, ...], least_bytes: int = 0) -> Codecs:
    """All codecs wherever they may be used and save something.

    :param least_bytes: residuals below this size (over all iterations of the loops around them) stay exact.
    """

    def choices(path: Path, value: Value, repeat: int) -> tuple[Codec, ...]:
        worth_it = _jax.aval_bytes(value.aval) * repeat >= least_bytes
        return tuple(c for codec in codecs for c in forced(codec, value)) if worth_it else ()

    return choices


def forced(codec: Codec, value: Value) -> tuple[Codec, ...]:
    """This codec, or nothing where it is exact, cannot code the value or saves no bytes."""
    shape, dtype = value.aval.shape, value.aval.dtype
    fits = not codec.exact and codec.supports(shape, dtype)
    return (codec,) if fits and codec.stored_bytes(shape, dtype) < _jax.aval_bytes(value.aval) else ()


def _is_made_again(equation: Equation, value: Value, repeat: int) -> bool:
    """Whether the backward sweep may compute ``value`` from the operands of its equation."""
    if not equation.cheap:
        return False
    size = _jax.aval_bytes(value.aval)
    if not equation.inputs:
        return True
    return size > SMALL_BYTES and not (equation.draws_bits and size * repeat <= SMALL_DRAW_BYTES)


def _operands(graph: Graph, value: Value) -> list[Value]:
    return [a for a in graph.producer[value].inputs if isinstance(a, Value)]


def _disjoint_groups(graph: Graph, linear: dict[Value, set[Edge]]) -> dict[Value, tuple[frozenset[Edge], ...]]:
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


# -- the decision problem ----------------------------------------------------------------------------------------------


class Decision:
    """The decision problem of a graph and of all graphs inside it, and the plan that a solution of it stands for."""

    def __init__(
        self,
        graph: Graph,
        wanted: Wanted,
        segments: dict[Scan, tuple[int, ...]] | None = None,
        chain: Chain | None = None,
    ) -> None:
        self.graph, self.codecs, self.segments, self.chain = graph, wanted.codecs, segments or {}, chain
        self.costs = wanted.costs
        self.late = chain.late if chain is not None else {}
        self.flow = wanted.flow or Flow(graph, EqualShares(graph))
        self.time_weight, self.variance_weight = _OBJECTIVES[wanted.objective]
        self.problem = solver.Problem()
        self.number: dict[Value, int] = {}
        self.carrier: dict[Graph, dict[Value, Value]] = {}
        self.exact: dict[Graph, set[Value]] = {}
        self.carried: dict[Graph, set[Value]] = {}
        self.boundaries: set[int] = set()
        self.offload = wanted.offload
        self.offloadable: set[Value] = set()
        self.demands: list[tuple[Graph, Value | None, tuple[Encoded, ...]]] = []
        self.noises: list[
            tuple[Path, tuple[CodeNoise, ...]]
        ] = []  # of each demand: the residual, and what its codes do
        self.storing, size = self._exact_storing()
        self.hold = self.costs.hold_per_byte if size >= self.costs.hold_from_bytes else 0.0
        self.storing += self.hold * size  # nanoseconds that the exact step spends on its residuals
        # the backward sweep has two products for each of the forward sweep
        self.step = max(1.0, 3 * self._forward_nanoseconds(graph, 1) + self.storing)
        for value in graph.inputs:
            self.number[value] = self.problem.add_value(0, 0.0)
        self._add(graph, 1, 1, ())
        if chain is not None:
            for value in chain.taken:
                self._ask(graph, None, (), self.number[value])
            again = self._price(sum(map(self._make_nanoseconds, chain.again)))
            self._boundary(graph, 0, again)

    def _forward_nanoseconds(self, graph: Graph, repeat: int) -> float:
        own = sum(self._make_nanoseconds(e) for e in graph.equations if e.node is None)
        bodies = [(b, repeat * e.node.repeats) for e in graph.equations if e.node is not None for b in e.node.bodies]
        return own * repeat + sum(self._forward_nanoseconds(b, times) for b, times in bodies)

    def _make_nanoseconds(self, equation: Equation) -> float:
        return self.costs.nanoseconds(equation.work) + self.costs.make_start

    def _keep_nanoseconds(self, size: int) -> float:
        return self.costs.keep_per_byte * size + self.costs.keep_start

    def _exact_storing(self) -> tuple[float, int]:
        """How long storing all residuals takes, besides holding them, and their bytes."""
        time, size = 0.0, 0
        for graph, _, repeat in self.graph.places():
            own = {r for e in graph.edges for r in e.residuals if r in graph.producer}
            loops = [node for node in graph.control_flow if isinstance(node, Scan)]
            carried = sum(node.carry_bytes * node.length for node in loops) * repeat
            size += sum(map(kept_bytes, own)) * repeat + carried
            time += sum(map(self._keep_nanoseconds, map(kept_bytes, own))) * repeat
            time += self.costs.keep_per_byte * carried
        return time, size

    def _price(self, nanoseconds: float) -> float:
        return self.time_weight * nanoseconds / self.step

    def _keep(self, size: int, repeat: int, held: float) -> int:
        """A new value, stored in each of ``repeat`` runs, in ``held`` of them at once; its number."""
        cost = self._price(self._keep_nanoseconds(size) * repeat + self.hold * size * held)
        return self.problem.add_value(size * held, cost)

    def _held(self, value: Value, held: int) -> float:
        """Of how many runs a value is held at once; one that belongs to a segment counts for its share."""
        return held / self.chain.n_segments if self.chain is not None and value in self.late else held

    def _may_be_made(self, value: Value) -> bool:
        """Whether the operands of a value are there in the backward sweep before its own segment has run again."""
        if self.chain is None or value in self.late or value not in self.graph.producer:
            return True
        return not any(a in self.late for a in self.graph.producer[value].inputs)

    def _boundary(self, graph: Graph, size: float, cost: float) -> None:
        """Something that is stored in any case."""
        number = self.problem.add_value(size, cost + self._price(self.hold * size))
        self.boundaries.add(number)
        self._ask(graph, None, (), number)

    def _add(self, graph: Graph, repeat: int, held: int, path: Path) -> None:
        problem = self.problem
        for equation in graph.equations:
            operands = [self.number[a] for a in equation.inputs if isinstance(a, Value)]
            for value in equation.outputs:
                self.number[value] = self._keep(kept_bytes(value), repeat, self._held(value, held))
            made = [v for v in equation.outputs if _is_made_again(equation, v, repeat) and self._may_be_made(v)]
            if made:
                cost = self._price(self._make_nanoseconds(equation) * repeat)
                problem.add_maker([self.number[v] for v in made], operands, cost)
            outside = graph is self.graph and self.chain is None
            for value in equation.outputs if outside else ():
                if value not in made and self.offload((value.number,), value):
                    # as if it were made from nothing: what a budget counts is memory of the device
                    cost = self._price(self.costs.offload_per_byte * kept_bytes(value))
                    problem.add_maker([self.number[value]], (), cost)
                    self.offloadable.add(value)
        exact, linear, carrier = self._readers(graph)
        self.exact[graph], self.carrier[graph] = exact, carrier
        groups = _disjoint_groups(graph, linear)
        for value in sorted(exact | set(linear), key=lambda v: v.number):
            choices: tuple[Encoded, ...] = ()
            if value not in exact:
                shape, dtype = value.aval.shape, value.aval.dtype
                choices = tuple(
                    Encoded(c, groups[value], c.stored_bytes(shape, dtype))
                    for c in self.codecs((*path, value.number), value, repeat)
                )
            self._demand(graph, value, choices, repeat, held, path)
        for node in graph.control_flow:
            self._add_bodies(graph, node, repeat, held, path)

    def _demand(
        self, graph: Graph, value: Value, choices: tuple[Encoded, ...], repeat: int, held: int, path: Path
    ) -> None:
        name, timed, noises = (*path, value.number), [], []
        for entry in choices:
            nanoseconds = self.costs.code_per_entry * entry.codec.work * value.aval.size + self.costs.code_start
            nanoseconds *= repeat * len(entry.readers)
            size = entry.stored_bytes * self._held(value, held)
            timed.append(solver.Code(size, self._price(nanoseconds + self.hold * size)))
            noises.append(self.flow.code(name, value, entry.codec))
        self._ask(graph, value, choices, self.number[value], timed, (name, tuple(noises)))

    def _ask(
        self,
        graph: Graph,
        value: Value | None,
        choices: tuple[Encoded, ...],
        number: int,
        codes: Sequence[solver.Code] = (),
        noises: tuple[Path, tuple[CodeNoise, ...]] = ((), ()),
    ) -> None:
        self.demands.append((graph, value, choices))
        self.noises.append(noises)
        self.problem.demands.append(solver.Demand(number, tuple(codes)))

    def _readers(self, graph: Graph) -> tuple[set[Value], dict[Value, set[Edge]], dict[Value, Value]]:
        """What must be exact, who may read an estimate of what, and what stands for it in storage."""
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
        return exact, linear, carrier

    def _add_bodies(self, graph: Graph, node: ControlFlow, repeat: int, held: int, path: Path) -> None:
        times, inside = repeat * node.repeats, held * self._held_iterations(node)
        if isinstance(node, Scan) and node in self.segments:
            for value in node.outside:
                self._ask(graph, None, (), self.number[value])
            lengths = self.segments[node]
            again = self._price(self._forward_nanoseconds(node.body, times) * len(lengths))
            self._boundary(graph, n_boundaries(node.length, lengths) * node.carry_bytes * held, again)
        carry = set(node.carry)
        for number, body in enumerate(node.bodies):
            for inner, outer in zip(body.inputs, node.operands, strict=True):
                if inner in carry:  # there in one iteration only
                    self.number[inner] = self._keep(kept_bytes(inner), times, inside)
                    self.carried.setdefault(body, set()).add(inner)
                elif isinstance(outer, Value):
                    self.number[inner] = self.number[outer]
                else:
                    self.number[inner] = self.problem.add_value(0, 0.0)
            self._add(body, times, inside, (*path, node.number, number))

    def _held_iterations(self, node: ControlFlow) -> int:
        """Of how many iterations of one run of control flow the tape is held at once."""
        return self.segments[node][-1] if isinstance(node, Scan) and node in self.segments else node.repeats

    @property
    def has_codes(self) -> bool:
        """Whether anything may be coded."""
        return any(d.codes for d in self.problem.demands)

    @property
    def in_one_pass(self) -> bool:
        """Whether nothing is cut into segments: then the bytes of a solution are those of its plan."""
        return not self.segments and self.chain is None

    @property
    def residual_bytes(self) -> float:
        """Bytes of all residuals stored exactly."""
        return sum(self.problem.keep_bytes[d.value] for d in self.problem.demands)

    def least_again(self) -> float:
        """The least that it costs to run a loop of the program, or half of a chain, twice."""
        times = [self._forward_nanoseconds(node.body, node.length) for node in self._loops]
        return self._price(min((*times, self._forward_nanoseconds(self.graph, 1) / 2)))

    @property
    def _loops(self) -> list[Scan]:
        """The loops of the program that are in no other."""
        return [node for node in self.graph.control_flow if isinstance(node, Scan)]

    def segmentations(self, levels: Sequence[int]) -> list[dict[Scan, tuple[int, ...]]]:
        """Ways to cut the loops of the program into segments, so many times, such that all boundaries together take
        about as much as the tape of one segment: a tape of fewest bytes, of least cost, or without codes.
        """
        if not self._loops:
            return []
        problem = self.priced()
        exact = solver.smallest(problem.without_codes())
        solutions = (solver.smallest(problem), solver.priced(problem, 0.0), exact)
        plans = [self.plan(solution) for solution in solutions]
        found: list[dict[Scan, tuple[int, ...]]] = []
        for n_levels, plan in itertools.product(levels, plans):
            cut = {}
            for node, (child, *_) in plan.children.items():
                if not isinstance(node, Scan) or not node.repeatable:
                    continue
                lengths = segment_lengths(node, child.stored_bytes, n_levels)
                if lengths is not None:
                    cut[node] = lengths
            found += [{node: m} for node, m in cut.items()] if len(cut) > 1 else []
            found.append(cut)
        return [cut for i, cut in enumerate(found) if cut and cut not in found[:i]]

    # -- the variance of codes, which they do not have one by one

    def added(self, prices: Effects | None) -> list[list[float]]:
        """Variance by each code of each demand: the change that it makes in the plan of which these are the effects, or
        without any what it adds alone.
        """
        if prices is None:
            return [[code.alone for code in codes] for _, codes in self.noises]
        return [[prices.change(path, code) for code in codes] for path, codes in self.noises]

    def priced(self, prices: Effects | None = None) -> solver.Problem:
        """The problem with that variance in its costs."""
        demands = []
        for demand, added in zip(self.problem.demands, self.added(prices), strict=True):
            costs = [c.cost + self.variance_weight * a for c, a in zip(demand.codes, added, strict=True)]
            codes = tuple(solver.Code(c.bytes, cost) for c, cost in zip(demand.codes, costs, strict=True))
            demands.append(solver.Demand(demand.value, codes))
        return dataclasses.replace(self.problem, demands=demands)

    def together(self, solution: solver.Solution, most: float = math.inf) -> Effects:
        """What the codes of a solution do together, if their relative variances were at most so large."""
        chosen = zip(self.noises, solution.codes, strict=True)
        codes = {path: codes[k] for (path, codes), k in chosen if k is not None}
        return self.flow.effects({path: CodeNoise(c.alone, min(c.relative, most)) for path, c in codes.items()})

    def judged(self, solution: solver.Solution, effects: Effects) -> solver.Solution:
        """A solution with the cost of its codes together, as far from its bound as before."""
        cost = self._timed(solution) + self.variance_weight * effects.total
        return dataclasses.replace(solution, cost=cost, bound=solution.bound + cost - solution.cost)

    def _timed(self, solution: solver.Solution) -> float:
        """The cost of a solution without that of variance."""
        return solver.settled(self.problem, set(solution.kept), solution.codes).cost

    def nanoseconds(self, solution: solver.Solution) -> float:
        """What a solution takes to store, code and compute again in one step."""
        return self._timed(solution) / self.time_weight * self.step

    @property
    def launches(self) -> int:
        """How many operations a step starts, those of iterations and of both sweeps counted."""
        return 3 * self._launches(self.graph)

    def _launches(self, graph: Graph) -> int:
        return sum(
            sum(e.node.repeats * self._launches(b) for b in e.node.bodies) if e.node is not None else 1
            for e in graph.equations
        )

    @property
    def free(self) -> set[int]:
        """What is there in both sweeps and takes no bytes: inputs of the program, constants."""
        problem = self.problem
        return {v for v, m in enumerate(problem.maker) if m < 0 and not problem.keep_bytes[v]}

    def coded(self) -> list[int | None]:
        """The choice that codes all that may be coded, with the first of its codecs."""
        return [0 if d.codes else None for d in self.problem.demands]

    # -- from a solution to a plan

    def plan(self, solution: solver.Solution) -> Plan:
        """The plan that stores what the solution says."""
        variance = float(self.together(solution).total)  # a sum of nothing is an int, in files another number
        predicted = Prediction(
            float((self.nanoseconds(solution) - self.storing) / self.step),
            variance,
            solution.gap if solution.bound > 0 or not solution.cost else None,
        )
        chosen: dict[Graph, dict[Value, Encoded]] = {}
        for (graph, value, choices), code in zip(self.demands, solution.codes, strict=True):
            if code is not None and value is not None:
                chosen.setdefault(graph, {})[value] = choices[code]
        plan = self._plan_of(self.graph, 1, 1, (), solution.kept, chosen)
        return dataclasses.replace(plan, predicted=predicted)

    def _plan_of(
        self,
        graph: Graph,
        repeat: int,
        held: int,
        path: Path,
        kept: frozenset[int],
        chosen: dict[Graph, dict[Value, Encoded]],
    ) -> Plan:
        encoded = dict(sorted(chosen.get(graph, {}).items(), key=lambda item: item[0].number))
        carrier = self.carrier[graph]
        needed = self.exact[graph] | {v for pair in carrier.items() if pair[1] not in encoded for v in pair}
        children: dict[ControlFlow, tuple[Plan, ...]] = {}
        for node in graph.control_flow:
            inside = held * self._held_iterations(node)
            children[node] = tuple(
                self._plan_of(body, repeat * node.repeats, inside, (*path, node.number, i), kept, chosen)
                for i, body in enumerate(node.bodies)
            )
            for plan in children[node]:
                outer = dict(zip(plan.graph.inputs, node.operands, strict=True))
                needed |= {o for v in plan.reads if isinstance(o := outer[v], Value)}
            if isinstance(node, Scan) and node in self.segments:
                needed.update(node.outside)
        own = {v for e in graph.equations for v in e.outputs} | self.carried.get(graph, set())
        stored = {v for v in own if self.number[v] in kept or v in self.offloadable}
        if self.chain is not None and graph is self.graph:
            needed |= self.chain.taken
            early = stored - set(self.late)
            again = {v for v in (*stored, *encoded) if self.late.get(v, math.inf) < self.chain.n_segments - 1}
            needed |= recompute_leaves(graph, {a for v in again for a in _operands(graph, v)}, early)
        leaves = recompute_leaves(graph, needed, stored)
        reads = frozenset(v for v in leaves - stored if v in set(graph.inputs))
        keeps = {
            v: keep_codec(v) if self.number[v] in kept else Offload()
            for v in sorted(stored & leaves, key=lambda v: v.number)
        }
        segments = {node: m for node, m in self.segments.items() if node in children}
        late = {v: self.late[v] for v in (*keeps, *encoded) if v in self.late}
        length = self.chain.n_segments if self.chain is not None and graph is self.graph else 0
        return Plan(graph, repeat, held, path, keeps, encoded, carrier, children, segments, late, length, reads)
