"""Run a part of a program slice by slice, forward and backward together.

Where an axis (of rows, of particles) stays to itself until it is summed up, and all that follows is linear up to one
number, the pullback of the part is that number's cotangent times a gradient which is known as soon as the part has run:
in the linearized graph the whole part is eliminated into one edge to each of its inputs. :func:`find` reads such a part
off the program; :meth:`Part.cut` replaces it by a loop over slices of the axis. Each slice runs forward and backward,
only its residuals are alive meanwhile, and what stays is the gradient in what the part takes: added up for what the
slices share, slice by slice for what has the axis. Nothing runs twice.

A part is left as it is if the program prints or calls back, if it comes back to the part with what the part has summed
up (a batch norm), or if more than one number depends on it (a sum of logarithms of means over particles).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from numpyro_rad.ad import _jax, primitives
from numpyro_rad.ad.axes import Axes, Nodes, Step
from numpyro_rad.ad.graph import Atom, Constant, Graph, Slices, Value
from numpyro_rad.ad.linearize import Flat, split_body
from numpyro_rad.ad.plan import Plan
from numpyro_rad.ad.sweep import backward, forward


@dataclasses.dataclass(frozen=True)
class PlannedSlice:
    """One slice.

    :ivar plan: how it runs.
    :ivar again: nanoseconds of what it computes again, and of slices of its own.
    :ivar start: nanoseconds to start what it runs, however small it is.
    """

    plan: Plan
    again: float
    start: float


Planned = Callable[[Graph], PlannedSlice]
"""From the graph of a slice to how it runs."""


class _Mixed(Exception):
    """An axis does not stay to itself."""


@dataclasses.dataclass(eq=False)
class _Program:
    """A program of primals and tangents, step by step, with its axes."""

    jaxpr: _jax.Jaxpr
    flat: Flat
    inputs: list[Value]
    outputs: list[Atom]
    steps: list[Step]
    axes: Axes
    nodes: dict[Atom, Nodes]
    moving: set[Atom]  # primal values that depend on what is differentiated

    @classmethod
    def read(cls, jaxpr: _jax.Jaxpr, active: Sequence[bool]) -> _Program:
        flat, axes = Flat(whole=True), Axes()
        inputs = [flat.value(v.aval) for v in jaxpr.jaxpr.invars]
        flat.tangents.update(inputs[len(active) :])
        outputs = flat.read(jaxpr, inputs)
        flat.steps = flat.needed(outputs)
        nodes: dict[Atom, Nodes] = {v: axes.of(v.aval) for v in inputs}
        moving: set[Atom] = {v for v, on in zip(inputs, active, strict=False) if on}
        steps = []
        for step in flat.steps:
            for operand in step.operands:
                if isinstance(operand, Constant) and operand not in nodes:
                    nodes[operand] = axes.of(jax.typeof(operand.value))
            steps.append(axes.step(step.equation, [nodes[o] for o in step.operands]))
            nodes.update(zip(step.results, steps[-1].results, strict=True))
            if any(o in moving for o in step.operands):
                moving.update(r for r in step.results if r not in flat.tangents)
        return cls(jaxpr, flat, inputs, outputs, steps, axes, nodes, moving)

    def has(self, atom: Atom, axis: int) -> bool:
        """Whether a value has an axis.

        :raises _Mixed: if it has it twice.
        """
        n = sum(self.axes.root(node) == axis for node in self.nodes.get(atom, ()))
        if n > 1:
            raise _Mixed
        return n == 1

    def part(self, axis: int) -> Part:
        """The part of the program that has an axis.

        :raises _Mixed: if it cannot be run in slices.
        """
        inside = self._inside(axis)
        ends: list[Value] = []
        partial_sums: set[Atom] = set()  # tangents that are sums of what slices give
        after: set[Atom] = set()  # what follows from the part
        linear: set[int] = set()
        left: list[Atom] = []  # partial sums that something else needs
        for number, (flat, step) in enumerate(zip(self.flat.steps, self.steps, strict=True)):
            if number in inside:
                if any(o in after or o in partial_sums for o in flat.operands):
                    raise _Mixed
                sums = [r for r in flat.results if not self.has(r, axis)]
                if sums and (len(sums) < len(flat.results) or not self._any(step.summed, axis)):
                    raise _Mixed
                for result in sums:
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
        return Part(self, axis, inside, linear, ends, end, after)

    def _any(self, nodes: set[int], axis: int) -> bool:
        return any(self.axes.root(node) == axis for node in nodes)

    def _inside(self, axis: int) -> set[int]:
        """The numbers of the steps that have the axis and hand it on or sum it up."""
        inside: set[int] = set()
        whole: list[Atom] = [o for o in self.outputs if self.has(o, axis)]  # needed with all of the axis
        for number, (flat, step) in enumerate(zip(self.flat.steps, self.steps, strict=True)):
            if not any([self.has(v, axis) for v in (*flat.operands, *flat.results)]):
                for body in step.bodies:
                    if any(
                        self.axes.position(n, axis) is not None for s in body.steps for n in (*s.operands, *s.results)
                    ):
                        raise _Mixed
                continue
            mixes = self._any(step.mixed, axis) or self._any(step.made, axis)
            if flat.mixed and mixes:
                raise _Mixed
            is_sum = self._any(step.summed, axis) and not any(r in self.moving for r in flat.results)
            if mixes or (is_sum and not flat.mixed):
                whole += [o for o in flat.operands if self.has(o, axis)]
            else:
                inside.add(number)
        producer = {r: s for number, s in enumerate(self.flat.steps) for r in s.results if number in inside}
        while whole:
            atom = whole.pop()
            if atom in producer:
                if atom in self.moving or atom in self.flat.tangents:
                    raise _Mixed  # it would have to be computed twice
                whole += producer.pop(atom).operands
        return inside

    def largest_part(self) -> Part | None:
        """The part that computes most, of all that can be run in slices."""
        most: dict[int, int] = {}  # bytes of all that has an axis
        for flat, step in zip(self.flat.steps, self.steps, strict=True):
            for value, nodes in zip(flat.results, step.results, strict=True):
                if value not in self.flat.tangents:
                    for axis in {self.axes.root(node) for node in nodes}:
                        most[axis] = most.get(axis, 0) + _jax.aval_bytes(value.aval)
        best, size = None, 0
        for axis in sorted(most, key=lambda axis: (-most[axis], axis)):
            if most[axis] > size and self.axes.sizes[axis] > 1:
                try:
                    part = self.part(axis)
                except _Mixed:
                    continue
                if part.made_bytes > size:
                    best, size = part, part.made_bytes
        return best


def find(jaxpr: _jax.Jaxpr, active: Sequence[bool]) -> Part | None:
    """The part of a program that computes most along one axis and can be run in slices of it, if there is any.

    :param jaxpr: a program of primals and tangents: the primals come first, then the tangents of the active ones.
    :param active: which of the primal inputs are differentiated.
    """
    equations = jaxpr.jaxpr.eqns
    if _jax.has_references(jaxpr) or any(e.effects for e in equations):
        return None
    return _Program.read(jaxpr, active).largest_part()


@dataclasses.dataclass(eq=False)
class Part:
    """A part of a program, of one axis.

    :ivar axis: the axis.
    :ivar inside: numbers of the steps that have the axis.
    :ivar linear: numbers of the steps through which the tangents of its sums go until they are one number.
    :ivar ends: the sums.
    :ivar end: the tangent of that number.
    :ivar after: what follows from the sums.
    """

    program: _Program
    axis: int
    inside: set[int]
    linear: set[int]
    ends: list[Value]
    end: Value
    after: set[Atom]

    @property
    def size(self) -> int:
        """The length of the axis."""
        return self.program.axes.sizes[self.axis]

    @property
    def made_bytes(self) -> int:
        """Bytes of all primal values that it computes along the axis."""
        flat = self.program.flat
        results = (r for number in self.inside for r in flat.steps[number].results if r not in flat.tangents)
        return sum(_jax.aval_bytes(r.aval) for r in results)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradient in what the part takes, which stays until the backward sweep."""
        return sum(_jax.aval_bytes(t.aval) for t in self.inputs()[1])

    def cut(self, n_slices: int, plan: Planned) -> tuple[_jax.Jaxpr, Slices]:
        """The same program, in which the part runs in so many slices. After its outputs come the gradients in the
        tangents that are :attr:`entrywise`.

        Where there are more slices than entries of the axis, what one of them computes is cut again, along another axis
        if there is one.
        """
        loop = _Loop(self, n_slices, plan)
        program = _jax.retrace(loop.run, self.program.jaxpr)
        slices = list(loop.plans.values())
        number = -(-self.size // loop.size)
        inner = max((s.plan.graph.slices.number for s in slices if s.plan.graph.slices is not None), default=1)
        each, again, start = (
            max(f) for f in zip(*((s.plan.peak_bytes, s.again, s.start) for s in slices), strict=True)
        )
        line = _jax.source_line(self.last)
        return program, Slices(number * inner, self.size, each, line, number * (again + start), start)

    @property
    def last(self) -> _jax.JaxprEquation:
        """The last of its equations that belongs to a line of the user's, or the last of all."""
        equations = [self.program.flat.steps[n].equation for n in sorted(self.inside)]
        return next((e for e in reversed(equations) if _jax.source_line(e)), equations[-1])

    @functools.cached_property
    def steps(self) -> list[int]:
        """Numbers of the steps of a slice that are needed, in order."""
        steps = self.program.flat.steps
        live: set[Atom] = {self.end, *self.ends}
        found = []
        for number in sorted(self.inside | self.linear, reverse=True):
            if any(r in live for r in steps[number].results):
                live.update(steps[number].operands)
                found.append(number)
        return found[::-1]

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

    def slice_program(self, size: int, primals: Sequence[Atom], tangents: Sequence[Value]) -> _jax.Jaxpr:
        """The program of a slice of so many entries: its sums, and the tangent of the part's end."""
        axes, nodes = self.program.axes, self.program.nodes
        inputs = (*primals, *tangents)
        shapes = [axes.shape(_aval(a), nodes[a], self.axis, size) for a in inputs]
        like = [jax.ShapeDtypeStruct(shape, _aval(a).dtype) for shape, a in zip(shapes, inputs, strict=True)]
        return _jax.program(lambda arrays: self._run_slice(size, dict(zip(inputs, arrays, strict=True))), like)

    def _run_slice(self, size: int, env: dict[Atom, jax.Array]) -> list[jax.Array]:
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
        return [env[v] for v in (*self.ends, self.end)]


class _Loop:
    """The whole program, with its part in slices.

    :ivar size: entries of the axis in a slice.
    :ivar plans: of slices, by their size; the last one may be smaller.
    """

    def __init__(self, part: Part, n_slices: int, plan: Planned) -> None:
        self.part, self.program, self.plan = part, part.program, plan
        self.size = -(-part.size // n_slices)
        self.n_inner = max(1, n_slices // part.size)
        self.plans: dict[int, PlannedSlice] = {}
        self.primals, self.tangents = part.inputs()
        axes, nodes = part.program.axes, part.program.nodes
        self.places = [axes.position(nodes[a], part.axis) for a in self.primals]
        self.gradient_places = [axes.position(nodes[t], part.axis) for t in self.tangents]

    def run(self, args: Sequence[jax.Array]) -> list[jax.Array]:
        """Run it: what the part needs, the part, what follows from it. Gradients in what is entrywise come last."""
        part, flat = self.part, self.program.flat
        env: dict[Atom, jax.Array] = dict(zip(self.program.inputs, args, strict=True))

        def read(atom: Atom) -> jax.Array:
            return atom.value if isinstance(atom, Constant) else env[atom]

        def run_steps(numbers: Sequence[int]) -> None:
            for step in (flat.steps[n] for n in numbers):
                env.update(zip(step.results, _jax.bind(step.equation, [read(o) for o in step.operands]), strict=True))

        outside = self._outside()
        follows = [n in part.linear or any(r in part.after for r in flat.steps[n].results) for n in outside]
        run_steps([n for n, later in zip(outside, follows, strict=True) if not later])
        with _jax.context(part.last):
            sums, gradients = self._slices([read(a) for a in self.primals])
            env.update(zip(part.ends, sums, strict=True))
            gradients = [g.astype(t.aval.dtype) for g, t in zip(gradients, self.tangents, strict=True)]
            terms = [jnp.sum(g * env[t]) for g, t in zip(gradients, self.tangents, strict=True)]
            total = sum(terms[1:], terms[0]).astype(part.end.aval.dtype).reshape(part.end.aval.shape)
        if not any(part.end in flat.steps[n].results for n in part.linear):
            env[part.end] = total
        for number in (n for n, later in zip(outside, follows, strict=True) if later):
            if number in part.linear:
                self._add(flat.steps[number], env, total)
            else:
                run_steps([number])
        in_place = [g for g, t in zip(gradients, self.tangents, strict=True) if t in part.entrywise]
        return [*(read(a) for a in self.program.outputs), *in_place]

    def _add(self, step: Any, env: dict[Atom, jax.Array], total: jax.Array) -> None:
        """Run a step between the part's tangents and its end with what else it takes, and add the part to the end."""
        outs: list[jax.Array] = []
        if any(o in env for o in step.operands if o in self.program.flat.tangents):
            arrays = [
                o.value if isinstance(o, Constant) else env[o] if o in env else jnp.zeros(o.aval.shape, o.aval.dtype)
                for o in step.operands
            ]
            outs = _jax.bind(step.equation, arrays)
        if self.part.end in step.results:
            outs = [outs[0] + total] if outs else [total]
        env.update(zip(step.results, outs, strict=False))

    def _outside(self) -> list[int]:
        """Numbers of the steps that are run outside of the part, in order."""
        flat = self.program.flat
        live: set[Atom] = {*self.program.outputs, *self.primals, *self.tangents}
        found = []
        for number in reversed(range(len(flat.steps))):
            step = flat.steps[number]
            inside = number in self.part.inside and any(r in flat.tangents or r in self.part.ends for r in step.results)
            if not inside and any(r in live for r in step.results):
                live.update(step.operands)
                found.append(number)
        return found[::-1]

    def _slices(self, arrays: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        """The sums of the part and its gradient in the tangents that it takes."""
        part = self.part
        state = (
            [jnp.zeros(v.aval.shape, _wide(v.aval.dtype)) for v in part.ends],
            [
                jnp.zeros(t.aval.shape, _wide(t.aval.dtype) if at is None else t.aval.dtype)
                for t, at in zip(self.tangents, self.gradient_places, strict=True)
            ],
        )
        n_full, rest = divmod(part.size, self.size)

        def iterate(
            state: tuple[list[jax.Array], list[jax.Array]], start: jax.Array
        ) -> tuple[tuple[list[jax.Array], list[jax.Array]], None]:
            return self._one(state, start, self.size, arrays), None

        state, _ = lax.scan(iterate, state, self.size * jnp.arange(n_full, dtype=jnp.int32))
        if rest:
            state = self._one(state, n_full * self.size, rest, arrays)
        return [s.astype(v.aval.dtype) for s, v in zip(state[0], part.ends, strict=True)], state[1]

    def _one(
        self, state: tuple[list[jax.Array], list[jax.Array]], start: ArrayLike, size: int, arrays: list[jax.Array]
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """Run a slice, forward and backward, and add what it gives to ``state``."""
        taken = [
            a if at is None else lax.dynamic_slice_in_dim(a, start, size, at)
            for a, at in zip(arrays, self.places, strict=True)
        ]
        plan = self._plan(size).plan
        seed = jnp.zeros(2, jnp.uint32)  # nothing in a slice is random
        sums, tape = forward(plan, seed, taken)
        reads = {v: a for v, a in zip(plan.graph.inputs, taken, strict=True) if v in plan.reads}
        end = self.part.end.aval
        found = backward(plan, seed, tape, reads, [jnp.ones(end.shape, end.dtype)])
        totals = [_added(total, s) for total, s in zip(state[0], sums, strict=True)]
        gradients = []
        for gradient, at, new in zip(state[1], self.gradient_places, found, strict=True):
            if new is None:
                gradients.append(gradient)
            elif at is None:
                gradients.append(_added(gradient, new))
            else:
                gradients.append(lax.dynamic_update_slice_in_dim(gradient, new, start, at))
        return totals, gradients

    def _plan(self, size: int) -> PlannedSlice:
        if size not in self.plans:
            program, slices = self.part.slice_program(size, self.primals, self.tangents), None
            if self.n_inner > 1:
                inner = find(program, [a in self.program.moving for a in self.primals])
                if inner is not None:
                    program, slices = inner.cut(self.n_inner, self.plan)
            is_tangent = [False] * len(self.primals) + [True] * len(self.tangents)
            graph = split_body(program, is_tangent, [False] * len(self.part.ends) + [True], in_loop=False)
            graph.slices = slices
            self.plans[size] = self.plan(graph)
        return self.plans[size]


def _aval(atom: Atom) -> _jax.Aval:
    return jax.typeof(atom.value) if isinstance(atom, Constant) else atom.aval


def _wide(dtype: DTypeLike) -> DTypeLike:
    """In which precision many numbers of a type are added up."""
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype


def _added(total: jax.Array, summand: jax.Array) -> jax.Array:
    return total + summand.astype(total.dtype)
