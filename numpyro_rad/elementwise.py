"""Elimination of vertices: a chain of elementwise derivatives becomes one coefficient array.

A tangent that elementwise steps have made is held as a *linear form* of earlier tangents,

    t = sum_i c_i * t_i,        c_i = scale_i * residual_i  (elementwise),

and grows by the chain rule until somebody needs the tangent itself. The products and sums of coefficients are equations
appended to the primal program, so a GELU stores one array where its dozen steps would store five. This is vertex
elimination (Griewank and Walther 2008, ch. 9) restricted to diagonal Jacobians.

Where many ways lead from an array to one scalar, such as a log density, a linear form in front of each of them is still
too much: the derivative of a scalar has the shape of what it is taken in. ``collect`` finds the parts of a graph that
end in a scalar and, where that saves bytes, accumulates this one derivative in the primal program.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_rad import _jax, rules
from numpyro_rad.graph import Atom, Constant, Edge, Equation, Graph, Value

LINEAR = frozenset("mul div select_n neg add add_any sub copy".split())
"""Primitives of the tangent program that have a diagonal Jacobian if all their tangents have the result's shape."""

SUMS = LINEAR - {"mul", "div"}
"""Those that may have several tangent operands."""


@dataclasses.dataclass(frozen=True, slots=True)
class Term:
    """``scale * residual`` in front of a tangent; no residual means a plain number."""

    scale: float
    residual: Value | None


ONE = Term(1.0, None)
LinearForm = dict[Value, Term]


class Coefficients:
    """Arithmetic of coefficients. What has to be computed is appended to the primal program, each thing once.

    :param equations: the primal program.
    :param new_value: makes a value of a type.
    """

    def __init__(self, equations: list[Equation], new_value: Callable[[Any], Value]) -> None:
        self.new_value = new_value
        self._equations = equations
        self._known: dict[Any, Value] = {}

    def local(self, name: str, operands: Sequence[Atom], position: int, line: str) -> Term:
        """The coefficient that an elementwise linear step puts in front of its tangent operand at ``position``."""
        if name == "mul":
            return self._of(operands[1 - position], line)
        if name == "div":
            denominator = self._of(operands[1], line)
            if denominator.residual is None:
                return Term(1.0 / denominator.scale if denominator.scale else math.inf, None)
            return Term(1.0, self._derive("reciprocal", _reciprocal, (denominator.residual,), line))
        if name == "select_n":  # one where this case is chosen, zero elsewhere: the bits of the predicate say it all
            case = position - 1
            return Term(1.0, self._derive(f"case {case}", partial(_is_chosen, case=case), (operands[0],), line))
        return Term(-1.0, None) if name == "neg" or (name == "sub" and position == 1) else ONE

    def product(self, a: Term, b: Term, line: str) -> Term:
        """The coefficient of two steps in a row. A mask silences what it meets, even a derivative that is infinite."""
        scale = a.scale * b.scale
        if a.residual is None or b.residual is None:
            return Term(scale, a.residual or b.residual)
        first, second = sorted((a.residual, b.residual), key=lambda v: (v.aval.dtype != bool, v.number))
        name, run = ("mask", _masked) if first.aval.dtype == bool else ("mul", jnp.multiply)
        return Term(scale, self._derive(name, run, (first, second), line))

    def sum(self, a: Term | None, b: Term, dtype: Any, line: str) -> Term:
        if a is None:
            return b
        if a.residual is b.residual:
            return Term(a.scale + b.scale, a.residual)
        if a.residual is None:
            a, b = b, a
        assert a.residual is not None
        if b.residual is None:
            run = partial(_affine, scale=a.scale, shift=b.scale, dtype=dtype)
            return Term(1.0, self._derive(f"affine {a.scale} {b.scale} {dtype}", run, (a.residual,), line))
        run = partial(_scaled_sum, a=a.scale, b=b.scale, dtype=dtype)
        return Term(1.0, self._derive(f"sum {a.scale} {b.scale} {dtype}", run, (a.residual, b.residual), line))

    def pulled(self, edge: Edge, cotangent: Term) -> list[Term]:
        """What an edge turns the coefficient in front of its output into: those in front of its inputs."""
        if edge.terms:
            return [self.product(cotangent, term, edge.line) for term in edge.terms]
        name = None if edge.residuals else _TRANSPOSED.get(edge.name)
        if name is not None and cotangent.residual is None:
            return [cotangent]
        own = () if cotangent.residual is None else (cotangent.residual,)
        return [
            Term(
                cotangent.scale,
                self._derive(
                    name or f"pull {edge.name}",
                    partial(_pulled, edge, i),
                    (*own, *edge.residuals),
                    edge.line,
                    (edge, i),
                ),
            )
            for i in range(len(edge.inputs))
        ]

    def _of(self, atom: Atom, line: str) -> Term:
        """The coefficient that a primal operand is: a number where it is one."""
        if isinstance(atom, Value):
            return Term(1.0, atom)
        if np.ndim(atom.value) == 0 and math.isfinite(float(atom.value)):
            return Term(float(atom.value), None)
        array = atom.value
        return Term(1.0, self._derive(f"constant {id(array)}", lambda: jnp.asarray(array), (), line))

    def _derive(
        self, name: str, run: Callable[..., Any], operands: tuple[Atom, ...], line: str, parameters: Any = ()
    ) -> Value:
        known = (name, parameters, *operands)
        if known not in self._known:
            structs = [
                o.value if isinstance(o, Constant) else jax.ShapeDtypeStruct(o.aval.shape, o.aval.dtype)
                for o in operands
            ]
            aval = jax.eval_shape(run, *structs)
            output = self.new_value(_jax.array_type(aval.shape, aval.dtype))
            self._equations.append(Equation(name, operands, (output,), lambda *args: [run(*args)], True, line))
            self._known[known] = output
        return self._known[known]


def _reciprocal(x: Any) -> Any:
    return 1 / x


def _is_chosen(which: Any, case: int) -> Any:
    which = jnp.asarray(which)  # a literal predicate is a number of Python
    return (which if case else ~which) if which.dtype == bool else which == case


def _masked(mask: Any, x: Any) -> Any:
    return jnp.where(mask, x, jnp.zeros((), x.dtype))


def _affine(x: Any, scale: float, shift: float, dtype: Any) -> Any:
    return _times(scale, x.astype(dtype)) + np.asarray(shift, dtype)


def _scaled_sum(x: Any, y: Any, a: float, b: float, dtype: Any) -> Any:
    return _times(a, x.astype(dtype)) + _times(b, y.astype(dtype))


def _times(scale: float, x: Any) -> Any:
    return x if scale == 1.0 else -x if scale == -1.0 else x * np.asarray(scale, x.dtype)


def _weigh(term: Term, residual: Any, x: Any) -> Any:
    if residual is None:
        return _times(term.scale, x)
    return _times(term.scale, _masked(residual, x) if residual.dtype == bool else residual.astype(x.dtype) * x)


def combination(form: LinearForm, tangent: Value, line: str) -> Edge:
    """The edge that makes ``tangent`` from what its linear form is made of."""
    sources, terms = tuple(form), tuple(form.values())
    residuals = tuple(t.residual for t in terms if t.residual is not None)
    run, pull = partial(combine, terms), partial(pull_combination, terms)
    linear = (True,) * len(residuals)
    return Edge("elementwise", sources, (tangent,), residuals, linear, run, line, False, pull=pull, terms=terms)


def combine(terms: tuple[Term, ...], residuals: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
    """The tangent that a linear form stands for."""
    arrays = iter(residuals)
    parts = [
        _weigh(term, None if term.residual is None else next(arrays), t)
        for term, t in zip(terms, tangents, strict=True)
    ]
    return [sum(parts[1:], start=parts[0])]


def pull_combination(terms: tuple[Term, ...], residuals: Sequence[Any], cotangents: Sequence[Any]) -> list[Any]:
    """The cotangents of the tangents of a linear form."""
    arrays = iter(residuals)
    return [_weigh(term, None if term.residual is None else next(arrays), cotangents[0]) for term in terms]


# -- derivatives of scalars --------------------------------------------------------------------------------------------

_TRANSPOSED = {
    "reduce_sum": "broadcast_in_dim",
    "reshape": "reshape",
    "squeeze": "reshape",
    "transpose": "transpose",
    "rev": "rev",
    "copy": "copy",
    "convert_element_type": "convert_element_type",
}
"""Linear steps of one operand whose transpose only rearranges: its name. A constant they leave a constant."""


def _pulled(edge: Edge, position: int, *arrays: Any) -> Any:
    """The cotangent of one input of ``edge``, given the one of its output (unless that is one) and the residuals."""
    (out,) = edge.outputs
    own, residuals = arrays[: len(arrays) - len(edge.residuals)], arrays[len(arrays) - len(edge.residuals) :]
    cotangent = jnp.broadcast_to(jnp.asarray(own[0] if own else 1, out.aval.dtype), out.aval.shape)
    if edge.pull is not None:
        return edge.pull(residuals, [cotangent])[position]
    run = partial(edge.run, residuals)
    return _jax.linear_transpose(lambda *t: run(t), [t.aval for t in edge.inputs], [cotangent])[position]


def collect(graph: Graph, coefficients: Coefficients, free: Iterable[Value]) -> None:
    """Let each array that reaches a scalar by cheap steps alone reach it by one coefficient, where that saves bytes.

    All the ways from arrays ``t_i`` to a scalar ``s`` add up to ``s = sum_i <c_i, t_i>``: one array of the shape of
    ``t_i`` however many there were. The coefficients are what a reverse sweep from ``s`` gives; its steps become cheap
    equations of the primal program, so the planner may still make them again from what they are made of. Steps at the
    far end that need no more bytes than the coefficient before them stay as they are.

    :param graph: its edges are replaced in place.
    :param coefficients: adds to its primal program.
    :param free: primal inputs that cost nothing to store.
    """
    prices = _Prices(graph.equations, free)
    replaced: dict[Edge, list[Edge]] = {}
    for scalar, edges in _regions(graph).items():
        inside = set(edges)
        elsewhere = {r for e in graph.edges if e not in inside for r in e.residuals}
        if all(r in elsewhere or not prices(r) for e in edges for r in e.residuals):
            continue
        region = _Region(scalar, edges, coefficients)
        region.trim(prices)
        before = sum(prices(r) for r in {r for e in region.edges for r in e.residuals} - elsewhere)
        sources = region.sources()
        if sum(prices(r) for r in {term.residual for term in sources.values()} if r is not None) < before:
            replaced.update((e, []) for e in region.edges)
            replaced[edges[-1]] = list(_weighted_sums(scalar, sources, coefficients, edges[-1].line))
    graph.edges = [new for edge in graph.edges for new in replaced.get(edge, [edge])]


class _Prices:
    """Bytes that a coefficient takes if it is stored exactly; none if it follows from what is there anyway."""

    def __init__(self, equations: list[Equation], free: Iterable[Value]) -> None:
        self._equations, self._n_seen = equations, 0
        self._free = set(free)
        self._carried: dict[Value, float] = {}  # of rearrangements of something smaller: what that takes

    def __call__(self, value: Value) -> float:
        for equation in self._equations[self._n_seen :]:
            operands = [a for a in equation.inputs if isinstance(a, Value)]
            if equation.cheap and all(a in self._free for a in operands):
                self._free.update(equation.outputs)
            elif equation.name in rules.PASSES_ESTIMATE:
                self._carried[equation.outputs[0]] = min(map(self._bytes, (*operands, *equation.outputs)))
        self._n_seen = len(self._equations)
        return 0 if value in self._free else self._bytes(value)

    def _bytes(self, value: Value) -> float:
        exact = _jax.aval_bytes(value.aval)
        return self._carried.get(value, exact / 8 if value.aval.dtype == bool else exact)


def _regions(graph: Graph) -> dict[Value, list[Edge]]:
    """For each scalar the edges, in order, whose every way on leads to it by cheap steps.

    A scalar that a later value multiplies is an end of its own: a coefficient should not wait for that value.
    """
    readers: dict[Value, list[Edge]] = {}
    for edge in graph.edges:
        for tangent in edge.inputs:
            readers.setdefault(tangent, []).append(edge)
    outputs = set(graph.tangent_outputs)
    end: dict[Edge, Value | None] = {}
    regions: dict[Value, list[Edge]] = {}
    for edge in reversed(graph.edges):
        end[edge] = None
        if edge.anchor or len(edge.outputs) != 1:
            continue
        if not all(rules.is_real_float(t.aval.dtype) for t in (*edge.inputs, *edge.outputs)):
            continue
        (out,) = edge.outputs
        ends = {None} if out in outputs else {end[e] for e in readers[out]}
        if len(ends) == 1 and (out.aval.size > 1 or all(_is_constant(e, out) for e in readers.get(out, ()))):
            (end[edge],) = ends
        if end[edge] is None and out.aval.size == 1:
            end[edge] = out
        if (scalar := end[edge]) is not None:
            regions.setdefault(scalar, []).append(edge)
    return {scalar: edges[::-1] for scalar, edges in regions.items()}


def _is_constant(edge: Edge, tangent: Value) -> bool:
    """Whether no residual stands in front of one input of an edge."""
    if edge.terms:
        return edge.terms[edge.inputs.index(tangent)].residual is None
    return not edge.residuals


class _Region:
    """Edges that all lead to one scalar, with the coefficients that a reverse sweep from it puts in front of each input
    of each edge.
    """

    def __init__(self, scalar: Value, edges: list[Edge], coefficients: Coefficients) -> None:
        self.edges = dict.fromkeys(edges)
        self._coefficients = coefficients
        self._parts: dict[Value, dict[tuple[Edge, int], Term]] = {}
        for edge in reversed(edges):
            (out,) = edge.outputs
            cotangent = ONE if out is scalar else self._total(out, edge.line)
            for i, (tangent, term) in enumerate(zip(edge.inputs, coefficients.pulled(edge, cotangent), strict=True)):
                self._parts.setdefault(tangent, {})[edge, i] = term

    def _total(self, tangent: Value, line: str) -> Term:
        total = None
        for (edge, _), term in self._parts[tangent].items():
            if edge in self.edges:
                total = self._coefficients.sum(total, term, tangent.aval.dtype, line)
        assert total is not None
        return total

    def trim(self, prices: _Prices) -> None:
        """Leave out edges from the far end on while the coefficients before and behind them cost no less."""

        def price(tangent: Value, without: Edge | None = None) -> float:
            parts = self._parts.get(tangent, {}).items()
            terms = {t.residual for (e, _), t in parts if e in self.edges and e is not without}
            costly = [prices(r) for r in terms if r is not None and prices(r)]
            return max(_jax.aval_bytes(tangent.aval), *costly) if len(costly) > 1 else sum(costly)

        made = {o for e in self.edges for o in e.outputs}
        for edge in list(self.edges):
            inputs = set(edge.inputs)
            if inputs & made:
                continue
            own = sum(prices(r) for r in set(edge.residuals))
            if own + price(edge.outputs[0]) + sum(price(t, edge) for t in inputs) <= sum(map(price, inputs)):
                del self.edges[edge]
                made.remove(edge.outputs[0])

    def sources(self) -> LinearForm:
        """What the edges start from, each with its coefficient."""
        made = {o for e in self.edges for o in e.outputs}
        starts = dict.fromkeys((t, e.line) for e in self.edges for t in e.inputs if t not in made)
        return {tangent: self._total(tangent, line) for tangent, line in starts}


def _weighted_sums(scalar: Value, sources: LinearForm, coefficients: Coefficients, line: str) -> Iterable[Edge]:
    """Edges for ``scalar = sum_i <c_i, t_i>``. Each product has its own, so that each can be pulled back where the
    cotangent is needed.
    """
    form: LinearForm = {}
    for tangent, term in sources.items():
        if term.residual is None and tangent.aval.shape == scalar.aval.shape:
            form[tangent] = term
            continue
        part = coefficients.new_value(scalar.aval)
        residuals = () if term.residual is None else (term.residual,)
        run, pull = partial(_dot, term, part.aval), partial(_pull_dot, term, tangent.aval)
        linear = (True,) * len(residuals)
        yield Edge("weighted sum", (tangent,), (part,), residuals, linear, run, line, False, pull=pull)
        form[part] = ONE
    yield combination(form, scalar, line)


def _dot(term: Term, aval: Any, residuals: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
    products = _weigh(term, residuals[0] if residuals else None, tangents[0])
    return [jnp.sum(products).astype(aval.dtype).reshape(aval.shape)]


def _pull_dot(term: Term, aval: Any, residuals: Sequence[Any], cotangents: Sequence[Any]) -> list[Any]:
    product = _weigh(term, residuals[0] if residuals else None, cotangents[0].reshape(()))
    return [jnp.broadcast_to(product, aval.shape).astype(aval.dtype)]
