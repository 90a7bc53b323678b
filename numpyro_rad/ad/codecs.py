"""Codecs: a stored array replaced by a cheap random code that is right on average.

Reverse-mode AD stores residuals between the forward and the backward sweep. The gradient is multilinear in those that
may be coded, so storing a random code instead of an array x leaves the gradient unbiased as long as

    E[decode(seed, encode(seed, x))] = x,        the expectation being over the seed,

and costs variance tr Cov(decode(encode(x))) instead of memory. Every codec below satisfies this for every entry, and
reports its bytes and its variance in closed form so that a plan can be priced before anything runs.

The randomness follows from a seed (see `seeds.py`), so the decoder makes the same draws again rather than storing them.
``planning`` asks for bytes and variances, ``sweep`` encodes and decodes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from numpyro_rad.ad.layout import Layout, sampled_rows
from numpyro_rad.ad.seeds import fold, hash_words, linear_index, signs, u32, uniform
from numpyro_rad.mistakes import fields_checked


def _itemsize(dtype: DTypeLike) -> int:
    return (dtype if hasattr(dtype, "itemsize") and not isinstance(dtype, type) else np.dtype(dtype)).itemsize  # pyright: ignore[reportAttributeAccessIssue]


def _is_real_float(dtype: DTypeLike) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and _itemsize(dtype) in (2, 4, 8)


def _work_dtype(dtype: DTypeLike) -> np.dtype:
    """Arithmetic is in float64 for float64 and in float32 for all else."""
    return np.dtype(np.float64 if _itemsize(dtype) == 8 else np.float32)


def _spacing(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Distance between the numbers of a half-precision `dtype` at the float32 values x."""
    power = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint32) & u32(0x7F800000), jnp.float32)
    info = jnp.finfo(dtype)
    smallest = max(float(info.smallest_subnormal), 2.0**-126)  # float32 subnormals are flushed to zero on most devices
    return jnp.maximum(power * np.float32(2.0**-info.nmant), np.float32(smallest))


def _to_nearest(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Nearest number that `dtype` holds, still in float32: XLA drops a cast there and back, but not this."""
    return jnp.round(x / _spacing(x, dtype)) * _spacing(x, dtype) if _itemsize(dtype) == 2 else x


def _cast_unbiased(x: jax.Array, dtype: DTypeLike, seed: jax.Array) -> jax.Array:
    """x in `dtype`; to half precision by stochastic rounding, since rounding to nearest would bias the mean."""
    if _itemsize(dtype) == 2:
        scaled, floor = x / _spacing(x, dtype), jnp.floor(x / _spacing(x, dtype))
        x = (floor + (uniform(seed, x.shape, x.dtype) < scaled - floor)) * _spacing(x, dtype)
    return x.astype(dtype)


@dataclass(frozen=True)
class Codec:
    """A random code with E[decode(encode(x))] = x. Hashable and without state; the seed is always the first argument.

    A subclass defines the five methods that raise here and `__str__`, and may narrow or widen `supports`. Variances are
    those of the estimator; storing half precision adds its rounding noise, below 1e-5 of the squared norm of the code.
    """

    exact = False  #: whether decode(encode(x)) equals x bit for bit
    work = 1.0  #: time for encoding and decoding, relative to plain rounding

    def encode(self, seed: jax.Array, x: jax.Array) -> tuple[jax.Array, ...]:
        """The code of x, a tuple of arrays whose sizes add up to `stored_bytes`.

        :param seed: uint32 array of shape (2,), a different one for every array, see `fold`.
        :param x: array that `supports` accepts.
        :raises ValueError: if this codec cannot code x.
        """
        raise NotImplementedError

    def decode(self, seed: jax.Array, code: Sequence[jax.Array], like: jax.ShapeDtypeStruct) -> jax.Array:
        """Unbiased estimate of the encoded array.

        :param seed: the seed that the array was encoded with.
        :param code: what `encode` returned.
        :param like: `jax.ShapeDtypeStruct` of the encoded array.
        """
        raise NotImplementedError

    def stored_bytes(self, shape: tuple[int, ...], dtype: DTypeLike) -> int:
        """Bytes of the code of an array, to the byte. The seed is made again from the key and not counted."""
        raise NotImplementedError

    def variance(self, x: jax.Array) -> jax.Array:
        """tr Cov(decode(encode(x))) over the seed, given x: a scalar in the units of x squared."""
        raise NotImplementedError

    def variance_along(self, x: jax.Array, direction: jax.Array) -> jax.Array:
        """Var <direction, decode(encode(x))> over the seed, given x: what the code of x adds to the variance of a
        number whose derivative in x is `direction`, to first order.

        Unless a codec knows better, as if the errors of all entries had equal variance and no correlation.
        """
        return self.variance(x) * jnp.mean(direction.astype(_work_dtype(x.dtype)) ** 2)

    def relative_variance(self, shape: tuple[int, ...]) -> float:
        """Variance over the squared norm, for i.i.d. standard normal entries: a float known before any data."""
        raise NotImplementedError

    def supports(self, shape: tuple[int, ...], dtype: DTypeLike) -> bool:
        """Whether arrays of this shape and dtype can be coded."""
        return len(shape) >= self._least_axes and _is_real_float(dtype)

    def _check(self, x: jax.Array) -> None:
        if not self.supports(x.shape, x.dtype):
            raise ValueError(
                f"codec '{self}' cannot code an array of dtype {x.dtype} and shape {x.shape}: "
                f"it takes {self._needs} with at least {self._least_axes} axes. Use Keep() for this array."
            )

    _needs, _least_axes = "real floating-point arrays (float16, bfloat16, float32, float64)", 0


class _Noiseless(Codec):
    def variance(self, x: jax.Array) -> jax.Array:
        return jnp.zeros((), jnp.float32)

    def relative_variance(self, shape: tuple[int, ...]) -> float:
        return 0.0


class _Whole(_Noiseless):
    """The array itself."""

    def encode(self, seed: jax.Array, x: jax.Array) -> tuple[jax.Array, ...]:
        return (x,)

    def decode(self, seed: jax.Array, code: Sequence[jax.Array], like: jax.ShapeDtypeStruct) -> jax.Array:
        return code[0]

    def stored_bytes(self, shape: tuple[int, ...], dtype: DTypeLike) -> int:
        return math.prod(shape) * _itemsize(dtype)


@dataclass(frozen=True)
class Keep(_Whole):
    """The array itself: exact, no saving, any dtype (PRNG keys too)."""

    exact = True

    def supports(self, shape: tuple[int, ...], dtype: DTypeLike) -> bool:
        return True

    def __str__(self) -> str:
        return "keep"


@dataclass(frozen=True)
class Offload(Keep):
    """The array itself, in the memory of the host until it is read: exact, no bytes on the device, any dtype."""

    def encode(self, seed: jax.Array, x: jax.Array) -> tuple[jax.Array, ...]:
        return (jax.device_put(x, jax.memory.Space.Host),)

    def decode(self, seed: jax.Array, code: Sequence[jax.Array], like: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put(code[0], jax.memory.Space.Device)

    def stored_bytes(self, shape: tuple[int, ...], dtype: DTypeLike) -> int:
        return 0

    def __str__(self) -> str:
        return "keep on the host"


@dataclass(frozen=True)
class InResult(Keep):
    """The array itself, which is the gradient in an input up to a factor: exact, and no bytes, for it is where the
    result goes."""

    def stored_bytes(self, shape: tuple[int, ...], dtype: DTypeLike) -> int:
        return 0

    def __str__(self) -> str:
        return "keep, as a result"


@dataclass(frozen=True)
class PassThrough(_Whole):
    """The array itself in the place of a code, to see what a code would do there."""

    def __str__(self) -> str:
        return "pass through"


@dataclass(frozen=True)
class BitMask(_Noiseless):
    """Booleans, eight to a byte: exact. Holds the two-valued derivatives of relu, max, select."""

    exact = True
    _needs = "boolean arrays"

    def encode(self, seed: jax.Array, x: jax.Array) -> tuple[jax.Array, ...]:
        self._check(x)
        layout = Layout.of(x.shape, 8)
        return layout.pack(layout.split(x))

    def decode(self, seed: jax.Array, code: Sequence[jax.Array], like: jax.ShapeDtypeStruct) -> jax.Array:
        layout = Layout.of(like.shape, 8)
        return layout.join(layout.unpack(code) != 0, like.shape)

    def stored_bytes(self, shape: tuple[int, ...], dtype: DTypeLike) -> int:
        layout = Layout.of(shape, 8)
        return layout.packed_bytes(layout.width)

    def supports(self, shape: tuple[int, ...], dtype: DTypeLike) -> bool:
        return dtype == jnp.bool_

    def __str__(self) -> str:
        return "1-bit mask"


@lru_cache(maxsize=256)
def _normal_rounding_variance(bits: int, size: int) -> float:
    """Relative variance of rounding groups of `size` standard normal entries, simulated with a fixed seed."""
    x = np.random.default_rng(0).standard_normal((max(8, 2**16 // size), size))
    low, span = x.min(1, keepdims=True), np.ptp(x, 1, keepdims=True)
    place = (x - low) / np.where(span > 0, span, 1) * (2**bits - 1)
    part = place - np.clip(np.floor(place), 0, 2**bits - 2)
    return float((part * (1 - part) * (span / (2**bits - 1)) ** 2).sum() / (x**2).sum())


@fields_checked
@dataclass(frozen=True)
class StochasticRound(Codec):
    """Unbiased stochastic rounding to 2**bits evenly spaced levels, from the minimum to the maximum of each group.

    An entry x between the levels a <= x <= b becomes b with probability (x - a) / (b - a), else a, independently over
    entries, so its mean is x and its variance (x - a)(b - x). The levels are the numbers that the decoder returns,
    rounding to the array's dtype included, so floating point adds no bias to half precision either. The error stays
    below one step, (maximum - minimum) / (2**bits - 1); groups of equal entries are exact. A NaN or an infinity makes
    its group NaN, and so does a range that overflows. The decoder draws no random bits.

    At equal bytes this has 50 to 1000 times less variance than sampling or projecting. Per-group rounding of stored
    activations: Chen et al., "ActNN", ICML 2021.

    :param bits: bits for each entry, one of 1, 2, 4, 8.
    :param group: most entries that share a minimum and a step (8 bytes for each group, 16 for float64); each row is cut
        into equal groups of at most so many, and short rows are taken together. A multiple of 8 between 8 and 65536.
    :raises ValueError: if `bits` or `group` is none of these.
    """

    bits: int = 2
    group: int = 256

    def __post_init__(self) -> None:
        if self.bits not in (1, 2, 4, 8):
            raise ValueError(f"bits={self.bits}: whole codes must fill a byte. Use 1, 2, 4 or 8.")
        if not (isinstance(self.group, int) and 8 <= self.group <= 65536 and self.group % 8 == 0):
            raise ValueError(
                f"group={self.group}: a group is stored in whole bytes, so its size must be a multiple of 8 between "
                "8 and 65536. Try 256."
            )

    def _layout(self, shape: tuple[int, ...]) -> Layout:
        return Layout.of(shape, 8 // self.bits, group=self.group)

    def _fit(self, layout: Layout, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Minimum and step of each group, (groups,) each."""
        low, high = layout.over_groups(jnp.min, x), layout.over_groups(jnp.max, x)
        step = (high - low) / np.asarray(2**self.bits - 1, x.dtype)
        return low, jnp.where(jnp.isfinite(step), step, jnp.nan)

    def _neighbours(
        self, layout: Layout, x: jax.Array, low: jax.Array, step: jax.Array, dtype: DTypeLike
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Number of the level below each entry, that level, and the next."""
        low, step = layout.to_entries(low), layout.to_entries(step)
        inverse = jnp.where(step > jnp.finfo(step.dtype).tiny, 1 / step, 0)  # groups of equal entries: number 0
        number = jnp.clip(jnp.floor((x - low) * inverse), 0, 2**self.bits - 2)
        return number, _to_nearest(low + number * step, dtype), _to_nearest(low + (number + 1) * step, dtype)

    def encode(self, seed: jax.Array, x: jax.Array) -> tuple[jax.Array, ...]:
        self._check(x)
        layout, dtype = self._layout(x.shape), x.dtype
        x = layout.split(x).astype(_work_dtype(dtype))
        low, step = self._fit(layout, x)
        number, below, above = self._neighbours(layout, x, low, step, dtype)
        up = uniform(seed, x.shape, x.dtype) * (above - below) < x - below
        return *layout.pack(number + up), low, step

    def decode(self, seed: jax.Array, code: Sequence[jax.Array], like: jax.ShapeDtypeStruct) -> jax.Array:
        layout = self._layout(like.shape)
        return layout.join(self._levels(layout, code, like.dtype), like.shape).astype(like.dtype)

    def _levels(self, layout: Layout, code: Sequence[jax.Array], dtype: DTypeLike) -> jax.Array:
        """The level of each entry that was encoded."""
        *packed, low, step = code
        number = layout.unpack(packed).astype(low.dtype)
        return _to_nearest(layout.to_entries(low) + number * layout.to_entries(step), dtype)

    def stored_bytes(self, shape: tuple[int, ...], dtype: DTypeLike) -> int:
        layout = self._layout(shape)
        return layout.packed_bytes(layout.width) + layout.groups * 2 * _work_dtype(dtype).itemsize

    def _variances(self, x: jax.Array) -> jax.Array:
        """Variance of each entry; errors are independent from entry to entry."""
        layout = self._layout(x.shape)
        grouped = layout.split(x).astype(_work_dtype(x.dtype))
        _, below, above = self._neighbours(layout, grouped, *self._fit(layout, grouped), x.dtype)
        return layout.join((grouped - below) * (above - grouped), x.shape)

    def variance(self, x: jax.Array) -> jax.Array:
        return self._variances(x).sum()

    def variance_along(self, x: jax.Array, direction: jax.Array) -> jax.Array:
        variances = self._variances(x)
        return (variances * direction.astype(variances.dtype) ** 2).sum()

    def relative_variance(self, shape: tuple[int, ...]) -> float:
        layout = self._layout(shape)
        return _normal_rounding_variance(self.bits, layout.block * layout.width) if layout.rows else 0.0

    def __str__(self) -> str:
        return f"{self.bits}-bit" + (f" groups of {self.group}" if self.group != 256 else "")


@lru_cache(maxsize=256)
def _normal_step_variance(bits: int, size: int) -> float:
    """Relative variance of an error that is uniform over a step, for groups as above."""
    x = np.random.default_rng(0).standard_normal((max(8, 2**16 // size), size))
    step = np.ptp(x, 1) / (2**bits - 1)
    return float((step**2 / 12).mean() / (x**2).mean())


@fields_checked
@dataclass(frozen=True)
class DitheredRound(StochasticRound):
    """Rounding with subtractive dither: the decoder takes back the noise with which the encoder rounded.

    The code is that of `StochasticRound`: an entry at n + p steps above the minimum, n whole and 0 <= p < 1, becomes
    the number n + 1 if a uniform draw u is below p, else n. The decoder makes u again and returns the place
    number + u - 1/2 instead of number. What is wrong with that is uniform over one step, from -1/2 to 1/2, whatever p
    is: mean zero, and a variance of step**2 / 12 for every entry, where plain rounding has p (1 - p) step**2. That is
    half as much where entries lie anywhere between the levels, and a third in the middle of one bit. Where they lie
    next to levels it is more: zeros behind a ReLU, one-hot or saturated probabilities are better rounded plainly.

    Where a step is about as small as the spacing of the numbers themselves nothing is taken back; groups of equal
    entries are exact. A NaN or an infinity makes its group NaN. Decoding draws the random bits once more.

    Subtractive dither: Schuchman, "Dither signals and their effect on quantization noise", IEEE Trans. Commun. Technol.
    1964; Gray and Stockham, "Dithered quantizers", IEEE Trans. Inf. Theory 1993.

    :param bits: bits for each entry, one of 1, 2, 4, 8.
    :param group: as in `StochasticRound`.
    :raises ValueError: if `bits` or `group` is none of these.
    """

    work = 1.5

    def _width(self, low: jax.Array, step: jax.Array) -> jax.Array:
        """Over how much the errors of each group are spread: a step, or nothing where rounding what is decoded to the
        numbers that there are would bias it."""
        largest = jnp.maximum(jnp.abs(low), jnp.abs(low + (2**self.bits - 1) * step))
        fine = step > 32 * np.asarray(jnp.finfo(low.dtype).eps, low.dtype) * largest
        return jnp.where(fine | jnp.isnan(step), step, 0)

    def decode(self, seed: jax.Array, code: Sequence[jax.Array], like: jax.ShapeDtypeStruct) -> jax.Array:
        *_, low, step = code
        layout = self._layout(like.shape)
        level = self._levels(layout, code, like.dtype)
        middle = np.asarray(0.5 - 2.0**-25, low.dtype)  # the mean of the draws, which are multiples of 2**-24
        noise = uniform(seed, level.shape, low.dtype) - middle
        whole = level + noise * layout.to_entries(self._width(low, step))
        return _cast_unbiased(layout.join(whole, like.shape), like.dtype, fold(seed, 1))

    def _variances(self, x: jax.Array) -> jax.Array:
        layout = self._layout(x.shape)
        grouped = layout.split(x).astype(_work_dtype(x.dtype))
        low, step = self._fit(layout, grouped)
        _, below, above = self._neighbours(layout, grouped, low, step, x.dtype)
        width = layout.to_entries(self._width(low, step))
        plain = (grouped - below) * (above - grouped)
        between = above - below
        taken = jnp.where(between > 0, plain * width / jnp.where(between > 0, between, 1), 0)  # about all of it
        return layout.join(plain - taken + width**2 / 12, x.shape)

    def relative_variance(self, shape: tuple[int, ...]) -> float:
        layout = self._layout(shape)
        return _normal_step_variance(self.bits, layout.block * layout.width) if layout.rows else 0.0

    def __str__(self) -> str:
        return f"{super().__str__()}, dithered"


@fields_checked
@dataclass(frozen=True)
class SampledRound(StochasticRound):
    """Stochastic rounding of a sampled part: below one bit for an entry.

    Groups are rounded as by `StochasticRound`, but of every `size` neighbours only one, chosen uniformly, is stored.
    The others are decoded as the mean m of their group, which is stored as well, and the kept one, decoded from its
    level as q, as m + size (q - m). Mean x, variance (size - 1)(x - m)**2 + size (x - a)(b - x) for an entry between
    the levels a and b. For normal entries 2 bits of 1 of 4, about half a bit, have a tenth of the variance of one
    float32 of 64 (`SampleAxis`), and 2 bits of 1 of 2 a third of that of 1 bit of each. Which entries were kept follows
    from the seed. A NaN or an infinity makes its group NaN.

    :param bits: bits of each stored entry, one of 1, 2, 4, 8.
    :param group: most entries that share a minimum, a step and a mean (12 bytes, 24 for float64).
    :param size: how many entries share a stored one, at least 2.
    :raises ValueError: if an argument is none of these.
    """

    bits: int = 2
    group: int = 1024
    size: int = 4
    work = 2.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.size, int) and self.size >= 2):
            raise ValueError(f"size={self.size}: one of so many entries is stored, so at least 2. Try 4.")

    def _layout(self, shape: tuple[int, ...]) -> tuple[Layout, np.ndarray]:
        """The layout, and for each stratum of the runs of a row how many entries there are to choose from: the last
        ones of a run may have fewer, and those that are padding have none."""
        layout = Layout.of(shape, 8 // self.bits, group=self.group)
        place = np.arange(-(-layout.width // self.size) * self.size)
        real = (place < layout.width) & (np.arange(layout.parts)[:, None] * layout.width + place < layout.inner)
        return layout, real.reshape(layout.parts, -1, self.size).sum(-1)

    def _chosen(self, seed: jax.Array, layout: Layout, sizes: np.ndarray) -> jax.Array:
        """(rows, parts, strata, size), true at the one kept entry of each stratum."""
        slot = hash_words(seed, linear_index((layout.rows, *sizes.shape)))
        slot = slot % jnp.asarray(np.maximum(sizes, 1), jnp.uint32)
        return slot[..., None] == jnp.arange(self.size, dtype=jnp.uint32)

    def _strata(self, x: jax.Array, layout: Layout) -> jax.Array:
        """Entries of runs as (rows, parts, strata, size)."""
        padding = -layout.width % self.size
        x = jnp.pad(x, ((0, 0), (0, 0), (0, padding)), mode="edge") if padding and x.size else x
        return x.reshape(layout.rows, layout.parts, -(-layout.width // self.size), self.size)

    def _means(self, x: jax.Array, layout: Layout, step: jax.Array) -> jax.Array:
        """Mean of each group, (groups,), padding not counted."""
        counts = np.clip(layout.inner - np.arange(layout.parts) * layout.width, 0, layout.width)
        real = np.arange(layout.width) < counts[:, None]
        count = jnp.broadcast_to(counts.astype(x.dtype)[:, None], (layout.rows, layout.parts, 1))
        mean = layout.over_groups(jnp.sum, jnp.where(real, x, 0)) / jnp.maximum(layout.over_groups(jnp.sum, count), 1)
        return jnp.where(jnp.isfinite(step), mean, jnp.nan)

    def encode(self, seed: jax.Array, x: jax.Array) -> tuple[jax.Array, ...]:
        self._check(x)
        (layout, sizes), dtype = self._layout(x.shape), x.dtype
        x = layout.split(x).astype(_work_dtype(dtype))
        low, step = self._fit(layout, x)
        number, below, above = self._neighbours(layout, x, low, step, dtype)
        number = self._strata(number + (uniform(seed, x.shape, x.dtype) * (above - below) < x - below), layout)
        kept = jnp.where(self._chosen(fold(seed, 1), layout, sizes), number, 0).sum(-1)
        return *layout.pack(kept), low, step, self._means(x, layout, step)

    def decode(self, seed: jax.Array, code: Sequence[jax.Array], like: jax.ShapeDtypeStruct) -> jax.Array:
        layout, sizes = self._layout(like.shape)
        packed, (low, step, mean) = code[:-3], (layout.to_entries(a) for a in code[-3:])
        number = layout.unpack(packed).astype(low.dtype)
        level = _to_nearest(low + number * step, like.dtype)
        scaled = mean + jnp.asarray(sizes, low.dtype) * (level - mean)
        dense = jnp.where(self._chosen(fold(seed, 1), layout, sizes), scaled[..., None], mean[..., None])
        dense = dense.reshape(layout.rows, layout.parts, sizes.shape[1] * self.size)[..., : layout.width]
        return _cast_unbiased(layout.join(dense, like.shape), like.dtype, fold(seed, 2))

    def stored_bytes(self, shape: tuple[int, ...], dtype: DTypeLike) -> int:
        layout, sizes = self._layout(shape)
        return layout.packed_bytes(sizes.shape[1]) + layout.groups * 3 * _work_dtype(dtype).itemsize

    def variance(self, x: jax.Array) -> jax.Array:
        return self.variance_along(x, jnp.ones_like(x), together=False)

    def variance_along(self, x: jax.Array, direction: jax.Array, together: bool = True) -> jax.Array:
        layout, sizes = self._layout(x.shape)
        grouped = layout.split(x).astype(_work_dtype(x.dtype))
        along = layout.split(direction).astype(grouped.dtype)
        low, step = self._fit(layout, grouped)
        _, below, above = self._neighbours(layout, grouped, low, step, x.dtype)
        errors = (grouped - below) * (above - grouped) * along**2
        parts = (grouped - layout.to_entries(self._means(grouped, layout, step))) * along
        real = np.arange(self.size) < sizes[..., None]
        errors, parts = (jnp.where(real, self._strata(a, layout), 0) for a in (errors, parts))
        weights = jnp.asarray(sizes, errors.dtype)
        taken = (parts.sum(-1) ** 2 if together else (parts**2).sum(-1)).sum()
        return (weights * (errors.sum(-1) + (parts**2).sum(-1))).sum() - taken

    def relative_variance(self, shape: tuple[int, ...]) -> float:
        layout, sizes = self._layout(shape)
        if not layout.rows:
            return 0.0
        size = float((sizes**2).sum() / sizes.sum())  # of the stratum of an entry, on average
        width = layout.block * layout.width
        return (size - 1) * (1 - 1 / width) + size * _normal_rounding_variance(self.bits, width)

    def __str__(self) -> str:
        return f"{self.bits}-bit, 1 of {self.size}"


@fields_checked
@dataclass(frozen=True)
class SampleAxis(Codec):
    """Stratified sampling of the last axis, the estimator of RAD (Oktay et al., ICLR 2021).

    The last axis is cut into strata of s = round(1 / keep) neighbours (the last may be smaller). One entry of each,
    chosen uniformly, is kept and scaled by the size of its stratum, the others become zero: mean x, variance
    (s - 1) x**2 for each entry. Which entries were kept follows from the seed and is not stored. A vector is seen as
    rows of some 256 entries. A NaN or an infinity makes all the kept entries of its row NaN, and the whole row if
    centred.

    :param keep: fraction of the entries that is stored, above 0 and at most 2/3.
    :param per: "row" for another choice in each row (all axes but the last), "shared" for one choice for all rows, so
        that a product can skip the same columns in all. Same variance, but shared errors do not average over rows.
    :param centred: also keep the mean of each row and sample the deviation from it: variance (s - 1)(x - mean)**2.
    :raises ValueError: if an argument is none of these.
    """

    keep: float = 0.1
    per: str = "row"
    centred: bool = False
    _least_axes = 1

    def __post_init__(self) -> None:
        if not (0 < self.keep <= 1 and round(1 / self.keep) >= 2):
            raise ValueError(
                f"keep={self.keep}: one entry of every round(1 / keep) >= 2 is stored, so keep must be above 0 and at "
                "most 2/3. Try 0.1, or Keep() to store every entry."
            )
        if self.per not in ("row", "shared"):
            raise ValueError(f"per={self.per!r}: the choice is made for each row or once. Use 'row' or 'shared'.")

    def _sizes(self, n: int) -> np.ndarray:
        """Size of each stratum of an axis of n entries."""
        size = round(1 / self.keep)
        return np.diff(np.minimum(np.arange(-(-n // size) + 1) * size, n))

    def _chosen(self, seed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """(..., strata, size), true at the one kept entry of each stratum."""
        sizes = self._sizes(shape[-1])
        rows = shape[:-1] if self.per == "row" else (1,) * (len(shape) - 1)
        slot = hash_words(seed, linear_index((*rows, len(sizes)))) % jnp.asarray(sizes, jnp.uint32)
        return slot[..., None] == jnp.arange(round(1 / self.keep), dtype=jnp.uint32)

    def _mean(self, x: jax.Array) -> jax.Array:
        wide = x.astype(_work_dtype(x.dtype))
        return jnp.where(jnp.isfinite(wide).all(-1), wide.sum(-1) / max(x.shape[-1], 1), jnp.nan)

    def encode(self, seed: jax.Array, x: jax.Array) -> tuple[jax.Array, ...]:
        self._check(x)
        x = x.reshape(sampled_rows(x.shape))
        chosen = self._chosen(seed, x.shape)
        strata, size = chosen.shape[-2:]
        grouped = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, strata * size - x.shape[-1])])
        kept = jnp.where(chosen, grouped.reshape(*x.shape[:-1], strata, size), 0).sum(-1)
        kept = jnp.where(jnp.isfinite(x).all(-1, keepdims=True), kept, jnp.nan).astype(x.dtype)
        return (kept, self._mean(x)) if self.centred else (kept,)

    def decode(self, seed: jax.Array, code: Sequence[jax.Array], like: jax.ShapeDtypeStruct) -> jax.Array:
        shape = sampled_rows(like.shape)
        sizes = self._sizes(shape[-1])
        dtype = _work_dtype(like.dtype)
        mean = code[1][..., None] if self.centred else np.zeros((), dtype)
        scaled = mean + (code[0].astype(dtype) - mean) * jnp.asarray(sizes, dtype)  # (..., strata)
        dense = jnp.where(self._chosen(seed, shape), scaled[..., None], mean[..., None])  # (..., strata, size)
        dense = dense.reshape(*shape[:-1], math.prod(dense.shape[-2:]))[..., : shape[-1]].reshape(like.shape)
        return _cast_unbiased(dense, like.dtype, fold(seed, 1))

    def stored_bytes(self, shape: tuple[int, ...], dtype: DTypeLike) -> int:
        shape = sampled_rows(shape)
        each_row = len(self._sizes(shape[-1])) * _itemsize(dtype) + self.centred * _work_dtype(dtype).itemsize
        return math.prod(shape[:-1]) * each_row

    def variance(self, x: jax.Array) -> jax.Array:
        x = x.reshape(sampled_rows(x.shape))
        sizes = self._sizes(x.shape[-1])
        deviation = x.astype(_work_dtype(x.dtype)) - (self._mean(x)[..., None] if self.centred else 0)
        return (jnp.asarray(np.repeat(sizes - 1, sizes), deviation.dtype) * deviation**2).sum()

    def variance_along(self, x: jax.Array, direction: jax.Array) -> jax.Array:
        direction = direction.reshape(sampled_rows(x.shape))
        x = x.reshape(sampled_rows(x.shape))
        deviation = x.astype(_work_dtype(x.dtype)) - (self._mean(x)[..., None] if self.centred else 0)
        parts = deviation * direction.astype(deviation.dtype)
        if self.per == "shared":
            parts = parts.sum(tuple(range(parts.ndim - 1)))
        sizes = self._sizes(x.shape[-1])
        strata = np.repeat(np.arange(len(sizes)), sizes)  # one entry of each is kept, with its size as its weight
        sums = jnp.zeros((*parts.shape[:-1], len(sizes)), parts.dtype).at[..., strata].add(parts)
        return (jnp.asarray(sizes[strata], parts.dtype) * parts**2).sum() - (sums**2).sum()

    def relative_variance(self, shape: tuple[int, ...]) -> float:
        n = sampled_rows(shape)[-1]
        sizes = self._sizes(n)
        return float((sizes * (sizes - 1)).sum() / n * ((n - 1) / n if self.centred else 1)) if n else 0.0

    def __str__(self) -> str:
        how = "shared" if self.per == "shared" else "per row"
        return f"{'centred ' if self.centred else ''}sample {self.keep:g} {how}"


@fields_checked
@dataclass(frozen=True)
class RandomProjection(Codec):
    """Random projection of the last axis, the other estimator of RAD (Oktay et al., ICLR 2021).

    Stores x P and decodes (x P) Pᵀ, where P, of shape (n, k), k = max(1, round(keep * n)), holds independent signs over
    sqrt(k), so E[P Pᵀ] = I and the variance is (n - 1) / k times the squared norm, whatever x is. P follows from the
    seed, is not stored, and is shared by the rows. It is made in full, n * k entries, while encoding and decoding:
    meant for axes of at most a few thousand entries. A vector is seen as rows of some 256 entries. A NaN or an infinity
    makes its row NaN.

    :param keep: numbers stored for each entry, above 0 and at most 1.
    :raises ValueError: if `keep` is not.
    """

    keep: float = 0.1
    _least_axes = 1

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep={self.keep}: it is the stored fraction, so above 0 and at most 1. Try 0.1.")

    def _columns(self, n: int) -> int:
        return max(1, round(self.keep * n))

    def _matrix(self, seed: jax.Array, n: int, dtype: DTypeLike) -> jax.Array:
        k = self._columns(n)
        return signs(seed, (n, k), dtype) * np.asarray(1 / math.sqrt(k), dtype)

    def encode(self, seed: jax.Array, x: jax.Array) -> tuple[jax.Array, ...]:
        self._check(x)
        wide = x.astype(_work_dtype(x.dtype)).reshape(sampled_rows(x.shape))
        code = jnp.matmul(wide, self._matrix(seed, wide.shape[-1], wide.dtype), precision="highest")  # (..., k)
        code = jnp.where(jnp.isfinite(wide).all(-1, keepdims=True), code, jnp.nan)
        return (_cast_unbiased(code, x.dtype, fold(seed, 1)),)

    def decode(self, seed: jax.Array, code: Sequence[jax.Array], like: jax.ShapeDtypeStruct) -> jax.Array:
        wide = code[0].astype(_work_dtype(like.dtype))
        decoded = jnp.matmul(wide, self._matrix(seed, sampled_rows(like.shape)[-1], wide.dtype).T, precision="highest")
        return _cast_unbiased(decoded.reshape(like.shape), like.dtype, fold(seed, 2))

    def stored_bytes(self, shape: tuple[int, ...], dtype: DTypeLike) -> int:
        shape = sampled_rows(shape)
        return math.prod(shape[:-1]) * self._columns(shape[-1]) * _itemsize(dtype)

    def variance(self, x: jax.Array) -> jax.Array:
        n = sampled_rows(x.shape)[-1]
        return (x.astype(_work_dtype(x.dtype)) ** 2).sum() * (max(n - 1, 0) / self._columns(n))

    def relative_variance(self, shape: tuple[int, ...]) -> float:
        n = sampled_rows(shape)[-1]
        return max(n - 1, 0) / self._columns(n)

    def __str__(self) -> str:
        return f"project {self.keep:g}"
