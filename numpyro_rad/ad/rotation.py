"""A codec that turns an array at random before it rounds: the error depends on its length alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from scipy.special import ndtr, ndtri

from numpyro_rad.ad.codecs import Codec, cast_unbiased, work_dtype
from numpyro_rad.ad.layout import Layout
from numpyro_rad.ad.seeds import fold, linear_index, signs, uniform
from numpyro_rad.mistakes import fields_checked


@lru_cache
def _levels(bits: int) -> np.ndarray:
    """The 2**bits levels that are closest to a standard normal number on average, rising (Max 1960, Lloyd 1982)."""
    levels = ndtri((np.arange(2**bits) + 0.5) / 2**bits)
    for _ in range(5000):
        ends = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        density = np.exp(-(ends**2) / 2) / math.sqrt(2 * math.pi)
        levels = -np.diff(density) / np.diff(ndtr(ends))  # the mean between two ends
    return (levels - levels[::-1]) / 2


def _nearest(u: jax.Array, bits: int) -> jax.Array:
    """The number of the level that is nearest to each entry."""
    levels = _levels(bits)
    above = (u > np.asarray(end, u.dtype) for end in (levels[1:] + levels[:-1]) / 2)
    return sum((a.astype(jnp.int32) for a in above), jnp.zeros(u.shape, jnp.int32))


def _level(number: jax.Array, bits: int, dtype: DTypeLike) -> jax.Array:
    """The levels of these numbers, without a table to look them up in: that is slow on a CPU."""
    levels = _levels(bits).astype(dtype)
    level = jnp.full(number.shape, levels[0])
    for i, step in enumerate(np.diff(levels)):
        level = level + jnp.where(number > i, step, 0)
    return level


@lru_cache(maxsize=256)
def _relative_variance(bits: int, size: int) -> float:
    """Of a turned group, whatever is in it: simulated with a fixed seed. A single entry is exact."""
    if size == 1:
        return 0.0
    x = np.random.default_rng(0).standard_normal((max(64, 2**18 // size), size))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    levels = _levels(bits)
    q = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, x * math.sqrt(size))]
    return float(((q**2).sum(1) / (x * q).sum(1) ** 2 - 1).mean())


@fields_checked
@dataclass(frozen=True)
class RotatedRound(Codec):
    """Rounding after a random rotation: EDEN (Vargaftik et al., ICML 2022).

    Each group x of entries is turned, z = R x, with a rotation R that is uniform over all of them, and every entry of z
    becomes the nearest of the 2**bits levels that suit normal numbers best (times the length of x over the square root
    of the group's size): that is what the entries of z look like, whatever x is. With the levels q and the factor
    s = (x . x) / (z . q), which is stored, the decoder returns y = s R^T q. Unbiased: x . y = x . x always, and to turn
    what is orthogonal to x leaves the distribution of R as it is, so that the mean of y has no other direction than x.
    The same two facts say what the variance is: the error is orthogonal to x and alike in all directions there, so

        Var(d . y) = c ((x . x) (d . d) - (d . x)**2) / (n - 1),

    for a group of n, with c = 0.56, 0.13, 0.034, 0.009 for 1 to 4 bits.

    So outliers do no harm, and few bits have much less variance than with plain rounding: a twelfth at one bit for
    normal entries, a quarter at two. Where groups are constant or have two values, plain rounding is exact and this is
    not; where entries are small in a group of large ones, their errors are as large as those of the others.

    One matrix is drawn for an array, and random signs for each of its groups. The errors of different groups are
    uncorrelated but for something like 1 / n**2. A NaN or an infinity makes its group NaN.

    :param bits: bits for each entry, from 1 to 4.
    :param group: most entries that are turned together and share a factor (2 bytes, 8 for float64). To turn one takes
        as many multiplications, twice; to draw a matrix of 64 a tenth of a millisecond on a CPU, of 128 one. A multiple
        of 8 between 8 and 1024.
    :raises ValueError: if an argument is none of these.
    """

    bits: int = 2
    group: int = 64
    work = 5.0
    start = 8.0

    def __post_init__(self) -> None:
        if self.bits not in (1, 2, 3, 4):
            raise ValueError(f"bits={self.bits}: with more than 4, plain rounding is as good. Use 1, 2, 3 or 4.")
        if not (isinstance(self.group, int) and 8 <= self.group <= 1024 and self.group % 8 == 0):
            raise ValueError(
                f"group={self.group}: a matrix of that size is drawn, and groups are stored in whole bytes. Use a "
                "multiple of 8 between 8 and 1024, such as 64."
            )

    def _layout(self, shape: tuple[int, ...]) -> Layout:
        return Layout.of(shape, self.bits, group=self.group)

    @staticmethod
    def _size(layout: Layout) -> int:
        """Entries of a group, padding included."""
        return layout.block * layout.width

    def _groups(self, layout: Layout, x: jax.Array) -> jax.Array:
        """Entries as (groups, entries of a group)."""
        return layout.split(x).reshape(layout.groups, self._size(layout)).astype(work_dtype(x.dtype))

    @staticmethod
    def _runs(layout: Layout, grouped: jax.Array) -> jax.Array:
        """The same as (rows, parts, width)."""
        return grouped.reshape(layout.rows, layout.parts, layout.width)

    def _rotation(self, seed: jax.Array, layout: Layout, dtype: np.dtype) -> tuple[jax.Array, jax.Array]:
        """A matrix for all groups, uniform over rotations and reflections, and signs for each: (n, n), (groups, n)."""
        n = self._size(layout)
        inside = np.asarray(1 - 2.0**-23, dtype)  # of what erf_inv makes finite numbers of
        normal = lax.erf_inv((2 * uniform(fold(seed, 1), (n, n), dtype) - 1) * inside)
        q, r = jnp.linalg.qr(normal)
        return q * jnp.where(jnp.diag(r) < 0, -1, 1).astype(dtype), signs(fold(seed, 2), (layout.groups, n), dtype)

    def encode(self, seed: jax.Array, x: jax.Array) -> tuple[jax.Array, ...]:
        self._check(x)
        layout, dtype = self._layout(x.shape), x.dtype
        x = self._groups(layout, x)
        largest = jnp.max(jnp.abs(x), axis=1, keepdims=True, initial=0)
        x = x / jnp.where(largest > 0, largest, 1)
        matrix, turned = self._rotation(seed, layout, x.dtype)
        z = jnp.matmul(x * turned, matrix, precision="highest")
        square = (x**2).sum(1, keepdims=True)
        number = _nearest(z * lax.rsqrt(jnp.where(square > 0, square, 1) / x.shape[1]), self.bits)
        # a sum over what is made of so many comparisons would not be vectorized
        along = (z * lax.optimization_barrier(_level(number, self.bits, x.dtype))).sum(1, keepdims=True)
        factor = largest * square / jnp.where(square > 0, along, 1)
        factor = jnp.where(jnp.isfinite(factor), factor, jnp.nan)[:, 0]
        return *layout.pack(self._runs(layout, number)), cast_unbiased(factor, self._stored(dtype), fold(seed, 3))

    def decode(self, seed: jax.Array, code: Sequence[jax.Array], like: jax.ShapeDtypeStruct) -> jax.Array:
        *packed, factor = code
        layout, dtype = self._layout(like.shape), work_dtype(like.dtype)
        number = layout.unpack(packed).reshape(layout.groups, self._size(layout))
        matrix, turned = self._rotation(seed, layout, dtype)
        level = _level(number, self.bits, dtype) * factor.astype(dtype)[:, None]
        x = jnp.matmul(level, matrix.T, precision="highest") * turned
        return cast_unbiased(layout.join(self._runs(layout, x), like.shape), like.dtype, fold(seed, 4))

    @staticmethod
    def _stored(dtype: DTypeLike) -> np.dtype:
        """Of the factors: they are rounded at random, too, for which eight bits are enough."""
        return np.dtype(np.float64) if work_dtype(dtype).itemsize == 8 else np.dtype(jnp.bfloat16)

    def stored_bytes(self, shape: tuple[int, ...], dtype: DTypeLike) -> int:
        layout = self._layout(shape)
        return layout.packed_bytes(layout.width) + layout.groups * self._stored(dtype).itemsize

    def variance(self, x: jax.Array) -> jax.Array:
        layout = self._layout(x.shape)
        real = self._real(layout)
        grouped = self._groups(layout, x)
        squares, own = (grouped**2).sum(1), (grouped**2 * real).sum(1)
        return self._factor(layout) * (real.sum(1) * squares - own).sum()

    def variance_along(self, x: jax.Array, direction: jax.Array) -> jax.Array:
        layout = self._layout(x.shape)
        grouped = self._groups(layout, x)
        along = self._groups(layout, direction) * self._real(layout)
        squares = (grouped**2).sum(1) * (along**2).sum(1)
        return self._factor(layout) * (squares - (grouped * along).sum(1) ** 2).sum()

    def _factor(self, layout: Layout) -> float:
        n = self._size(layout)
        return _relative_variance(self.bits, n) / max(1, n - 1)

    def _real(self, layout: Layout) -> jax.Array:
        """1 where there are entries and 0 where there is padding, as (groups, entries of a group) or something that is
        broadcast to it."""
        if layout.parts * layout.width == layout.inner:
            return jnp.ones((1, self._size(layout)))
        place = linear_index((layout.rows, layout.parts * layout.width)) % np.uint32(layout.parts * layout.width)
        return (place < layout.inner).astype(jnp.float32).reshape(layout.groups, self._size(layout))

    def relative_variance(self, shape: tuple[int, ...]) -> float:
        layout = self._layout(shape)
        return _relative_variance(self.bits, self._size(layout)) if layout.rows else 0.0

    def __str__(self) -> str:
        return f"{self.bits}-bit, rotated" + (f" by {self.group}" if self.group != 64 else "")
