"""What a section of a report is made of: text, tables and figures, and how long ones are cut short."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from numpyro_rad.report import charts

MAX_ROWS, MAX_BARS = 200, 16
"""Of a table and of a figure; what is left out is added up in a last line."""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text.

    :ivar title: what it is.
    :ivar header: names of its columns, units included.
    :ivar rows: its cells.
    :ivar text_columns: how many columns, from the left, are text; the others are numbers.
    :ivar folded: whether to show it only on demand, where that can be done.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int = 1
    folded: bool = False


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of a report; ``figures`` draw themselves when they are called."""

    title: str
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Callable[[], str], ...] = ()


def thin(x: np.ndarray, *series: np.ndarray) -> list[np.ndarray]:
    """Series over a common axis at fewer points, whose peaks stay."""
    kept = charts.decimated(np.column_stack([x, *series]))
    return [kept[:, i] for i in range(kept.shape[1])]


def largest(x: float) -> float:
    """A sort key: the largest first, NaN before everything."""
    return -math.inf if math.isnan(x) else -x
