"""How the entries of an array share bytes and scales: rows, runs, groups and lanes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 6: (4, 2), 8: (8,)}
"""Bits of an entry, and the planes that they are shared out to, the lower ones first. In each, entries fill bytes."""

LEAST_ROW = 32
"""Trailing axes of so many entries make rows on their own; shorter ones are taken together with a part of the next."""


def _sharing(length: int, devices: int) -> int:
    """How many of the devices may share an axis of this length in equal parts: all or one."""
    return devices if length % devices == 0 else 1


def _cut(length: int, inner: int, size: int, devices: int = 1) -> int:
    """How many of the `length` blocks of `inner` entries make a row of about `size`: all of them, or a divisor.

    Of the divisors the one that comes closest, and if it can be such that rows end where the shares of devices end.
    """
    near = [d for d in range(1, 2 * size // max(inner, 1) + 1) if length % d == 0 and 4 * d * inner >= size]
    return min(near, key=lambda d: (length // d % devices > 0, abs(d * inner - size)), default=length)


def _together(length: int, inner: int, size: int, devices: int) -> int:
    """How many of `length` rows of `inner` entries may make a group of at most `size`: a divisor, as large as can be,
    and such that groups end where the shares of devices end."""
    fitting = [d for d in range(1, size // max(inner, 1) + 1) if length % (d * devices) == 0]
    return max(fitting, default=1)


def sampled_rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Where an axis is to be sampled or projected: that of an array as it is, or of a vector cut into rows."""
    if len(shape) != 1:
        return shape
    row = _cut(shape[0], 1, 256, _sharing(shape[0], jax.device_count()))
    return (shape[0] // row, row) if row else (1, 0)


@dataclass(frozen=True)
class Layout:
    """View of an array as rows, cut into *runs*. One or several runs make a group, and entries at the same place of
    several lanes, of one or several runs each, share a byte.

    Rows are whole trailing axes where these are long enough, and a lane is a row where there are enough of them. So
    packing and unpacking are vector operations on lanes, and nothing is rearranged on the way from the array and back,
    which a compiler would do entry by entry (on CPU, decoding then takes 2 to 4 ns for each instead of 0.2). Lanes that
    share bytes are far apart, as the halves of a batch are: a TPU, which holds eight rows in a tile, would have to take
    neighbours out of each. Rows keep the order of the leading (batch) axes and, where the sizes allow it, the edges
    between the shares of the devices that JAX has.
    """

    rows: int
    inner: int  # entries of a row
    parts: int  # runs of a row
    width: int  # entries of a run; the last ones of a row may be padding
    block: int  # runs of a group
    lane: int  # runs of a lane
    bits: int  # of an entry
    shares: int  # of the devices, whose lanes are packed by themselves

    @classmethod
    def of(cls, shape: Sequence[int], bits: int, group: int | None = None) -> Layout:
        """
        :param bits: of an entry, one of :data:`PLANES`.
        :param group: most entries of a group; None for groups of one run, of any length.
        """
        return cls._of(tuple(shape), bits, group, jax.device_count())

    @classmethod
    @lru_cache(maxsize=4096)
    def _of(cls, shape: tuple[int, ...], bits: int, group: int | None, all_devices: int) -> Layout:
        if not math.prod(shape):
            return cls(0, 1, 1, 1, 1, 1, bits, 1)
        slots = 8 // min(PLANES[bits])  # entries that fill a byte in each plane
        size, devices = max(256, group or 0), _sharing(shape[0], all_devices) if shape else 1
        axis, inner, rest = len(shape), 1, 1  # a row takes all of the axes from this one on, or 1 / rest of it
        while axis and inner < LEAST_ROW and rest == 1:
            axis -= 1
            whole = axis == len(shape) - 1 > 0
            part = shape[axis] if whole else _cut(shape[axis], inner, size, 1 if axis else devices)
            inner, rest = inner * part, shape[axis] // part
        rows, lanes = math.prod(shape) // inner, 1  # lanes of each row
        own = rows // devices if rows % devices == 0 else rows
        if own % slots and (own < rows or -rows % slots > rows / 16):  # padding the last byte is impossible or wasteful
            lanes = slots // math.gcd(own, slots)
        lane = -(-inner // (lanes * (group or inner)))
        width = -(-inner // (lanes * lane))
        if rest == 1 and axis:
            axis, rest = axis - 1, shape[axis - 1]
        if not group:
            block = 1
        elif inner <= group:
            block = lanes * lane * _together(rest, inner, group, 1 if axis else devices)
        else:
            block = _together(lanes * lane, width, group, 1)
        return cls(rows, inner, lanes * lane, width, block, lane, bits, rows // own)

    @property
    def groups(self) -> int:
        return self.rows * self.parts // self.block

    @property
    def lanes(self) -> int:
        return self.rows * self.parts // self.lane

    def packed_bytes(self, entries: int) -> int:
        """Of so many entries of each run."""
        return sum(-(-self.lanes * plane // 8) for plane in PLANES[self.bits]) * self.lane * entries

    def split(self, x: jax.Array) -> jax.Array:
        """Entries as (rows, parts, width)."""
        x = x.reshape(self.rows, self.inner)
        padding = self.parts * self.width - self.inner
        if padding:
            x = jnp.pad(x, ((0, 0), (0, padding)), mode="edge")  # edge values leave a group's range as it is
        return x.reshape(self.rows, self.parts, self.width)

    def over_groups(self, f: Callable[[jax.Array, int], jax.Array], x: jax.Array) -> jax.Array:
        """What f (a sum, a minimum) makes of each group of entries, (rows, parts, width) to (groups,)."""
        return f(f(x, 2).reshape(self.groups, self.block), 1)

    def to_entries(self, x: jax.Array) -> jax.Array:
        """A number for each group, (groups,), where its entries are: (rows, parts, 1)."""
        return jnp.broadcast_to(x[:, None], (self.groups, self.block)).reshape(self.rows, self.parts, 1)

    def join(self, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The array of which these are the runs."""
        return x.reshape(self.rows, self.parts * self.width)[:, : self.inner].reshape(shape)

    def pack(self, q: jax.Array) -> tuple[jax.Array, ...]:
        """Integers below 2**bits, (rows, parts, some), as bytes: for each plane uint8 arrays of shape (bytes, lane,
        some), of the lanes that fill theirs and of those that are left, if any.

        These are not one array. With a padding of all lanes, or a concatenation of both parts, whatever makes the
        numbers would be fused with it and not vectorized: with JAX 0.10, inside of loops on CPU, it then takes 5 ns an
        entry instead of 1.2.
        """
        q = q.astype(jnp.uint8).reshape(self.lanes, self.lane, q.shape[2])
        packed: list[jax.Array] = []
        for plane in PLANES[self.bits]:
            part = q if plane == self.bits else q & np.uint8(2**plane - 1)
            q = q if plane == self.bits else q >> np.uint8(plane)
            packed += self._packed(part, plane)
        return tuple(packed)

    def _packed(self, q: jax.Array, bits: int) -> list[jax.Array]:
        """One plane."""
        slots = 8 // bits
        whole = self.lanes // slots * slots
        if whole == self.lanes:
            return [_joined(q, bits, self._apart(bits))]
        left = jnp.pad(q[whole:], ((0, slots + whole - self.lanes), (0, 0), (0, 0)))
        return [_joined(q[:whole], bits, whole // slots), _joined(left, bits, 1)] if whole else [_joined(left, bits, 1)]

    def _apart(self, bits: int) -> int:
        """How many stretches of lanes are packed by themselves: the shares of the devices, or where lanes are left over
        as many as there are bytes, so that neighbours share them."""
        slots = 8 // bits
        return -(-self.lanes // slots) if self.lanes % (slots * self.shares) else self.shares

    def unpack(self, packed: Sequence[jax.Array]) -> jax.Array:
        """What was packed, (rows, parts, some)."""
        arrays, lower, q = iter(packed), 0, None
        for bits in PLANES[self.bits]:
            left = self.lanes % (8 // bits)
            codes = [next(arrays) for _ in range(2 if 0 < left < self.lanes else 1)]
            code = jnp.concatenate(codes) if len(codes) > 1 else codes[0]
            plane = self._unpacked(code, bits)
            q = plane if q is None else q | (plane << np.int32(lower))
            lower += bits
        assert q is not None
        return q.reshape(self.rows, self.parts, q.shape[2])

    def _unpacked(self, code: jax.Array, bits: int) -> jax.Array:
        """One plane, (lanes, lane, some)."""
        shift = lax.broadcasted_iota(jnp.int32, (1, 8 // bits, 1, 1, 1), 1) * np.int32(bits)
        code = code.astype(jnp.int32).reshape(self._apart(bits), 1, -1, *code.shape[1:])
        q = (code >> shift) & np.int32(2**bits - 1)
        return q.reshape(-1, *code.shape[3:])[: self.lanes]


def _joined(q: jax.Array, bits: int, apart: int) -> jax.Array:
    """Of each of so many stretches of lanes the first, second, ... part in the lower, upper, ... bits of its bytes."""
    slots = 8 // bits
    shift = lax.broadcasted_iota(jnp.uint8, (1, slots, 1, 1, 1), 1) * np.uint8(bits)
    whole = q.shape[0] // slots, *q.shape[1:]
    q = q.reshape(apart, slots, whole[0] // apart, *q.shape[1:])
    # Bytes are what is reduced: a cast after the reduction would be fused into the reader, and words would be
    # stored. Added rather than combined by "or", which not every backend has among devices.
    return lax.reduce(q << shift, np.uint8(0), lax.add, (1,)).reshape(whole)
