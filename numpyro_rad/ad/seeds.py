"""Counter-based randomness of the codecs: an integer hash of (seed, index of the entry).

It fuses with its neighbours, costs a few operations for each entry, and gives encoder and decoder the same draws
without storing them. A *seed* is two uint32 words: ``seed_words`` makes it from a JAX key, ``fold`` a new one for each
residual and loop iteration.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from numpyro_rad.annotations import Key

Word = TypeVar("Word", jax.Array, np.uint32)

_GOLDEN = 0x9E3779B1  # odd, close to 2**32 / golden ratio: spreads consecutive indices


def u32(number: int) -> np.uint32:
    """A Python int as a 32-bit word, wrapped around."""
    return np.uint32(number & 0xFFFFFFFF)


def _mix(word: Word, late: Word | int = 0) -> Word:
    """A bijection of uint32 in two multiply and xor-shift rounds (constants of C. Wellons's `lowbias32`)."""
    word = (word ^ (word >> u32(16))) * u32(0x7FEB352D) + late
    word = (word ^ (word >> u32(15))) * u32(0x846CA68B)
    return word ^ (word >> u32(16))


def hash_words(seed: jax.Array, index: jax.Array) -> jax.Array:
    """A random 32-bit word for each index."""
    # The second word enters between the rounds: two seeds are never index-shifted copies of each other.
    return _mix(index * u32(_GOLDEN) + seed[0], late=seed[1])


def linear_index(shape: tuple[int, ...]) -> jax.Array:
    """Row-major index of every entry, as one iota per axis so that it fuses and shards like the array itself."""
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        index = index + lax.broadcasted_iota(jnp.uint32, shape, axis) * u32(stride)
        stride *= shape[axis]
    return index


def uniform(seed: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Uniform numbers on [0, 1), multiples of 2**-24."""
    bits = hash_words(seed, linear_index(shape)) >> u32(8)
    return bits.astype(jnp.int32).astype(dtype) * np.asarray(2.0**-24, dtype)


def signs(seed: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """-1 and 1, as likely."""
    words = hash_words(seed, linear_index(shape)) >> u32(31)
    return (words.astype(jnp.int32) * 2 - 1).astype(dtype)


def seed_words(key: Key) -> jax.Array:
    """Seed of the codecs from one JAX PRNG key.

    :param key: a typed key or a raw uint32 key of any implementation and length, shape `()` or `(words,)`.
    :return: uint32 array of shape (2,); different keys of two words give different seeds.
    :raises ValueError: if `key` is not one key.
    """
    key = jnp.asarray(key)
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    if data.dtype != jnp.uint32 or data.ndim != 1:
        raise ValueError(
            f"seed_words needs one PRNG key, got {key.dtype} of shape {key.shape}, because a seed belongs to one draw. "
            "Pass jax.random.key(...), or jax.vmap over a batch of keys."
        )
    return fold(np.asarray([0x243F6A88, 0x85A308D3], np.uint32), *(data[i] for i in range(data.shape[0])))


def fold(seed: jax.Array | np.ndarray, *numbers: int | jax.Array) -> jax.Array:
    """A new seed, independent of the old one, for each sequence of numbers (a residual, a loop iteration).

    Python ints are hashed at trace time and cost two operations of the compiled program. Seeds folded from one seed by
    different sequences of them differ; the order of two such folds in a row does not matter, so fold all ints at once.

    :param seed: uint32 array of shape (2,).
    :param numbers: all of them Python ints in [0, 2**32), or all integer scalars that may be traced.
    :return: uint32 array of shape (2,). Different single numbers give different seeds.
    :raises ValueError: if a Python int does not fit 32 bits.
    """
    if all(isinstance(number, int) for number in numbers):
        a = b = np.uint32(0)
        for number in numbers:
            if not 0 <= number < 2**32:
                raise ValueError(f"fold({number}): a seed is folded with 32-bit words; use a number in [0, 2**32).")
            a, b = _feistel(a, b, np.uint32(number))
        return jnp.stack([jnp.asarray(seed[0]) + a, jnp.asarray(seed[1]) ^ b])
    a, b = jnp.asarray(seed[0]), jnp.asarray(seed[1])
    for number in numbers:
        a, b = _feistel(a, b, jnp.uint32(number))
    return jnp.stack([a, b])


def _feistel(a: Word, b: Word, word: Word) -> tuple[Word, Word]:
    """One step for each half: a bijection of the pair for every word, and of the word for every pair."""
    with np.errstate(over="ignore"):
        a = a ^ _mix(b + word * u32(_GOLDEN) + u32(0x9E3779B9))
        return a, b ^ _mix(a + word * u32(0x85EBCA6B) + u32(0xC2B2AE35))
