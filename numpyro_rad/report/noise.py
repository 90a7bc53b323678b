"""The sections of a report about the noise of the gradient: where it comes from, and how it went during the fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import numpy as np

from numpyro_rad.diagnostics.records import BlockVariance, FitRecord, GradientVariance, Track
from numpyro_rad.report import charts
from numpyro_rad.report.charts import Bar, Curve
from numpyro_rad.report.parts import MAX_BARS, MAX_ROWS, Section, Table, largest, thin
from numpyro_rad.report.verdict import SOURCES, estimate, shares
from numpyro_rad.wording import number, seconds_text, size_text

LOOKS_AVERAGED = 10
"""Single looks at the noise of a gradient are averaged over a tenth of them before they are drawn."""


_COLOURS = {"minibatch": "blue", "guide": "green", "path": "red"}


def noise(record: FitRecord) -> Iterator[Section]:
    """Noise at the end, by source and by block."""
    measured = record.gradient_variance
    if measured is None:
        return
    text = (
        "The variance of the gradient, tr Cov(g), split by the law of total variance: what minibatches add, what the "
        f"guide's samples add, and what the codes of residuals (the path) add. From {measured.draws:,} draws.",
        f"{measured.rho_text}. {measured.signal_text}.",
        "The estimates are unbiased, so a small variance may come out negative; figures draw such a part as nothing.",
    )
    figures = (partial(_totals_figure, measured), partial(_blocks_figure, measured))
    tables = (_variance_table(measured), *_efficiency_table(measured))
    yield Section("Where the noise comes from", text, tables, figures if measured.blocks else figures[:1])


def _totals_figure(measured: GradientVariance) -> str:
    total = measured.total
    shown = [
        Bar(f"{label}: {estimate(getattr(total, name))}", _alone(total, name), getattr(total, name).standard_error)
        for name, label in _sources(measured)
    ]
    described = "; ".join(bar.label for bar in shown)
    legend = [("", _COLOURS[name]) for name, _ in SOURCES]  # each bar bears the name of its source
    return charts.bars("Variance of the whole gradient", described, shown, legend, "variance, tr Cov(g)", share=False)


def _sources(measured: GradientVariance) -> list[tuple[str, str]]:
    """The sources of variance that there are: a fit without minibatches or codes has no such part."""
    return [(name, label) for name, label in SOURCES if getattr(measured.total, name).value != 0]


def _alone(block: BlockVariance, wanted: str) -> tuple[float, ...]:
    return tuple(getattr(block, name).value if name == wanted else 0.0 for name, _ in SOURCES)


def _blocks_figure(measured: GradientVariance) -> str:
    blocks = sorted(measured.blocks, key=lambda b: largest(b.total.value))
    coded = measured.total.path.value != 0
    scale = sum(max(b.total.value, 0.0) for b in blocks if math.isfinite(b.total.value)) or 1.0
    shown = []
    for b in blocks[:MAX_BARS]:
        parts = tuple(getattr(b, name).value / scale for name, _ in SOURCES)
        name = f"{b.name} ({100 * shares(b)['path']:.0f} % path)" if coded else b.name
        shown.append(Bar(name, parts, b.total.standard_error / scale))
    rest = blocks[MAX_BARS:]
    if rest:
        parts = tuple(sum(_finite(getattr(b, name).value) for b in rest) / scale for name, _ in SOURCES)
        shown.append(Bar(f"{len(rest)} others", parts))
    described = "Share of each block of parameters in the total variance, split by source; the largest first."
    legend = [(label, _COLOURS[name]) for name, label in SOURCES]
    return charts.bars(
        "Variance by block of parameters", described, shown, legend, "share of the total variance", share=False
    )


def _variance_table(measured: GradientVariance) -> Table:
    blocks = sorted(measured.blocks, key=lambda b: largest(b.total.value))
    rows = [_variance_row(b) for b in (measured.total, *blocks[:MAX_ROWS])]
    if len(blocks) > MAX_ROWS:
        rest = blocks[MAX_ROWS:]
        sums = (number(sum(_finite(getattr(b, name).value) for b in rest)) for name in ("minibatch", "guide", "path"))
        total = number(sum(_finite(b.total.value) for b in rest))
        rows.append((f"{len(rest)} others", f"{sum(b.size for b in rest):,}", *sums, total, ""))
    header = ("block", "parameters", "minibatch", "guide", "path", "total", "‖mean gradient‖²")
    return Table("Variance by block (± standard error)", header, tuple(rows), folded=len(rows) > 12)


def _variance_row(b: BlockVariance) -> tuple[str, ...]:
    return (b.name, f"{b.size:,}", *map(estimate, (b.minibatch, b.guide, b.path, b.total, b.squared_norm)))


def _efficiency_table(measured: GradientVariance) -> Iterator[Table]:
    names = list(dict.fromkeys([*measured.seconds, *measured.temporary_bytes]))
    if not names:
        return
    rows = []
    for name in names:
        size = measured.temporary_bytes.get(name)
        rows.append(
            (
                name,
                seconds_text(measured.seconds[name]) if name in measured.seconds else "–",
                size_text(size) if size is not None else "–",
                number(measured.efficiency.get(name)),
                number(measured.memory_efficiency.get(name)),
            )
        )
    header = ("gradient", "time", "temporary memory", "1 / (variance x time)", "1 / (variance x memory)")
    yield Table("Cost of one gradient; efficiencies relative to the exact one", header, tuple(rows))


def noise_over_time(record: FitRecord) -> Iterator[Section]:
    """Noise as it was looked at during the fit."""
    track = record.track
    if track is None or not len(track.steps):
        return
    text = (
        "Looked at during the fit, at intervals. Single looks are noisy, so the curves are running averages over a "
        "tenth of them. The path is what codes of residuals add; the rest is minibatches and the guide's samples. ρ is "
        "path / rest; codes are harmless far below the alarm line, and a fit takes up to 1 + ρ times as many steps.",
    )
    figures = [partial(_sources_figure, track), partial(_rho_figure, track), partial(_signal_figure, track)]
    if not np.any(track.path):  # exact gradients have no codes
        text, figures = (text[0].split(" The path is")[0],), [figures[0], figures[2]]
    yield Section("Noise during the fit", text, (_track_table(track),), tuple(figures))


def _averaged(y: np.ndarray) -> np.ndarray:
    """Running averages over a tenth of the looks, of what is finite."""
    width = max(1, len(y) // LOOKS_AVERAGED)
    good = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(good, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(good)])
    stop = np.arange(1, len(y) + 1)
    start = np.maximum(stop - width, 0)
    n = counts[stop] - counts[start]
    return np.where(n > 0, (sums[stop] - sums[start]) / np.maximum(n, 1), np.nan)


def _sources_figure(track: Track) -> str:
    path, total = (np.asarray(y, float).sum(1) for y in (track.path, track.total))
    steps, path, rest = thin(np.asarray(track.steps, float), _averaged(path), _averaged(total - path))
    shown = [
        Curve("minibatches and guide", "blue", steps, rest),
        Curve("codes of residuals (path)", "red", steps, path, dash="5 3"),
    ]
    codes = f", {number(float(path[-1]))} from codes" if np.any(track.path) else ""
    described = f"At the end {number(float(rest[-1]))} from minibatches and guide{codes}."
    return charts.curves("Variance over time", described, shown, ("step", "variance, tr Cov(g)"), log=True)


def _rho_figure(track: Track) -> str:
    steps, rho = thin(np.asarray(track.steps, float), np.asarray(track.rho, float))
    described = (
        f"Path variance over all other variance, {number(float(rho[-1]))} at the end; there is an alarm above "
        f"{number(track.rho_max)}."
    )
    labels = ("step", "ρ = path / rest")
    alarm = (track.rho_max, f"alarm at {number(track.rho_max)}") if 0 < track.rho_max < math.inf else None
    return charts.curves("ρ over time", described, [Curve("ρ", "red", steps, rho)], labels, log=True, level=alarm)


def _signal_figure(track: Track) -> str:
    norm, total = (_averaged(np.asarray(y, float).sum(1)) for y in (track.squared_norm, track.total))
    ratio = np.where(total > 0, norm / np.where(total > 0, total, 1.0), 0.0 * total)
    steps, ratio = thin(np.asarray(track.steps, float), ratio)
    described = "Squared norm of the mean gradient over its variance. It falls towards 0 near an optimum."
    shown = [Curve("signal-to-noise ratio", "green", steps, ratio)]
    return charts.curves("Signal-to-noise ratio over time", described, shown, ("step", "‖mean‖² / variance"), log=True)


def _track_table(track: Track) -> Table:
    """Means over the last half of the looks, by parameter."""
    half = len(track.steps) // 2
    means = [_mean(np.asarray(y, float)[half:]) for y in (track.path, track.total, track.squared_norm)]
    order = sorted(range(len(track.names)), key=lambda i: largest(float(means[1][i])))
    rows = []
    for i in order[:MAX_ROWS]:
        path, total, norm = (float(m[i]) for m in means)
        rho = path / (total - path) if total - path > 0 else math.nan
        rows.append(
            (track.names[i], number(path), number(total), number(rho), number(norm / total if total > 0 else math.nan))
        )
    if len(order) > MAX_ROWS:
        path, total = (number(float(sum(m[i] for i in order[MAX_ROWS:]))) for m in means[:2])
        rows.append((f"{len(order) - MAX_ROWS} others", path, total, "", ""))
    header = ("parameter", "path", "total", "ρ", "signal-to-noise")
    return Table("Mean over the last half of the looks", header, tuple(rows), folded=True)


def _mean(y: np.ndarray) -> np.ndarray:
    """Mean of the finite numbers of each column; NaN without any."""
    good = np.isfinite(y)
    return np.where(good.any(0), np.where(good, y, 0.0).sum(0) / np.maximum(good.sum(0), 1), np.nan)


def _finite(x: float) -> float:
    return x if math.isfinite(x) else 0.0
