"""Parts of a program that can be run slice by slice, because an axis (of rows, of particles) stays to itself in them.

Two kinds are read off a program:

*A waist*. The axis is summed up and all that follows is linear up to one number. Then the pullback of the part is
that number's cotangent times a gradient which is known as soon as the part has run: in the linearized graph the whole
part is eliminated into one edge to each of its inputs. Slices run forward and backward together and nothing runs twice.

*A stage*. The part ends in something wide, or in several numbers: the features of a kernel over rows, what a batch norm
takes the mean of, the weight of each particle in a Renyi bound. Nothing between its inputs and its ends is stored, and
its slices run again on the way back.

In both, what is mixed before is an input of the part. A part is left as it is if the program prints or calls back.
``slices`` runs parts.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from numpyro_rad.ad import _jax, primitives
from numpyro_rad.ad.axes import Axes, Nodes, Step
from numpyro_rad.ad.graph import Atom, Constant, Value
from numpyro_rad.ad.linearize import Flat

WORTH = 0.1
"""A part whose slices run again should compute such a share of all that is dear in the program."""


class _Use(enum.Enum):
    """What a step does with an axis."""

    NOTHING = enum.auto()
    HANDS_ON = enum.auto()
    SUMS_UP = enum.auto()
    MIXES = enum.auto()


class Bytes(NamedTuple):
    """Bytes of values; what is dear counts first.

    :ivar dear: of those that follow from a product, a loop or the like.
    :ivar all: of all.
    """

    dear: int
    all: int

    def plus(self, other: Bytes) -> Bytes:
        return Bytes(self.dear + other.dear, self.all + other.all)


class _Mixed(Exception):
    """An axis does not stay to itself."""


def find(jaxpr: _jax.Jaxpr, active: Sequence[bool]) -> Part | None:
    """The part of a program that saves most if it runs in slices, if there is any: a waist, unless a stage saves twice
    as much.

    :param jaxpr: a program of primals and tangents: the primals come first, then the tangents of the active ones.
    :param active: which of the primal inputs are differentiated.
    """
    program = Program.read(jaxpr, active)
    if program is None:
        return None
    waist, stage = program.largest(program.waist), program.largest(program.stage)
    if stage is None or stage.share <= WORTH or (waist is not None and stage.saved.dear <= 2 * waist.saved.dear):
        return waist
    return stage


@dataclasses.dataclass(eq=False)
class Program:
    """A program of primals and tangents, step by step, with its axes."""

    jaxpr: _jax.Jaxpr
    flat: Flat
    inputs: list[Value]
    outputs: list[Atom]
    steps: list[Step]
    axes: Axes
    nodes: dict[Atom, Nodes]
    moving: set[Atom]  # primal values that depend on what is differentiated
    dear: set[Atom]  # those that also follow from a product, a loop or the like: what does not is computed again anyway

    @classmethod
    def read(cls, jaxpr: _jax.Jaxpr, active: Sequence[bool]) -> Program | None:
        """The program; None if nothing of it may run in slices."""
        if _jax.has_references(jaxpr) or any(e.effects for e in jaxpr.jaxpr.eqns):
            return None
        flat, axes = Flat(whole=True), Axes()
        inputs = [flat.value(v.aval) for v in jaxpr.jaxpr.invars]
        flat.tangents.update(inputs[len(active) :])
        outputs = flat.read(jaxpr, inputs)
        flat.steps = flat.needed(outputs)
        nodes: dict[Atom, Nodes] = {v: axes.of(v.aval) for v in inputs}
        moving: set[Atom] = {v for v, on in zip(inputs, active, strict=False) if on}
        dear: set[Atom] = set()
        steps = []
        for step in flat.steps:
            for operand in step.operands:
                if isinstance(operand, Constant) and operand not in nodes:
                    nodes[operand] = axes.of(jax.typeof(operand.value))
            steps.append(axes.step(step.equation, [nodes[o] for o in step.operands]))
            nodes.update(zip(step.results, steps[-1].results, strict=True))
            if any(o in moving for o in step.operands):
                primal = [r for r in step.results if r not in flat.tangents]
                moving.update(primal)
                if any(o in dear for o in step.operands) or not primitives.is_cheap(step.equation):
                    dear.update(primal)
        return cls(jaxpr, flat, inputs, outputs, steps, axes, nodes, moving, dear)

    def largest(self, part_of: Callable[[int], Part]) -> Part | None:
        """Of the parts of all axes the one that saves most, if one saves anything."""
        most: dict[int, Bytes] = {}  # of all that has an axis
        for flat, step in zip(self.flat.steps, self.steps, strict=True):
            for value, nodes in zip(flat.results, step.results, strict=True):
                for axis in {self.axes.root(node) for node in nodes}:
                    most[axis] = most.get(axis, Bytes(0, 0)).plus(self.size_of(value))
        best, size = None, Bytes(0, 0)
        for axis in sorted(most, key=lambda axis: (most[axis], -axis), reverse=True):
            if most[axis] > size and self.axes.sizes[axis] > 1:
                try:
                    part = part_of(axis)
                except _Mixed:
                    continue
                if part.saved > size:
                    best, size = part, part.saved
        return best

    def size_of(self, *values: Atom) -> Bytes:
        """Bytes of those primal values that depend on what is differentiated."""
        sizes = [(v in self.dear, _jax.aval_bytes(v.aval)) for v in values if isinstance(v, Value) and v in self.moving]
        return Bytes(sum(size for dear, size in sizes if dear), sum(size for _, size in sizes))

    def made(self, numbers: Iterable[int]) -> Bytes:
        """The same of what steps compute."""
        return self.size_of(*(r for n in numbers for r in self.flat.steps[n].results))

    # -- where an axis goes --------------------------------------------------------------------------------------------

    def has(self, atom: Atom, axis: int) -> bool:
        """Whether a value has an axis.

        :raises _Mixed: if it has it twice.
        """
        n = sum(self.axes.root(node) == axis for node in self.nodes.get(atom, ()))
        if n > 1:
            raise _Mixed
        return n == 1

    def _any(self, nodes: set[int], axis: int) -> bool:
        return any(self.axes.root(node) == axis for node in nodes)

    def moves(self, number: int) -> bool:
        """Whether a step has something to do with what is differentiated."""
        flat = self.flat.steps[number]
        return flat.mixed or any(o in self.moving for o in flat.operands)

    def _use(self, number: int, axis: int) -> _Use:
        """What a step does with an axis."""
        flat, step = self.flat.steps[number], self.steps[number]
        values = (*flat.operands, *flat.results)
        try:
            found = [self.has(v, axis) for v in values]
        except _Mixed:
            return _Use.MIXES
        if not any(found):
            inside = (n for body in step.bodies for s in body.steps for n in (*s.operands, *s.results))
            return _Use.MIXES if any(self.axes.position(n, axis) is not None for n in inside) else _Use.NOTHING
        if self._any(step.mixed, axis) or self._any(step.made, axis):
            return _Use.MIXES
        kept = [self.has(r, axis) for r in flat.results]
        if all(kept):
            return _Use.HANDS_ON
        return _Use.SUMS_UP if not any(kept) and self._any(step.summed, axis) else _Use.MIXES

    # -- parts ---------------------------------------------------------------------------------------------------------

    def waist(self, axis: int) -> Part:
        """The part that has an axis up to one number, behind whatever mixes it.

        :raises _Mixed: if there is none.
        """
        inside = self._behind_mixing(axis)
        ends: list[Value] = []
        partial_sums: set[Atom] = set()  # tangents that are sums of what slices give
        after: set[Atom] = set()  # what follows from the part
        linear: set[int] = set()
        left: list[Atom] = []  # partial sums that something else needs
        for number, flat in enumerate(self.flat.steps):
            if number in inside:
                for result in (r for r in flat.results if not self.has(r, axis)):
                    if result in self.flat.tangents:
                        partial_sums.add(result)
                    else:
                        ends.append(result)
                        after.add(result)
                continue
            summands = [o for o in flat.operands if o in partial_sums]
            if summands and all(r in self.flat.tangents for r in flat.results):
                others = [o for o in flat.operands if o not in self.flat.tangents]
                if not any(o in after for o in others):
                    linear.add(number)
                    partial_sums.update(flat.results)
                    continue
            left += summands
            if summands or any(o in after for o in flat.operands):
                after.update(flat.results)
        left += [o for o in self.outputs if o in partial_sums]
        if len(set(left)) != 1:
            raise _Mixed
        (end,) = set(left)
        assert isinstance(end, Value)
        if end.aval.size != 1 or not jnp.issubdtype(end.aval.dtype, jnp.floating):
            raise _Mixed
        return Part(self, axis, inside, ends, [end], after, linear)

    def _behind_mixing(self, axis: int) -> set[int]:
        """The numbers of the steps that hand an axis on or sum it up, and lead to no step that mixes it.

        What is no matter to derivatives is computed with all of the axis where it is mixed, and again in slices.
        """
        inside: set[int] = set()
        whole = {o for o in self.outputs if self.has(o, axis)}  # needed with all of the axis
        leading: set[Atom] = set()  # what leads to a step that has the axis
        for number in reversed(range(len(self.steps))):
            flat, use = self.flat.steps[number], self._use(number, axis)
            moves = self.moves(number)
            leads, needed = (any(r in those for r in flat.results) for those in (leading, whole))
            # a sum that comes back to the axis mixes it, and one of what is only data is there before
            mixes = use is _Use.MIXES or (use is _Use.SUMS_UP and (leads or not moves))
            if mixes or needed:
                whole.update(flat.operands)
            if use in (_Use.HANDS_ON, _Use.SUMS_UP) and not mixes and not (needed and moves):
                inside.add(number)
            if leads or use is not _Use.NOTHING:
                leading.update(flat.operands)
        return inside

    def stage(self, axis: int) -> Part:
        """The part that has an axis, up to whatever mixes it.

        :raises _Mixed: if there is none.
        """
        inside: set[int] = set()
        made: set[Atom] = set()  # what the part makes, of what depends on what is differentiated
        after: set[Atom] = set()
        ends: dict[Atom, None] = {}
        for number, flat in enumerate(self.flat.steps):
            use, moves = self._use(number, axis), self.moves(number)
            follows = any(o in after for o in flat.operands)
            back = any(o in made and not self.has(o, axis) for o in flat.operands)  # a sum of the part
            fits = use is _Use.HANDS_ON or (use is _Use.SUMS_UP and moves)
            if fits and not follows and not back:
                inside.add(number)
                if moves:
                    made.update(flat.results)
                continue
            taken = [o for o in flat.operands if o in made]
            ends.update(dict.fromkeys(taken))
            if taken or follows:
                after.update(flat.results)
        ends.update(dict.fromkeys(o for o in self.outputs if o in made))
        tangents = self.flat.tangents
        primal_ends = [e for e in ends if isinstance(e, Value) and e not in tangents]
        tangent_ends = [e for e in ends if isinstance(e, Value) and e in tangents]
        part = Part(self, axis, inside, primal_ends, tangent_ends, after, set(), again=True)
        opaque = any(jnp.issubdtype(e.aval.dtype, jax.dtypes.extended) for e in primal_ends)
        if not tangent_ends or opaque:
            raise _Mixed
        return part


@dataclasses.dataclass(eq=False)
class Part:
    """A part of a program, of one axis.

    :ivar axis: the axis.
    :ivar inside: numbers of the steps that have the axis.
    :ivar ends: primal values that it hands on.
    :ivar tangent_ends: tangents that it hands on: of a waist the one number.
    :ivar after: what follows from the part.
    :ivar linear: of a waist, numbers of the steps through which the tangents of its sums go until they are one number.
    :ivar again: whether its slices run again on the way back.
    """

    program: Program
    axis: int
    inside: set[int]
    ends: list[Value]
    tangent_ends: list[Value]
    after: set[Atom]
    linear: set[int]
    again: bool = False

    @property
    def size(self) -> int:
        """The length of the axis."""
        return self.program.axes.sizes[self.axis]

    @property
    def share(self) -> float:
        """The share of what is dear in the program that it computes."""
        program = self.program
        return program.made(self.inside).dear / max(1, program.made(range(len(program.steps))).dear)

    @functools.cached_property
    def saved(self) -> Bytes:
        """Bytes of what it computes from what is differentiated, without what it hands on and what of its axis it
        takes: that has to be there, however many slices there are.
        """
        program = self.program
        taken = (a for a in self.inputs[0] if a not in program.inputs and self.position(a) is not None)
        made, there = program.made(self.inside), program.size_of(*self.ends, *taken)
        return Bytes(made.dear - there.dear, made.all - there.all)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradient in what the part takes, which of a waist stays until the backward sweep."""
        return sum(_jax.aval_bytes(t.aval) for t in self.inputs[1])

    @property
    def last(self) -> _jax.JaxprEquation:
        """The last of its equations that belongs to a line of the user's, or the last of all."""
        equations = [self.program.flat.steps[n].equation for n in sorted(self.inside)]
        return next((e for e in reversed(equations) if _jax.source_line(e)), equations[-1])

    @functools.cached_property
    def steps(self) -> list[int]:
        """Numbers of the steps of a slice that are needed, in order."""
        steps = self.program.flat.steps
        live: set[Atom] = {*self.ends, *self.tangent_ends}
        found = []
        for number in sorted(self.inside | self.linear, reverse=True):
            if any(r in live for r in steps[number].results):
                live.update(steps[number].operands)
                found.append(number)
        return found[::-1]

    @functools.cached_property
    def inputs(self) -> tuple[list[Atom], list[Value]]:
        """Primal values and tangents that slices take from outside; of constants, those with the axis."""
        flat, has = self.program.flat, self.program.has
        made: set[Atom] = set()
        primals: dict[Atom, None] = {}
        tangents: dict[Value, None] = {}
        for number in self.steps:
            for operand in flat.steps[number].operands:
                if operand in made:
                    continue
                if isinstance(operand, Constant):
                    if has(operand, self.axis):
                        primals[operand] = None
                elif operand not in flat.tangents:
                    primals[operand] = None
                elif number in self.inside:
                    tangents[operand] = None
            made.update(flat.steps[number].results)
        return list(primals), list(tangents)

    def outside(self) -> list[int]:
        """Numbers of the steps that are run outside of the part, in order."""
        flat = self.program.flat
        primals, tangents = self.inputs
        live: set[Atom] = {*self.program.outputs, *primals, *tangents}
        found = []
        for number in reversed(range(len(flat.steps))):
            step = flat.steps[number]
            if not (number in self.inside and self.program.moves(number)) and any(r in live for r in step.results):
                live.update(step.operands)
                found.append(number)
        return found[::-1]

    @functools.cached_property
    def entrywise(self) -> set[Atom]:
        """The tangents that follow from one of the program's inputs of as many bytes entry by entry: the gradient in
        them becomes that of the input in its place.
        """
        flat = self.program.flat
        found: set[Atom] = {v for v in self.program.inputs if v in flat.tangents}
        for step in flat.steps:
            traits = primitives.of(step.name)
            if traits.elementwise or traits.rearranges:
                sizes = {_jax.aval_bytes(_aval(o)) for o in step.operands if o in found}
                found.update(r for r in step.results if r in flat.tangents and _jax.aval_bytes(r.aval) in sizes)
        return found

    # -- one slice -----------------------------------------------------------------------------------------------------

    def position(self, atom: Atom) -> int | None:
        """Which axis of a value is the part's; None if none is."""
        return self.program.axes.position(self.program.nodes[atom], self.axis)

    def slice_program(self, size: int, primals: Sequence[Atom], tangents: Sequence[Value]) -> _jax.Jaxpr:
        """The program of a slice of so many entries: what it hands on, and the tangents of that."""
        axes, nodes = self.program.axes, self.program.nodes
        inputs = (*primals, *tangents)
        shapes = [axes.shape(_aval(a), nodes[a], self.axis, size) for a in inputs]
        like = [jax.ShapeDtypeStruct(shape, _aval(a).dtype) for shape, a in zip(shapes, inputs, strict=True)]
        return _jax.program(lambda arrays: self._run(size, dict(zip(inputs, arrays, strict=True))), like)

    def _run(self, size: int, env: dict[Atom, jax.Array]) -> list[jax.Array]:
        program, tangents = self.program, self.program.flat.tangents
        made: set[Atom] = set()

        def read(atom: Atom, linear: bool) -> jax.Array:
            if linear and atom in tangents and atom not in made:  # it is added outside
                return jnp.zeros(_aval(atom).shape, _aval(atom).dtype)
            return env[atom] if atom in env or isinstance(atom, Value) else atom.value

        for number in self.steps:
            flat = program.flat.steps[number]
            arrays = [read(o, number in self.linear) for o in flat.operands]
            if number in self.inside:
                outs = program.axes.run(program.steps[number], arrays, self.axis, size)
            else:
                outs = _jax.bind(flat.equation, arrays)
            made.update(flat.results)
            env.update(zip(flat.results, outs, strict=True))
        return [env[v] for v in (*self.ends, *self.tangent_ends)]


def _aval(atom: Atom) -> _jax.Aval:
    return jax.typeof(atom.value) if isinstance(atom, Constant) else atom.aval
