"""Small figures as SVG text: curves with bands, and stacked bars. What a report needs, without a plotting library.

Colours are classes that the style sheet :data:`STYLE` gives a value in light and in dark: those of Okabe and Ito, which
stay apart for colour-blind readers. A figure is 440 units wide, its text 11 units high or 14 on a phone. It
carries a title and a description for those who cannot see it. Numbers below zero or without a value are left out
of drawings only, which say so below; tables show them.
"""

from __future__ import annotations

import dataclasses
import html
import itertools
import math
import re
from collections.abc import Sequence

import numpy as np

WIDTH, HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 12, 10, 44
_ROW = 38  # of a bar and its name
_ROOM = 0.04  # above and below curves, of their height

STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#57606a;--paper:#fff;--panel:#f6f8fa;--line:#d0d7de;
--shade:#1b1f2440;--blue:#0072b2;--green:#007d5c;--red:#c04f00;--grey:#6b6b6b}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#a3adb8;--paper:#0d1117;--panel:#161b22;--line:#3a424c;
--shade:#e6edf366;--blue:#56b4e9;--green:#2bc49b;--red:#f0883e;--grey:#a0a0a0}}
svg{display:block;width:100%;height:auto}
svg text{font:11px system-ui,sans-serif;fill:var(--soft)}
@media (max-width:560px){svg text{font-size:14px}}
svg .name{fill:var(--ink)}
svg .grid{stroke:var(--line);stroke-width:.7}
svg .axis{stroke:var(--soft);stroke-width:1}
svg .error{stroke:var(--ink);stroke-width:1.3}
svg .curve{fill:none;stroke-width:1.8;stroke-linejoin:round}
svg .band{stroke:none;opacity:.25}svg .pale{opacity:.4}
.blue{stroke:var(--blue);fill:var(--blue)}.green{stroke:var(--green);fill:var(--green)}
.red{stroke:var(--red);fill:var(--red)}.grey{stroke:var(--grey);fill:var(--grey)}
"""


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """One curve of a figure.

    :ivar label: its name in the legend.
    :ivar colour: "blue", "green", "red" or "grey".
    :ivar x: shape (points,).
    :ivar y: shape (points,); where it is not finite the curve has a gap.
    :ivar band: lower and upper edge of a band around it, each of shape (points,); None for no band.
    :ivar dash: dashes of the line, as in SVG; empty for none.
    """

    label: str
    colour: str
    x: np.ndarray
    y: np.ndarray
    band: tuple[np.ndarray, np.ndarray] | None = None
    dash: str = ""


@dataclasses.dataclass(frozen=True)
class Bar:
    """One bar: parts from left to right, and the standard error of their sum."""

    label: str
    parts: tuple[float, ...]
    error: float = 0.0


def escape(text: object) -> str:
    """Text that is safe inside HTML, SVG and their attributes; what XML does not allow becomes a replacement mark."""
    return html.escape(re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", str(text)))


def shorten(text: str, length: int) -> str:
    """Text of at most so many characters, its middle left out: names begin and end with what tells them apart."""
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return text[:head] + "…" + text[len(text) - (length - 1 - head) :]


def curves(
    title: str,
    description: str,
    shown: Sequence[Curve],
    labels: tuple[str, str],
    *,
    log: bool = False,
    from_zero: bool = False,
    level: tuple[float, str] | None = None,
) -> str:
    """Curves over one axis, with a legend of those that there is anything of, and a word about their gaps.

    :param title: of the figure; it also names its parts, so it must be unique in a page.
    :param description: what it shows, in a sentence or two.
    :param labels: of the two axes, units included.
    :param log: whether the vertical axis is logarithmic; what is not positive is left out then.
    :param from_zero: whether the vertical axis begins at 0; for what cannot be negative.
    :param level: height and name of a horizontal line to compare with.
    :return: a ``<figure>`` element.
    """
    x_low, x_high = _extent([c.x for c in shown])
    heights = [edge for c in shown for edge in (c.y, *(c.band or ()))]
    y_low, y_high = _extent([*heights, np.array([] if level is None else [level[0]])], log)
    if from_zero:
        y_low = 0.0
    if log:
        y_low, y_high = y_low * (y_low / y_high) ** _ROOM, y_high * (y_high / y_low) ** _ROOM
    else:
        room = _ROOM * (y_high - y_low)
        y_low, y_high = y_low - room * (y_low != 0), y_high + room
    y_scale = _log if log else np.asarray

    def across(x: np.ndarray) -> np.ndarray:
        return _LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - _LEFT - _RIGHT)

    def down(y: np.ndarray) -> np.ndarray:
        low, high = (float(y_scale(np.array(v))) for v in (y_low, y_high))
        share = (y_scale(np.asarray(y, float)) - low) / (high - low)
        return HEIGHT - _BOTTOM - np.clip(share, -0.02, 1.02) * (HEIGHT - _TOP - _BOTTOM)

    parts = [*_y_axis(y_low, y_high, down, log), *_x_axis(x_low, x_high, across, HEIGHT - _BOTTOM)]
    if level is not None:
        parts += _level(float(down(np.array(level[0]))), level[1])
    for c in shown:
        if c.band is not None:
            edges = [down(edge) for edge in c.band]
            parts.append(f'<path class="band {c.colour}" d="{_area(across(c.x), *edges)}"/>')
    for c in shown:
        dash = f' stroke-dasharray="{c.dash}"' if c.dash else ""
        parts.append(f'<path class="curve {c.colour}"{dash} d="{_line(across(c.x), down(c.y))}"/>')
    parts.append(_axis_label(labels[0], (_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 5))
    middle = (_TOP + HEIGHT - _BOTTOM) / 2
    parts.append(
        f'<text text-anchor="middle" transform="translate(12 {middle}) rotate(-90)">{escape(labels[1])}</text>'
    )
    keys = []
    for c in shown:
        if _drawn(c.y, log).any():
            keys.append((c.label, c.colour, c.dash))
        elif c.band is not None and np.isfinite(np.asarray(c.band)).all(0).any():
            keys.append((c.label, f"pale {c.colour}", c.dash))
    return _figure(title, description, parts, HEIGHT, keys, _gaps(shown, log))


def _level(y: float, label: str) -> list[str]:
    """A dotted line across a figure, its name above it, or below where there is no room."""
    text_y = y - 4 if y > _TOP + 16 else y + 14
    return [
        f'<path class="curve grey" stroke-dasharray="2 3" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>',
        f'<text class="name" text-anchor="end" x="{WIDTH - _RIGHT}" y="{text_y:.1f}">{escape(label)}</text>',
    ]


def _drawn(y: np.ndarray, log: bool) -> np.ndarray:
    """Which points of a curve have a place."""
    return np.isfinite(y) & ((y > 0) | (not log))


def _gaps(shown: Sequence[Curve], log: bool) -> str:
    """Why curves are interrupted, empty if none is; one without any numbers (nothing but zeros or NaN) is no curve."""
    reasons = []
    ys = [np.asarray(c.y, float) for c in shown]
    ys = [y for y in ys if (np.isfinite(y) & (y != 0)).any()]
    if any((y <= 0).any() for y in ys) and log:
        reasons.append(
            "a value is not positive, as unbiased estimates of small ones may be: a logarithmic axis has no "
            "place for it"
        )
    if any((~np.isfinite(y)).any() for y in ys):
        reasons.append("there is no finite number")
    return f"Gaps in a curve: {', or '.join(reasons)}." if reasons else ""


def bars(
    title: str, description: str, shown: Sequence[Bar], legend: Sequence[tuple[str, str]], label: str, *, share: bool
) -> str:
    """Stacked horizontal bars, the name of each above it; negative parts are drawn as nothing.

    :param legend: label and colour of each part; one without a label, or that no bar has, is left out.
    :param label: of the axis, units included.
    :param share: whether the axis ends at 1 at least.
    :return: a ``<figure>`` element.
    """
    sums = [sum(max(p, 0.0) for p in b.parts if math.isfinite(p)) for b in shown]
    ends = [s + (b.error if math.isfinite(b.error) else 0.0) for b, s in zip(shown, sums, strict=True)]
    longest = max([1.0 if share else 0.0, *ends]) or 1.0
    left, row = 12, _ROW
    height = _TOP + row * len(shown) + _BOTTOM

    def across(x: float | np.ndarray) -> float | np.ndarray:
        return left + x / longest * (WIDTH - left - _RIGHT)

    parts = _x_axis(0.0, longest, across, height - _BOTTOM)
    for i, (b, total) in enumerate(zip(shown, sums, strict=True)):
        top, start = _TOP + row * i + 16, 0.0
        name = escape(b.label)
        parts.append(
            f'<text class="name" x="{left}" y="{top - 5}"><title>{name}</title>{escape(shorten(b.label, 52))}</text>'
        )
        for value, (_, colour) in zip(b.parts, legend, strict=True):
            if value > 0 and math.isfinite(value):
                x, width = across(start), across(start + value) - across(start)
                box = f'x="{x:.1f}" y="{top}" width="{max(width - 1, 0.5):.1f}" height="13"'
                parts.append(f'<rect class="{colour}" stroke="none" {box}/>')
                start += value
        if b.error > 0 and math.isfinite(b.error):
            low, high = across(max(total - b.error, 0.0)), across(total + b.error)
            ends_of_it = "".join(f"M{x:.1f} {top + 3.5}v6" for x in (low, high))
            parts.append(f'<path class="error" d="M{low:.1f} {top + 6.5}H{high:.1f}{ends_of_it}"/>')
    parts.append(_axis_label(label, WIDTH / 2, height - 5))
    there = [any(b.parts[i] > 0 for b in shown) for i in range(len(legend))]
    keys = [(name, colour, "") for (name, colour), drawn in zip(legend, there, strict=True) if drawn and name]
    return _figure(title, description, parts, height, keys)


# -- thinning ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Binned:
    """A long series of noisy numbers in bins, shape (bins,) each.

    :ivar x: middle of the bin.
    :ivar mean: of the finite numbers in it; NaN without any.
    :ivar error: Monte Carlo standard error of the mean; NaN where a bin has fewer than two numbers.
    """

    x: np.ndarray
    mean: np.ndarray
    error: np.ndarray


def binned(y: np.ndarray, bins: int = 150) -> Binned:
    """Running means over bins of equal length.

    The noise of single numbers is taken from successive differences, var = E (y[i+1] - y[i])² / 2 (von Neumann 1941),
    which a slow trend hardly moves.

    :param y: shape (steps,); what is not finite is left out.
    """
    y = np.asarray(y, float)
    edges = np.unique(np.linspace(0, len(y), min(bins, max(1, len(y) // 4)) + 1).astype(int))
    x, mean, error = [], [], []
    for start, stop in itertools.pairwise(edges):
        part = y[start:stop]
        x.append((start + stop - 1) / 2 + 1)
        m, e = mean_and_error(part)
        mean.append(m)
        error.append(e)
    return Binned(np.array(x), np.array(mean), np.array(error))


def mean_and_error(y: np.ndarray) -> tuple[float, float]:
    """Mean of the finite numbers of a noisy series, and its Monte Carlo standard error, see :func:`binned`."""
    y = y[np.isfinite(y)]
    if len(y) < 2:
        return (float(y[0]) if len(y) else math.nan), math.nan
    return float(y.mean()), float(np.sqrt(np.mean(np.diff(y) ** 2) / 2 / len(y)))


def decimated(rows: np.ndarray, points: int = 400) -> np.ndarray:
    """At most about so many rows of a long series whose peaks stay.

    :param rows: shape (rows, columns), in order of the first column.
    """
    if len(rows) <= points:
        return rows
    groups = np.array_split(np.arange(len(rows)), points // rows.shape[1])
    kept = [{int(g[0]), *(int(g[0] + np.argmax(rows[g, c])) for c in range(1, rows.shape[1]))} for g in groups]
    kept[-1].add(len(rows) - 1)
    return rows[sorted(set().union(*kept))]


# -- parts of a figure -------------------------------------------------------------------------------------------------


def _figure(
    title: str,
    description: str,
    parts: list[str],
    height: float,
    legend: Sequence[tuple[str, str, str]],
    remark: str = "",
) -> str:
    slug = re.sub(r"\W+", "-", title.lower()).strip("-")
    keys = "".join(
        f'<span class="key"><svg class="swatch" viewBox="0 0 18 8" aria-hidden="true"><path class="{colour}" '
        f'stroke-width="4"{f" stroke-dasharray={chr(34)}{dash}{chr(34)}" if dash else ""} d="M0 4H18"/></svg>'
        f"{escape(label)}</span>"
        for label, colour, dash in legend
    )
    keys = f'<div class="legend">{keys}</div>' if keys else ""
    remark = f'<p class="remark">{escape(remark)}</p>' if remark else ""
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>{keys}"
        f'<svg role="img" viewBox="0 0 {WIDTH} {height:g}" '
        f'aria-labelledby="{slug}-title {slug}-text"><title id="{slug}-title">{escape(title)}</title>'
        f'<desc id="{slug}-text">{escape(description)}</desc>{"".join(parts)}</svg>{remark}</figure>'
    )


def _axis_label(text: str, x: float, y: float) -> str:
    return f'<text text-anchor="middle" x="{x:g}" y="{y:g}">{escape(text)}</text>'


def _y_axis(low: float, high: float, down, log: bool) -> list[str]:
    parts = []
    for value, text in _log_ticks(low, high) if log else ticks(low, high):
        y = float(down(np.array(value)))
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text text-anchor="end" x="{_LEFT - 5}" y="{y + 4:.1f}">{text}</text>')
    return parts


def _x_axis(low: float, high: float, across, y: float) -> list[str]:
    parts = [f'<path class="axis" d="M{float(across(low)):.1f} {y}H{WIDTH - _RIGHT}"/>']
    for value, text in ticks(low, high, 5):
        x = float(across(value))
        anchor = "end" if x > WIDTH - _RIGHT - 12 else "middle"
        parts.append(f'<path class="axis" d="M{x:.1f} {y}v4"/>')
        parts.append(f'<text text-anchor="{anchor}" x="{min(x, WIDTH - 2.0):.1f}" y="{y + 16:g}">{text}</text>')
    return parts


def ticks(low: float, high: float, about: int = 6) -> list[tuple[float, str]]:
    """Round numbers between two, with texts that tell them apart."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    values = np.arange(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1) * step
    largest = max(abs(low), abs(high))
    if largest < 1e-3:
        digits = max(2, 1 + math.floor(math.log10(largest)) - math.floor(math.log10(step) + 1e-9))
        return [(float(v), f"{v:.{digits}g}") for v in values]
    found = [_with_unit(values, step, *unit) for unit in {_unit_of(largest), ("", 1.0)}]
    return list(zip(values.tolist(), min(found, key=lambda texts: (max(map(len, texts)), texts)), strict=True))


def _with_unit(values: np.ndarray, step: float, suffix: str, unit: float) -> list[str]:
    digits = max(0, -math.floor(math.log10(step / unit) + 1e-9))
    return [f"{v / unit + 0.0:,.{digits}f}{suffix}" if abs(v) > step / 2 else "0" for v in values]


def _unit_of(largest: float) -> tuple[str, float]:
    """What numbers up to this one are counted in, such that none has more than three digits before the point."""
    units = ((" T", 1e12, 1e12), (" G", 1e9, 1e9), (" M", 1e6, 1e6), (" k", 1e3, 1e4))
    return next(((suffix, unit) for suffix, unit, least in units if largest >= least), ("", 1.0))


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, (last - first) // 6 + 1)
    mantissas = (1, 2, 5) if last - first <= 3 else (1,)
    values = [m * 10.0**e for e in range(first, last + 1, every) for m in mantissas]
    found = [(v, _compact(v)) for v in values if low * 0.999 <= v <= high * 1.001]
    return found if len(found) > 1 else ticks(low, high)


def _compact(x: float) -> str:
    suffix, unit = _unit_of(x)
    return f"{x / unit:,.0f}{suffix}" if 1 <= x / unit < 1e6 else f"{x:g}"


def _extent(arrays: Sequence[np.ndarray], positive: bool = False) -> tuple[float, float]:
    """Smallest and largest finite number, apart from one another."""
    values = np.concatenate([np.ravel(np.asarray(a, float)) for a in arrays])
    values = values[np.isfinite(values) & ((values > 0) | (not positive))]
    if not len(values):
        return (0.1, 1.0) if positive else (0.0, 1.0)
    low, high = float(values.min()), float(values.max())
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    return (low / 2, high * 2) if positive else (low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5))


def _log(y: np.ndarray) -> np.ndarray:
    return np.log10(np.where(np.asarray(y) > 0, y, np.nan))


def _line(x: np.ndarray, y: np.ndarray) -> str:
    """A path through the points, interrupted where there is none; a point alone becomes a dot."""
    text, pen = [], False
    for a, b in zip(x, y, strict=True):
        good = bool(np.isfinite(b))
        if good:
            text.append(f"{'L' if pen else 'M'}{a:.1f} {b:.1f}" + ("" if pen else "h0.1"))
        pen = good
    return "".join(text)


def _area(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> str:
    """The outlines of the stretches in which both edges are finite."""
    good = np.isfinite(low) & np.isfinite(high)
    stretches = np.split(np.arange(len(x)), np.flatnonzero(np.diff(good.astype(int))) + 1)
    text = []
    for s in (s for s in stretches if len(s) and good[s[0]]):
        there = [f"{a:.1f} {b:.1f}" for a, b in zip(x[s], high[s], strict=True)]
        back = [f"{a:.1f} {b:.1f}" for a, b in zip(x[s][::-1], low[s][::-1], strict=True)]
        text.append("M" + "L".join(there + back) + "Z")
    return "".join(text)
