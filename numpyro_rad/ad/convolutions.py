"""Convolutions in loops, in the form for which XLA's compiler for CPUs has fast code.

That form has the batch first, then space, then features; the kernel space, inputs, outputs. The compiler brings
convolutions into it in the body of a program, and not in the bodies of its loops, where every gradient of a convolution
is in another form and then runs in plain loops over its entries, some 70 times longer. Here they are brought into it
before: to transpose operands and result takes little beside a convolution.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax import lax
from jax.typing import ArrayLike

from numpyro_rad.ad import _jax

_CONVOLUTION = "conv_general_dilated"


def fast_in_loops(jaxpr: _jax.Jaxpr) -> _jax.Jaxpr:
    """The same program, with the convolutions inside of its loops and calls in that form."""
    if not any(_has_convolution(body) for e in jaxpr.jaxpr.eqns for body in _jax.inner_jaxprs(e)):
        return jaxpr
    return _jax.retrace(lambda args: _jax.evaluate(jaxpr, args, _inside), jaxpr)


def _has_convolution(jaxpr: _jax.Jaxpr) -> bool:
    equations = jaxpr.jaxpr.eqns
    return any(e.primitive.name == _CONVOLUTION or any(map(_has_convolution, _jax.inner_jaxprs(e))) for e in equations)


def _inside(equation: _jax.JaxprEquation, args: Sequence[ArrayLike]) -> list[jax.Array]:
    """An equation, run with all convolutions inside of it in that form."""
    if any(map(_has_convolution, _jax.inner_jaxprs(equation))):
        equation = _jax.with_inner_jaxprs(equation, _everywhere)
    return _jax.bind(equation, args)


def _everywhere(jaxpr: _jax.Jaxpr) -> _jax.Jaxpr:
    """The same program, with all of its convolutions in that form."""
    if not _has_convolution(jaxpr):
        return jaxpr

    def run(equation: _jax.JaxprEquation, args: Sequence[ArrayLike]) -> list[jax.Array]:
        return _convolved(equation, *args) if equation.primitive.name == _CONVOLUTION else _inside(equation, args)

    return _jax.retrace(lambda args: _jax.evaluate(jaxpr, args, run), jaxpr)


def _convolved(equation: _jax.JaxprEquation, image: ArrayLike, kernel: ArrayLike) -> list[jax.Array]:
    numbers = equation.params["dimension_numbers"]
    last = len(numbers.lhs_spec) - 1
    space = tuple(range(1, last))
    form = lax.ConvDimensionNumbers((0, last, *space), (last, last - 1, *range(last - 1)), (0, last, *space))
    (batch, features, *rest), (outputs, inputs, *window) = numbers.lhs_spec, numbers.rhs_spec
    with _jax.context(equation):
        image, kernel = (
            lax.transpose(image, (batch, *rest, features)),
            lax.transpose(kernel, (*window, inputs, outputs)),
        )
    (result,) = _jax.bind(_jax.with_params(equation, dimension_numbers=form), [image, kernel])
    batch, features, *rest = numbers.out_spec
    places = (batch, *rest, features)
    with _jax.context(equation):
        return [lax.transpose(result, [places.index(axis) for axis in range(last + 1)])]
