"""The table and the picture of the training curves that ``training.py`` writes; ``figures.py`` calls them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from examples.benchmarks.curves import LOSSES
from examples.benchmarks.wording import MIB, as_fraction, circumstances

WEIGHTS = {"AutoDelta": "deterministic", "AutoNormal": "Bayesian"}
# Okabe-Ito colours; the second of two of the same kind, with fewer bits or entries, is dashed.
CURVES: dict[str, dict[str, Any]] = {
    "exact": {"color": "#000000", "linewidth": 2.5, "alpha": 0.6},
    "small_batch": {"color": "#0072B2", "linewidth": 2},
    "same_sample_10": {"color": "#009E73"},
    "same_sample_5": {"color": "#009E73", "linestyle": "--"},
    "different_sample_10": {"color": "#56B4E9"},
    "different_sample_5": {"color": "#56B4E9", "linestyle": "--"},
    "projection_10": {"color": "#CC79A7"},
    "projection_5": {"color": "#CC79A7", "linestyle": "--"},
    "ours_4bit": {"color": "#D55E00"},
    "ours_2bit": {"color": "#D55E00", "linestyle": "--"},
    "ours_budget": {"color": "#E69F00"},
    "ours_default": {"color": "#D55E00", "linestyle": ":", "linewidth": 2.5},
}
# The picture begins, from above, where the exact run is at most after this part of its steps.
FROM_ABOVE = 0.1


def training_table(report: dict[str, Any]) -> str:
    """One row for each estimator and kind of weights; what no row has gets no column."""
    header = [
        "weights",
        "step",
        "rate",
        "T (MiB)",
        "R (MiB)",
        "time (ms)",
        "final loss",
        "its data part",
        "steps to exact's",
        "steps to the small batch's",
        "test accuracy (%)",
        "test log likelihood",
    ]
    rows, notes = [], []
    for guide, entry in report["training"]["guides"].items():
        for name, cost in entry["costs"].items():
            if "failure" in cost:
                notes.append(f"- {WEIGHTS[guide]}, {cost['label']}: `{cost['failure']}`")
            elif name in entry["summary"] or "check" in cost:
                rows.append(table_row(guide, entry, name))
    used = [column for column in range(len(header)) if any(row[column] for row in rows)]
    lines = ["| " + " | ".join(header[c] for c in used) + " |", "| --- | --- |" + " ---: |" * (len(used) - 2)]
    lines += ["| " + " | ".join(row[c] for c in used) + " |" for row in rows]
    return "\n".join([*lines, "", footnote(report), *(["", "Failed:", "", *notes] if notes else [])])


def table_row(guide: str, entry: dict[str, Any], name: str) -> list[str]:
    """The cells of one estimator."""
    cost, exact = entry["costs"][name], entry["costs"]["exact"]
    took, reference = (c["step"]["median_seconds"] for c in (cost, exact))
    label = cost["label"] + (f" ({cost['rows_per_step']} rows)" if cost["kind"] == "small_batch" else "")
    stored = cost["stored_bytes"]
    cells = [
        WEIGHTS[guide],
        label,
        "",
        f"{cost['temp_bytes'] / MIB:.3g} ({as_fraction(cost['temp_bytes'] / exact['temp_bytes'])})",
        "" if stored is None else f"{stored / MIB:.3g} ({as_fraction(stored / exact['stored_bytes'])})",
        f"{1e3 * took:.3g} ({took / reference:.2f}x)",
    ]
    if cost["follows_exact"]:
        check = cost["check"]
        differs = "" if check["equals_exact"] else "not "
        return [*cells, f"{differs}as exact ({check['largest_difference']:.0e})", "", "", "", "", ""]
    found, runs = entry["summary"][name], [run for run in entry["runs"] if run["estimator"] == name]
    cells[2] = f"{runs[0]['rate']:g}"
    cells += [loss_cell(found, field, name == "exact") for field in LOSSES]
    for target in ("exact", "small_batch"):
        ratios = [found[field]["steps_to"].get(target) for field in LOSSES]
        cells.append("" if None in ratios or name == target else " / ".join(map(ratio_cell, ratios)))
    tests = [run["test"] for run in runs if run["test"]]
    for field, factor, digits in (("accuracy", 100, 1), ("log_likelihood", 1, 3)):
        cells.append(f"{factor * np.mean([test[field] for test in tests]):.{digits}f}" if tests else "")
    return cells


def loss_cell(found: dict[str, Any], field: str, is_exact: bool) -> str:
    """The final loss of the exact runs; of others, by how much it differs."""
    if found["diverged"]:
        return f"{found['diverged']} of {found['runs']} diverged"
    value = found[field]["final" if is_exact else "difference"]
    if value["mean"] is None:
        return ""
    return f"{value['mean']:.4g}" if is_exact else f"{value['mean']:+.2g}{error_text(value, '.1g')}"


def ratio_cell(ratio: dict[str, Any]) -> str:
    """Steps to a loss, in relation to those of its owner."""
    if ratio["mean"] is None:
        return f"{ratio['there']} of {len(ratio['values'])} arrive"
    return f"{ratio['mean']:.2f}{error_text(ratio, '.2f')}"


def error_text(value: dict[str, Any], form: str) -> str:
    error = value["standard_error"]
    return "" if error is None else f" ± {error:{form}}"


def footnote(report: dict[str, Any]) -> str:
    """How the numbers came about."""
    settings = report["training"]["settings"]
    seeds = {run["seed"] for entry in report["training"]["guides"].values() for run in entry["runs"]}
    rates = ", ".join(f"{rate:g}" for rate in settings["rates"])
    rows = settings["evaluated_rows"]
    evaluated = "the only row" if rows == 1 else f"{rows} rows of the training data"
    return (
        f"{circumstances(report)} {len(seeds)} paired seeds. Rate: of Adam, the best of {rates} for each estimator, on "
        "a seed of its own. T: temporary bytes of the compiled `svi.update`. R: bytes stored between the sweeps; of "
        "Trace_ELBO, those of `RAD_ELBO(codec=Keep())`. In brackets: of exact's. Time: median of "
        f"{settings['timed_rounds']} interleaved rounds. Final loss: after {settings['steps']} steps, per row, with "
        f"its data part, the negative log likelihood; evaluated exactly on {evaluated} "
        "with one draw of the guide, the same for all, and averaged over "
        f"{settings['averaged_evaluations']} evaluations. That of exact itself, and for the others what differs from "
        "it on the same seed, with the standard error. Steps to exact's: until its final loss, and until its "
        "data part, as ratios to the steps of exact itself; runs have a quarter more steps. The same for the small "
        "batch's. As exact: an exact gradient, with the largest relative difference of the losses of the first steps."
    )


def draw_training(report: dict[str, Any], path: Path) -> None:
    """A row of panels for each kind of weights: loss against steps and seconds, and its data part against both."""
    guides = {guide: entry for guide, entry in report["training"]["guides"].items() if entry["runs"]}
    at = report["training"]["settings"]["at_steps"]
    plt.rcParams.update({"font.size": 10, "font.family": "DejaVu Sans"})
    figure, panels = plt.subplots(
        len(guides),
        4,
        figsize=(16, 3.8 * len(guides) + 0.8),
        dpi=75,
        facecolor="white",
        layout="constrained",
        squeeze=False,
    )
    labels = {"loss": "loss per row", "data_loss": "negative log likelihood per row"}
    for row, (guide, entry) in zip(panels, guides.items(), strict=True):
        for i, field in enumerate(LOSSES):
            draw_curves(row[2 * i], entry, field, at, in_seconds=False)
            draw_curves(row[2 * i + 1], entry, field, at, in_seconds=True)
            for axes in row[2 * i : 2 * i + 2]:
                axes.set_ylabel(f"{WEIGHTS[guide]}: {labels[field]}")
    handles = {
        label: line for axes in panels.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(f"{report['workload']['title']}: means over paired seeds (left and low is better)", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def draw_curves(axes: Axes, entry: dict[str, Any], field: str, at: list[int], in_seconds: bool) -> None:
    """The mean curve of each estimator; one that follows the exact runs differs from them in seconds only."""
    means = {
        name: np.mean([np.array(run[field], float) for run in entry["runs"] if run["estimator"] == name], axis=0)
        for name in dict.fromkeys(run["estimator"] for run in entry["runs"])
    }
    exact = means["exact"]
    for name, cost in entry["costs"].items():
        if name not in CURVES or "step" not in cost:
            continue
        curve = means.get(name, exact if cost["follows_exact"] and in_seconds else None)
        if curve is not None:
            unit = cost["step"]["median_seconds"] if in_seconds else 1.0
            axes.plot(unit * np.array(at), curve, **{"linewidth": 1.5, "label": cost["label"], **CURVES[name]})
    begin = exact[int(FROM_ABOVE * len(exact)) :].max()
    lowest = min((float(np.nanmin(curve)) for curve in means.values() if np.isfinite(curve).any()), default=begin)
    if lowest < begin:
        axes.set_ylim(lowest - 0.05 * (begin - lowest), begin + 0.05 * (begin - lowest))
    axes.set_xlabel("seconds" if in_seconds else "steps")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
