"""What a workload repeats, and the ways in which its rivals write it.

Some rivals are not another loss but another way to write the same layer (in bfloat16, or under ``jax.checkpoint``). So
a layer is given in parts, and each entry of ``VARIANTS`` makes one from any ``Layer``, or from any ``Block`` of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

Apply = Callable[..., Any]

# The name that the variant "named_product" gives to the products, for checkpoint policies that go by name.
PRODUCT_NAME = "layer_product"


@dataclass(frozen=True)
class Layer:
    """``activation(product(h, w) + shift(*rest))``: what a workload repeats, and what its rivals rewrite.

    :param product: linear in ``h`` for each ``w``, and affine in ``w`` for each ``h``.
    :param activation: elementwise; None for none.
    :param shift: of the other arguments, if any, an array that broadcasts against the product.
    :param looped: whether the layer is the body of a loop, where ``jax.checkpoint`` needs no barriers of its own.
    """

    product: Callable[[jax.Array, jax.Array], jax.Array]
    activation: Callable[[jax.Array], jax.Array] | None = None
    shift: Apply = lambda b: b
    looped: bool = False

    def preactivation(self, h: jax.Array, w: jax.Array, *rest: jax.Array) -> jax.Array:
        """What the activation is applied to."""
        return self.product(h, w) + self.shift(*rest) if rest else self.product(h, w)

    def __call__(self, h: jax.Array, w: jax.Array, *rest: jax.Array) -> jax.Array:
        z = self.preactivation(h, w, *rest)
        return z if self.activation is None else self.activation(z)


@dataclass(frozen=True)
class Block:
    """Several layers and what connects them, where that is what a workload repeats: ``function(layers, *args)``.

    :param layers: the parts that have the form of a ``Layer``; variants of single layers rewrite these.
    :param function: of the layers and the arguments; variants of the whole, such as ``jax.checkpoint``, rewrite this.
    :param looped: as in ``Layer``.
    """

    layers: tuple[Apply, ...]
    function: Callable[..., Any]
    looped: bool = False

    def __call__(self, *args: Any) -> Any:
        return self.function(self.layers, *args)


def layer_by_layer(variant: Callable[[Layer], Apply]) -> Callable[[Layer | Block], Apply]:
    """A variant of single layers, for blocks as well: each layer of the block is rewritten."""

    @wraps(variant)
    def rewrite(layer: Layer | Block) -> Apply:
        if isinstance(layer, Block):
            return replace(layer, layers=tuple(rewrite(part) for part in layer.layers))
        return variant(layer)

    return rewrite


def checkpoint(layer: Layer | Block) -> Apply:
    """The layer under ``jax.checkpoint``: only its arguments are stored."""
    return jax.checkpoint(layer, prevent_cse=not layer.looped)


@dataclass(frozen=True)
class Segmented:
    """The plain layer, with the loop around it cut in about sqrt(steps) segments; see ``loop``."""

    layer: Layer | Block

    def __call__(self, *args: Any) -> Any:
        return self.layer(*args)


def loop(apply: Apply, step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any) -> tuple[Any, Any]:
    """``lax.scan(step, carry, xs)``, the way ``apply`` (the layer that ``step`` calls) asks for it.

    For ``Segmented`` this is a scan over segments of steps, each segment under ``jax.checkpoint``. Stored are the state
    at the start of each segment and, in the backward sweep, the residuals of one segment. The number of segments is the
    largest divisor of the number of steps that does not exceed its square root.
    """
    if not isinstance(apply, Segmented):
        return lax.scan(step, carry, xs)
    steps = jax.tree.leaves(xs)[0].shape[0]
    segments = next(n for n in range(int(steps**0.5), 0, -1) if steps % n == 0)

    @jax.checkpoint
    def segment(carry: Any, xs: Any) -> tuple[Any, Any]:
        return lax.scan(step, carry, xs)

    pieces = jax.tree.map(lambda x: x.reshape(segments, steps // segments, *x.shape[1:]), xs)
    carry, ys = lax.scan(segment, carry, pieces)
    return carry, jax.tree.map(lambda y: y.reshape(steps, *y.shape[2:]), ys)


@layer_by_layer
def named_product(layer: Layer) -> Apply:
    """The layer with its product named, so that a checkpoint policy can save it by name."""
    return replace(layer, product=lambda h, w: checkpoint_name(layer.product(h, w), PRODUCT_NAME))


@layer_by_layer
def bfloat16_residuals(layer: Layer) -> Apply:
    """The layer computed in float32, with what the way back reads stored in bfloat16.

    Written by hand: two arrays per layer, the input h and the derivative of the activation. The cotangents stay
    float32, so the gradient is rounded (deterministic, slightly wrong) but no sum is taken in low precision. What
    connects the layers of a block is left to JAX, in float32. The barriers keep XLA from storing the float32 arrays and
    converting them late. JAX 0.12 then stores two bytes per entry; the CPU compiler of JAX 0.10.2 still fuses the
    rounding into its reader on the way back, so there this layer saves nothing.
    """

    @jax.custom_vjp
    def apply(h: jax.Array, w: jax.Array, *rest: jax.Array) -> jax.Array:
        return layer(h, w, *rest)

    def forward(h: jax.Array, w: jax.Array, *rest: jax.Array) -> tuple[jax.Array, Any]:
        y, stored = layer.preactivation(h, w, *rest), [h]
        if layer.activation is not None:
            y, slope = jax.jvp(layer.activation, (y,), (jnp.ones_like(y),))
            stored.append(slope)
        y, stored = lax.optimization_barrier((y, [array.astype(jnp.bfloat16) for array in stored]))
        return y, (stored, w, rest)

    def backward(residuals: Any, ct: jax.Array) -> tuple[jax.Array, ...]:
        stored, w, rest = residuals
        stored, ct = lax.optimization_barrier((stored, ct))
        h, *slope = (array.astype(ct.dtype) for array in stored)
        _, pull = jax.vjp(layer.preactivation, h, w, *rest)  # its value is not needed and not computed
        return pull(ct * slope[0] if slope else ct)

    apply.defvjp(forward, backward)
    return apply


def bfloat16(layer: Layer | Block) -> Apply:
    """The layer computed in bfloat16, so that its residuals are bfloat16 where the hardware's compiler agrees.

    The sampled float32 weights are cast on entry and the hidden state stays bfloat16 from layer to layer; latent
    variables, their densities, the output layer and the optimizer stay float32. This is usual mixed precision: the
    gradient is rounded, hence slightly wrong, and not random. XLA's CPU backend widens bfloat16 arithmetic to float32,
    residuals included, so it saves nothing there.
    """
    return lambda *args: layer(*jax.tree.map(lambda a: a.astype(jnp.bfloat16), args))


VARIANTS: dict[str, Callable[[Layer | Block], Apply]] = {
    "plain": lambda layer: layer,
    "named_product": named_product,
    "bfloat16_residuals": bfloat16_residuals,
    "bfloat16": bfloat16,
    "checkpoint": checkpoint,
    "checkpoint_sqrt": Segmented,
}
