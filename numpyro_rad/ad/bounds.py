"""How much memory a program may take, at sight: for what is so small that its linearized graph is not worth making."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from numpyro_rad.ad import _jax, primitives, tangents

UNKNOWN_TIMES = 4
"""A derivative of which nothing is known is taken to store so many times what it reads and makes."""


def computed_bytes(jaxpr: _jax.Jaxpr) -> int:
    """Bytes of all that a program computes, in all iterations of its loops where their number is known."""
    total = 0
    for equation in jaxpr.jaxpr.eqns:
        total += _repeats(equation) * sum(map(computed_bytes, _jax.inner_jaxprs(equation)))
        total += sum(_jax.aval_bytes(v.aval) for v in equation.outvars)
    return total


def residual_bytes(jaxpr: _jax.Jaxpr, active: Sequence[bool]) -> int:
    """At least as many bytes as reverse mode stores of a program, whose inputs cost nothing.

    The derivative of an elementwise step is one array for each operand, a product reads its other operand, and what
    only moves or adds entries reads indices at most. Nothing is taken to be made again or fused.

    :param active: which inputs are differentiated.
    """
    return _stored(jaxpr, active, [False] * len(active))


def _stored(jaxpr: _jax.Jaxpr, active: Sequence[bool], computed: Sequence[bool]) -> int:
    """Bytes that reverse mode stores of a program.

    :param computed: which inputs have to be stored if a derivative reads them.
    """
    inner = jaxpr.jaxpr
    moving = {v for v, on in zip(inner.invars, active, strict=True) if on and _moves(v)}
    made = {v for v, on in zip(inner.invars, computed, strict=True) if on}
    stored: set[_jax.Variable] = set()
    total = 0
    for equation in inner.eqns:
        flags = [not isinstance(v, _jax.Literal) and v in moving for v in equation.invars]
        own = [not isinstance(v, _jax.Literal) and v in made for v in equation.invars]
        made.update(equation.outvars)
        if not any(flags) or not any(map(_moves, equation.outvars)):
            continue
        traits = primitives.of(equation.primitive.name)
        moving.update(filter(_moves, equation.outvars))
        bodies = _bodies(equation, flags, own)
        read = list(zip(equation.invars, flags, own, strict=True))
        if bodies:
            total += _repeats(equation) * sum(_stored(*body) for body in bodies)
            stored.update(v for v, on, mine in read if mine and not on)  # which branch, among others
            continue
        results = sum(_jax.aval_bytes(v.aval) for v in equation.outvars)
        several = sum(flags) > 1
        if traits.structural or traits.sums or traits.bilinear:
            stored.update(v for v, on, mine in read if mine and (not on or (traits.bilinear and several)))
        elif traits.elementwise:
            total += sum(flags) * results
        else:
            operands = sum(_jax.aval_bytes(v.aval) for v in equation.invars)
            inside = sum(map(computed_bytes, _jax.inner_jaxprs(equation)))
            total += UNKNOWN_TIMES * (operands + results + inside)
    return total + sum(_jax.aval_bytes(v.aval) for v in stored)


def _bodies(
    equation: _jax.JaxprEquation, active: Sequence[bool], computed: Sequence[bool]
) -> list[tuple[_jax.Jaxpr, Sequence[bool], Sequence[bool]]]:
    """The programs that an equation runs, with which of their inputs are differentiated and which are computed."""
    body = _jax.inlined_jaxpr(equation)
    if body is not None:
        return [(body, active, computed)]
    if equation.primitive.name == "scan":
        return [(_jax.scan_parts(equation)[0], tangents.scan_tangents(equation, active)[0], [True] * len(active))]
    if equation.primitive.name == "cond":
        return [(branch, active[1:], computed[1:]) for branch in _jax.cond_branches(equation)]
    return []


def _repeats(equation: _jax.JaxprEquation) -> int:
    return equation.params["length"] if equation.primitive.name == "scan" else 1


def _moves(v: _jax.Variable) -> bool:
    return _is_inexact(v.aval.dtype)


@functools.cache
def _is_inexact(dtype: np.dtype) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.inexact))
