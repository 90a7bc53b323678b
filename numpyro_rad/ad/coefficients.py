"""Arithmetic of the coefficients that stand in front of tangents.

A chain of elementwise derivatives is one coefficient array: a tangent that elementwise steps have made is a *linear
form* of earlier tangents,

    t = sum_i c_i * t_i,        c_i = scale_i * residual_i  (elementwise).

Products and sums of coefficients are equations appended to the primal program. ``edges`` says what an edge makes of a
coefficient, ``elimination`` in which order vertices are eliminated.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from numpyro_rad.ad import _jax, primitives
from numpyro_rad.ad.graph import Atom, Constant, Equation, Value
from numpyro_rad.ad.work import Entries


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

    def __init__(self, equations: list[Equation], new_value: Callable[[_jax.Aval], Value]) -> None:
        self.new_value = new_value
        self._equations = equations
        self._known: dict[Hashable, Value] = {}
        self._types: dict[Hashable, _jax.Aval] = {}  # layers that repeat make the same things of the same types

    def local(self, name: str, operands: Sequence[Atom], position: int, line: str) -> Term:
        """The coefficient that an elementwise linear step puts in front of its tangent operand at ``position``."""
        match primitives.of(name).coefficient:
            case "factor":
                return self._of(operands[1 - position], line)
            case "quotient":
                denominator = self._of(operands[1], line)
                if denominator.residual is None:
                    return Term(1.0 / denominator.scale if denominator.scale else math.inf, None)
                return Term(1.0, self.derive("reciprocal", _reciprocal, (denominator.residual,), line))
            case "case":  # one where this case is chosen, zero elsewhere: the bits of the predicate say it all
                case = position - 1
                return Term(1.0, self.derive(f"case {case}", partial(_is_chosen, case=case), (operands[0],), line))
            case "minus":
                return Term(-1.0, None)
            case "difference":
                return Term(-1.0, None) if position == 1 else ONE
        return ONE

    def product(self, a: Term, b: Term, line: str) -> Term:
        """The coefficient of two steps in a row. A mask silences what it meets, even a derivative that is infinite."""
        scale = a.scale * b.scale
        if a.residual is None or b.residual is None:
            return Term(scale, a.residual or b.residual)
        first, second = sorted((a.residual, b.residual), key=lambda v: (v.aval.dtype != bool, v.number))
        name, run = ("mask", _masked) if first.aval.dtype == bool else ("mul", jnp.multiply)
        return Term(scale, self.derive(name, run, (first, second), line))

    def sum(self, a: Term | None, b: Term, dtype: DTypeLike, line: str) -> Term:
        if a is None:
            return b
        if a.residual is b.residual:
            return Term(a.scale + b.scale, a.residual)
        if a.residual is None:
            a, b = b, a
        assert a.residual is not None
        if b.residual is None:
            run = partial(_affine, scale=a.scale, shift=b.scale, dtype=dtype)
            return Term(1.0, self.derive(f"affine {a.scale} {b.scale} {dtype}", run, (a.residual,), line))
        run = partial(_scaled_sum, a=a.scale, b=b.scale, dtype=dtype)
        return Term(1.0, self.derive(f"sum {a.scale} {b.scale} {dtype}", run, (a.residual, b.residual), line))

    def _of(self, atom: Atom, line: str) -> Term:
        """The coefficient that a primal operand is: a number where it is one."""
        if isinstance(atom, Value):
            return Term(1.0, atom)
        if np.ndim(atom.value) == 0 and math.isfinite(float(atom.value)):
            return Term(float(atom.value), None)
        array = atom.value
        return Term(1.0, self.derive("constant", lambda: jnp.asarray(array), (), line, id(array)))

    def derive(
        self,
        name: str,
        run: Callable[..., jax.Array],
        operands: tuple[Atom, ...],
        line: str,
        parameters: Hashable = (),
        aval: _jax.Aval | None = None,
    ) -> Value:
        """What ``run`` makes of operands, as a value of the primal program.

        :param parameters: what ``run`` depends on besides its name.
        :param aval: the type of that, where it is known.
        """
        known = (name, parameters, *operands)
        if known not in self._known:
            output = self.new_value(aval or self._type(name, run, operands, parameters))
            self._equations.append(
                Equation(
                    name,
                    operands,
                    (output,),
                    lambda *args: [run(*args)],
                    True,
                    line,
                    work=Entries(output.aval.size, "derived"),
                )
            )
            self._known[known] = output
        return self._known[known]

    def _type(
        self, name: str, run: Callable[..., jax.Array], operands: tuple[Atom, ...], parameters: Hashable
    ) -> _jax.Aval:
        given = [
            o.value if isinstance(o, Constant) else jax.ShapeDtypeStruct(o.aval.shape, o.aval.dtype) for o in operands
        ]
        pairs = zip(operands, given, strict=True)
        known = (name, parameters, *(o if isinstance(o, Constant) else struct for o, struct in pairs))
        if known not in self._types:
            aval = jax.eval_shape(run, *given)
            self._types[known] = _jax.array_type(aval.shape, aval.dtype)
        return self._types[known]


def _reciprocal(x: jax.Array) -> jax.Array:
    return 1 / x


def _is_chosen(which: ArrayLike, case: int) -> jax.Array:
    which = jnp.asarray(which)  # a literal predicate is a number of Python
    return (which if case else ~which) if which.dtype == bool else which == case


def _masked(mask: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(mask, x, jnp.zeros((), x.dtype))


def _affine(x: jax.Array, scale: float, shift: float, dtype: DTypeLike) -> jax.Array:
    return _times(scale, x.astype(dtype)) + np.asarray(shift, dtype)


def _scaled_sum(x: jax.Array, y: jax.Array, a: float, b: float, dtype: DTypeLike) -> jax.Array:
    return _times(a, x.astype(dtype)) + _times(b, y.astype(dtype))


def _times(scale: float, x: jax.Array) -> jax.Array:
    return x if scale == 1.0 else -x if scale == -1.0 else x * np.asarray(scale, x.dtype)


def weigh(term: Term, residual: jax.Array | None, x: jax.Array) -> jax.Array:
    """``scale * residual * x``; a mask selects."""
    if residual is None:
        return _times(term.scale, x)
    return _times(term.scale, _masked(residual, x) if residual.dtype == bool else residual.astype(x.dtype) * x)
