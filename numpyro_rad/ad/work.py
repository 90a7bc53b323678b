"""How much work a step of a program is, in numbers that are the same on every machine.

A step that goes over arrays is as much work as they have entries, of a class that says what is done with each; a matrix
product is so many multiplications. Steps that call others are made of theirs. What work costs in time depends on the
machine: nothing here knows, ``planning.costs`` has the prices.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

CostClass = Literal[
    "simple",
    "derived",
    "ordinary",
    "trigonometric",
    "power",
    "gamma",
    "bessel",
    "random",
    "series",
    "cumulative",
    "indexed",
    "scattered",
    "sorted",
]
"""What is done with an entry, fused with its neighbours. Arithmetic, from the least to the most of it: ``simple``
(sums, products, comparisons, copies), ``derived`` (a step of a derivative that is eliminated), ``ordinary``
(exponentials, quotients, reductions, and whatever is not known), ``trigonometric``, ``power``, ``gamma`` (its
logarithm), ``bessel``, ``random`` (bits), ``series`` (functions that are iterated until they converge). Memory rather
than arithmetic: ``cumulative``, ``indexed`` (picked), ``scattered``, ``sorted``."""

COST_CLASSES: tuple[str, ...] = get_args(CostClass)


@dataclasses.dataclass(frozen=True, slots=True)
class Entries:
    """Work on so many entries, of the larger of operands and results."""

    number: float
    kind: CostClass


@dataclasses.dataclass(frozen=True, slots=True)
class Multiplications:
    """A matrix product or a convolution: its multiplications, each with an addition, of numbers of a dtype."""

    number: float
    dtype: str


@dataclasses.dataclass(frozen=True, slots=True)
class Together:
    """All of the parts, one after the other, so many times."""

    parts: tuple[Work, ...]
    times: int = 1


@dataclasses.dataclass(frozen=True, slots=True)
class OneOf:
    """One of the parts, nobody knows which: the dearest counts."""

    parts: tuple[Work, ...]


Work = Entries | Multiplications | Together | OneOf

NOTHING = Together(())
"""No work: what is free, and control flow whose bodies have their own."""
