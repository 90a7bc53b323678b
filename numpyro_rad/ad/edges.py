"""The kinds of edges of a linearized graph.

Each can be applied, pulled back, asked for the sparsity of its Jacobian, and composed with the coefficient that stands
behind it, which is one step of elimination (``elimination``).

==================  ==============================================  ============================
kind                Jacobian                                        an estimate may stand in for
==================  ==============================================  ============================
``Diagonal``        a sum of diagonal ones, of fused steps          each of its coefficients
``WeightedSum``     a row, that leads to a scalar                   its coefficient
``Contraction``     linear in one operand: products, convolutions   that operand
``Rearrangement``   zeros and ones, for all that is stored of it    nothing
``Pointwise``       diagonal, of steps that are not fused           a factor
``Again``           that of slices that run again                   nothing
``Unknown``         anything else: the safe default                 nothing
``Opaque``          of a call that cannot be parted                 nothing
``ControlFlowEdge`` that of loops and branches                      what their bodies say
==================  ==============================================  ============================
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from numpyro_rad.ad import _jax, primitives
from numpyro_rad.ad.coefficients import Coefficients, LinearForm, Term, weigh
from numpyro_rad.ad.graph import Atom, Constant, Edge, Value


def composed(edge: Edge, cotangent: Term, coefficients: Coefficients) -> list[Term]:
    """What an edge turns the coefficient in front of its output into: those in front of its inputs."""
    if isinstance(edge, Diagonal):
        return [coefficients.product(cotangent, term, edge.line) for term in edge.terms]
    name = "" if edge.residuals else primitives.of(edge.name).transposed
    if name and cotangent.residual is None:
        return [cotangent]
    own = () if cotangent.residual is None else (cotangent.residual,)
    operands = (*own, *edge.residuals)

    def term(position: int) -> Term:
        run, name_of_run = partial(_pulled, edge, position), name or f"pull {edge.name}"
        aval = _jax.array_type(edge.inputs[position].aval.shape, edge.inputs[position].aval.dtype)
        value = coefficients.derive(name_of_run, run, operands, edge.line, (edge, position), aval)
        return Term(cotangent.scale, value)

    return [term(i) for i in range(len(edge.inputs))]


def _pulled(edge: Edge, position: int, *arrays: jax.Array) -> jax.Array:
    """The cotangent of one input of ``edge``, given the one of its output (unless that is one) and the residuals."""
    (out,) = edge.outputs
    own, residuals = arrays[: len(arrays) - len(edge.residuals)], arrays[len(arrays) - len(edge.residuals) :]
    cotangent = jnp.broadcast_to(jnp.asarray(own[0] if own else 1, out.aval.dtype), out.aval.shape)
    return edge.pull(residuals, [cotangent])[position]


# -- made of coefficients ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False, slots=True)
class Diagonal(Edge):
    """``sum_i terms_i * t_i``, elementwise, in the precision of the sum.

    :ivar terms: the coefficient in front of each input.
    """

    terms: tuple[Term, ...]

    @classmethod
    def of(cls, form: LinearForm, tangent: Value, line: str) -> Diagonal:
        """The edge that makes ``tangent`` from what its linear form is made of."""
        terms = tuple(form.values())
        residuals = tuple(t.residual for t in terms if t.residual is not None)
        return cls("elementwise", tuple(form), (tangent,), residuals, (True,) * len(residuals), line, terms)

    def _weighed(self, residuals: Sequence[jax.Array], arrays: Sequence[jax.Array]) -> list[jax.Array]:
        given = iter(residuals)
        return [
            weigh(term, None if term.residual is None else next(given), x)
            for term, x in zip(self.terms, arrays, strict=True)
        ]

    def apply(self, residuals: Sequence[jax.Array], tangents: Sequence[jax.Array]) -> list[jax.Array]:
        parts = [p.astype(self.outputs[0].aval.dtype) for p in self._weighed(residuals, tangents)]
        return [sum(parts[1:], start=parts[0])]

    def pull(self, residuals: Sequence[jax.Array], cotangents: Sequence[jax.Array | None]) -> list[jax.Array]:
        (cotangent,) = cotangents
        assert cotangent is not None
        parts = self._weighed(residuals, [cotangent] * len(self.terms))
        return [p.astype(t.aval.dtype) for p, t in zip(parts, self.inputs, strict=True)]

    def is_constant_in(self, tangent: Value) -> bool:
        return self.terms[self.inputs.index(tangent)].residual is None


@dataclasses.dataclass(eq=False, slots=True)
class WeightedSum(Edge):
    """``<term, t>``, a number."""

    term: Term

    @classmethod
    def of(cls, term: Term, tangent: Value, scalar: Value, line: str) -> WeightedSum:
        """The edge from a tangent to what it adds to a scalar."""
        residuals = () if term.residual is None else (term.residual,)
        return cls("weighted sum", (tangent,), (scalar,), residuals, (True,) * len(residuals), line, term)

    def _weighed(self, residuals: Sequence[jax.Array], array: jax.Array) -> jax.Array:
        return weigh(self.term, residuals[0] if residuals else None, array)

    def apply(self, residuals: Sequence[jax.Array], tangents: Sequence[jax.Array]) -> list[jax.Array]:
        aval = self.outputs[0].aval
        return [jnp.sum(self._weighed(residuals, tangents[0])).astype(aval.dtype).reshape(aval.shape)]

    def pull(self, residuals: Sequence[jax.Array], cotangents: Sequence[jax.Array | None]) -> list[jax.Array]:
        (cotangent,), aval = cotangents, self.inputs[0].aval
        assert cotangent is not None
        return [jnp.broadcast_to(self._weighed(residuals, cotangent.reshape(())), aval.shape).astype(aval.dtype)]


# -- steps of JAX's own ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Operands:
    """The operands of an equation of a traced program, sorted.

    :ivar equation: the equation.
    :ivar sources: for each operand the array itself, if it is a constant, or its number among tangents or residuals.
    """

    equation: _jax.JaxprEquation
    tangents: tuple[Value, ...]
    residuals: tuple[Value, ...]
    sources: tuple[tuple[str, Any], ...]

    @classmethod
    def of(
        cls,
        equation: _jax.JaxprEquation,
        operands: Sequence[Atom],
        is_tangent: Callable[[Value], bool],
        vertex: Callable[[Value], Value],
    ) -> Operands:
        """Sort operands.

        :param vertex: from a tangent to the vertex that stands for it.
        """
        tangents: list[Value] = []
        residuals: dict[Value, int] = {}
        sources: list[tuple[str, Any]] = []
        for operand in operands:
            if isinstance(operand, Constant):
                sources.append(("constant", operand.value))
            elif is_tangent(operand):
                sources.append(("tangent", len(tangents)))
                tangents.append(vertex(operand))
            else:
                sources.append(("residual", residuals.setdefault(operand, len(residuals))))
        return cls(equation, tuple(tangents), tuple(residuals), tuple(sources))

    @property
    def moving(self) -> list[int]:
        """Positions of the tangents among the operands."""
        return [i for i, (kind, _) in enumerate(self.sources) if kind == "tangent"]

    def run(
        self,
        residuals: Sequence[jax.Array],
        tangents: Sequence[jax.Array],
        bind: Callable[..., list[jax.Array]] = _jax.bind,
    ) -> list[jax.Array]:
        """Evaluate the equation."""
        arrays = {"tangent": tangents, "residual": residuals}
        return bind(self.equation, [what if kind == "constant" else arrays[kind][what] for kind, what in self.sources])


@dataclasses.dataclass(eq=False, slots=True)
class _Step(Edge):
    """A step of the traced program, applied as it is and transposed by JAX."""

    operands: Operands

    def apply(self, residuals: Sequence[jax.Array], tangents: Sequence[jax.Array]) -> list[jax.Array]:
        return self.operands.run(residuals, tangents)

    @property
    def entries(self) -> tuple[float, ...]:
        return tuple(primitives.jacobian_entries(self.operands.equation, i) for i in self.operands.moving)


@dataclasses.dataclass(eq=False, slots=True)
class Contraction(_Step):
    """A matrix product or a convolution of a tangent and a residual, in which its pullback is linear."""

    expensive: ClassVar[bool] = True


@dataclasses.dataclass(eq=False, slots=True)
class Rearrangement(_Step):
    """A step that moves, repeats, picks or adds up entries; what it reads are indices and zeros."""


@dataclasses.dataclass(eq=False, slots=True)
class Pointwise(_Step):
    """An elementwise step that is not fused, for instance of complex numbers."""


@dataclasses.dataclass(eq=False, slots=True)
class Again(_Step):
    """Slices of a part that run again: what they compute from is exact."""

    expensive: ClassVar[bool] = True


@dataclasses.dataclass(eq=False, slots=True)
class Unknown(_Step):
    """Any other linear step, whose residuals are exact."""

    expensive: ClassVar[bool] = True
    known: ClassVar[bool] = False


def linear_edge(name: str, operands: Operands, results: Sequence[Value], line: str) -> Edge:
    """The edge of a linear step, by its primitive."""
    traits = primitives.of(name)
    bilinear = traits.bilinear and len(operands.tangents) == 1
    linear = tuple(bilinear and primitives.is_real_float(r.aval.dtype) for r in operands.residuals)
    if name == _jax.PULLED_BY:
        kind = Again
    elif traits.structural:
        kind = Rearrangement
    elif traits.coefficient is not None:
        kind = Pointwise
    else:
        kind = Contraction if bilinear else Unknown
    return kind(name, operands.tangents, tuple(results), operands.residuals, linear, line, operands)


@dataclasses.dataclass(eq=False, slots=True)
class Opaque(Edge):
    """The tangent part of a call that mixes primal and tangent work and that nobody can look into: it is run again on
    the way back.

    :ivar moves: which of the call's results are tangents.
    """

    operands: Operands
    moves: tuple[bool, ...]

    expensive: ClassVar[bool] = True
    known: ClassVar[bool] = False

    def primal(self, *residuals: jax.Array) -> list[jax.Array]:
        """Its results that are no tangents."""
        return self._results(residuals, self._zeros(), False)

    def apply(self, residuals: Sequence[jax.Array], tangents: Sequence[jax.Array]) -> list[jax.Array]:
        return self._results(residuals, tangents, True)

    def pull(self, residuals: Sequence[jax.Array], cotangents: Sequence[jax.Array | None]) -> list[jax.Array]:
        def moved(*tangents: jax.Array) -> list[jax.Array]:
            return self._results(residuals, tangents, True, _jax.run_again)

        _, pullback = jax.vjp(moved, *self._zeros())
        return list(pullback([filled(c, t) for c, t in zip(cotangents, self.outputs, strict=True)]))

    def _results(
        self,
        residuals: Sequence[jax.Array],
        tangents: Sequence[jax.Array],
        moving: bool,
        bind: Callable[..., list[jax.Array]] = _jax.bind,
    ) -> list[jax.Array]:
        found = self.operands.run(residuals, tangents, bind)
        return [r for r, moves in zip(found, self.moves, strict=True) if moves == moving]

    def _zeros(self) -> list[jax.Array]:
        return [filled(None, t) for t in self.inputs]


def filled(cotangent: jax.Array | None, tangent: Value) -> jax.Array:
    """A cotangent of a tangent, zeros where there is none."""
    return jnp.zeros(tangent.aval.shape, tangent.aval.dtype) if cotangent is None else cotangent
