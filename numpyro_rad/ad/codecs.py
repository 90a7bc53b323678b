"""Codecs: a stored array replaced by a cheap random code that is right on average.

Reverse-mode AD stores residuals between the forward and the backward sweep. The gradient is multilinear in those that
may be coded, so storing a random code instead of an array x leaves the gradient unbiased as long as

    E[decode(seed, encode(seed, x))] = x,        the expectation being over the seed,

and costs variance tr Cov(decode(encode(x))) instead of memory. Every codec satisfies this for every entry, and reports
its bytes and its variance in closed form so that a plan can be priced before anything runs.

Here are what they have in common, and those that are exact; ``rounding``, ``rotation`` and ``sampling`` have the random
ones. The randomness follows from a seed (see `seeds.py`), so the decoder makes the same draws again rather than storing
them. ``planning`` asks for bytes and variances, ``sweep`` encodes and decodes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from numpyro_rad.ad.layout import Layout
from numpyro_rad.ad.seeds import u32, uniform


def itemsize(dtype: DTypeLike) -> int:
    """Bytes of a number."""
    return (dtype if hasattr(dtype, "itemsize") and not isinstance(dtype, type) else np.dtype(dtype)).itemsize  # pyright: ignore[reportAttributeAccessIssue]


def _is_real_float(dtype: DTypeLike) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and itemsize(dtype) in (2, 4, 8)


def work_dtype(dtype: DTypeLike) -> np.dtype:
    """Arithmetic is in float64 for float64 and in float32 for all else."""
    return np.dtype(np.float64 if itemsize(dtype) == 8 else np.float32)


def _spacing(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Distance between the numbers of a half-precision `dtype` at the float32 values x."""
    power = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint32) & u32(0x7F800000), jnp.float32)
    info = jnp.finfo(dtype)
    smallest = max(float(info.smallest_subnormal), 2.0**-126)  # float32 subnormals are flushed to zero on most devices
    return jnp.maximum(power * np.float32(2.0**-info.nmant), np.float32(smallest))


def to_nearest(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Nearest number that `dtype` holds, still in float32: XLA drops a cast there and back, but not this."""
    return jnp.round(x / _spacing(x, dtype)) * _spacing(x, dtype) if itemsize(dtype) == 2 else x


def cast_unbiased(x: jax.Array, dtype: DTypeLike, seed: jax.Array) -> jax.Array:
    """x in `dtype`; to half precision by stochastic rounding, since rounding to nearest would bias the mean."""
    if itemsize(dtype) == 2:
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
    work = 1.0  #: time for encoding and decoding an entry, relative to plain rounding
    start = 1.0  #: time for beginning with an array, likewise

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
        return self.variance(x) * jnp.mean(direction.astype(work_dtype(x.dtype)) ** 2)

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


class EntryByEntry(Codec):
    """A codec whose errors are independent from entry to entry. A subclass defines `_variances`."""

    def _variances(self, x: jax.Array) -> jax.Array:
        """Variance of each entry of x."""
        raise NotImplementedError

    def variance(self, x: jax.Array) -> jax.Array:
        return self._variances(x).sum()

    def variance_along(self, x: jax.Array, direction: jax.Array) -> jax.Array:
        variances = self._variances(x)
        return (variances * direction.astype(variances.dtype) ** 2).sum()


def check_group(group: int, usual: int) -> None:
    """
    :raises ValueError: if groups cannot have this size.
    """
    if not (isinstance(group, int) and 8 <= group <= 65536 and group % 8 == 0):
        raise ValueError(
            f"group={group}: a group is stored in whole bytes, so its size must be a multiple of 8 between 8 and "
            f"65536. Try {usual}."
        )


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
        return math.prod(shape) * itemsize(dtype)


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
        layout = Layout.of(x.shape, 1)
        return layout.pack(layout.split(x))

    def decode(self, seed: jax.Array, code: Sequence[jax.Array], like: jax.ShapeDtypeStruct) -> jax.Array:
        layout = Layout.of(like.shape, 1)
        return layout.join(layout.unpack(code) != 0, like.shape)

    def stored_bytes(self, shape: tuple[int, ...], dtype: DTypeLike) -> int:
        layout = Layout.of(shape, 1)
        return layout.packed_bytes(layout.width)

    def supports(self, shape: tuple[int, ...], dtype: DTypeLike) -> bool:
        return dtype == jnp.bool_

    def __str__(self) -> str:
        return "1-bit mask"
