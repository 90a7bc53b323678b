"""What is known about primitives: one registry, one line for an easy one.

Two programs are looked at. In the *primal* program a primitive is either cheap (elementwise, structural, a reduction or
random bits: running it again costs about as much as reading its output) or not. In the *tangent* program, which is
linear, a primitive is elementwise (a diagonal Jacobian that can be fused with its neighbours), bilinear in a tangent
and a residual (so that an unbiased estimate of the residual leaves the pullback unbiased), or anything else: then its
residuals are kept exactly and JAX's own transpose is used. That last line is the safe default, so a primitive that
nobody has heard of still trains; :func:`register` says more of one of your own.

A line is a family (:func:`elementwise`, :func:`structural`, :func:`reduction`, :func:`random`, :func:`contraction`,
...) and its members. Which axes of an operand stay apart is not in it: that depends on the parameters of an equation,
so it takes a function for each primitive, and these rules are with the only one who asks, ``axes``. What is elementwise
here needs none there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from numpyro_rad.ad import _jax
from numpyro_rad.ad.work import COST_CLASSES, CostClass, Entries, Multiplications, OneOf, Together, Work
from numpyro_rad.mistakes import shown

Coefficient = Literal["one", "minus", "difference", "factor", "quotient", "case"]
"""What an elementwise linear step puts in front of a tangent operand: one, minus one, minus one in front of the second,
its other factor, one over its denominator, or one where a predicate chooses it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traits:
    """What is known of a primitive; nothing, by default.

    Of the primal program:

    :ivar cheap: it may be run again in the backward sweep.
    :ivar rearranges: it only moves, repeats or picks entries, or makes keys and bits.
    :ivar draws_bits: it makes random bits: cheap to run again, dear to compile again.
    :ivar elementwise: an entry of its results depends on the entries of its operands at the same place.
    :ivar calls: it runs its body and is whatever that is.
    :ivar cost: what is done with an entry; None for what its body does, or if it has none for ``"ordinary"``.
    :ivar work: how much work an equation of it is, where entries do not say it.

    Of the tangent program:

    :ivar coefficient: its Jacobian is diagonal if all its tangents have the result's shape: what it consists of.
    :ivar bilinear: its pullback is linear in the residual that it reads.
    :ivar structural: it reads no residual worth storing (indices and zeros at most).
    :ivar passes_estimate: a linear rearrangement of one operand: an unbiased estimate of that gives one of the result.
    :ivar transposed: its transpose only rearranges: the name of that. A constant it leaves a constant.
    :ivar splits: control flow that the graph splits into a primal and a tangent part.
    :ivar jacobian_entries: from an equation and the position of an operand to how many entries of the Jacobian in it
        are not zero, where it is another number than the operand has.
    """

    cheap: bool = False
    rearranges: bool = False
    draws_bits: bool = False
    elementwise: bool = False
    calls: bool = False
    cost: CostClass | None = None
    work: Callable[[_jax.JaxprEquation], Work] | None = None
    coefficient: Coefficient | None = None
    bilinear: bool = False
    structural: bool = False
    passes_estimate: bool = False
    transposed: str = ""
    splits: bool = False
    jacobian_entries: Callable[[_jax.JaxprEquation, int], float] | None = None

    def __post_init__(self) -> None:
        if self.cost is not None and self.cost not in COST_CLASSES:
            raise ValueError(f"cost={self.cost!r} is none of {', '.join(COST_CLASSES)}.")
        if self.splits and self.cheap:
            raise ValueError("splits and cheap exclude each other: control flow is split or run again as a whole.")
        if self.bilinear and self.structural:
            raise ValueError("bilinear and structural exclude each other: what reads no residual is linear in none.")

    @property
    def sums(self) -> bool:
        """Whether it is elementwise in the tangent program and may have several tangent operands."""
        return self.coefficient not in (None, "factor", "quotient")


UNKNOWN = Traits()
"""The safe default: not run again, its residuals exact, its transpose JAX's own."""


# -- families ----------------------------------------------------------------------------------------------------------


def elementwise(cost: CostClass | None = None, cheap: bool = True, **more: Any) -> Traits:
    """An entry of the result from the entries at its place; run again unless that is dear.

    :param cost: what is done with an entry; ``"ordinary"`` by default.
    :param more: other fields of :class:`Traits`.
    """
    return Traits(cheap=cheap, elementwise=True, cost=cost, **more)


def structural(cost: CostClass | None = None, **more: Any) -> Traits:
    """Entries are moved, repeated or picked: linear in them, and run again."""
    return Traits(**{"cheap": True, "rearranges": True, "structural": True, "cost": cost, **more})


def _same_place(name: str, **more: Any) -> Traits:
    """A rearrangement, its own transpose, that leaves each entry at its place."""
    return structural("simple", elementwise=True, passes_estimate=True, transposed=name, **more)


def reduction(cost: CostClass | None = None, **more: Any) -> Traits:
    """Entries are brought together along axes, and run again."""
    return Traits(cheap=True, cost=cost, **more)


def random(cost: CostClass | None = None, **more: Any) -> Traits:
    """Keys and bits are made, and made again."""
    return Traits(cheap=True, rearranges=True, cost=cost, **more)


def contraction(multiplications: Callable[[_jax.JaxprEquation], float]) -> Traits:
    """A product of two operands that is linear in each; not run again.

    :param multiplications: how many an equation of it takes.
    """
    return Traits(
        bilinear=True,
        work=lambda equation: Multiplications(multiplications(equation), _dtype(equation.invars[0])),
        jacobian_entries=lambda equation, position: multiplications(equation),
    )


def factorization() -> Traits:
    """A matrix is factorized, or a system solved; not run again."""
    return Traits(work=_cubic)


def dear(cost: CostClass) -> Traits:
    """Entries have their price; not run again."""
    return Traits(cost=cost)


# -- the registry ------------------------------------------------------------------------------------------------------


def _dot_multiplications(equation: _jax.JaxprEquation) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    return equation.outvars[0].aval.size * float(np.prod([equation.invars[0].aval.shape[i] for i in contracted]))


def _conv_multiplications(equation: _jax.JaxprEquation) -> float:
    kernel = equation.invars[1].aval
    size = equation.outvars[0].aval.size
    return size * kernel.size / max(kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]], 1)


def _cubic(equation: _jax.JaxprEquation) -> Work:
    results = [v.aval for v in equation.outvars if v.aval.shape]
    number = max(aval.size * aval.shape[-1] for aval in results)
    return Together((Multiplications(number, str(results[0].dtype)),), 4)


def _dtype(v: _jax.Variable) -> str:
    return str(v.aval.dtype)


def _of_the_result(equation: _jax.JaxprEquation, position: int) -> float:
    """Each entry of the result is one of the operand."""
    return equation.outvars[0].aval.size


def _of_a_triangle(equation: _jax.JaxprEquation, position: int) -> float:
    """An entry of the result is a sum of half of the axis."""
    aval = equation.invars[position].aval
    return aval.size * (aval.shape[equation.params["axis"]] + 1) / 2


_LINES: tuple[tuple[Traits, str], ...] = (
    # elementwise
    (elementwise(), "abs bitcast_convert_type cbrt ceil clamp complex conj cosh eq_to erf erf_inv erfc exp exp2 expm1"),
    (elementwise(), "floor imag integer_pow is_finite le_to log log1p logistic lt_to nextafter one_minus_square"),
    (elementwise(), "population_count real reduce_precision rem round rsqrt shift_left shift_right_arithmetic"),
    (elementwise(), "shift_right_logical sign sinh sqrt tanh xor"),
    (elementwise("simple"), "and eq ge gt le lt max min ne not or square stop_gradient"),
    (elementwise("trigonometric"), "cos sin"),
    (elementwise("power"), "acos acosh asin asinh atan atan2 atanh pow tan"),
    (elementwise("gamma"), "digamma lgamma"),
    (elementwise("bessel"), "bessel_i0e bessel_i1e"),
    (elementwise("series", cheap=False), "betainc igamma igamma_grad_a igammac polygamma random_gamma"),
    (elementwise("series", cheap=False), "regularized_incomplete_beta zeta"),
    (elementwise(cheap=False), "random_gamma_grad"),
    (elementwise("simple", coefficient="one"), "add add_any"),
    (elementwise("simple", coefficient="minus"), "neg"),
    (elementwise("simple", coefficient="difference"), "sub"),
    (elementwise("simple", coefficient="case"), "select_n"),
    (elementwise("simple", coefficient="factor", bilinear=True), "mul"),
    (elementwise(coefficient="quotient"), "div"),
    # structural
    (structural(), "concatenate dynamic_update_slice empty pad split"),
    (structural(jacobian_entries=_of_the_result), "slice"),
    (structural("indexed", jacobian_entries=_of_the_result), "dynamic_slice gather"),
    (structural("scattered"), "scatter"),
    (structural("scattered", cheap=False, rearranges=False), "scatter-add"),
    (structural("simple"), "iota"),
    (structural("simple", passes_estimate=True, jacobian_entries=_of_the_result), "broadcast_in_dim"),
    (structural("simple", passes_estimate=True, transposed="reshape"), "reshape squeeze"),
    (structural("simple", passes_estimate=True, transposed="transpose"), "transpose"),
    (structural(passes_estimate=True, transposed="rev"), "rev"),
    (_same_place("convert_element_type"), "convert_element_type"),
    (_same_place("copy", coefficient="one"), "copy"),
    # reductions
    (reduction(), "argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_xor"),
    (reduction(structural=True, transposed="broadcast_in_dim"), "reduce_sum"),
    (reduction("cumulative"), "cumlogsumexp cummax cummin cumprod"),
    (reduction("cumulative", structural=True, jacobian_entries=_of_a_triangle), "cumsum"),
    # random bits and keys
    (random(), "random_seed random_split random_unwrap random_wrap"),
    (random(elementwise=True), "random_fold_in"),
    (random("random", draws_bits=True), "random_bits"),
    (random("random", draws_bits=True, elementwise=True), "threefry2x32"),
    # what is not run again
    (contraction(_dot_multiplications), "dot_general"),
    (contraction(_conv_multiplications), "conv_general_dilated"),
    (factorization(), "cholesky eig eigh geqrf householder_product lu qr schur svd triangular_solve"),
    (dear("sorted"), "sort top_k"),
    # what has programs inside of it
    (Traits(calls=True), "closed_call custom_jvp_call custom_vjp_call eval_jaxpr jit"),
    (Traits(splits=True), "cond scan"),
)

_REGISTRY: dict[str, Traits] = {name: traits for traits, names in _LINES for name in names.split()}


def of(name: str) -> Traits:
    """What is known of the primitive of this name."""
    return _REGISTRY.get(name, UNKNOWN)


def names(hold: Callable[[Traits], object]) -> frozenset[str]:
    """The names of the primitives for which something holds."""
    return frozenset(name for name, traits in _REGISTRY.items() if hold(traits))


def register(primitive: _jax.Primitive | str, traits: Traits) -> None:
    """Say what is known of a primitive of your own, before a program with it is planned.

    Nothing has to be said: its results are then kept where a derivative reads them. An elementwise one that is
    registered is computed again instead, has its price and may run in slices. What is said is believed: a gradient is
    biased where ``bilinear`` or ``coefficient`` is said of a primitive that has no such derivative.

    :param primitive: a ``jax.extend.core.Primitive``, or its name.
    :param traits: of a family: :func:`elementwise`, :func:`structural`, :func:`reduction`, :func:`random`,
        :func:`contraction`, :func:`factorization`, :func:`dear`, or :class:`Traits` field by field.
    :raises TypeError: if these are no primitive and no traits.
    :raises ValueError: if something else is known of a primitive of this name, or it cannot be what is said.

    Example::

        from jax.extend.core import Primitive
        from numpyro_rad.ad import primitives

        softsign_p = Primitive("softsign")  # with an abstract evaluation, a lowering and a JVP, as JAX wants them
        primitives.register(softsign_p, primitives.elementwise())
    """
    name = getattr(primitive, "name", primitive)
    if not isinstance(name, str):
        raise TypeError(f"register: {shown(primitive)} is neither a primitive of JAX nor the name of one.")
    if not isinstance(traits, Traits):
        raise TypeError(
            f"register: {shown(traits)} does not say what is known of '{name}'. Pass for example "
            "primitives.elementwise() (called, with parentheses)."
        )
    if traits.splits and name not in ("scan", "cond"):
        raise ValueError(f"register: only scan and cond are split, and {name} is neither. Leave splits out.")
    if _REGISTRY.setdefault(name, traits) != traits:
        raise ValueError(
            f"register: something else is known of '{name}' already: {_REGISTRY[name]}. Give your primitive a name of "
            "its own."
        )


# -- questions about equations -----------------------------------------------------------------------------------------


def is_cheap(equation: _jax.JaxprEquation) -> bool:
    """Whether running ``equation`` again is cheap; calls are as cheap as the dearest equation of their body."""
    return _holds(equation, lambda traits: traits.cheap)


def is_rearrangement(equation: _jax.JaxprEquation) -> bool:
    """Whether ``equation`` only moves, repeats or picks entries, or makes keys and bits."""
    return _holds(equation, lambda traits: traits.rearranges)


def _holds(equation: _jax.JaxprEquation, trait: Callable[[Traits], bool]) -> bool:
    """Whether it holds for an equation, or for all equations of the body that it calls."""
    traits = of(equation.primitive.name)
    if not traits.calls:
        return trait(traits)
    return all(_holds(e, trait) for j in _jax.inner_jaxprs(equation) for e in j.jaxpr.eqns)


def draws_bits(equation: _jax.JaxprEquation) -> bool:
    """Whether ``equation`` makes random bits, or anything inside of it does."""
    if of(equation.primitive.name).draws_bits:
        return True
    return any(draws_bits(e) for j in _jax.inner_jaxprs(equation) for e in j.jaxpr.eqns)


def work(equation: _jax.JaxprEquation) -> Work:
    """How much work ``equation`` is, without that of starting it."""
    traits = of(equation.primitive.name)
    if traits.work is not None:
        return traits.work(equation)
    inner = tuple(Together(tuple(map(work, j.jaxpr.eqns))) for j in _jax.inner_jaxprs(equation))
    if inner and traits.cost is None:
        return OneOf(inner) if equation.primitive.name == "cond" else Together(inner, equation.params.get("length", 1))
    sizes = [v.aval.size for v in (*equation.invars, *equation.outvars) if hasattr(v.aval, "size")]
    return Entries(max(sizes, default=0), traits.cost or "ordinary")


def jacobian_entries(equation: _jax.JaxprEquation, position: int) -> float:
    """How many entries of the Jacobian in the operand at ``position`` are not zero, of a linear step and for what is
    known: of others, one for each entry of the operand.
    """
    known = of(equation.primitive.name).jacobian_entries
    return known(equation, position) if known is not None else equation.invars[position].aval.size


def is_real_float(dtype: DTypeLike) -> bool:
    """Whether values of ``dtype`` may be replaced by unbiased estimates."""
    return jnp.issubdtype(dtype, jnp.floating)
