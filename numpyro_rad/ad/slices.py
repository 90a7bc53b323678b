"""Run a part of a program slice by slice.

:func:`cut` replaces a part (``parts``) by loops over slices of its axis. Of a waist each slice runs forward and
backward together, only its residuals are alive meanwhile, and what stays is the gradient in what the part takes: added
up for what the slices share, slice by slice for what has the axis. Nothing runs twice. Of a stage slices run forward,
and on the way back each runs forward once more and backward, given the cotangents of what it handed on.

Where several devices have a share of the axis each, a slice takes as many entries of every share, side by side
(``jax.vmap``): none has to be sent. Each share adds up for itself, and the sums are added once, after the last slice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from numpyro_rad.ad import _jax
from numpyro_rad.ad.graph import Atom, Constant, Graph, Slices, Value, read
from numpyro_rad.ad.linearize import split_body
from numpyro_rad.ad.parts import WORTH, Part, find
from numpyro_rad.ad.plan import Plan
from numpyro_rad.ad.sweep import backward, forward


@dataclasses.dataclass(frozen=True)
class PlannedSlice:
    """One slice.

    :ivar plan: how it runs.
    :ivar again: nanoseconds of what it computes again, and of slices of its own.
    :ivar start: nanoseconds to start what it runs, however small it is.
    :ivar forward: nanoseconds to run it forward.
    """

    plan: Plan
    again: float
    start: float
    forward: float


MOST_PARTS = 8
"""So many parts run in slices, at most: each makes the program longer to plan."""

Planned = Callable[[Graph], PlannedSlice]
"""From the graph of a slice to how it runs."""


def cut(part: Part, n_slices: int, plan: Planned, devices: int = 1) -> tuple[_jax.Jaxpr, Slices]:
    """The program of a part, in which that runs in so many slices. After its outputs come the gradients of a waist in
    the tangents that are :attr:`~Part.entrywise`.

    Where there are more slices than entries of the axis, what one slice of a waist computes is cut again, along another
    axis if there is one.

    :param devices: so many have a share of the axis each, if they can be equal.
    """
    loop = (_Stage if part.again else _Waist)(part, n_slices, plan, devices)
    program = _jax.retrace(loop.run, part.program.jaxpr)
    slices = list(loop.plans.values())
    number = -(-loop.length // loop.size)
    inner = max((s.plan.graph.slices.number for s in slices if s.plan.graph.slices is not None), default=1)
    each, again, start, forward = (
        max(f) for f in zip(*((s.plan.peak_bytes, s.again, s.start, s.forward) for s in slices), strict=True)
    )
    each *= loop.shares
    twice = number * forward if part.again else 0.0
    return program, Slices(
        number=number * inner,
        axis_size=part.size,
        bytes_each=each,
        bytes_in_all=number * inner * each,
        lines=(_jax.source_line(part.last),),
        again=part.again,
        nanoseconds=number * (again + start) + twice,
        nanoseconds_each=start,
    )


def cut_all(
    part: Part, active: Sequence[bool], n_slices: int, plan: Planned, devices: int = 1
) -> tuple[_jax.Jaxpr, Slices]:
    """The same as :func:`cut`, with other parts that are worth it in slices as well, unless a waist computes most of
    the program.
    """
    program, slices = cut(part, n_slices, plan, devices)
    while (part.again or part.share < 0.5) and len(slices.lines) < MOST_PARTS:
        other = find(program, active)
        if other is None or other.share <= WORTH:
            break
        program, more = cut(other, n_slices, plan, devices)
        slices = slices.beside(more)
    return program, slices


State = tuple[list[jax.Array], list[jax.Array]]
"""What the slices before have added up, or written slice by slice: what the part hands on, and gradients."""


class _Loop:
    """The whole program, with its part in slices.

    :ivar shares: of the axis, of which each slice takes a part.
    :ivar length: entries of the axis in a share.
    :ivar size: entries of each share in a slice.
    :ivar plans: of slices, by their size; the last one may be smaller.
    """

    def __init__(self, part: Part, n_slices: int, plan: Planned, devices: int) -> None:
        self.part, self.program, self.plan = part, part.program, plan
        self.shares = devices if part.size % devices == 0 else 1
        self.length = part.size // self.shares
        self.size = -(-self.length // n_slices)
        self.n_inner = 1 if part.again else max(1, n_slices // self.length)
        self.plans: dict[int, PlannedSlice] = {}
        self.programs: dict[int, _jax.Jaxpr] = {}
        self.primals, self.tangents = part.inputs
        self.places = [part.position(a) for a in self.primals]
        self.gradient_places = [part.position(t) for t in self.tangents]

    def run(self, args: Sequence[jax.Array]) -> list[jax.Array]:
        """Run it: what the part needs, the part, what follows from it."""
        part, flat = self.part, self.program.flat
        env: dict[Atom, jax.Array] = dict(zip(self.program.inputs, args, strict=True))
        outside = part.outside()
        follows = [n in part.linear or any(r in part.after for r in flat.steps[n].results) for n in outside]
        self.run_steps([n for n, later in zip(outside, follows, strict=True) if not later], env)
        with _jax.context(part.last):
            self.run_part(env)
        self.run_after([n for n, later in zip(outside, follows, strict=True) if later], env)
        return [read(env, a) for a in self.program.outputs]

    def run_steps(self, numbers: Sequence[int], env: dict[Atom, jax.Array]) -> None:
        for step in (self.program.flat.steps[n] for n in numbers):
            outs = _jax.bind(step.equation, [read(env, o) for o in step.operands])
            env.update(zip(step.results, outs, strict=True))

    def run_part(self, env: dict[Atom, jax.Array]) -> None:
        """Run the slices: what the part hands on is known then."""
        raise NotImplementedError

    def run_after(self, numbers: Sequence[int], env: dict[Atom, jax.Array]) -> None:
        """Run the steps that follow from the part."""
        self.run_steps(numbers, env)

    # -- slices --------------------------------------------------------------------------------------------------------

    def each(self, state: State, run: Callable[[State, ArrayLike, int], State]) -> State:
        """Run all slices in a loop: ``run(state, start, size)`` is one of them."""
        n_full, rest = divmod(self.length, self.size)

        def iterate(state: State, start: jax.Array) -> tuple[State, None]:
            return run(state, start, self.size), None

        state, _ = lax.scan(iterate, state, self.size * jnp.arange(n_full, dtype=jnp.int32))
        return run(state, n_full * self.size, rest) if rest else state

    def zeros(self, values: Sequence[Value], places: Sequence[int | None]) -> list[jax.Array]:
        """Where slices add up what they share, in full precision, or write what has the axis."""
        each = (self.shares,) if self.shares > 1 else ()
        pairs = zip((v.aval for v in values), places, strict=True)
        return [
            jnp.zeros((*each, *a.shape), _wide(a.dtype)) if at is None else self._apart(jnp.zeros(a.shape, a.dtype), at)
            for a, at in pairs
        ]

    def whole(self, arrays: Sequence[jax.Array], places: Sequence[int | None]) -> list[jax.Array]:
        """What slices have added up or written, of all shares together."""
        if self.shares == 1:
            return list(arrays)
        pairs = zip(arrays, places, strict=True)
        return [x.sum(0) if at is None else lax.collapse(x, at, at + 2) for x, at in pairs]

    def taken(
        self, arrays: Sequence[jax.Array], places: Sequence[int | None], start: ArrayLike, size: int
    ) -> list[jax.Array]:
        """What a slice takes of arrays: a slice of those with the axis."""
        pairs = zip(arrays, places, strict=True)
        return [
            a if at is None else lax.dynamic_slice_in_dim(self._apart(a, at), start, size, self._inside(at))
            for a, at in pairs
        ]

    def collected(
        self,
        before: Sequence[jax.Array],
        found: Sequence[jax.Array | None],
        places: Sequence[int | None],
        start: ArrayLike,
    ) -> list[jax.Array]:
        """What slices have found so far: sums, and what has the axis."""
        after = []
        for whole, new, at in zip(before, found, places, strict=True):
            if new is None:
                after.append(whole)
            elif at is None:
                after.append(whole + new.astype(whole.dtype))
            else:
                after.append(lax.dynamic_update_slice_in_dim(whole, new, start, self._inside(at)))
        return after

    def _apart(self, x: jax.Array, at: int) -> jax.Array:
        """An array with the axis of the part as shares and entries of a share."""
        if self.shares == 1:
            return x
        return x.reshape(*x.shape[:at], self.shares, self.length, *x.shape[at + 1 :])

    def _inside(self, at: int) -> int:
        """Where the entries of a share are then."""
        return at + 1 if self.shares > 1 else at

    def of_shares(
        self,
        run: Callable[..., list[jax.Array | None]],
        arrays: Sequence[jax.Array],
        places: Sequence[int | None],
        outs: Sequence[int | None],
    ) -> list[jax.Array | None]:
        """What ``run(*arrays)`` makes of each share: an axis of shares comes before the axis of the part, and first
        where there is none.

        :param places: where arrays have the axis.
        :param outs: where results have it.
        """
        if self.shares == 1:
            return run(*arrays)
        found: list[jax.Array | None] = jax.vmap(run, in_axes=tuple(places))(*arrays)
        return [x if x is None or not at else jnp.moveaxis(x, 0, at) for x, at in zip(found, outs, strict=True)]

    def forward_and_backward(
        self, arrays: Sequence[jax.Array], size: int, cotangents: Sequence[jax.Array], arriving: Sequence[int | None]
    ) -> tuple[list[jax.Array | None], list[jax.Array | None]]:
        """What a slice hands on, and its gradient in the tangents that it takes.

        :param arrays: what it takes.
        :param arriving: where the cotangents have the axis.
        """
        plan, n_arrays, ends = self._plan(size).plan, len(arrays), self.part.ends
        seed = jnp.zeros(2, jnp.uint32)  # nothing in a slice is random

        def run(*given: jax.Array) -> list[jax.Array | None]:
            outs, tape = forward(plan, seed, given[:n_arrays])
            reads = {v: a for v, a in zip(plan.graph.inputs, given, strict=False) if v in plan.reads}
            return [*outs, *backward(plan, seed, tape, reads, given[n_arrays:])]

        outs = [*map(self.part.position, ends), *self.gradient_places]
        found = self.of_shares(run, [*arrays, *cotangents], [*self.places, *arriving], outs)
        return found[: len(ends)], found[len(ends) :]

    def program_of(self, size: int) -> _jax.Jaxpr:
        """The program of a slice of so many entries."""
        if size not in self.programs:
            self.programs[size] = self.part.slice_program(size, self.primals, self.tangents)
        return self.programs[size]

    def _plan(self, size: int) -> PlannedSlice:
        if size not in self.plans:
            part = self.part
            program, slices = self.program_of(size), None
            if self.n_inner > 1:
                inner = find(program, [a in self.program.moving for a in self.primals])
                if inner is not None and not inner.again:
                    program, slices = cut(inner, self.n_inner, self.plan)
            is_tangent = [False] * len(self.primals) + [True] * len(self.tangents)
            outs = [False] * len(part.ends) + [True] * len(part.tangent_ends)
            graph = split_body(program, is_tangent, outs, in_loop=False)
            graph.slices = slices
            self.plans[size] = self.plan(graph)
        return self.plans[size]


class _Waist(_Loop):
    """With a part that ends in one number."""

    def __init__(self, part: Part, n_slices: int, plan: Planned, devices: int) -> None:
        super().__init__(part, n_slices, plan, devices)
        (self.end,) = part.tangent_ends

    def run(self, args: Sequence[jax.Array]) -> list[jax.Array]:
        """Run it. Gradients in what is entrywise come last."""
        outputs = super().run(args)
        return [*outputs, *(g for g, t in zip(self.gradients, self.tangents, strict=True) if t in self.part.entrywise)]

    def run_part(self, env: dict[Atom, jax.Array]) -> None:
        part, arrays = self.part, [read(env, a) for a in self.primals]
        cotangent = jnp.ones(self.end.aval.shape, self.end.aval.dtype)

        def run(state: State, start: ArrayLike, size: int) -> State:
            taken = self.taken(arrays, self.places, start, size)
            sums, found = self.forward_and_backward(taken, size, [cotangent], [None])
            totals = self.collected(state[0], sums, nowhere, start)
            return totals, self.collected(state[1], found, self.gradient_places, start)

        nowhere = [None] * len(part.ends)
        begin = self.zeros(part.ends, nowhere), self.zeros(self.tangents, self.gradient_places)
        sums, gradients = self.each(begin, run)
        sums, gradients = self.whole(sums, nowhere), self.whole(gradients, self.gradient_places)
        env.update((v, s.astype(v.aval.dtype)) for v, s in zip(part.ends, sums, strict=True))
        self.gradients = [g.astype(t.aval.dtype) for g, t in zip(gradients, self.tangents, strict=True)]
        terms = [jnp.sum(g * env[t]) for g, t in zip(self.gradients, self.tangents, strict=True)]
        self.total = sum(terms[1:], terms[0]).astype(self.end.aval.dtype).reshape(self.end.aval.shape)
        if not any(self.end in self.program.flat.steps[n].results for n in part.linear):
            env[self.end] = self.total

    def run_after(self, numbers: Sequence[int], env: dict[Atom, jax.Array]) -> None:
        for number in numbers:
            if number in self.part.linear:
                self._add(self.program.flat.steps[number], env)
            else:
                self.run_steps([number], env)

    def _add(self, step: Any, env: dict[Atom, jax.Array]) -> None:
        """Run a step between the part's tangents and its end with what else it takes, and add the part to the end."""
        outs: list[jax.Array] = []
        if any(o in env for o in step.operands if o in self.program.flat.tangents):
            arrays = [
                o.value if isinstance(o, Constant) else env[o] if o in env else jnp.zeros(o.aval.shape, o.aval.dtype)
                for o in step.operands
            ]
            outs = _jax.bind(step.equation, arrays)
        if self.end in step.results:
            outs = [outs[0] + self.total] if outs else [self.total]
        env.update(zip(step.results, outs, strict=False))


class _Stage(_Loop):
    """With a part that ends in something wide, whose slices run again on the way back."""

    def __init__(self, part: Part, n_slices: int, plan: Planned, devices: int) -> None:
        super().__init__(part, min(n_slices, part.size), plan, devices)
        self.end_places = [part.position(e) for e in part.ends]
        self.cotangent_places = [part.position(e) for e in part.tangent_ends]

    def run_part(self, env: dict[Atom, jax.Array]) -> None:
        part, arrays = self.part, [read(env, a) for a in self.primals]
        primal = [True] * len(part.ends) + [False] * len(part.tangent_ends)

        def run(state: State, start: ArrayLike, size: int) -> State:
            program, takes = _jax.needed_for(self.program_of(size), primal)
            taken = self.taken(arrays, self.places, start, size)

            def ends_of(*taken: jax.Array) -> list[jax.Array | None]:
                return list(_jax.evaluate(program, [a for a, on in zip(taken, takes, strict=False) if on]))

            found = self.of_shares(ends_of, taken, self.places, self.end_places)
            return self.collected(state[0], found, self.end_places, start), []

        ends, _ = self.each((self.zeros(part.ends, self.end_places), []), run)
        ends = self.whole(ends, self.end_places)
        env.update((v, end.astype(v.aval.dtype)) for v, end in zip(part.ends, ends, strict=True))
        avals = [t.aval for t in part.tangent_ends]
        pull = _jax.program(self._pull, [*map(jax.typeof, arrays), *avals])
        tangents = _jax.pulled_by(pull, arrays, [env[t] for t in self.tangents], avals)
        env.update(zip(part.tangent_ends, tangents, strict=True))

    def _pull(self, given: Sequence[jax.Array]) -> list[jax.Array]:
        """The gradient in the tangents that the part takes, given what else it takes and the cotangents of its ends."""
        arrays, cotangents = given[: len(self.primals)], given[len(self.primals) :]

        def run(state: State, start: ArrayLike, size: int) -> State:
            taken = self.taken(arrays, self.places, start, size)
            arriving = self.taken(cotangents, self.cotangent_places, start, size)
            _, found = self.forward_and_backward(taken, size, arriving, self.cotangent_places)
            return [], self.collected(state[1], found, self.gradient_places, start)

        _, gradients = self.each(([], self.zeros(self.tangents, self.gradient_places)), run)
        gradients = self.whole(gradients, self.gradient_places)
        return [g.astype(t.aval.dtype) for g, t in zip(gradients, self.tangents, strict=True)]


def _wide(dtype: DTypeLike) -> DTypeLike:
    """In which precision many numbers of a type are added up."""
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype
