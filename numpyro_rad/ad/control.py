"""Both sweeps through loops and branches, whose bodies are swept in turn: the sweeps themselves are handed in.

A loop folds the number of an iteration into the seed, so that no two draws share one. One that is cut into segments
(``loops``) stores carries instead of tapes; the bodies of a branch, of which one runs, share what is stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_rad.ad import _jax, loops
from numpyro_rad.ad.edges import filled
from numpyro_rad.ad.graph import Cond, ControlFlow, ControlFlowEdge, Graph, Scan, Value, read
from numpyro_rad.ad.plan import Plan
from numpyro_rad.ad.seeds import fold
from numpyro_rad.annotations import PyTree

Forward = Callable[[Plan, jax.Array, Sequence[jax.Array], bool], tuple[list[jax.Array], PyTree]]
"""``sweep.forward``."""

Backward = Callable[
    [Plan, jax.Array, PyTree, dict[Value, jax.Array], Sequence[jax.Array | None]], list[jax.Array | None]
]
"""``sweep.backward``."""


# -- forward ---------------------------------------------------------------------------------------------------------


def run(
    forward: Forward, plan: Plan, node: ControlFlow, seed: jax.Array, args: Sequence[jax.Array], quiet: bool
) -> tuple[list[jax.Array], PyTree]:
    """Primal results of control flow and the tapes of its bodies (None where nothing is differentiated)."""
    children = plan.children.get(node)
    plans = children or tuple(map(_nothing_stored, node.bodies))
    if isinstance(node, Scan):
        outs, tapes = _run_scan(forward, plans[0], node, plan.segments.get(node, ()), seed, args, quiet)
    else:
        outs, tapes = _run_cond(forward, plans, plan.apart, seed, args, quiet)
    return outs, tapes if children else None


def _nothing_stored(graph: Graph) -> Plan:
    nodes = (e.node for e in graph.equations if e.node is not None)
    inner = {node: tuple(map(_nothing_stored, node.bodies)) for node in nodes}
    return Plan(graph, 1, 1, (), {}, {}, {}, inner, {}, {}, 0, frozenset())


@dataclasses.dataclass(frozen=True)
class _Iterations:
    """Iterations of a loop on the way forward."""

    forward: Forward
    node: Scan
    seed: jax.Array
    consts: Sequence[jax.Array]
    quiet: bool

    def run(
        self, child: Plan, carry: list[jax.Array], steps: tuple[jax.Array, list[jax.Array]]
    ) -> tuple[list[jax.Array], list[jax.Array], PyTree]:
        """The carry after them, their outputs, and their tapes."""

        def body(
            carry: list[jax.Array], step: tuple[jax.Array, list[jax.Array]]
        ) -> tuple[list[jax.Array], tuple[list[jax.Array], PyTree]]:
            index, xs = step
            outs, tape = self.forward(child, fold(self.seed, index), [*self.consts, *carry, *xs], self.quiet)
            return outs[: len(carry)], (outs[len(carry) :], tape)

        carry, (ys, tape) = lax.scan(body, carry, steps, reverse=self.node.reverse, unroll=self.node.unroll)
        return carry, ys, tape

    def run_bare(
        self, raw: list[jax.Array], steps: tuple[jax.Array, list[jax.Array]]
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """The same with nothing stored; the carry is as it would be stored."""
        carry, ys, _ = self.run(_nothing_stored(self.node.body), self.typed(raw), steps)
        return list(map(_jax.to_raw, carry)), ys

    def typed(self, raw: Sequence[jax.Array]) -> list[jax.Array]:
        """The carry from its arrays as they are stored."""
        return [_jax.from_raw(c, v.aval) for c, v in zip(raw, self.node.carry, strict=True)]


def _run_scan(
    forward: Forward,
    child: Plan,
    node: Scan,
    lengths: tuple[int, ...],
    seed: jax.Array,
    args: Sequence[jax.Array],
    quiet: bool,
) -> tuple[list[jax.Array], PyTree]:
    consts, carry, xs = node.primal.of(args)
    iterations = _Iterations(forward, node, seed, consts, quiet)
    steps = (jnp.arange(node.length, dtype=jnp.uint32), list(xs))
    if not lengths:
        after, ys, tape = iterations.run(child, list(carry), steps)
        return [*after, *ys], (tape,)
    raw = list(map(_jax.to_raw, carry))
    raw, ys, begins = loops.run_storing(iterations.run_bare, raw, steps, lengths[0], node.reverse)
    return [*iterations.typed(raw), *ys], (begins,)


@jax.tree_util.register_pytree_node_class
class _Shared:
    """The tapes of the bodies of a branch, one of which is filled: arrays of one type are one array.

    :ivar arrays: as many of each type as the body with most of them has.
    :ivar places: for each body the structure of its tape and the numbers of its arrays.
    """

    def __init__(self, arrays: Sequence[PyTree], places: tuple[tuple[PyTree, tuple[int, ...]], ...]) -> None:
        self.arrays, self.places = tuple(arrays), places

    @classmethod
    def of(cls, tapes: Sequence[PyTree]) -> _Shared:
        """The types of what tapes of these types share."""
        types: list[jax.ShapeDtypeStruct] = []
        places = []
        for tape in tapes:
            leaves, tree = jax.tree.flatten(tape)
            free = list(range(len(types)))
            numbers = []
            for leaf in leaves:
                same = (n for n in free if (types[n].shape, types[n].dtype) == (leaf.shape, leaf.dtype))
                number = next(same, len(types))
                if number == len(types):
                    types.append(leaf)
                else:
                    free.remove(number)
                numbers.append(number)
            places.append((tree, tuple(numbers)))
        return cls(types, tuple(places))

    def filled(self, number: int, tape: PyTree) -> _Shared:
        """The arrays, given their types, with the tape of one body."""
        arrays = dict(zip(self.places[number][1], jax.tree.leaves(tape), strict=True))
        empty = (jnp.zeros(t.shape, t.dtype) if n not in arrays else arrays[n] for n, t in enumerate(self.arrays))
        return _Shared(tuple(empty), self.places)

    def __getitem__(self, number: int) -> PyTree:
        """The tape of one body; it means nothing if another has run."""
        tree, numbers = self.places[number]
        return jax.tree.unflatten(tree, [self.arrays[n] for n in numbers])

    def tree_flatten(self) -> tuple[tuple[PyTree, ...], tuple[tuple[PyTree, tuple[int, ...]], ...]]:
        return self.arrays, self.places

    @classmethod
    def tree_unflatten(cls, places: tuple[tuple[PyTree, tuple[int, ...]], ...], arrays: Sequence[PyTree]) -> _Shared:
        return cls(arrays, places)


def _run_cond(
    forward: Forward, plans: Sequence[Plan], apart: bool, seed: jax.Array, args: Sequence[jax.Array], quiet: bool
) -> tuple[list[jax.Array], PyTree]:
    index, *operands = args
    types = [jax.eval_shape(lambda *a, p=p: forward(p, seed, a, False)[1], *operands) for p in plans]
    shared = _Shared.of(types)

    def branch(number: int) -> Callable[..., tuple[list[jax.Array], PyTree]]:
        def run(*operands: jax.Array) -> tuple[list[jax.Array], PyTree]:
            outs, tape = forward(plans[number], seed, operands, quiet)
            if not apart:
                return outs, shared.filled(number, tape)
            tapes = [jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), t) for t in types]
            tapes[number] = tape
            return outs, tuple(tapes)

        return run

    return lax.switch(index, [branch(i) for i in range(len(plans))], *operands)


# -- backward --------------------------------------------------------------------------------------------------------


def pull(
    forward: Forward,
    backward: Backward,
    plan: Plan,
    edge: ControlFlowEdge,
    env: dict[Value, jax.Array],
    tapes: PyTree,
    cotangents: Sequence[jax.Array | None],
    seed: jax.Array,
) -> list[jax.Array | None]:
    """Cotangents of the inputs of control flow.

    :param env: what it reads from outside.
    :param tapes: what :func:`run` stored.
    :param cotangents: of its outputs; None for zero.
    """
    node = edge.node
    arriving = [filled(c, v) for c, v in zip(cotangents, edge.outputs, strict=True)]
    if isinstance(node, Scan):
        pulled = _pull_scan(forward, backward, plan, node, env, tapes, arriving, seed)
    else:
        assert isinstance(node, Cond)
        pulled = _pull_cond(backward, plan.children[node], node, env, tapes, arriving, seed)
    sums: dict[Value, jax.Array] = {}
    for tangent, cotangent in zip(node.tangents, pulled, strict=True):
        if tangent is not None and cotangent is not None:
            sums[tangent] = sums[tangent] + cotangent if tangent in sums else cotangent
    return [sums.get(t) for t in edge.inputs]


def _pull_scan(
    forward: Forward,
    backward: Backward,
    plan: Plan,
    node: Scan,
    env: dict[Value, jax.Array],
    tapes: PyTree,
    cotangents: list[jax.Array],
    seed: jax.Array,
) -> list[jax.Array]:
    (child,), (stored,) = plan.children[node], tapes
    lengths = plan.segments.get(node, ())
    body, carried = node.body, set(node.carry)
    pairs = zip(body.inputs, node.operands, strict=True)
    known = {v: read(env, outer) for v, outer in pairs if v in child.reads or (lengths and v not in carried)}
    consts, _, sliced = node.primal.of(body.inputs)
    whole = {v: a for v, a in known.items() if v not in set(sliced)}
    slices = [known.get(v) for v in sliced]  # None where nothing reads it

    def pull(
        carry: tuple[list, list], tape: PyTree, steps: tuple[jax.Array, list], ys: list
    ) -> tuple[tuple[list, list], list]:
        """Iterations in reverse: cotangents of the carry and sums of those of constants; then those of the slices."""

        def step(carry: tuple[list, list], x: tuple) -> tuple[tuple[list, list], list]:
            (cotangents, sums), (tape, (index, xs), ys) = carry, x
            reads = {**whole, **{v: x for v, x in zip(sliced, xs, strict=True) if x is not None}}
            pulled = backward(child, fold(seed, index), tape, reads, [*cotangents, *ys])
            pulled = [filled(p, t) for p, t in zip(pulled, body.tangent_inputs, strict=True)]
            of_consts, of_carry, of_slices = node.tangent.of(pulled)
            return (list(of_carry), [a + b for a, b in zip(sums, of_consts, strict=True)]), list(of_slices)

        return lax.scan(step, carry, (tape, steps, ys), reverse=not node.reverse, unroll=node.unroll)

    zeros = [filled(None, t) for t in node.tangent.of(body.tangent_inputs)[0]]
    n_carry = node.tangent.n_carry
    begin = (cotangents[:n_carry], zeros)
    steps, ys = (jnp.arange(node.length, dtype=jnp.uint32), slices), cotangents[n_carry:]
    if lengths:
        iterations = _Iterations(forward, node, seed, [whole[v] for v in consts], quiet=True)

        def pull_segment(carry: tuple[list, list], raw: list, x: tuple) -> tuple[tuple[list, list], list]:
            steps, ys = x
            _, _, tape = iterations.run(child, iterations.typed(raw), steps)
            return pull(carry, tape, steps, ys)

        (of_carry, of_consts), of_slices = loops.pull_again(
            iterations.run_bare, pull_segment, begin, stored, (steps, ys), lengths, node.reverse
        )
    else:
        (of_carry, of_consts), of_slices = pull(begin, stored, steps, ys)
    return [*of_consts, *of_carry, *of_slices]


def _pull_cond(
    backward: Backward,
    plans: Sequence[Plan],
    node: Cond,
    env: dict[Value, jax.Array],
    tapes: PyTree,
    cotangents: list[jax.Array],
    seed: jax.Array,
) -> list[jax.Array]:
    def branch(number: int) -> Callable[..., list[jax.Array]]:
        child = plans[number]
        outer = dict(zip(child.graph.inputs, node.operands, strict=True))

        def run(tapes: PyTree, cotangents: list[jax.Array]) -> list[jax.Array]:
            reads = {v: read(env, outer[v]) for v in child.graph.inputs if v in child.reads}
            pulled = backward(child, seed, tapes[number], reads, cotangents)
            return [filled(p, t) for p, t in zip(pulled, child.graph.tangent_inputs, strict=True)]

        return run

    return lax.switch(read(env, node.index), [branch(i) for i in range(len(plans))], tapes, cotangents)
