"""The two sweeps: forward over the primal program, filling a tape; backward over the tangent program, reading it.

Both run in *stages*. Forward, a stage is what can be done before the next expensive step (a contraction, a loop): what
is only there for that step waits for its stage, so a sampled weight and its log density live where the weight is used.
Backward, an edge belongs to the stage in which the cotangent of one of its inputs can first be complete; prior, guide
and layer of one weight then meet in one stage, where the weight is made again once. Optimization barriers hold the
compiler to this: codes are written before the next expensive step begins, and nothing is decoded or made again before
the cotangent that needs it has arrived. Where nothing is encoded there is no barrier forward: it would only store what
the compiler would have fused. Small bodies of loops have none at all.

What acts (prints, calls back) does so once, in the forward sweep and in the order of the program. Where a part runs
again it is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_rad.ad import _jax, loops
from numpyro_rad.ad.codecs import Codec
from numpyro_rad.ad.graph import Atom, Constant, Edge, Equation, Graph, Split, Value
from numpyro_rad.ad.plan import Plan, kept_bytes, read_by_segments, recompute_leaves
from numpyro_rad.ad.seeds import fold

ORDERED_FROM = 2**20
"""Bodies of loops whose values take fewer bytes than this, all together, are left to the compiler's own order. There is
next to no memory to be gained, and barriers would keep it from fusing small operations: that may double their time."""


class Tape(NamedTuple):
    """What is stored between the sweeps: arrays only, in the order of the plan."""

    kept: tuple[Any, ...]
    encoded: tuple[tuple[Any, ...], ...]
    children: tuple[tuple[Any, ...], ...]


def _seed_of(plan: Plan, seed: Any, value: Value, group: int) -> Any:
    """The seed of one draw: no two draws of a program share one (loops fold their iteration into ``seed``)."""
    return fold(seed, *plan.path, value.number, group)


def _in_order(plan: Plan, first: list[Any], then: list[Any]) -> tuple[list[Any], list[Any]]:
    """Both lists; where it matters, what follows from ``then`` waits until all of ``first`` is there."""
    size = sum(kept_bytes(o) for e in plan.graph.equations for o in e.outputs)
    return (first, then) if plan.repeat > 1 and size < ORDERED_FROM else _jax.barrier(first, then)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _encode(codec: Codec, seed: Any, array: Any) -> tuple[Any, ...]:
    return codec.encode(seed, array)


@_encode.defjvp
def _encode_jvp(codec: Codec, primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        f"a randomized gradient was differentiated once more, but the '{codec}' codes that it reads have no "
        "derivative, so second derivatives would be wrong. Pass codec=Keep() where a gradient is differentiated."
    )


# -- forward ---------------------------------------------------------------------------------------------------------


def forward(plan: Plan, seed: Any, args: Sequence[Any], quiet: bool = False) -> tuple[list[Any], Tape]:
    """Run the primal program of ``plan.graph`` on ``args``.

    :param seed: uint32 pair from which every code of this run draws.
    :param quiet: whether to leave out what acts where nobody reads its results.
    :return: outputs of the graph (primal ones only) and the tape.
    """
    graph = plan.graph
    env: dict[Value, Any] = dict(zip(graph.inputs, args, strict=True))
    kept: dict[Value, Any] = {}
    encoded: dict[Value, tuple[Any, ...]] = {}
    children: dict[Split, Any] = {}

    pending: list[Value] = []  # encoded since the last barrier
    again = {v for values in plan.runs_again.values() for v in values}  # stored when their segment runs again

    def store(value: Value, array: Any) -> None:
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
    stages = _forward_stages(plan, quiet)
    for i, stage in enumerate(stages):
        inside = {o for e in stage for o in e.outputs}
        outside = dict.fromkeys(a for e in stage for a in e.inputs if isinstance(a, Value) and a not in inside)
        local = {v: env[v] for v in outside}
        if i and pending:
            codes, tree = jax.tree.flatten([encoded[v] for v in pending])
            done = [env[v] for v in dict.fromkeys(o for e in stages[i - 1] if e.anchor for o in e.outputs)]
            needed = _leading_to_anchors(stage)
            waiting = [v for v in outside if v in needed]  # the rest may be fused with whatever reads it
            codes, arrays = _in_order(plan, [*codes, *done], [env[v] for v in waiting])
            local.update(zip(waiting, arrays, strict=True))
            encoded.update(zip(pending, jax.tree.unflatten(tree, codes[: tree.num_leaves]), strict=True))
            pending.clear()
        for equation in stage:
            arrays = [_read(local, a) for a in equation.inputs]
            if equation.split is None:
                outs = equation.run(*arrays)
            else:
                outs, tape = _forward_split(plan, equation.split, seed, arrays, quiet)
                if tape is not None:
                    children[equation.split] = tape
            for value, array in zip(equation.outputs, outs, strict=True):
                local[value] = env[value] = array
                store(value, array)
    outs = [_read(env, a) for a in graph.outputs]
    tape = Tape(
        tuple(kept[v] for v in plan.kept if v not in again),
        tuple(encoded[v] for v in plan.encoded if v not in again),
        tuple(children[s] for s in plan.children),
    )
    return outs, tape


def _codes(plan: Plan, seed: Any, value: Value, array: Any) -> tuple[Any, ...]:
    """The codes of a value, one for each group of its readers."""
    entry = plan.encoded[value]
    return tuple(_encode(entry.codec, _seed_of(plan, seed, value, i), array) for i in range(len(entry.readers)))


def _leading_to_anchors(stage: list[Equation]) -> set[Atom]:
    """What the expensive steps of a stage follow from."""
    found: set[Atom] = set()
    for equation in reversed(stage):
        if equation.anchor or any(o in found for o in equation.outputs):
            found.update(equation.inputs)
    return found


def _read(env: dict[Value, Any], atom: Atom) -> Any:
    return atom.value if isinstance(atom, Constant) else env[atom]


def _forward_stages(plan: Plan, quiet: bool) -> list[list[Equation]]:
    """The needed equations of the primal program in stages, expensive steps last in each."""
    graph = plan.graph
    live: set[Any] = {*graph.outputs, *plan.kept, *plan.encoded}
    equations = []
    for equation in reversed(graph.equations):
        acts = equation.acts and not quiet
        if acts or any(o in live for o in equation.outputs) or equation.split in plan.children:
            live.update(equation.inputs)
            equations.append(equation)
    equations.reverse()
    producer = {o: e for e in equations for o in e.outputs}
    earliest: dict[Equation, int] = {}

    def after(equation: Equation, stage: dict[Equation, int]) -> int:
        makers = [producer[a] for a in equation.inputs if a in producer]  # type: ignore[index]
        return max((stage[m] + m.anchor for m in makers), default=0)

    latest_act = 0
    for equation in equations:
        earliest[equation] = after(equation, earliest)
        if equation.acts:
            latest_act = earliest[equation] = max(latest_act, earliest[equation])
    wanted: dict[Value, int] = {}  # stage of the first expensive step that a value leads to
    stage: dict[Equation, int] = {}
    for equation in reversed(equations):
        if equation.anchor:
            stage[equation] = earliest[equation]
        else:
            stages = [wanted[o] for o in equation.outputs if o in wanted]
            if not stages:
                continue
            stage[equation] = min(stages)
        for atom in equation.inputs:
            if isinstance(atom, Value):
                wanted[atom] = min(stage[equation], wanted.get(atom, stage[equation]))
    for equation in equations:
        if equation not in stage:  # leads to no expensive step: as soon as its operands are there
            stage[equation] = after(equation, stage)
    result: list[list[Equation]] = [[] for _ in range(1 + max(stage.values(), default=-1))]
    for anchor in (False, True):
        for equation in equations:
            if equation.anchor == anchor:
                result[stage[equation]].append(equation)
    return [s for s in result if s]


# -- backward --------------------------------------------------------------------------------------------------------


def backward(
    plan: Plan, seed: Any, tape: Tape, reads: dict[Value, Any], cotangents: Sequence[Any | None]
) -> list[Any | None]:
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
    sums: dict[Value, Any] = {}

    def add(tangent: Value, cotangent: Any) -> None:
        sums[tangent] = sums[tangent] + cotangent if tangent in sums else cotangent

    for tangent, cotangent in zip(graph.tangent_outputs, cotangents, strict=True):
        if tangent is not None and cotangent is not None:
            add(tangent, cotangent)
    stages = _backward_stages(graph, set(sums))
    if graph.slices is not None:
        # With the cotangent of the part's end those of all that it takes are complete: the parts of the program that
        # made it come one after the other.
        stages = [group for stage in stages for group in _one_by_one(stage)]
    done: list[Value] = []
    for stage in stages:
        incoming = [t for t in dict.fromkeys(o for e in stage for o in e.outputs) if t in sums]
        incoming += [t for t in done if t in sums and t not in incoming]
        done = list(dict.fromkeys(t for e in stage for t in e.inputs)) if graph.slices is not None else []
        segments = {to_come[v] for v in _stored_for(plan, stage) if v in to_come}
        for segment in sorted(segments, reverse=True):
            values = [v for v, s in to_come.items() if s == segment]
            _run_again(plan, seed, values, reads, kept, encoded, sums, incoming)
            for value in values:
                del to_come[value]
        state = _StageInputs(plan, stage, reads, kept, encoded, children)
        held, tree = jax.tree.flatten(state.arrays)
        arrived, held = _in_order(plan, [sums[t] for t in incoming], held)
        state.arrays = jax.tree.unflatten(tree, held)
        sums.update(zip(incoming, arrived, strict=True))
        values = _StageValues(state, seed)
        for edge in stage:
            outs = [sums.pop(o, None) for o in edge.outputs]
            if all(o is None for o in outs):
                continue
            for tangent, cotangent in zip(edge.inputs, _pull(plan, edge, values, outs, seed), strict=True):
                if cotangent is not None:
                    add(tangent, cotangent)
    return [sums.get(t) for t in graph.tangent_inputs]


def _stored_for(plan: Plan, stage: list[Edge]) -> set[Value]:
    """What the edges of a stage take from the tape."""
    exact: set[Value] = set()
    coded: set[Value] = set()
    for edge in stage:
        for residual, linear in zip(edge.residuals, edge.linear, strict=True):
            if linear and plan.estimated(residual):
                coded.add(plan.carrier[residual])
            else:
                exact.add(residual)
        if edge.split is not None:
            exact.update(split_reads(plan, edge.split))
    return coded | recompute_leaves(plan.graph, exact, plan.kept)


def _run_again(
    plan: Plan,
    seed: Any,
    values: list[Value],
    reads: dict[Value, Any],
    kept: dict[Value, Any],
    encoded: dict[Value, Any],
    sums: dict[Value, Any],
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
    env: dict[Value, Any] = {}
    for value, array in zip(leaves, jax.tree.unflatten(tree, held), strict=True):
        env[value] = _decoded(plan, seed, value, array) if value in early else array
    for equation in _leading_to(graph, set(values), set(env)):
        outs = equation.run(*[_read(env, a) for a in equation.inputs])
        for value, array in zip(equation.outputs, outs, strict=True):
            env.setdefault(value, array)
    for value in values:
        if value in plan.kept:
            kept[value] = plan.kept[value].encode(seed, _jax.to_raw(env[value]))
        if value in plan.encoded:
            encoded[value] = _codes(plan, seed, value, env[value])


def _leading_to(graph: Graph, wanted: set[Value], known: set[Value]) -> list[Equation]:
    """The equations that make ``wanted`` from ``known``, in order."""
    found = []
    for equation in reversed(graph.equations):
        if any(o in wanted and o not in known for o in equation.outputs):
            found.append(equation)
            wanted.update(a for a in equation.inputs if isinstance(a, Value))
    return found[::-1]


def _decoded(plan: Plan, seed: Any, value: Value, code: Any) -> Any:
    """A kept value from the tape."""
    raw = plan.kept[value].decode(seed, code, jax.ShapeDtypeStruct(value.aval.shape, value.aval.dtype))
    return _jax.from_raw(raw, value.aval)


def _backward_stages(graph: Graph, seeds: set[Value]) -> list[list[Edge]]:
    """Edges in stages, in the order in which they are pulled back."""
    complete: dict[Value, int] = dict.fromkeys(seeds, 0)  # first stage at which a cotangent can be complete
    live = []
    for edge in reversed(graph.edges):
        stages = [complete[o] for o in edge.outputs if o in complete]
        if not stages:
            continue
        live.append(edge)
        ready = max(stages) + edge.anchor
        for tangent in edge.inputs:
            complete[tangent] = max(ready, complete.get(tangent, 0))
    # Each edge waits until a cotangent that it adds to is needed: by the edge that made the tangent or, for the inputs
    # of the graph, when the last contribution arrives.
    producer = {o: e for e in live for o in e.outputs}
    stage: dict[Edge, int] = {}
    for edge in reversed(live):
        needed = [stage[producer[t]] - producer[t].anchor if t in producer else complete[t] for t in edge.inputs]
        stage[edge] = min(needed, default=0)
    result: dict[int, list[Edge]] = {}
    for edge in live:
        result.setdefault(stage[edge], []).append(edge)
    return [result[k] for k in sorted(result)]


def _one_by_one(stage: list[Edge]) -> list[list[Edge]]:
    """A stage in groups, in the order in which they are pulled back: edges that share a large tangent are together."""
    group: dict[Value, list[Edge]] = {}
    of_edge: dict[Edge, list[Edge]] = {}
    for edge in stage:
        found = [group[t] for t in (*edge.inputs, *edge.outputs) if t in group]
        members = [*dict.fromkeys(e for each in found for e in each), edge]
        of_edge.update(dict.fromkeys(members, members))
        large = [t for e in members for t in (*e.inputs, *e.outputs) if t.aval.size > 1]
        group.update(dict.fromkeys(large, members))
    givers: dict[Value, set[Edge]] = {}  # which edges of the stage add to a cotangent
    for edge in stage:
        for tangent in edge.inputs:
            givers.setdefault(tangent, set()).add(edge)
    waiting = list({id(m): m for m in of_edge.values()}.values())
    ordered: list[list[Edge]] = []
    pulled: set[Edge] = set()
    while waiting:
        ready = [m for m in waiting if all(givers.get(o, set()) <= pulled | set(m) for e in m for o in e.outputs)]
        if not ready:
            return [stage]
        for members in ready:
            ordered.append([e for e in stage if e in members])
            pulled.update(members)
        waiting = [m for m in waiting if not pulled.issuperset(m)]
    result: list[list[Edge]] = []
    size = ORDERED_FROM
    for members in ordered:
        if size >= ORDERED_FROM:
            result.append([])
            size = 0
        result[-1] += members
        size += sum(kept_bytes(t) for t in {t for e in members for t in e.inputs})
    return result


class _StageInputs:
    """The arrays that one stage of the backward sweep takes from outside. All pass its barrier but the tapes of control
    flow, which cannot be decoded before the loop or branch that reads them begins.
    """

    def __init__(self, plan: Plan, stage: list[Edge], reads: dict, kept: dict, encoded: dict, children: dict) -> None:
        self.plan = plan
        graph = plan.graph
        exact: set[Value] = set()
        codes: dict[tuple[Value, int], Any] = {}
        for edge in stage:
            for residual, linear in zip(edge.residuals, edge.linear, strict=True):
                if linear and plan.estimated(residual):
                    carrier = plan.carrier[residual]
                    group = next(i for i, g in enumerate(plan.encoded[carrier].readers) if edge in g)
                    codes[carrier, group] = encoded[carrier][group]
                else:
                    exact.add(residual)
            if edge.split is not None:
                exact.update(split_reads(plan, edge.split))
        # The equations to run again, in order, and what they start from.
        wanted = set(exact)
        self.equations: list[Equation] = []
        leaves: set[Value] = {v for v in wanted if v in kept or v not in graph.producer}
        for equation in reversed(graph.equations):
            made = [o for o in equation.outputs if o in wanted and o not in kept]
            if made:
                self.equations.append(equation)
                for atom in equation.inputs:
                    if isinstance(atom, Value):
                        wanted.add(atom)
                        if atom in kept or atom not in graph.producer:
                            leaves.add(atom)
        self.equations.reverse()
        ordered = sorted(leaves, key=lambda v: v.number)
        self.arrays: dict[str, Any] = {
            "reads": [reads[v] for v in ordered if v not in kept],
            "kept": [kept[v] for v in ordered if v in kept],
            "codes": list(codes.values()),
        }
        self.read_values = [v for v in ordered if v not in kept]
        self.kept_values = [v for v in ordered if v in kept]
        self.code_keys = list(codes)
        self.tapes = {s: children[s] for e in stage if (s := e.split) is not None}


class _StageValues:
    """Residuals as one stage of the backward sweep sees them: exact ones made once, estimates decoded for each
    reader."""

    def __init__(self, state: _StageInputs, seed: Any) -> None:
        self.plan, self.seed = state.plan, seed
        self.codes = dict(zip(state.code_keys, state.arrays["codes"], strict=True))
        self.tapes = state.tapes
        self.env: dict[Value, Any] = dict(zip(state.read_values, state.arrays["reads"], strict=True))
        for value, code in zip(state.kept_values, state.arrays["kept"], strict=True):
            self.env[value] = _decoded(self.plan, seed, value, code)
        for equation in state.equations:
            outs = equation.run(*[_read(self.env, a) for a in equation.inputs])
            for value, array in zip(equation.outputs, outs, strict=True):
                self.env.setdefault(value, array)
        self.decoded: dict[tuple[Value, int], Any] = {}

    def residual(self, edge: Edge, residual: Value, linear: bool) -> Any:
        if not linear or not self.plan.estimated(residual):
            return self.env[residual]
        carrier = self.plan.carrier[residual]
        entry = self.plan.encoded[carrier]
        group = next(i for i, g in enumerate(entry.readers) if edge in g)
        if (carrier, group) not in self.decoded:
            like = jax.ShapeDtypeStruct(carrier.aval.shape, carrier.aval.dtype)
            seed = _seed_of(self.plan, self.seed, carrier, group)
            self.decoded[carrier, group] = entry.codec.decode(seed, self.codes[carrier, group], like)
        return self.rearranged(residual, carrier, self.decoded[carrier, group])

    def rearranged(self, residual: Value, carrier: Value, array: Any) -> Any:
        """``residual`` from an estimate of its carrier."""
        if residual is carrier:
            return array
        equation = self.plan.graph.producer[residual]
        (operand,) = equation.inputs
        assert isinstance(operand, Value)
        return equation.run(self.rearranged(operand, carrier, array))[0]


def _pull(plan: Plan, edge: Edge, values: _StageValues, outs: list[Any | None], seed: Any) -> list[Any | None]:
    """Cotangents of the inputs of one edge."""
    if edge.split is not None:
        return _pull_split(plan, edge, values, outs, seed)
    arrays = [values.residual(edge, r, lin) for r, lin in zip(edge.residuals, edge.linear, strict=True)]
    if edge.pull is not None:
        return edge.pull(arrays, [_filled(o, v.aval) for o, v in zip(outs, edge.outputs, strict=True)])
    present = [i for i, o in enumerate(outs) if o is not None]

    def linear(*tangents: Any) -> list[Any]:
        results = edge.run(arrays, tangents)
        return [results[i] for i in present]

    return list(_jax.linear_transpose(linear, [t.aval for t in edge.inputs], [outs[i] for i in present]))


def _filled(cotangent: Any | None, aval: Any) -> Any:
    return jnp.zeros(aval.shape, aval.dtype) if cotangent is None else cotangent


# -- control flow ----------------------------------------------------------------------------------------------------


def split_reads(plan: Plan, node: Split) -> list[Value]:
    """Outer values that the bodies of ``node`` read on the way back."""
    skip = 1 if node.kind == "cond" else 0
    found = {a: None for a in node.operands[:skip] if isinstance(a, Value)}
    if node in plan.segments:
        found.update(dict.fromkeys(read_by_segments(node)))
    for body, child in zip(node.bodies, plan.children[node], strict=True):
        for inner, outer in zip(body.inputs, node.operands[skip:], strict=True):
            if inner in child.reads and isinstance(outer, Value):
                found[outer] = None
    return list(found)


def _forward_split(plan: Plan, node: Split, seed: Any, args: list[Any], quiet: bool) -> tuple[list[Any], Any]:
    """Primal results of control flow and the tapes of its bodies (None where nothing is differentiated)."""
    children = plan.children.get(node)
    plans = children or tuple(_nothing_stored(b) for b in node.bodies)
    if node.kind == "cond":
        outs, tapes = _forward_cond(plans, seed, args, quiet)
    else:
        outs, tapes = _forward_scan(plans[0], node, plan.segments.get(node, ()), seed, args, quiet)
    return outs, tapes if children else None


def _nothing_stored(graph: Graph) -> Plan:
    inner = {e.split: tuple(_nothing_stored(b) for b in e.split.bodies) for e in graph.equations if e.split is not None}
    return Plan(graph, 1, 1, (), {}, {}, {}, inner, {}, {}, 0, frozenset())


def _forward_scan(
    child: Plan, node: Split, lengths: tuple[int, ...], seed: Any, args: list[Any], quiet: bool
) -> tuple[list[Any], Any]:
    n_consts, n_carry = node.params["primal_counts"]
    consts, carry, xs = args[:n_consts], args[n_consts : n_consts + n_carry], args[n_consts + n_carry :]
    steps = (jnp.arange(node.params["length"], dtype=jnp.uint32), xs)
    if not lengths:
        carry, ys, tape = _iterate(child, node, seed, consts, carry, steps, quiet)
        return [*carry, *ys], (tape,)
    run = _bare_run(child.graph, node, seed, consts, quiet)
    carry, ys, begins = loops.run_storing(run, list(map(_jax.to_raw, carry)), steps, lengths[0], node.params["reverse"])
    return [*_typed_carry(child.graph, node, carry), *ys], (begins,)


def _typed_carry(graph: Graph, node: Split, raw: list[Any]) -> list[Any]:
    """The carry of a loop from its arrays as they are stored."""
    n_consts, n_carry = node.params["primal_counts"]
    return [_jax.from_raw(c, v.aval) for c, v in zip(raw, graph.inputs[n_consts : n_consts + n_carry], strict=True)]


def _bare_run(graph: Graph, node: Split, seed: Any, consts: list[Any], quiet: bool) -> loops.Run:
    """Iterations of a loop of which nothing is stored; the carry is as it would be stored."""
    bare = _nothing_stored(graph)

    def run(raw: list[Any], steps: Any) -> tuple[list[Any], list[Any]]:
        carry, ys, _ = _iterate(bare, node, seed, consts, _typed_carry(graph, node, raw), steps, quiet)
        return list(map(_jax.to_raw, carry)), ys

    return run


def _iterate(
    child: Plan, node: Split, seed: Any, consts: list[Any], carry: list[Any], steps: tuple[Any, list[Any]], quiet: bool
) -> tuple[list[Any], list[Any], Tape]:
    """Iterations of a loop: the carry after them, their outputs, and their tapes."""

    def body(carry: list[Any], step: tuple[Any, list[Any]]) -> tuple[list[Any], tuple[list[Any], Tape]]:
        index, xs = step
        outs, tape = forward(child, fold(seed, index), [*consts, *carry, *xs], quiet)
        return outs[: len(carry)], (outs[len(carry) :], tape)

    carry, (ys, tape) = lax.scan(body, carry, steps, reverse=node.params["reverse"], unroll=node.params["unroll"])
    return carry, ys, tape


def _forward_cond(plans: Sequence[Plan], seed: Any, args: list[Any], quiet: bool) -> tuple[list[Any], Any]:
    index, operands = args[0], args[1:]
    shapes = [jax.eval_shape(lambda *a, p=p: forward(p, seed, a)[1], *operands) for p in plans]

    def branch(number: int) -> Any:
        def run(*operands: Any) -> tuple[list[Any], tuple[Tape, ...]]:
            outs, tape = forward(plans[number], seed, operands, quiet)
            tapes = [jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), s) for s in shapes]
            tapes[number] = tape
            return outs, tuple(tapes)

        return run

    return lax.switch(index, [branch(i) for i in range(len(plans))], *operands)


def _pull_split(plan: Plan, edge: Edge, values: _StageValues, outs: list[Any | None], seed: Any) -> list[Any | None]:
    node = edge.split
    assert node is not None
    cotangents = [_filled(o, v.aval) for o, v in zip(outs, edge.outputs, strict=True)]
    pull = _pull_cond if node.kind == "cond" else _pull_scan
    pulled = pull(plan, node, values, cotangents, seed)
    sums: dict[Value, Any] = {}
    for tangent, cotangent in zip(node.tangents, pulled, strict=True):
        if tangent is not None and cotangent is not None:
            sums[tangent] = sums[tangent] + cotangent if tangent in sums else cotangent
    return [sums.get(t) for t in edge.inputs]


def _pull_scan(plan: Plan, node: Split, values: _StageValues, cotangents: list[Any], seed: Any) -> list[Any]:
    (child,) = plan.children[node]
    lengths = plan.segments.get(node, ())
    (stored,) = values.tapes[node]
    n_consts, n_carry = node.params["tangent_counts"]
    first, n_primal_carry = node.params["primal_counts"]
    known = {
        v: _read(values.env, outer)
        for i, (v, outer) in enumerate(zip(child.graph.inputs, node.operands, strict=True))
        if v in child.reads or (lengths and not first <= i < first + n_primal_carry)
    }
    sliced = child.graph.inputs[first + n_primal_carry :]
    whole = {v: a for v, a in known.items() if v not in set(sliced)}
    slices = [known.get(v) for v in sliced]  # None where nothing reads it

    def pull(carry: tuple[list, list], tape: Tape, steps: tuple[Any, list], ys: list) -> tuple[tuple[list, list], list]:
        """Iterations in reverse: cotangents of the carry and sums of those of constants; then those of the slices."""

        def step(carry: tuple[list, list], x: tuple) -> tuple[tuple[list, list], list]:
            (carried, consts), (tape, (index, xs), ys) = carry, x
            reads = {**whole, **{v: x for v, x in zip(sliced, xs, strict=True) if x is not None}}
            pulled = backward(child, fold(seed, index), tape, reads, [*carried, *ys])
            pulled = [_filled(p, t.aval) for p, t in zip(pulled, child.graph.tangent_inputs, strict=True)]
            consts = [a + b for a, b in zip(consts, pulled[:n_consts], strict=True)]
            return (pulled[n_consts : n_consts + n_carry], consts), pulled[n_consts + n_carry :]

        order = {"reverse": not node.params["reverse"], "unroll": node.params["unroll"]}
        return lax.scan(step, carry, (tape, steps, ys), **order)

    zeros = [jnp.zeros(t.aval.shape, t.aval.dtype) for t in child.graph.tangent_inputs[:n_consts]]
    begin = (cotangents[:n_carry], zeros)
    steps, ys = (jnp.arange(node.params["length"], dtype=jnp.uint32), slices), cotangents[n_carry:]
    if lengths:
        consts = [whole[v] for v in child.graph.inputs[:first]]

        def pull_segment(carry: tuple[list, list], raw: list, x: tuple) -> tuple[tuple[list, list], list]:
            steps, ys = x
            begin = _typed_carry(child.graph, node, raw)
            _, _, tape = _iterate(child, node, seed, consts, begin, steps, quiet=True)
            return pull(carry, tape, steps, ys)

        run = _bare_run(child.graph, node, seed, consts, quiet=True)
        reverse = node.params["reverse"]
        (carried, consts), xs = loops.pull_again(run, pull_segment, begin, stored, (steps, ys), lengths, reverse)
    else:
        (carried, consts), xs = pull(begin, stored, steps, ys)
    return [*consts, *carried, *xs]


def _pull_cond(plan: Plan, node: Split, values: _StageValues, cotangents: list[Any], seed: Any) -> list[Any]:
    plans = plan.children[node]
    operands = node.operands[1:]
    tapes = values.tapes[node]

    def branch(number: int) -> Any:
        child = plans[number]
        outer = dict(zip(child.graph.inputs, operands, strict=True))

        def run(tapes: Any, cotangents: list[Any]) -> list[Any]:
            reads = {v: _read(values.env, outer[v]) for v in child.graph.inputs if v in child.reads}
            pulled = backward(child, seed, tapes[number], reads, cotangents)
            return [_filled(p, t.aval) for p, t in zip(pulled, child.graph.tangent_inputs, strict=True)]

        return run

    index = _read(values.env, node.operands[0])
    return lax.switch(index, [branch(i) for i in range(len(plans))], tapes, cotangents)
