"""Decide for each residual whether it is alive anyway, recomputed, kept exactly, or encoded, and with which codec.

All values of a program, those of the bodies of its loops included, form one problem (``solver``): a cheap equation
makes its results again from its operands, inputs of the program are alive in both sweeps and cost nothing, anything
else has to be kept to be had. A residual whose pullback is linear in it may be replaced by a code.

Bytes are what the budget counts. The cost of a choice is the time and the variance that it takes, in two parts that
are comparable because the work that a gradient takes is its time times its variance:

    cost = seconds / seconds of the exact step + variance added / variance of the exact gradient.

Both are predictions: seconds from a cost model (``timing``), variance from a ``VarianceModel`` (``noise``).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

from numpyro_rad.ad import _jax
from numpyro_rad.ad.graph import ControlFlow, Equation, Graph, Path, Scan, Value
from numpyro_rad.ad.loops import n_boundaries
from numpyro_rad.ad.plan import Encoded, kept_bytes
from numpyro_rad.ad.recompute import recompute_equations
from numpyro_rad.ad.segments import Chain
from numpyro_rad.planning import solver
from numpyro_rad.planning.noise import CodeNoise, Effects, EqualShares, ErrorPropagation
from numpyro_rad.planning.readers import Readers
from numpyro_rad.planning.request import PlanRequest
from numpyro_rad.planning.timing import Timing

SMALL_BYTES = 64
"""Values of up to this size (PRNG keys, scalars) are kept rather than made again: chains of key splits stay short."""

SMALL_DRAW_BYTES = 4096
"""Random numbers of up to this size (over all iterations) are kept too: drawing them again takes long to compile."""


@dataclasses.dataclass(frozen=True, eq=False)
class Cuts:
    """Where a program is cut into segments, which run again in the backward sweep.

    :ivar loops: lengths of the segments of its loops (``Plan.segments``).
    :ivar chain: segments of the program itself.
    """

    loops: Mapping[Scan, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    chain: Chain | None = None

    def __bool__(self) -> bool:
        return bool(self.loops) or self.chain is not None

    @property
    def segment_of(self) -> Mapping[Value, int]:
        """The segment of the chain that a value belongs to, of those that belong to one."""
        return self.chain.segment_of if self.chain is not None else {}

    def held(self, value: Value, runs: int) -> float:
        """Of how many runs a value is held at once; one that belongs to a segment counts for its share."""
        return runs / self.chain.n_segments if self.chain is not None and value in self.segment_of else runs

    def held_iterations(self, node: ControlFlow) -> int:
        """Of how many iterations of one run of control flow the tape is held at once."""
        return self.loops[node][-1] if isinstance(node, Scan) and node in self.loops else node.repeats


NO_CUTS = Cuts()


@dataclasses.dataclass(frozen=True)
class Choice:
    """A code that may stand for a residual: what it stores, its bytes and time in the problem, its noise."""

    entry: Encoded
    code: solver.Code
    noise: CodeNoise


@dataclasses.dataclass(frozen=True, eq=False)
class Demanded:
    """What the backward sweep asks for, in the problem.

    :ivar number: of the value in the solver's problem.
    :ivar path: its name in the program; empty for what belongs to a boundary of segments and is stored as it is.
    :ivar value: the value, unless it belongs to a boundary.
    :ivar choices: the codes that it may have besides being exact.
    """

    number: int
    path: Path = ()
    graph: Graph | None = None
    value: Value | None = None
    choices: tuple[Choice, ...] = ()


class PlanProblem:
    """The problem of planning a graph and all graphs inside it, cut into segments or not.

    :ivar residuals: what the backward sweep asks for, one for each demand of the solver's problem.
    :ivar number: of each value in the solver's problem.
    :ivar readers: of each graph.
    :ivar carried: carries of the loops, by their bodies.
    :ivar boundaries: numbers of what is stored at the boundaries of segments.
    :ivar offloadable: what may wait on the host.
    """

    def __init__(
        self, graph: Graph, request: PlanRequest, cuts: Cuts = NO_CUTS, like: PlanProblem | None = None
    ) -> None:
        """Pose the problem.

        :param like: a problem of the same graph and request: what does not depend on the cuts is taken from it.
        """
        self.graph, self.cuts, self._request = graph, cuts, request
        self.timing = Timing(graph, request.costs) if like is None else like.timing
        self._like = like
        self._known_readers = {} if like is None else like.readers
        self._time_weight, self._variance_weight = request.weights
        self.residuals: list[Demanded] = []
        self.number: dict[Value, int] = {}
        self.readers: dict[Graph, Readers] = {}
        self.carried: dict[Graph, set[Value]] = {}
        self.boundaries: set[int] = set()
        self.offloadable: set[Value] = set()
        self._problem = solver.Problem()
        for value in graph.inputs:
            self.number[value] = self._problem.add_value(0, 0.0)
        self._add(graph, 1, 1, ())
        if cuts.chain is not None:
            for value in cuts.chain.taken:
                self._ask(Demanded(self.number[value]))
            self._add_boundary(0, self._price(self.timing.making(cuts.chain.again)))

    @functools.cached_property
    def _propagation(self) -> ErrorPropagation:
        """How errors travel; only where there are codes is it asked for."""
        if self._like is not None:
            return self._like._propagation
        return self._request.propagation or ErrorPropagation(self.graph, EqualShares(self.graph))

    def cut(self, cuts: Cuts) -> PlanProblem:
        """The same problem, of the program cut into segments."""
        return PlanProblem(self.graph, self._request, cuts, like=self)

    # -- posed

    def _add(self, graph: Graph, repeat: int, held: int, path: Path) -> None:
        forward = _of_the_values(graph)
        for equation in graph.equations:
            self._add_equation(graph, equation, repeat, held, equation in forward)
        readers = self.readers[graph] = self._known_readers.get(graph) or Readers.of(graph)
        for value in readers.stored:
            name, choices = (*path, value.number), ()
            if value not in readers.exact:
                codecs = self._request.codecs(name, value, repeat)
                shape, dtype = value.aval.shape, value.aval.dtype
                entries = (Encoded(c, readers.groups[value], c.stored_bytes(shape, dtype)) for c in codecs)
                choices = tuple(self._choice(name, value, entry, repeat, held) for entry in entries)
            self._ask(Demanded(self.number[value], name, graph, value, choices))
        for node in graph.control_flow:
            self._add_bodies(node, repeat, held, path)

    def _add_equation(self, graph: Graph, equation: Equation, repeat: int, held: int, forward: bool) -> None:
        """What an equation makes: to be kept, or made again from its operands.

        :param forward: whether it runs in the forward sweep in any case. What only derivatives read is made once,
            wherever that is.
        """
        operands = [self.number[a] for a in equation.inputs if isinstance(a, Value)]
        for value in equation.outputs:
            held_in = 0 if value in graph.gradients else self.cuts.held(value, held)
            self.number[value] = self._keep(kept_bytes(value), repeat, held_in)
        made = [v for v in equation.outputs if _is_made_again(equation, v, repeat) and self._may_be_made(v)]
        if made:
            cost = self._price(self.timing.making_again(equation, repeat)) if forward else 0.0
            self._problem.add_maker([self.number[v] for v in made], operands, cost)
        if graph is not self.graph or self.cuts.chain is not None:
            return
        for value in equation.outputs:
            if value not in made and self._request.offload((value.number,), value):
                # as if it were made from nothing: what a budget counts is memory of the device
                cost = self._price(self.timing.offloading(value))
                self._problem.add_maker([self.number[value]], (), cost)
                self.offloadable.add(value)

    def _may_be_made(self, value: Value) -> bool:
        """Whether the operands of a value are there in the backward sweep before its own segment has run again."""
        segment_of = self.cuts.segment_of
        if value in segment_of or value not in self.graph.producer:
            return True
        return not any(a in segment_of for a in self.graph.producer[value].inputs)

    def _add_bodies(self, node: ControlFlow, repeat: int, held: int, path: Path) -> None:
        times, inside = repeat * node.repeats, held * self.cuts.held_iterations(node)
        if isinstance(node, Scan) and node in self.cuts.loops:
            for value in node.outside:
                self._ask(Demanded(self.number[value]))
            lengths = self.cuts.loops[node]
            again = self._price(self.timing.forward(node.body, times) * len(lengths))
            self._add_boundary(n_boundaries(node.length, lengths) * node.carry_bytes * held, again)
        carry = set(node.carry)
        for number, body in enumerate(node.bodies):
            for inner, outer in zip(body.inputs, node.operands, strict=True):
                if inner in carry:  # there in one iteration only
                    self.number[inner] = self._keep(kept_bytes(inner), times, inside)
                    self.carried.setdefault(body, set()).add(inner)
                elif isinstance(outer, Value):
                    self.number[inner] = self.number[outer]
                else:
                    self.number[inner] = self._problem.add_value(0, 0.0)
            self._add(body, times, inside, (*path, node.number, number))

    def _choice(self, name: Path, value: Value, entry: Encoded, repeat: int, held: int) -> Choice:
        nanoseconds = self.timing.coding(entry.codec, value) * (repeat * len(entry.readers))
        size = entry.stored_bytes * self.cuts.held(value, held)
        code = solver.Code(size, self._price(nanoseconds + self.timing.holding(size)))
        return Choice(entry, code, self._propagation.code(name, value, entry.codec))

    def _ask(self, residual: Demanded) -> None:
        self.residuals.append(residual)
        self._problem.demands.append(solver.Demand(residual.number, tuple(c.code for c in residual.choices)))

    def _add_boundary(self, size: float, cost: float) -> None:
        """Something that is stored in any case."""
        number = self._problem.add_value(size, cost + self._price(self.timing.holding(size)))
        self.boundaries.add(number)
        self._ask(Demanded(number))

    def _keep(self, size: int, repeat: int, held: float) -> int:
        """A new value, stored in each of ``repeat`` runs, in ``held`` of them at once; its number."""
        cost = self._price(self.timing.keeping(size) * repeat + self.timing.holding(size * held))
        return self._problem.add_value(size * held, cost)

    def _price(self, nanoseconds: float) -> float:
        return self._time_weight * nanoseconds / self.timing.step

    # -- priced

    @property
    def timed(self) -> solver.Problem:
        """The problem with time alone in its costs."""
        return self._problem

    def priced(self, prices: Effects | None = None) -> solver.Problem:
        """The problem with time and variance in its costs, see :meth:`added`."""
        demands = []
        for demand, added in zip(self._problem.demands, self.added(prices), strict=True):
            costs = [c.cost + self._variance_weight * a for c, a in zip(demand.codes, added, strict=True)]
            codes = tuple(solver.Code(c.bytes, cost) for c, cost in zip(demand.codes, costs, strict=True))
            demands.append(solver.Demand(demand.value, codes))
        return dataclasses.replace(self._problem, demands=demands)

    def added(self, prices: Effects | None) -> list[list[float]]:
        """Variance by each code of each residual: the change that it makes in the plan of which these are the effects,
        or without any what it adds alone.
        """
        return [
            [c.noise.alone if prices is None else prices.change(r.path, c.noise) for c in r.choices]
            for r in self.residuals
        ]

    def together(self, solution: solver.Solution, most: float = math.inf) -> Effects:
        """What the codes of a solution do together, if their relative variances were at most so large."""
        if not self.has_codes:
            return Effects(0.0, {}, {})
        noise = {r.path: choice.noise for r, choice in self.chosen(solution).items()}
        return self._propagation.effects({p: CodeNoise(n.alone, min(n.relative, most)) for p, n in noise.items()})

    def judged(self, solution: solver.Solution, effects: Effects) -> solver.Solution:
        """A solution with the cost of its codes together, as far from its bound as before."""
        cost = self._cost_of_time(solution) + self._variance_weight * effects.total
        return dataclasses.replace(solution, cost=cost, bound=solution.bound + cost - solution.cost)

    def _cost_of_time(self, solution: solver.Solution) -> float:
        return solver.settled(self._problem, set(solution.kept), solution.codes).cost

    def nanoseconds(self, solution: solver.Solution) -> float:
        """What a solution takes to store, code and compute again in one step."""
        return self._cost_of_time(solution) / self._time_weight * self.timing.step

    def least_again(self) -> float:
        """The least that it costs to run a loop of the program, or half of a chain, twice."""
        times = [self.timing.forward(node.body, node.length) for node in self.loops]
        return self._price(min((*times, self.timing.forward(self.graph) / 2)))

    # -- what there is to choose

    @property
    def loops(self) -> list[Scan]:
        """The loops of the program that are in no other."""
        return [node for node in self.graph.control_flow if isinstance(node, Scan)]

    @property
    def has_codes(self) -> bool:
        """Whether anything may be coded."""
        return any(r.choices for r in self.residuals)

    @property
    def residual_bytes(self) -> float:
        """Bytes of all residuals stored exactly."""
        return sum(self._problem.keep_bytes[r.number] for r in self.residuals)

    @property
    def free(self) -> set[int]:
        """What is there in both sweeps and takes no bytes: inputs of the program, constants."""
        problem = self._problem
        return {v for v, m in enumerate(problem.maker) if m < 0 and not problem.keep_bytes[v]}

    def coded(self) -> list[int | None]:
        """The choice that codes all that may be coded, with the first of its codecs."""
        return [0 if r.choices else None for r in self.residuals]

    def chosen(self, solution: solver.Solution) -> dict[Demanded, Choice]:
        """The codes of a solution."""
        pairs = zip(self.residuals, solution.codes, strict=True)
        return {r: r.choices[code] for r, code in pairs if code is not None}


def _of_the_values(graph: Graph) -> set[Equation]:
    """The equations that the values of a program follow from."""
    inner = [a for e in graph.equations if e.acts or e.node is not None for a in e.inputs]
    ends = [a for a in (*graph.outputs, *inner) if isinstance(a, Value)]
    return set(recompute_equations(graph, ends, ()))


def _is_made_again(equation: Equation, value: Value, repeat: int) -> bool:
    """Whether the backward sweep may compute ``value`` from the operands of its equation."""
    if not equation.cheap:
        return False
    size = _jax.aval_bytes(value.aval)
    if not equation.inputs:
        return True
    return size > SMALL_BYTES and not (equation.draws_bits and size * repeat <= SMALL_DRAW_BYTES)
