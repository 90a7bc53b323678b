"""Which axes of a program's values are one axis: of rows, of particles, of hidden units.

Every primitive has a *signature*, which labels the axes of its operands and results as in an einsum: an axis with the
label of an operand's axis is the same axis, a label that no result has is summed over, and a new label belongs to an
axis along which the results are the same everywhere. ``None`` stands for anything else: an axis of an operand that is
mixed, an axis of a result whose entries differ by their position. What is not known has no labels at all, so a
primitive that nobody has heard of mixes what it reads.

What is elementwise is known by the registry (``primitives``). The other rules are here and not there: an axis depends
on the parameters of an equation, so that each needs a function of its own, and nobody else asks for it.

:class:`Axes` follows labels through a program, control flow and nested calls included, by union and find. A program can
then be run on a part of an axis (:meth:`Axes.run`), in every step that neither mixes nor makes it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_rad.ad import _jax, primitives

Labels = tuple[Hashable, ...]
Signature = tuple[list[Labels], list[Labels]]
Nodes = tuple[int, ...]
"""For each axis of a value a node; nodes of one axis have one root."""


class _New:
    """A label of an axis along which nothing changes."""


def signature(equation: _jax.JaxprEquation) -> Signature:
    """Labels of the axes of operands and results."""
    rule = rule_of(equation.primitive.name)
    found = rule(equation) if rule is not None else None
    if found is None:
        return [_unknown(v) for v in equation.invars], [_unknown(v) for v in equation.outvars]
    return found


def rule_of(name: str) -> Callable[[_jax.JaxprEquation], Signature | None] | None:
    """What tells the labels of an equation of the primitive of this name; None where nobody knows."""
    return _elementwise if primitives.of(name).elementwise else _RULES.get(name)


def _shape(v: _jax.Variable) -> tuple[int, ...]:
    return tuple(getattr(v.aval, "shape", ()))


def _unknown(v: _jax.Variable) -> Labels:
    return (None,) * len(_shape(v))


def _numbered(v: _jax.Variable, without: Sequence[int] = ()) -> Labels:
    return tuple(None if i in without else i for i in range(len(_shape(v))))


def _elementwise(equation: _jax.JaxprEquation) -> Signature | None:
    shape = _shape(equation.outvars[0])
    if any(len(_shape(v)) not in (len(shape), 0) for v in equation.invars):
        return None
    if shape and any(_jax.is_typed_key(v.aval) and not _shape(v) for v in equation.invars):
        return None  # what one key draws for all entries differs by their place, and by how many they are

    def labels(v: _jax.Variable) -> Labels:  # an axis of one entry may be repeated
        return tuple(i if n == m else None for i, (n, m) in enumerate(zip(_shape(v), shape, strict=False)))

    return [labels(v) for v in equation.invars], [_numbered(v) for v in equation.outvars]


def _one_by_one(equation: _jax.JaxprEquation) -> Signature:
    """Each operand becomes the result at its place."""
    labels: list[Labels] = [tuple((n, i) for i in range(len(_shape(v)))) for n, v in enumerate(equation.invars)]
    return labels, labels


def _along(name: str) -> Callable[[_jax.JaxprEquation], Signature]:
    """Operands and results of one rank, which mix the axes that a parameter names."""

    def rule(equation: _jax.JaxprEquation) -> Signature:
        named = equation.params[name]
        mixed = named if isinstance(named, (tuple, list)) else (named,)
        return [_numbered(v, mixed) for v in equation.invars], [_numbered(v, mixed) for v in equation.outvars]

    return rule


def _trailing(n_axes: int) -> Callable[[_jax.JaxprEquation], Signature]:
    """All but the last axes are a batch."""

    def labels(v: _jax.Variable) -> Labels:
        return tuple(i if i < len(_shape(v)) - n_axes else None for i in range(len(_shape(v))))

    def rule(equation: _jax.JaxprEquation) -> Signature:
        return [labels(v) for v in equation.invars], [labels(v) for v in equation.outvars]

    return rule


def _leading(equation: _jax.JaxprEquation) -> Signature:
    """The axes of the first operand come first in results, which may have more."""
    rank = min(len(_shape(v)) for v in (equation.invars[0], *equation.outvars))

    def labels(v: _jax.Variable) -> Labels:
        return tuple(i if i < rank else None for i in range(len(_shape(v))))

    return [labels(v) for v in equation.invars], [labels(v) for v in equation.outvars]


def _reduction(equation: _jax.JaxprEquation, sums: bool = False) -> Signature:
    gone = set(equation.params["axes"])
    operands = [_numbered(v, () if sums else tuple(gone)) for v in equation.invars]
    rest = tuple(i for i in range(len(_shape(equation.invars[0]))) if i not in gone)
    return operands, [rest for _ in equation.outvars]


def _broadcast(equation: _jax.JaxprEquation) -> Signature:
    operand, result = equation.invars[0], equation.outvars[0]
    places = equation.params["broadcast_dimensions"]
    labels: list[Hashable] = [_New() for _ in _shape(result)]
    kept = tuple(
        i if n == _shape(result)[at] else None for i, (n, at) in enumerate(zip(_shape(operand), places, strict=True))
    )
    for label, at in zip(kept, places, strict=True):
        labels[at] = labels[at] if label is None else label
    return [kept, *(_unknown(v) for v in equation.invars[1:])], [tuple(labels)]


def _reshape(equation: _jax.JaxprEquation) -> Signature | None:
    if equation.params.get("dimensions") is not None:
        return None
    old, new = _shape(equation.invars[0]), _shape(equation.outvars[0])
    if 0 in old:
        return None
    labels: list[Hashable] = [None] * len(old)
    placed: list[Hashable] = [_New() if n == 1 else None for n in new]
    left, right = ([i for i, n in enumerate(shape) if n != 1] for shape in (old, new))
    while left and right:  # as few axes as have the same number of entries on both sides
        before, after = [left.pop(0)], [right.pop(0)]
        while (a := math.prod(old[i] for i in before)) != (b := math.prod(new[i] for i in after)):
            (before.append(left.pop(0)) if a < b else after.append(right.pop(0)))
        if len(before) == len(after) == 1:
            labels[before[0]] = placed[after[0]] = before[0]
    return [tuple(labels), *(_unknown(v) for v in equation.invars[1:])], [tuple(placed)]


def _transpose(equation: _jax.JaxprEquation) -> Signature:
    return [_numbered(equation.invars[0])], [tuple(equation.params["permutation"])]


def _squeeze(equation: _jax.JaxprEquation) -> Signature:
    rank = len(_shape(equation.invars[0]))
    gone = {d % rank for d in equation.params["dimensions"]}
    return [_numbered(equation.invars[0], tuple(gone))], [tuple(i for i in range(rank) if i not in gone)]


def _unstack(equation: _jax.JaxprEquation) -> Signature:
    at = equation.params["axis"]
    labels = _numbered(equation.invars[0], (at,))
    return [labels], [labels[:at] + labels[at + 1 :] for _ in equation.outvars]


def _whole(equation: _jax.JaxprEquation) -> Signature:
    """An axis that is taken from its first entry to its last stays what it is; other operands are indices."""
    first, result = _shape(equation.invars[0]), _shape(equation.outvars[0])
    strides = equation.params.get("strides") or (1,) * len(first)
    labels = tuple(
        i if (n, s) == (m, 1) else None for i, (n, m, s) in enumerate(zip(first, result, strides, strict=True))
    )
    return [labels, *(_unknown(v) for v in equation.invars[1:])], [labels]


def _update(equation: _jax.JaxprEquation) -> Signature:
    operand, update, *indices = equation.invars
    labels = tuple(i if n == m else None for i, (n, m) in enumerate(zip(_shape(operand), _shape(update), strict=True)))
    return [labels, labels, *(_unknown(v) for v in indices)], [labels]


def _pad(equation: _jax.JaxprEquation) -> Signature:
    padded = [i for i, config in enumerate(equation.params["padding_config"]) if tuple(config) != (0, 0, 0)]
    return [_numbered(equation.invars[0], padded), ()], [_numbered(equation.outvars[0], padded)]


def _iota(equation: _jax.JaxprEquation) -> Signature:
    at = equation.params["dimension"]
    labels = tuple(None if i == at else _New() for i in range(len(_shape(equation.outvars[0]))))
    return [_unknown(v) for v in equation.invars], [labels]


def _dot_general(equation: _jax.JaxprEquation) -> Signature:
    (left_sum, right_sum), (left_batch, right_batch) = equation.params["dimension_numbers"]
    left, right = equation.invars
    right_labels: list[Hashable] = [("right", i) for i in range(len(_shape(right)))]
    for a, b in zip((*left_sum, *left_batch), (*right_sum, *right_batch), strict=True):
        right_labels[b] = a
    free = [i for i in range(len(_shape(left))) if i not in (*left_sum, *left_batch)]
    rest = [right_labels[i] for i in range(len(_shape(right))) if i not in (*right_sum, *right_batch)]
    return [_numbered(left), tuple(right_labels)], [(*left_batch, *free, *rest)]


def _convolution(equation: _jax.JaxprEquation) -> Signature | None:
    numbers = equation.params["dimension_numbers"]
    if equation.params["batch_group_count"] != 1:
        return None
    grouped = equation.params["feature_group_count"] != 1

    def labels(v: _jax.Variable, spec: Sequence[int], first: str | None, second: str | None) -> Labels:
        found: list[Hashable] = [None] * len(_shape(v))
        found[spec[0]], found[spec[1]] = first, second
        return tuple(found)

    left, right = equation.invars
    summed, out = (None, None) if grouped else ("in", "out")
    operands = [labels(left, numbers.lhs_spec, "row", summed), labels(right, numbers.rhs_spec, out, summed)]
    return operands, [labels(equation.outvars[0], numbers.out_spec, "row", out)]


def _window(equation: _jax.JaxprEquation) -> Signature | None:
    params = equation.params
    shapes = {_shape(v) for v in (*equation.invars, *equation.outvars) if _shape(v)}
    rank = len(params["window_dimensions"])
    if any(len(s) != rank for s in shapes):
        return None
    ones = (1,) * rank
    settings = [params["window_dimensions"]]
    settings += [params.get(n) or ones for n in ("window_strides", "base_dilation", "window_dilation")]
    touched = [i for i in range(rank) if any(s[i] != 1 for s in settings) or tuple(params["padding"][i]) != (0, 0)]
    return [_numbered(v, touched) for v in equation.invars], [_numbered(v, touched) for v in equation.outvars]


def _gather(equation: _jax.JaxprEquation) -> Signature:
    operand, indices = map(_shape, equation.invars)
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    batching, index_batching = numbers.operand_batching_dims, numbers.start_indices_batching_dims
    labels: list[Hashable] = [None] * len(operand)
    index_labels: list[Hashable] = [*(("index", i) for i in range(len(indices) - 1)), None]
    for a, b in zip(batching, index_batching, strict=True):
        labels[a] = index_labels[b]
    rank = len(_shape(equation.outvars[0]))
    result: list[Hashable] = [None] * rank
    seen = [i for i in range(len(operand)) if i not in (*numbers.collapsed_slice_dims, *batching)]
    for at, i in zip(numbers.offset_dims, seen, strict=True):
        if sizes[i] == operand[i]:
            labels[i] = result[at] = i
    places = [i for i in range(rank) if i not in numbers.offset_dims]
    for at, label in zip(places, index_labels[:-1], strict=True):
        result[at] = label
    return [tuple(labels), tuple(index_labels)], [tuple(result)]


_RULES: dict[str, Callable[[_jax.JaxprEquation], Signature | None]] = {
    **dict.fromkeys(
        "reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin".split(), _reduction
    ),
    **dict.fromkeys("cumsum cumprod cummax cummin cumlogsumexp".split(), _along("axis")),
    **dict.fromkeys("cholesky triangular_solve lu eigh qr svd".split(), _trailing(2)),
    **dict.fromkeys("random_bits random_split random_wrap random_unwrap".split(), _leading),
    **dict.fromkeys(
        "reduce_window reduce_window_sum reduce_window_max reduce_window_min select_and_gather_add "
        "select_and_scatter_add".split(),
        _window,
    ),
    **dict.fromkeys(("slice", "dynamic_slice"), _whole),
    "optimization_barrier": _one_by_one,
    "reduce_sum": lambda equation: _reduction(equation, sums=True),
    "sort": _along("dimension"),
    "concatenate": _along("dimension"),
    "split": _along("axis"),
    "rev": _along("dimensions"),
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "unstack": _unstack,
    "dynamic_update_slice": _update,
    "pad": _pad,
    "iota": _iota,
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "gather": _gather,
}


def _resized(
    equation: _jax.JaxprEquation, operands: list[tuple[int, ...]], results: list[tuple[int, ...]]
) -> _jax.JaxprEquation:
    """The equation for operands and results of other shapes."""
    name, params = equation.primitive.name, equation.params
    if name in ("broadcast_in_dim", "iota"):
        changed = {"shape": results[0]}
    elif name == "reshape":
        changed = {"new_sizes": results[0]}
    elif name == "dynamic_slice":
        changed = {"slice_sizes": results[0]}
    elif name == "slice":
        old = _shape(equation.invars[0])
        ends = zip(params["limit_indices"], old, operands[0], strict=True)
        changed = {"limit_indices": tuple(m if n != m else end for end, n, m in ends)}
    elif name == "gather":
        old = _shape(equation.invars[0])
        sizes = zip(params["slice_sizes"], old, operands[0], strict=True)
        changed = {"slice_sizes": tuple(m if n != m and size == n else size for size, n, m in sizes)}
    else:
        return equation
    return equation.replace(params={**params, **changed})


@dataclasses.dataclass(eq=False)
class Step:
    """An equation and the nodes of its axes.

    :ivar mixed: nodes of operands that do not come out as they are.
    :ivar summed: nodes of operands that are summed over.
    :ivar made: nodes of results along which the entries differ by position alone.
    :ivar bodies: the programs that it calls, if they are followed.
    """

    equation: _jax.JaxprEquation
    operands: list[Nodes]
    results: list[Nodes]
    mixed: set[int]
    summed: set[int]
    made: set[int]
    bodies: list[Body]


@dataclasses.dataclass(eq=False)
class Body:
    """A called program, step by step, the nodes of its outputs and those of its constants."""

    jaxpr: _jax.Jaxpr
    steps: list[Step]
    outputs: list[Nodes]
    constants: list[Nodes]


class Axes:
    """The axes of a program, which is told step by step."""

    def __init__(self) -> None:
        self._parents: list[int] = []
        self.sizes: list[int] = []

    def of(self, aval: _jax.Aval) -> Nodes:
        """New nodes for the axes of a value."""
        return tuple(self._new(n) for n in getattr(aval, "shape", ()))

    def _new(self, size: int) -> int:
        self._parents.append(len(self._parents))
        self.sizes.append(size)
        return len(self._parents) - 1

    def root(self, node: int) -> int:
        """The axis of a node."""
        while self._parents[node] != node:
            self._parents[node] = node = self._parents[self._parents[node]]
        return node

    def _unite(self, first: Nodes, second: Nodes) -> None:
        for a, b in zip(first, second, strict=True):
            self._parents[self.root(a)] = self.root(b)

    def position(self, nodes: Nodes, axis: int) -> int | None:
        """Which axis of a value is ``axis`` (a root), None if none is."""
        return next((i for i, node in enumerate(nodes) if self.root(node) == axis), None)

    def step(self, equation: _jax.JaxprEquation, operands: Sequence[Nodes]) -> Step:
        """An equation on operands whose nodes are known."""
        called = self._called(equation, operands)
        if called is not None:
            return called
        step = Step(equation, list(operands), [], set(), set(), set(), [])
        wanted, given = signature(equation)
        found: dict[Hashable, int] = {}
        for nodes, labels in zip(operands, wanted, strict=True):
            for node, label in zip(nodes, labels, strict=True):
                if label is None:
                    step.mixed.add(node)
                elif label in found:
                    self._unite((found[label],), (node,))
                else:
                    found[label] = node
        left = {label for labels in given for label in labels}
        step.summed = {node for label, node in found.items() if label not in left}
        for v, labels in zip(equation.outvars, given, strict=True):
            nodes = []
            for size, label in zip(_shape(v), labels, strict=True):
                node = found[label] if label in found else self._new(size)
                if label is None:
                    step.made.add(node)
                nodes.append(node)
            step.results.append(tuple(nodes))
        return step

    def _called(self, equation: _jax.JaxprEquation, operands: Sequence[Nodes]) -> Step | None:
        """An equation that calls programs which can be followed."""
        inner = _jax.inlined_jaxpr(equation) or _jax.followed_jaxpr(equation)
        if inner is not None:
            body = self._read(inner, operands)
            return self._around(equation, operands, body.outputs, [body])
        if equation.effects or any(map(_jax.has_references, _jax.inner_jaxprs(equation))):
            return None
        if equation.primitive.name == "scan":
            return self._scan(equation, operands)
        if equation.primitive.name == "cond":
            bodies = [self._read(branch, operands[1:]) for branch in _jax.cond_branches(equation)]
            for body in bodies[1:]:
                for first, other in zip(bodies[0].outputs, body.outputs, strict=True):
                    self._unite(first, other)
            step = self._around(equation, operands, bodies[0].outputs, bodies)
            step.mixed.update(operands[0])
            return step
        return None

    def _scan(self, equation: _jax.JaxprEquation, operands: Sequence[Nodes]) -> Step:
        jaxpr, n_consts, n_carry = _jax.scan_parts(equation)
        first = n_consts + n_carry
        body = self._read(jaxpr, [*operands[:first], *(nodes[1:] for nodes in operands[first:])])
        carry = body.outputs[:n_carry]
        for before, after in zip(operands[n_consts:first], carry, strict=True):
            self._unite(before, after)
        length = equation.params["length"]
        stacked = [(self._new(length), *nodes) for nodes in body.outputs[n_carry:]]
        step = self._around(equation, operands, [*carry, *stacked], [body])
        step.mixed.update(nodes[0] for nodes in operands[first:])
        step.made.update(nodes[0] for nodes in stacked)
        return step

    def _around(
        self, equation: _jax.JaxprEquation, operands: Sequence[Nodes], results: Sequence[Nodes], bodies: list[Body]
    ) -> Step:
        """A step of which the bodies must not do more with an axis than to hand it on."""
        inside = [s for body in bodies for s in body.steps]
        mixed = {node for s in inside for node in (*s.mixed, *s.summed, *s.made)}
        mixed.update(node for body in bodies for nodes in body.constants for node in nodes)
        return Step(equation, list(operands), list(results), mixed, set(), set(), bodies)

    def _read(self, jaxpr: _jax.Jaxpr, inputs: Sequence[Nodes]) -> Body:
        inner = jaxpr.jaxpr
        nodes: dict[_jax.Variable, Nodes] = dict(zip(inner.invars, inputs, strict=True))
        nodes.update((v, self.of(v.aval)) for v in inner.constvars)
        constants = [nodes[v] for v in inner.constvars]

        def look_up(atom: _jax.Variable) -> Nodes:
            if not isinstance(atom, _jax.Literal):
                return nodes[atom]
            constants.append(self.of(atom.aval))
            return constants[-1]

        steps = []
        for equation in inner.eqns:
            step = self.step(equation, [look_up(a) for a in equation.invars])
            nodes.update(zip(equation.outvars, step.results, strict=True))
            steps.append(step)
        return Body(jaxpr, steps, [look_up(a) for a in inner.outvars], constants)

    # -- running a part ------------------------------------------------------------------------------------------------

    def shape(self, aval: _jax.Aval, nodes: Nodes, axis: int, size: int) -> tuple[int, ...]:
        """The shape of a value of which ``axis`` has another size."""
        return tuple(size if self.root(node) == axis else n for n, node in zip(aval.shape, nodes, strict=True))

    def run(self, step: Step, args: Sequence[jax.Array], axis: int, size: int) -> list[jax.Array]:
        """Run a step on operands of which ``axis`` has another size."""
        equation = step.equation
        if all(self.position(nodes, axis) is None for nodes in (*step.operands, *step.results)):
            inside = (s for body in step.bodies for s in body.steps)
            if not any(self.position(n, axis) is not None for s in inside for n in (*s.operands, *s.results)):
                return _jax.bind(equation, args)
        if not step.bodies:
            operands = [jnp.shape(a) for a in args]
            pairs = zip(equation.outvars, step.results, strict=True)
            results = [self.shape(v.aval, nodes, axis, size) for v, nodes in pairs]
            return _jax.bind(_resized(equation, operands, results), args)
        with _jax.context(equation):
            if equation.primitive.name == "scan":
                return self._run_scan(step, args, axis, size)
            if equation.primitive.name == "cond":
                branches = [lambda *a, body=body: self._run_body(body, a, axis, size) for body in step.bodies]
                return lax.switch(args[0], branches, *args[1:])
        return self._run_body(step.bodies[0], args, axis, size)

    def _run_scan(self, step: Step, args: Sequence[jax.Array], axis: int, size: int) -> list[jax.Array]:
        (body,) = step.bodies
        _, n_consts, n_carry = _jax.scan_parts(step.equation)

        def iterate(carry: list[jax.Array], xs: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
            outs = self._run_body(body, [*args[:n_consts], *carry, *xs], axis, size)
            return outs[:n_carry], outs[n_carry:]

        order = {name: step.equation.params[name] for name in ("length", "reverse", "unroll")}
        carry, ys = lax.scan(
            iterate, list(args[n_consts : n_consts + n_carry]), list(args[n_consts + n_carry :]), **order
        )
        return [*carry, *ys]

    def _run_body(self, body: Body, args: Sequence[jax.Array], axis: int, size: int) -> list[jax.Array]:
        inner = body.jaxpr.jaxpr
        env: dict[_jax.Variable, Any] = dict(zip(inner.invars, args, strict=True))
        env.update(zip(inner.constvars, body.jaxpr.consts, strict=True))

        def read(atom: _jax.Variable) -> Any:
            return _jax.literal(atom) if isinstance(atom, _jax.Literal) else env[atom]

        for step in body.steps:
            outs = self.run(step, [read(a) for a in step.equation.invars], axis, size)
            env.update(zip(step.equation.outvars, outs, strict=True))
        return [read(a) for a in inner.outvars]
