"""The two sweeps: forward over the primal program, filling a tape; backward over the tangent program, reading it.

Both run in the stages of ``schedule``. Optimization barriers hold the compiler to these: codes are written before the
next expensive step begins, and nothing is decoded or made again before the cotangent that needs it has arrived. Where
nothing is encoded there is no barrier forward: it would only store what the compiler would have fused. Small bodies of
loops have none at all.

What acts (prints, calls back) does so once, in the forward sweep and in the order of the program. Where a part runs
again it is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple, NoReturn

import jax

from numpyro_rad.ad import _jax, control
from numpyro_rad.ad.codecs import Codec
from numpyro_rad.ad.graph import ControlFlow, ControlFlowEdge, Edge, Equation, Value, read
from numpyro_rad.ad.plan import Plan
from numpyro_rad.ad.recompute import Draw, Needs, draw_for, recompute_equations, recompute_leaves
from numpyro_rad.ad.schedule import backward_stages, forward_stages, is_ordered, leading_to_expensive
from numpyro_rad.ad.seeds import fold
from numpyro_rad.annotations import PyTree


class Tape(NamedTuple):
    """What is stored between the sweeps: arrays only, in the order of the plan."""

    kept: tuple[tuple[jax.Array, ...], ...]
    encoded: tuple[tuple[tuple[jax.Array, ...], ...], ...]
    children: tuple[tuple[PyTree, ...], ...]


def _seed_of(plan: Plan, seed: jax.Array, value: Value, group: int) -> jax.Array:
    """The seed of one draw: no two draws of a program share one (loops fold their iteration into ``seed``)."""
    return fold(seed, *plan.path, value.number, group)


def _in_order(plan: Plan, first: list[jax.Array], then: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
    """Both lists; where it matters, what follows from ``then`` waits until all of ``first`` is there."""
    return _jax.barrier(first, then) if is_ordered(plan) else (first, then)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _code(codec: Codec, seed: jax.Array, array: jax.Array) -> tuple[jax.Array, ...]:
    return codec.encode(seed, array)


_encode = jax.jit(_code, static_argnums=0, inline=True)  # each codec is traced once for each shape, and inlined


@partial(jax.jit, static_argnums=(0, 3), inline=True)
def _decode(codec: Codec, seed: jax.Array, code: tuple[jax.Array, ...], like: jax.ShapeDtypeStruct) -> jax.Array:
    return codec.decode(seed, code, like)


@_code.defjvp
def _code_jvp(codec: Codec, primals: tuple, tangents: tuple) -> NoReturn:
    raise NotImplementedError(
        f"a randomized gradient was differentiated once more, but the '{codec}' codes that it reads have no "
        "derivative, so second derivatives would be wrong. Pass codec=Keep() where a gradient is differentiated."
    )


# -- forward ---------------------------------------------------------------------------------------------------------


def forward(
    plan: Plan, seed: jax.Array, args: Sequence[jax.Array], quiet: bool = False
) -> tuple[list[jax.Array], Tape]:
    """Run the primal program of ``plan.graph`` on ``args``.

    :param seed: uint32 pair from which every code of this run draws.
    :param quiet: whether to leave out what acts where nobody reads its results.
    :return: outputs of the graph (primal ones only) and the tape.
    """
    graph = plan.graph
    env: dict[Value, jax.Array] = dict(zip(graph.inputs, args, strict=True))
    kept: dict[Value, tuple[jax.Array, ...]] = {}
    encoded: dict[Value, tuple[tuple[jax.Array, ...], ...]] = {}
    children: dict[ControlFlow, tuple[PyTree, ...]] = {}

    pending: list[Value] = []  # encoded since the last barrier
    again = {v for values in plan.runs_again.values() for v in values}  # stored when their segment runs again

    def store(value: Value, array: jax.Array) -> None:
        """Put ``array`` on the tape if the plan says so."""
        if value in again:
            return
        if value in plan.kept:
            kept[value] = plan.kept[value].encode(seed, _jax.to_raw(array))
        if value in plan.encoded:
            encoded[value] = _codes(plan, seed, value, array)
            pending.append(value)

    for value in graph.inputs:
        store(value, env[value])
    stages = forward_stages(plan, quiet)
    for i, stage in enumerate(stages):
        inside = {o for e in stage for o in e.outputs}
        outside = dict.fromkeys(a for e in stage for a in e.inputs if isinstance(a, Value) and a not in inside)
        local = {v: env[v] for v in outside}
        if i and pending:
            codes, tree = jax.tree.flatten([encoded[v] for v in pending])
            done = [env[v] for v in dict.fromkeys(o for e in stages[i - 1] if e.expensive for o in e.outputs)]
            needed = leading_to_expensive(stage)
            waiting = [v for v in outside if v in needed]  # the rest may be fused with whatever reads it
            codes, arrays = _in_order(plan, [*codes, *done], [env[v] for v in waiting])
            local.update(zip(waiting, arrays, strict=True))
            encoded.update(zip(pending, jax.tree.unflatten(tree, codes[: tree.num_leaves]), strict=True))
            pending.clear()
        for equation in stage:
            arrays = [read(local, a) for a in equation.inputs]
            if equation.node is None:
                outs = equation.run(*arrays)
            else:
                outs, tape = control.run(forward, plan, equation.node, seed, arrays, quiet)
                if tape is not None:
                    children[equation.node] = tape
            for value, array in zip(equation.outputs, outs, strict=True):
                local[value] = env[value] = array
                store(value, array)
    outs = [read(env, a) for a in graph.outputs]
    tape = Tape(
        tuple(kept[v] for v in plan.kept if v not in again),
        tuple(encoded[v] for v in plan.encoded if v not in again),
        tuple(children[s] for s in plan.children),
    )
    return outs, tape


def _codes(plan: Plan, seed: jax.Array, value: Value, array: jax.Array) -> tuple[tuple[jax.Array, ...], ...]:
    """The codes of a value, one for each group of its readers."""
    entry = plan.encoded[value]
    return tuple(_encode(entry.codec, _seed_of(plan, seed, value, i), array) for i in range(len(entry.readers)))


def _run_equations(equations: Iterable[Equation], env: dict[Value, jax.Array]) -> None:
    """Run equations, adding to ``env`` what is not there yet."""
    for equation in equations:
        outs = equation.run(*[read(env, a) for a in equation.inputs])
        for value, array in zip(equation.outputs, outs, strict=True):
            env.setdefault(value, array)


# -- backward --------------------------------------------------------------------------------------------------------


def backward(
    plan: Plan, seed: jax.Array, tape: Tape, reads: dict[Value, jax.Array], cotangents: Sequence[jax.Array | None]
) -> list[jax.Array | None]:
    """Pull cotangents back through the tangent program.

    :param reads: the inputs of the graph named in ``plan.reads``.
    :param cotangents: one for each tangent output of the graph; None stands for zero.
    :return: one cotangent for each tangent input; None stands for zero.
    """
    graph = plan.graph
    to_come = {v: s for s, values in plan.runs_again.items() for v in values}  # stored when their segment runs again
    kept = dict(zip([v for v in plan.kept if v not in to_come], tape.kept, strict=True))
    encoded = dict(zip([v for v in plan.encoded if v not in to_come], tape.encoded, strict=True))
    children = dict(zip(plan.children, tape.children, strict=True))
    sums: dict[Value, jax.Array] = {}

    def add(tangent: Value, cotangent: jax.Array) -> None:
        sums[tangent] = sums[tangent] + cotangent if tangent in sums else cotangent

    for tangent, cotangent in zip(graph.tangent_outputs, cotangents, strict=True):
        if tangent is not None and cotangent is not None:
            add(tangent, cotangent)
    in_turn = graph.slices is not None or _jax.devices_of(map(jax.typeof, (*reads.values(), *sums.values()))) == 1
    done: list[Value] = []
    for stage in backward_stages(graph, set(sums)):
        incoming = [t for t in dict.fromkeys(o for e in stage for o in e.outputs) if t in sums]
        # What the stage before gave is finished, the gradients of its weights too: a compiler that puts these off keeps
        # all that they are made of. Devices would wait there for each other's sums, which they add up in one go at the
        # end.
        incoming += [t for t in done if t in sums and t not in incoming]
        done = list(dict.fromkeys(t for e in stage for t in e.inputs)) if in_turn else []
        segments = {to_come[v] for v in Needs.of(plan, stage).stored(graph, plan.kept) if v in to_come}
        for segment in sorted(segments, reverse=True):
            values = [v for v, s in to_come.items() if s == segment]
            _run_again(plan, seed, values, reads, kept, encoded, sums, incoming)
            for value in values:
                del to_come[value]
        residuals = _Stage(plan, stage, reads, kept, encoded)
        held, tree = jax.tree.flatten(residuals.arrays)
        arrived, held = _in_order(plan, [sums[t] for t in incoming], held)
        residuals.arrays = jax.tree.unflatten(tree, held)
        sums.update(zip(incoming, arrived, strict=True))
        residuals.open(seed)
        for edge in stage:
            outs = [sums.pop(o, None) for o in edge.outputs]
            if all(o is None for o in outs):
                continue
            if isinstance(edge, ControlFlowEdge):
                pulled = control.pull(forward, backward, plan, edge, residuals.env, children[edge.node], outs, seed)
            else:
                arrays = [residuals.residual(edge, r, lin) for r, lin in zip(edge.residuals, edge.linear, strict=True)]
                pulled = edge.pull(arrays, outs)
            for tangent, cotangent in zip(edge.inputs, pulled, strict=True):
                if cotangent is not None:
                    add(tangent, cotangent)
    return [sums.get(t) for t in graph.tangent_inputs]


def _run_again(
    plan: Plan,
    seed: jax.Array,
    values: list[Value],
    reads: dict[Value, jax.Array],
    kept: dict[Value, tuple[jax.Array, ...]],
    encoded: dict[Value, tuple[tuple[jax.Array, ...], ...]],
    sums: dict[Value, jax.Array],
    incoming: list[Value],
) -> None:
    """Run a segment of the primal program again, once the cotangents ``incoming`` have arrived, and store what it
    stores.
    """
    graph = plan.graph
    early = set(kept)
    wanted = {a for v in values for a in graph.producer[v].inputs if isinstance(a, Value)}
    leaves = sorted(recompute_leaves(graph, wanted, early), key=lambda v: v.number)
    arrays = [kept[v] if v in kept else reads[v] for v in leaves]
    held, tree = jax.tree.flatten(arrays)
    arrived, held = _in_order(plan, [sums[t] for t in incoming], held)
    sums.update(zip(incoming, arrived, strict=True))
    env: dict[Value, jax.Array] = {}
    for value, array in zip(leaves, jax.tree.unflatten(tree, held), strict=True):
        env[value] = _decoded(plan, seed, value, array) if value in early else array
    _run_equations(recompute_equations(graph, values, env), env)
    for value in values:
        if value in plan.kept:
            kept[value] = plan.kept[value].encode(seed, _jax.to_raw(env[value]))
        if value in plan.encoded:
            encoded[value] = _codes(plan, seed, value, env[value])


def _decoded(plan: Plan, seed: jax.Array, value: Value, code: tuple[jax.Array, ...]) -> jax.Array:
    """A kept value from the tape."""
    raw = plan.kept[value].decode(seed, code, jax.ShapeDtypeStruct(value.aval.shape, value.aval.dtype))
    return _jax.from_raw(raw, value.aval)


class _Stage:
    """The residuals of one stage of the backward sweep: exact ones made once, estimates decoded for each reader.

    ``arrays`` are what it takes from outside. All pass its barrier but the tapes of control flow, which cannot be
    decoded before the loop or branch that reads them begins.
    """

    def __init__(
        self,
        plan: Plan,
        stage: list[Edge],
        reads: dict[Value, jax.Array],
        kept: dict[Value, tuple[jax.Array, ...]],
        encoded: dict[Value, tuple[tuple[jax.Array, ...], ...]],
    ) -> None:
        needs = Needs.of(plan, stage)
        self._plan, self._draws = plan, needs.draws
        self._again = recompute_equations(plan.graph, needs.exact, kept)
        leaves = sorted(recompute_leaves(plan.graph, needs.exact, kept), key=lambda v: v.number)
        self._read, self._kept = [v for v in leaves if v not in kept], [v for v in leaves if v in kept]
        self.arrays: dict[str, list] = {
            "reads": [reads[v] for v in self._read],
            "kept": [kept[v] for v in self._kept],
            "codes": [encoded[value][group] for value, group in needs.draws],
        }

    def open(self, seed: jax.Array) -> None:
        """Make what is exact from ``arrays``, once they have passed the barrier."""
        self._seed = seed
        self._codes = dict(zip(self._draws, self.arrays["codes"], strict=True))
        self.env: dict[Value, jax.Array] = dict(zip(self._read, self.arrays["reads"], strict=True))
        for value, code in zip(self._kept, self.arrays["kept"], strict=True):
            self.env[value] = _decoded(self._plan, seed, value, code)
        _run_equations(self._again, self.env)
        self._estimates: dict[Draw, jax.Array] = {}

    def residual(self, edge: Edge, residual: Value, linear: bool) -> jax.Array:
        """What an edge reads in the place of a residual."""
        if not linear or not self._plan.estimated(residual):
            return self.env[residual]
        carrier, group = draw = draw_for(self._plan, edge, residual)
        if draw not in self._estimates:
            like = jax.ShapeDtypeStruct(carrier.aval.shape, carrier.aval.dtype)
            seed = _seed_of(self._plan, self._seed, carrier, group)
            self._estimates[draw] = _decode(self._plan.encoded[carrier].codec, seed, self._codes[draw], like)
        return self._rearranged(residual, carrier, self._estimates[draw])

    def _rearranged(self, residual: Value, carrier: Value, array: jax.Array) -> jax.Array:
        """``residual`` from an estimate of its carrier."""
        if residual is carrier:
            return array
        equation = self._plan.graph.producer[residual]
        (operand,) = equation.inputs
        assert isinstance(operand, Value)
        return equation.run(self._rearranged(operand, carrier, array))[0]
