"""What is known about primitives, one line per family.

Two programs are looked at. In the *primal* program a primitive is either ``CHEAP`` (elementwise, structural, a
reduction or random bits: running it again costs about as much as reading its output) or not. In the *tangent* program,
which is linear, a primitive is elementwise (a diagonal Jacobian that can be fused with its neighbours), bilinear in a
tangent and a residual (so that an unbiased estimate of the residual leaves the pullback unbiased), or anything else:
then its residuals are kept exactly and JAX's own transpose is used. That last line is the safe default, so a primitive
that nobody has heard of still trains.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from numpyro_rad.ad import _jax
from numpyro_rad.ad.work import CostClass, Entries, Multiplications, OneOf, Together, Work

ELEMENTWISE = """
abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e bitcast_convert_type cbrt ceil clamp
complex conj convert_element_type copy cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt
imag integer_pow is_finite le lgamma log log1p logistic lt le_to lt_to max min mul ne neg nextafter not
one_minus_square or population_count pow real reduce_precision rem round rsqrt select_n shift_left
shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor
""".split()

_STRUCTURAL = """
broadcast_in_dim concatenate dynamic_slice dynamic_update_slice empty gather iota pad reshape rev scatter
slice split squeeze transpose
""".split()

_REDUCTIONS = """
argmax argmin cumlogsumexp cummax cummin cumprod cumsum reduce_and reduce_max reduce_min reduce_or reduce_prod
reduce_sum reduce_xor
""".split()

_RANDOM = "random_bits threefry2x32 random_wrap random_unwrap random_split random_fold_in random_seed".split()

CHEAP = frozenset(ELEMENTWISE + _STRUCTURAL + _REDUCTIONS + _RANDOM)
"""Primitives of the primal program that may be run again in the backward sweep."""

_REARRANGEMENTS = frozenset([*_STRUCTURAL, *_RANDOM, "convert_element_type", "copy"])

_CALLS = frozenset({"jit", "closed_call", "eval_jaxpr", "custom_jvp_call", "custom_vjp_call"})

BILINEAR = frozenset({"dot_general", "conv_general_dilated", "mul"})
"""Primitives of the tangent program whose pullback is linear in the residual that they read."""

STRUCTURAL = frozenset([*_STRUCTURAL, "reduce_sum", "cumsum", "convert_element_type", "copy", "scatter-add"])
"""Primitives of the tangent program that read no residual worth storing (indices and zeros at most)."""

PASSES_ESTIMATE = frozenset("reshape transpose broadcast_in_dim squeeze rev copy convert_element_type".split())
"""One-operand linear rearrangements: an unbiased estimate of the input gives one of the output."""

DIAGONAL = frozenset("mul div select_n neg add add_any sub copy".split())
"""Primitives of the tangent program that have a diagonal Jacobian if all their tangents have the result's shape."""

SUMS = DIAGONAL - {"mul", "div"}
"""Those that may have several tangent operands."""

TRANSPOSED = {
    "reduce_sum": "broadcast_in_dim",
    "reshape": "reshape",
    "squeeze": "reshape",
    "transpose": "transpose",
    "rev": "rev",
    "copy": "copy",
    "convert_element_type": "convert_element_type",
}
"""Linear steps of one operand whose transpose only rearranges: its name. A constant they leave a constant."""

MIXED = frozenset({"scan", "cond"})
"""Control flow that is split into a primal and a tangent part by the graph."""


def is_cheap(equation: _jax.JaxprEquation) -> bool:
    """Whether running ``equation`` again is cheap; calls are as cheap as the dearest equation of their body."""
    name = equation.primitive.name
    if name in CHEAP:
        return True
    if name in _CALLS:
        return all(is_cheap(e) for j in _jax.inner_jaxprs(equation) for e in j.jaxpr.eqns)
    return False


def is_rearrangement(equation: _jax.JaxprEquation) -> bool:
    """Whether ``equation`` only moves, repeats or picks entries, or makes keys and bits."""
    name = equation.primitive.name
    if name in _REARRANGEMENTS:
        return True
    return name in _CALLS and all(is_rearrangement(e) for j in _jax.inner_jaxprs(equation) for e in j.jaxpr.eqns)


def draws_bits(equation: _jax.JaxprEquation) -> bool:
    """Whether ``equation`` makes random bits: cheap to run again, dear to compile again."""
    if equation.primitive.name in ("random_bits", "threefry2x32"):
        return True
    return any(draws_bits(e) for j in _jax.inner_jaxprs(equation) for e in j.jaxpr.eqns)


_COSTS: dict[CostClass, str] = {
    "simple": "add add_any and broadcast_in_dim convert_element_type copy ge gt iota le lt max min mul ne eq neg not "
    "or reshape select_n squeeze square sub stop_gradient transpose",
    "cumulative": "cumsum cumprod cummax cummin cumlogsumexp",
    "indexed": "gather dynamic_slice",
    "trigonometric": "sin cos",
    "power": "pow tan asin acos atan atan2 asinh acosh atanh",
    "scattered": "scatter scatter-add",
    "gamma": "lgamma digamma",
    "random": "random_bits threefry2x32",
    "bessel": "bessel_i0e bessel_i1e",
    "sorted": "sort top_k",
    "series": "igamma igammac igamma_grad_a betainc regularized_incomplete_beta polygamma zeta random_gamma",
}
_COST_CLASS: dict[str, CostClass] = {name: kind for kind, names in _COSTS.items() for name in names.split()}
_CUBIC = frozenset("cholesky triangular_solve lu qr eigh svd geqrf householder_product schur eig".split())


def work(equation: _jax.JaxprEquation) -> Work:
    """How much work ``equation`` is, without that of starting it."""
    name = equation.primitive.name
    inner = [Together(tuple(map(work, j.jaxpr.eqns))) for j in _jax.inner_jaxprs(equation)]
    if inner and name not in _COST_CLASS:
        return OneOf(tuple(inner)) if name == "cond" else Together(tuple(inner), equation.params.get("length", 1))
    if name in ("dot_general", "conv_general_dilated"):
        return Multiplications(_operations(equation), str(equation.invars[0].aval.dtype))
    if name in _CUBIC:
        results = [v.aval for v in equation.outvars if v.aval.shape]
        number = max(aval.size * aval.shape[-1] for aval in results)
        return Together((Multiplications(number, str(results[0].dtype)),), 4)
    sizes = [v.aval.size for v in (*equation.invars, *equation.outvars) if hasattr(v.aval, "size")]
    return Entries(max(sizes, default=0), _COST_CLASS.get(name, "ordinary"))


def _operations(product: _jax.JaxprEquation) -> float:
    """Multiplications of a contraction or a convolution."""
    size = product.outvars[0].aval.size
    if product.primitive.name == "dot_general":
        (contracted, _), _ = product.params["dimension_numbers"]
        return size * float(np.prod([product.invars[0].aval.shape[i] for i in contracted]))
    kernel = product.invars[1].aval
    return size * kernel.size / max(kernel.shape[product.params["dimension_numbers"].rhs_spec[0]], 1)


_PICKS = frozenset("broadcast_in_dim slice gather dynamic_slice".split())


def jacobian_entries(equation: _jax.JaxprEquation, position: int) -> float:
    """How many entries of the Jacobian in the operand at ``position`` are not zero, of a linear step and for what is
    known: of others, one for each entry of the operand.
    """
    name, aval = equation.primitive.name, equation.invars[position].aval
    if name in _PICKS:  # each entry of the result is one of the operand
        return equation.outvars[0].aval.size
    if name in ("dot_general", "conv_general_dilated"):
        return _operations(equation)
    if name == "cumsum":
        return aval.size * (aval.shape[equation.params["axis"]] + 1) / 2
    return aval.size


def is_real_float(dtype: Any) -> bool:
    """Whether values of ``dtype`` may be replaced by unbiased estimates."""
    return jnp.issubdtype(dtype, jnp.floating)
