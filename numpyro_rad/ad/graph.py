"""The linearized computational graph (LCG): what it is made of.

A program has a *primal* part, a list of :class:`Equation`, and a *tangent* part, a list of linear :class:`Edge` objects
between tangents. An edge carries a local Jacobian, given by the primal values that it reads, its *residuals*. The
gradient is the sum over paths of the product of edge Jacobians (Bauer 1974; Griewank and Walther 2008, ch. 9),

    d out / d in = sum over paths in -> out of the product of J_edge,

and is linear in each edge, which is what randomized AD needs. ``linearize`` makes graphs, ``plan`` decides what becomes
of their residuals, ``sweep`` runs them.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax

from numpyro_rad.ad import _jax
from numpyro_rad.ad.work import NOTHING, Work

T = TypeVar("T")

Path = tuple[int, ...]
"""Numbers of the control flow around a value and of its body there, then the value's own: its name in a program."""


class Value:
    """An array of the primal program or a tangent: type and number, no data."""

    __slots__ = ("aval", "number")

    def __init__(self, aval: _jax.Aval, number: int):
        self.aval = aval
        self.number = number

    def __repr__(self) -> str:
        return f"v{self.number}:{self.aval.str_short() if hasattr(self.aval, 'str_short') else self.aval}"


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Constant:
    """An operand known at trace time."""

    value: Any


Atom = Value | Constant


def read(env: Mapping[Value, jax.Array] | Mapping[Atom, jax.Array], atom: Atom) -> jax.Array:
    """The array that an operand stands for."""
    return atom.value if isinstance(atom, Constant) else env[atom]


@dataclasses.dataclass(eq=False, slots=True)
class Equation:
    """One step of the primal program. ``run`` maps operand arrays to a list of output arrays.

    ``node`` is set for control flow: its forward part also returns a tape for the edge of the same ``node``.
    ``work`` is how much there is to do, about; nothing for control flow, whose bodies have their own. ``acts`` says
    whether it does something besides computing its outputs (it prints, calls back): then it runs once, in its turn,
    whoever reads them. ``within`` names the method of a distribution that it belongs to.
    """

    name: str
    inputs: tuple[Atom, ...]
    outputs: tuple[Value, ...]
    run: Callable[..., list[jax.Array]]
    cheap: bool
    line: str
    node: ControlFlow | None = None
    draws_bits: bool = False
    work: Work = NOTHING
    acts: bool = False
    within: str = ""

    @property
    def expensive(self) -> bool:
        """Whether this step orders the others around it."""
        return not self.cheap


@dataclasses.dataclass(eq=False, slots=True)
class Edge:
    """One linear step ``inputs -> outputs`` of the tangent program; its kinds are in ``edges``.

    :ivar residuals: the primal values that it reads.
    :ivar linear: for each of them whether the pullback is linear in it, so that an unbiased estimate may stand in.
    :ivar line: the user's line that it comes from.
    :cvar expensive: whether it orders the others around it.
    :cvar known: whether its residuals are exact for a reason, or because nothing better is known of it.
    """

    name: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    residuals: tuple[Value, ...]
    linear: tuple[bool, ...]
    line: str

    expensive: ClassVar[bool] = False
    known: ClassVar[bool] = True

    def apply(self, residuals: Sequence[jax.Array], tangents: Sequence[jax.Array]) -> list[jax.Array]:
        """The tangents of its outputs."""
        raise NotImplementedError

    def pull(self, residuals: Sequence[jax.Array], cotangents: Sequence[jax.Array | None]) -> list[jax.Array]:
        """The cotangents of its inputs; by default ``apply``, transposed.

        :param cotangents: of its outputs, not all of them None, which stands for zero.
        """
        present = [i for i, c in enumerate(cotangents) if c is not None]

        def applied(*tangents: jax.Array) -> list[jax.Array]:
            results = self.apply(residuals, tangents)
            return [results[i] for i in present]

        return list(
            _jax.linear_transpose(applied, [t.aval for t in self.inputs], [c for c in cotangents if c is not None])
        )

    def is_constant_in(self, tangent: Value) -> bool:
        """Whether no residual stands in front of one of its inputs."""
        return not self.residuals

    @property
    def entries(self) -> tuple[float, ...]:
        """For each input how many entries of the Jacobian are not zero, about; by default as many as it has itself."""
        return tuple(t.aval.size for t in self.inputs)


class LoopOperands(NamedTuple):
    """How the operands of a loop begin: with so many constants, then so many that it carries on; slices follow."""

    n_consts: int
    n_carry: int

    def of(self, operands: Sequence[T]) -> tuple[Sequence[T], Sequence[T], Sequence[T]]:
        """The constants, the carry and the slices among what is given for each operand."""
        end = self.n_consts + self.n_carry
        return operands[: self.n_consts], operands[self.n_consts : end], operands[end:]


@dataclasses.dataclass(eq=False, slots=True)
class ControlFlow:
    """Control flow separated into primal and tangent part: the graphs of its bodies and how operands map to them.

    :ivar number: its place among the control flow of its graph.
    :ivar operands: primal operands, one for each input of a body.
    :ivar tangents: tangent operands, one for each tangent input of a body; None stands for zero.
    """

    number: int
    bodies: tuple[Graph, ...]
    operands: tuple[Atom, ...]
    tangents: tuple[Value | None, ...]

    @property
    def repeats(self) -> int:
        """How often a body runs in one run, for all that is known."""
        return 1

    @property
    def conditions(self) -> tuple[Value, ...]:
        """What says which body runs."""
        return ()

    @property
    def carry(self) -> Sequence[Value]:
        """The inputs of a body that each iteration hands to the next."""
        return ()

    @property
    def repeatable(self) -> bool:
        """Whether the bodies may run a second time: what acts in them can be left out then, for nobody reads it."""
        for equation in (e for body in self.bodies for e in body.equations if e.acts):
            if not equation.node.repeatable if equation.node is not None else equation.outputs:
                return False
        return True


@dataclasses.dataclass(eq=False, slots=True)
class Scan(ControlFlow):
    """A loop of known length.

    :ivar primal: how its primal operands begin.
    :ivar tangent: how its tangent operands begin.
    """

    length: int
    reverse: bool
    unroll: int | bool
    primal: LoopOperands
    tangent: LoopOperands

    @property
    def body(self) -> Graph:
        """What each iteration runs."""
        (body,) = self.bodies
        return body

    @property
    def repeats(self) -> int:
        return self.length

    @property
    def carry(self) -> Sequence[Value]:
        return self.primal.of(self.body.inputs)[1]

    @property
    def carry_bytes(self) -> int:
        """Bytes of the carry."""
        return sum(_jax.aval_bytes(v.aval) for v in self.carry)

    @property
    def outside(self) -> list[Value]:
        """What it takes from outside besides its carry: its segments need all of it to run again."""
        consts, _, xs = self.primal.of(self.operands)
        return [a for a in (*consts, *xs) if isinstance(a, Value)]


@dataclasses.dataclass(eq=False, slots=True)
class Cond(ControlFlow):
    """A choice between bodies.

    :ivar index: which of them runs.
    """

    index: Atom

    @property
    def conditions(self) -> tuple[Value, ...]:
        return (self.index,) if isinstance(self.index, Value) else ()


@dataclasses.dataclass(frozen=True)
class Slices:
    """The parts of a program that run slice by slice.

    :ivar number: of the slices.
    :ivar axis_size: the length of the axis that is cut.
    :ivar bytes_each: what one slice holds between its two sweeps.
    :ivar bytes_in_all: what all slices of all parts would hold.
    :ivar lines: of the user's, where the parts end.
    :ivar again: whether there are slices that run forward once more on the way back, or all run forward and backward
        together.
    :ivar nanoseconds: what all slices take besides what the parts take in one go, about.
    :ivar nanoseconds_each: what of that one more slice would take, with its share of the parts' own work left out.
    :ivar exact_bytes: of the residuals of the parts in one go.
    :ivar exact_step: nanoseconds of the whole program's exact step in one go, about.
    :ivar program: the fingerprint of the program in one go.
    """

    number: int
    axis_size: int
    bytes_each: int
    bytes_in_all: int
    lines: tuple[str, ...]
    again: bool
    nanoseconds: float
    nanoseconds_each: float
    exact_bytes: int = 0
    exact_step: float = 0.0
    program: str = ""

    def beside(self, other: Slices) -> Slices:
        """These and those of another part, which run one after the other."""
        return Slices(
            max(self.number, other.number),
            self.axis_size,
            max(self.bytes_each, other.bytes_each),
            self.bytes_in_all + other.bytes_in_all,
            (*self.lines, *other.lines),
            self.again or other.again,
            self.nanoseconds + other.nanoseconds,
            self.nanoseconds_each + other.nanoseconds_each,
        )


@dataclasses.dataclass(eq=False, slots=True)
class ControlFlowEdge(Edge):
    """The tangent part of control flow. It stores tapes rather than residuals, and the sweeps run it."""

    node: ControlFlow

    expensive: ClassVar[bool] = True


class Place(NamedTuple):
    """A graph within a program.

    :ivar path: numbers of the control flow around it and of the bodies there.
    :ivar repeats: how often it runs in one run of the program.
    """

    graph: Graph
    path: Path
    repeats: int


@dataclasses.dataclass(eq=False, slots=True)
class Graph:
    """Primal program, tangent program and how both begin and end.

    :ivar slices: the part that is run in slices, whose gradient is known when the forward sweep has come to its end.
    :ivar gradients: what of that gradient becomes that of an input entry by entry: a compiler has it where the result
        goes.
    """

    inputs: list[Value]
    equations: list[Equation]
    outputs: list[Atom]
    tangent_inputs: list[Value]
    edges: list[Edge]
    tangent_outputs: list[Value | None]
    producer: dict[Value, Equation] = dataclasses.field(default_factory=dict)
    slices: Slices | None = None
    gradients: frozenset[Value] = frozenset()

    def finish(self) -> Graph:
        """Drop edges that lead nowhere, index producers."""
        live = {t for t in self.tangent_outputs if t is not None}
        kept = []
        for edge in reversed(self.edges):
            if any(o in live for o in edge.outputs):
                live.update(edge.inputs)
                kept.append(edge)
        self.edges = kept[::-1]
        self.producer = {o: e for e in self.equations for o in e.outputs}
        return self

    @property
    def control_flow(self) -> list[ControlFlow]:
        """The control flow that is differentiated, in order."""
        return [e.node for e in self.edges if isinstance(e, ControlFlowEdge)]

    def walk(self) -> Iterator[Graph]:
        """This graph and those of the bodies of its control flow that are differentiated."""
        return (place.graph for place in self.places())

    def places(self, path: Path = (), repeats: int = 1) -> Iterator[Place]:
        """The same, each with where it is and how often it runs.

        :param path: the control flow around this graph.
        :param repeats: how often it runs.
        """
        yield Place(self, path, repeats)
        for node in self.control_flow:
            for number, body in enumerate(node.bodies):
                yield from body.places((*path, node.number, number), repeats * node.repeats)

    @property
    def residual_bytes(self) -> int:
        """Bytes of all that its edges read, stored exactly; what is there anyway and gradients of slices left out."""
        size = 0
        for graph, _, repeats in self.places():
            read = {r for edge in graph.edges for r in edge.residuals if r in graph.producer} - graph.gradients
            size += repeats * sum(_jax.aval_bytes(r.aval) for r in read)
        return size

    def fingerprint(self) -> str:
        """The same for graphs of the same program at the same shapes, and for no others but by accident.

        Sums of scalars count without their operands: NumPyro adds up the log densities of the sites in the order of a
        set of names, which is another one in every process.
        """
        digest = hashlib.sha256()
        for graph in self.walk():
            for equation in graph.equations:
                operands = [a.number if isinstance(a, Value) else "constant" for a in equation.inputs]
                if equation.name not in ("add", "sub") or equation.outputs[0].aval.shape:
                    digest.update(f"{equation.name} {operands} {equation.outputs}\n".encode())
            for edge in graph.edges:
                if edge.residuals or edge.name != "elementwise" or edge.outputs[0].aval.shape:
                    digest.update(f"{edge.name} {edge.inputs} {edge.residuals} {edge.linear} {edge.outputs}\n".encode())
        return digest.hexdigest()[:16]


def site_name(parameter: str) -> str:
    """The site that a parameter of one of NumPyro's automatic guides or modules belongs to."""
    return parameter.removesuffix("$params").split("_auto_")[0]


def sites(graph: Graph, labels: Mapping[Value, str]) -> dict[Value | Edge, str]:
    """Site of each tangent and of each edge: of those that enter it, the one that enters the program last.

    :param labels: for tangent inputs of the graph the sites (or arguments) that they belong to.
    """
    order: dict[str, int] = {}
    found: dict[Value | Edge, str] = {**labels}
    for edge in graph.edges:
        names = [found[t] for t in edge.inputs if t in found]
        if len(edge.inputs) == 1 or edge.expensive:
            for name in names:
                order.setdefault(name, len(order))
        best = max(names, key=lambda name: order.get(name, -1), default="")
        found[edge] = best
        found.update(dict.fromkeys(edge.outputs, best))
    return found
