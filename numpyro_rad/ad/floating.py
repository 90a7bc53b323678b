"""A codec that rounds each entry at random to a small floating-point number: errors are in proportion to entries."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from numpyro_rad.ad.codecs import EntryByEntry, check_group, work_dtype
from numpyro_rad.ad.layout import Layout
from numpyro_rad.ad.seeds import uniform
from numpyro_rad.mistakes import fields_checked

_FORMATS = {4: (3, 0), 6: (4, 1), 8: (5, 2)}
"""From bits to those of the exponent and of the mantissa, besides the sign. No pattern stands for infinity or NaN."""


def _fields(dtype: np.dtype) -> tuple[np.dtype, int, int]:
    """Of float32 or float64: integers of that size, bits of the mantissa, and what is added to exponents."""
    info = jnp.finfo(dtype)
    return np.dtype(f"int{info.bits}"), info.nmant, -int(info.minexp) + 1


def _exponent(x: jax.Array) -> jax.Array:
    """floor(log2(x)) of entries that are not negative; of zero a number below all others."""
    integer, mantissa, bias = _fields(x.dtype)
    return ((lax.bitcast_convert_type(x, integer) >> mantissa) - bias).astype(jnp.int32)


def _power(exponent: jax.Array, dtype: np.dtype) -> jax.Array:
    """2**exponent, to the bit: for exponents of normal numbers."""
    integer, mantissa, bias = _fields(dtype)
    return lax.bitcast_convert_type((exponent.astype(integer) + bias) << mantissa, dtype)


@lru_cache(maxsize=256)
def _normal_variance(bits: int, size: int) -> float:
    """Relative variance for groups of `size` standard normal entries, simulated with a fixed seed."""
    exponent_bits, mantissa = _FORMATS[bits]
    x = np.abs(np.random.default_rng(0).standard_normal((max(8, 2**16 // size), size)))
    most = x.max(1, keepdims=True)
    top = np.floor(np.log2(most)) + (most > (2 - 2.0**-mantissa) * 2 ** np.floor(np.log2(most)))
    lowest = top - (2**exponent_bits - 2)
    step = 2 ** (np.maximum(np.floor(np.log2(x)), lowest) - mantissa)
    part = x / step - np.floor(x / step)
    return float((part * (1 - part) * step**2).sum() / (x**2).sum())


@fields_checked
@dataclass(frozen=True)
class FloatRound(EntryByEntry):
    """Unbiased stochastic rounding to small floating-point numbers: the error is in proportion to each entry.

    Groups of neighbours share a power of two, as in the MX formats (Rouhani et al., "Microscaling data formats for deep
    learning", 2023), and each entry, of absolute value x between the numbers a <= x <= b of the format, becomes b with
    probability (x - a) / (b - a), else a, with its sign. Its variance (x - a)(b - x) is at most x**2 / 8, 24 or 80 for
    4, 6, 8 bits, as long as x is not less than 2**-5, 2**-13, 2**-29 times the largest of its group; of smaller ones
    the steps are all of one size. Zeros are exact.

    So entries may range over many powers of ten (probabilities, products of many factors, sentinels among data) and
    each keeps its own precision, where plain rounding has an error in proportion to the largest of 256. Where entries
    are of similar size, plain rounding is 3 to 60 times more precise at equal bytes. A NaN or an infinity makes its
    group NaN, and so does an entry that cannot be rounded up.

    :param bits: bits for each entry: 4 (sign and 3 of the exponent), 6 (4 of the exponent, 1 of the mantissa) or 8 (5
        and 2).
    :param group: most entries that share a power of two (1 byte, 2 for float64). A multiple of 8 between 8 and 65536.
    :raises ValueError: if an argument is none of these.
    """

    bits: int = 8
    group: int = 32

    def __post_init__(self) -> None:
        if self.bits not in _FORMATS:
            raise ValueError(f"bits={self.bits}: there are floating-point numbers of 4, 6 and 8 bits. Use 8.")
        check_group(self.group, 32)

    def _layout(self, shape: tuple[int, ...]) -> Layout:
        return Layout.of(shape, self.bits, group=self.group)

    def _lowest(self, layout: Layout, x: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
        """Of each group the exponent of the smallest number with a whole mantissa, and whether it can be coded.

        :param x: absolute values, (rows, parts, width).
        :param dtype: of the array that is coded, whose numbers the levels have to be.
        """
        exponent_bits, mantissa = _FORMATS[self.bits]
        info, most = jnp.finfo(dtype), layout.over_groups(jnp.max, x)
        top = jnp.maximum(_exponent(most), int(jnp.finfo(x.dtype).minexp))
        top = top + (most > np.asarray(2 - 2.0**-mantissa, x.dtype) * _power(top, x.dtype))
        # what is smaller than the smallest normal number would be flushed to zero; float16 is computed with in float32
        least = int(info.minexp) - info.nmant if info.bits == 16 and info.nmant > 8 else int(info.minexp)
        lowest = jnp.maximum(top - (2**exponent_bits - 2), least + mantissa)
        return lowest, jnp.isfinite(most) & (top < int(info.maxexp))

    def _neighbours(self, x: jax.Array, lowest: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Number of the level below each entry, |x| in steps from there to the next, and the step."""
        mantissa = _FORMATS[self.bits][1]
        above = jnp.maximum(_exponent(x) - lowest, 0)
        step = _power(lowest + above - mantissa, x.dtype)
        steps = x / step
        whole = jnp.floor(steps)
        return (above << mantissa) + whole.astype(jnp.int32), steps - whole, step

    def encode(self, seed: jax.Array, x: jax.Array) -> tuple[jax.Array, ...]:
        self._check(x)
        layout, dtype = self._layout(x.shape), x.dtype
        x = layout.split(x).astype(work_dtype(dtype))
        lowest, coded = self._lowest(layout, jnp.abs(x), dtype)
        number, part, _ = self._neighbours(jnp.abs(x), layout.to_entries(lowest))
        number = number + (uniform(seed, x.shape, x.dtype) < part)
        sign = np.int32(2 ** (self.bits - 1))
        number = jnp.clip(number, 0, sign - 1) + (x < 0) * sign  # what NaN was cast to must not spill into neighbours
        scale = self._scale_dtype(dtype)
        return *layout.pack(number), jnp.where(coded, lowest, jnp.iinfo(scale).max).astype(scale)

    def decode(self, seed: jax.Array, code: Sequence[jax.Array], like: jax.ShapeDtypeStruct) -> jax.Array:
        *packed, scale = code
        layout, dtype, mantissa = self._layout(like.shape), work_dtype(like.dtype), _FORMATS[self.bits][1]
        number, sign = layout.unpack(packed), np.int32(2 ** (self.bits - 1))
        size = number & (sign - 1)
        above = jnp.maximum((size >> mantissa) - 1, 0)
        lowest = layout.to_entries(scale).astype(jnp.int32)
        x = (size - (above << mantissa)).astype(dtype) * _power(lowest + above - mantissa, dtype)
        x = jnp.where(lowest == jnp.iinfo(scale.dtype).max, jnp.nan, jnp.where(number >= sign, -x, x))
        return layout.join(x, like.shape).astype(like.dtype)

    @staticmethod
    def _scale_dtype(dtype: DTypeLike) -> np.dtype:
        return np.dtype(np.int16 if work_dtype(dtype).itemsize == 8 else np.int8)

    def stored_bytes(self, shape: tuple[int, ...], dtype: DTypeLike) -> int:
        layout = self._layout(shape)
        return layout.packed_bytes(layout.width) + layout.groups * self._scale_dtype(dtype).itemsize

    def _variances(self, x: jax.Array) -> jax.Array:
        layout = self._layout(x.shape)
        grouped = jnp.abs(layout.split(x).astype(work_dtype(x.dtype)))
        lowest, coded = self._lowest(layout, grouped, x.dtype)
        _, part, step = self._neighbours(grouped, layout.to_entries(lowest))
        return layout.join(jnp.where(layout.to_entries(coded), part * (1 - part) * step**2, jnp.nan), x.shape)

    def relative_variance(self, shape: tuple[int, ...]) -> float:
        layout = self._layout(shape)
        return _normal_variance(self.bits, layout.block * layout.width) if layout.rows else 0.0

    def __str__(self) -> str:
        return f"{self.bits}-bit float" + (f" groups of {self.group}" if self.group != 32 else "")
