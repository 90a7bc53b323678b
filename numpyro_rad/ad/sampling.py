"""Codecs that are linear in what they code: a part of the entries, or random projections (Oktay et al., ICLR 2021)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from numpyro_rad.ad.codecs import Codec, cast_unbiased, itemsize, work_dtype
from numpyro_rad.ad.layout import sampled_rows
from numpyro_rad.ad.seeds import fold, hash_words, linear_index, signs
from numpyro_rad.mistakes import fields_checked


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
        wide = x.astype(work_dtype(x.dtype))
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
        dtype = work_dtype(like.dtype)
        mean = code[1][..., None] if self.centred else np.zeros((), dtype)
        scaled = mean + (code[0].astype(dtype) - mean) * jnp.asarray(sizes, dtype)  # (..., strata)
        dense = jnp.where(self._chosen(seed, shape), scaled[..., None], mean[..., None])  # (..., strata, size)
        dense = dense.reshape(*shape[:-1], math.prod(dense.shape[-2:]))[..., : shape[-1]].reshape(like.shape)
        return cast_unbiased(dense, like.dtype, fold(seed, 1))

    def stored_bytes(self, shape: tuple[int, ...], dtype: DTypeLike) -> int:
        shape = sampled_rows(shape)
        each_row = len(self._sizes(shape[-1])) * itemsize(dtype) + self.centred * work_dtype(dtype).itemsize
        return math.prod(shape[:-1]) * each_row

    def variance(self, x: jax.Array) -> jax.Array:
        x = x.reshape(sampled_rows(x.shape))
        sizes = self._sizes(x.shape[-1])
        deviation = x.astype(work_dtype(x.dtype)) - (self._mean(x)[..., None] if self.centred else 0)
        return (jnp.asarray(np.repeat(sizes - 1, sizes), deviation.dtype) * deviation**2).sum()

    def variance_along(self, x: jax.Array, direction: jax.Array) -> jax.Array:
        direction = direction.reshape(sampled_rows(x.shape))
        x = x.reshape(sampled_rows(x.shape))
        deviation = x.astype(work_dtype(x.dtype)) - (self._mean(x)[..., None] if self.centred else 0)
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
        wide = x.astype(work_dtype(x.dtype)).reshape(sampled_rows(x.shape))
        code = jnp.matmul(wide, self._matrix(seed, wide.shape[-1], wide.dtype), precision="highest")  # (..., k)
        code = jnp.where(jnp.isfinite(wide).all(-1, keepdims=True), code, jnp.nan)
        return (cast_unbiased(code, x.dtype, fold(seed, 1)),)

    def decode(self, seed: jax.Array, code: Sequence[jax.Array], like: jax.ShapeDtypeStruct) -> jax.Array:
        wide = code[0].astype(work_dtype(like.dtype))
        decoded = jnp.matmul(wide, self._matrix(seed, sampled_rows(like.shape)[-1], wide.dtype).T, precision="highest")
        return cast_unbiased(decoded.reshape(like.shape), like.dtype, fold(seed, 2))

    def stored_bytes(self, shape: tuple[int, ...], dtype: DTypeLike) -> int:
        shape = sampled_rows(shape)
        return math.prod(shape[:-1]) * self._columns(shape[-1]) * itemsize(dtype)

    def variance(self, x: jax.Array) -> jax.Array:
        n = sampled_rows(x.shape)[-1]
        return (x.astype(work_dtype(x.dtype)) ** 2).sum() * (max(n - 1, 0) / self._columns(n))

    def relative_variance(self, shape: tuple[int, ...]) -> float:
        n = sampled_rows(shape)[-1]
        return max(n - 1, 0) / self._columns(n)

    def __str__(self) -> str:
        return f"project {self.keep:g}"
