"""Run a loop in segments: forward, store its carry at the beginning of each; backward, run each again.

A segment may be cut into segments in turn, whose carries are stored when it runs again: with carries of c bytes, a tape
of t bytes an iteration and segments of m1, m2, ... of n iterations,

    bytes = (n / m1 + m1 / m2 + ...) c + m_last t,

for one more forward run with each level (Griewank and Walther 2008, ch. 12). Iterations that are left over at the end
of a loop or segment make a shorter segment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_rad.annotations import PyTree

Run = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]
"""From a carry and stacked steps to the carry after them and stacked outputs."""


class Begins(NamedTuple):
    """Carries at the beginning of the full segments, stacked, and of the shorter one that may come last."""

    full: PyTree
    rest: PyTree


def n_boundaries(length: int, lengths: Sequence[int]) -> int:
    """How many carries a loop of ``length`` iterations holds at once, cut into segments of ``lengths`` iterations."""
    outer = (length, *lengths)
    return sum(-(-a // b) for a, b in zip(outer, lengths, strict=False))


def run_storing(run: Run, carry: PyTree, steps: PyTree, length: int, reverse: bool) -> tuple[PyTree, PyTree, Begins]:
    """Run a loop in segments of ``length`` iterations.

    :return: the carry after it, its stacked outputs and what it carries at the beginning of each segment.
    """
    full, rest = _cut(steps, length, reverse)

    def segment(carry: PyTree, steps: PyTree) -> tuple[PyTree, tuple[PyTree, PyTree]]:
        after, ys = run(carry, steps)
        return after, (ys, carry)

    carry, (ys, begins) = lax.scan(segment, carry, full, reverse=reverse)
    if rest is None:
        return carry, _joined(ys, None, reverse), Begins(begins, None)
    begin = carry
    carry, last = run(carry, rest)
    return carry, _joined(ys, last, reverse), Begins(begins, begin)


def pull_again(
    run: Run,
    pull: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]],
    cotangents: PyTree,
    begins: Begins,
    steps: tuple[PyTree, PyTree],
    lengths: Sequence[int],
    reverse: bool,
) -> tuple[PyTree, PyTree]:
    """Go back through a loop that ran in segments.

    :param pull: from cotangents after an uncut segment, the carry at its beginning and its steps to the cotangents
        before it and stacked results.
    :param steps: what the iterations take on the way forward, and what they take on the way back besides.
    :param lengths: iterations in each segment, in each segment of those, and so on.
    :param reverse: whether the loop runs from its last step to its first, in which case this goes from first to last.
    """
    length, *inner = lengths

    def segment(cotangents: PyTree, begin_and_steps: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        begin, steps = begin_and_steps
        finer = [m for m in inner if m < _n_steps(steps)]
        if not finer:
            return pull(cotangents, begin, steps)
        _, _, begins = run_storing(run, begin, steps[0], finer[0], reverse)
        return pull_again(run, pull, cotangents, begins, steps, finer, reverse)

    full, rest = _cut(steps, length, reverse)
    last = None
    if rest is not None:
        cotangents, last = segment(cotangents, (begins.rest, rest))
    cotangents, results = lax.scan(segment, cotangents, (begins.full, full), reverse=not reverse)
    return cotangents, _joined(results, last, reverse)


def _n_steps(arrays: PyTree) -> int:
    return jax.tree.leaves(arrays)[0].shape[0]


def _cut(arrays: PyTree, length: int, reverse: bool) -> tuple[PyTree, PyTree]:
    """Stacked steps as stacked segments of them, and the shorter segment that comes after those (None if empty)."""
    n_steps = _n_steps(arrays)
    n_rest = n_steps % length
    at = n_rest if reverse else n_steps - n_rest
    parts = jax.tree.map(lambda a: a[:at], arrays), jax.tree.map(lambda a: a[at:], arrays)
    rest, full = parts if reverse else parts[::-1]
    full = jax.tree.map(lambda a: a.reshape(-1, length, *a.shape[1:]), full)
    return full, rest if n_rest else None


def _joined(full: PyTree, rest: PyTree, reverse: bool) -> PyTree:
    """The inverse of ``_cut``."""
    full = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), full)
    if rest is None:
        return full
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *((rest, full) if reverse else (full, rest)))
