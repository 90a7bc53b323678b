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
from typing import Any


class Value:
    """An array of the primal program or a tangent: type and number, no data."""

    __slots__ = ("aval", "number")

    def __init__(self, aval: Any, number: int):
        self.aval = aval
        self.number = number

    def __repr__(self) -> str:
        return f"v{self.number}:{self.aval.str_short() if hasattr(self.aval, 'str_short') else self.aval}"


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Constant:
    """An operand known at trace time."""

    value: Any


Atom = Value | Constant


@dataclasses.dataclass(eq=False, slots=True)
class Equation:
    """One step of the primal program. ``run`` maps operand arrays to a list of output arrays.

    ``split`` is set for control flow: its forward part also returns a tape for the edge of the same ``split``.
    ``nanoseconds`` is what running it takes, about; 0 for control flow, whose bodies have their own. ``acts`` says
    whether it does something besides computing its outputs (it prints, calls back): then it runs once, in its turn,
    whoever reads them. ``within`` names the method of a distribution that it belongs to.
    """

    name: str
    inputs: tuple[Atom, ...]
    outputs: tuple[Value, ...]
    run: Callable[..., list[Any]]
    cheap: bool
    line: str
    split: Split | None = None
    draws_bits: bool = False
    nanoseconds: float = 0.0
    acts: bool = False
    within: str = ""

    @property
    def anchor(self) -> bool:
        """Whether this step is expensive enough to order the others around it."""
        return not self.cheap


@dataclasses.dataclass(eq=False, slots=True)
class Edge:
    """One linear step ``inputs -> outputs`` of the tangent program.

    ``residuals`` are the primal values that it reads; ``linear[i]`` says whether the pullback is linear in residual i,
    so that an unbiased estimate may stand in for it. ``run(residual arrays, tangent arrays)`` applies the edge;
    ``pull``, where given, maps ``(residual arrays, output cotangents)`` to input cotangents directly. ``terms``, where
    given, are the coefficients in front of the inputs: the edge is elementwise, its output their sum. ``entries`` says
    how many entries of the Jacobian in each input are not zero, about; where not given, one for each of the input.
    """

    name: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    residuals: tuple[Value, ...]
    linear: tuple[bool, ...]
    run: Callable[[Sequence[Any], Sequence[Any]], list[Any]]
    line: str
    anchor: bool
    default: bool = False  # the safe default: residuals exact because nothing better is known
    pull: Callable[[Sequence[Any], Sequence[Any]], list[Any]] | None = None
    split: Split | None = None
    terms: tuple[Any, ...] = ()
    entries: tuple[float, ...] = ()


@dataclasses.dataclass(eq=False, slots=True)
class Split:
    """Control flow separated into primal and tangent part: the graphs of its bodies and how operands map to them."""

    kind: str  # "scan" or "cond"
    bodies: tuple[Graph, ...]
    params: dict[str, Any]
    operands: tuple[Atom, ...]  # primal operands (of a cond: the index first), in the order of a body's inputs
    tangents: tuple[Value | None, ...]  # tangent operands, likewise; None stands for zero
    number: int

    @property
    def repeatable(self) -> bool:
        """Whether the bodies may run a second time: what acts in them can be left out then, for nobody reads it."""
        for equation in (e for body in self.bodies for e in body.equations if e.acts):
            if not equation.split.repeatable if equation.split is not None else equation.outputs:
                return False
        return True


@dataclasses.dataclass(frozen=True)
class Slices:
    """A part of a program that runs slice by slice, forward and backward together.

    :ivar number: of the slices.
    :ivar axis_size: the length of the axis that is cut.
    :ivar bytes_each: what one slice holds between its two sweeps.
    :ivar line: the user's line where the axis is summed up.
    :ivar nanoseconds: what all slices take besides what the part takes in one go, about.
    """

    number: int
    axis_size: int
    bytes_each: int
    line: str
    nanoseconds: float


@dataclasses.dataclass(eq=False, slots=True)
class Graph:
    """Primal program, tangent program and how both begin and end.

    :ivar slices: the part that is run in slices, whose gradient is known when the forward sweep has come to its end.
    """

    inputs: list[Value]
    equations: list[Equation]
    outputs: list[Atom]
    tangent_inputs: list[Value]
    edges: list[Edge]
    tangent_outputs: list[Value | None]
    producer: dict[Value, Equation] = dataclasses.field(default_factory=dict)
    slices: Slices | None = None

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

    def walk(self) -> Iterator[Graph]:
        """This graph and those of the bodies of its control flow that are differentiated."""
        yield self
        for edge in self.edges:
            for body in edge.split.bodies if edge.split is not None else ():
                yield from body.walk()

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


def sites(graph: Graph, labels: Mapping[Value, str]) -> dict[Any, str]:
    """Site of each tangent and of each edge: of those that enter it, the one that enters the program last.

    :param labels: for tangent inputs of the graph the sites (or arguments) that they belong to.
    """
    order: dict[str, int] = {}
    found: dict[Any, str] = dict(labels)
    for edge in graph.edges:
        names = [found[t] for t in edge.inputs if t in found]
        if len(edge.inputs) == 1 or edge.anchor:
            for name in names:
                order.setdefault(name, len(order))
        best = max(names, key=lambda name: order.get(name, -1), default="")
        found[edge] = best
        found.update(dict.fromkeys(edge.outputs, best))
    return found
