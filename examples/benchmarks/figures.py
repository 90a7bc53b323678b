"""Draw the figure and print the table of a stored benchmark; both come from the JSON alone.

    python -m examples.benchmarks.figures docs/benchmarks/p1.json

writes ``docs/benchmarks/p1.png`` and prints the Markdown table of the same numbers; with ``--into PAGE.md`` the table
also replaces what stands between ``<!-- p1-table -->`` and ``<!-- /p1-table -->`` on that page. The same for the budget
curves that ``budgets.py`` writes (``docs/benchmarks/budgets_p1.json``, ``<!-- budgets_p1-table -->``), for
``growth.py`` and the others here, and for ``posteriors.py``, ``uci.py``, ``bigger_than_memory.py`` and
``path_sampling.py`` of the examples.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation, Text
from matplotlib.ticker import LogLocator
from matplotlib.transforms import Bbox

from examples.benchmarks.training_figures import draw_training, training_table
from examples.benchmarks.wording import MIB, as_fraction, circumstances
from examples.evidence import (
    draw_memory_over_time,
    draw_path_sampling,
    memory_limit_table,
    path_sampling_table,
    posteriors_table,
    uci_table,
)

# Okabe-Ito colours, which stay apart for colour-blind readers; each family has its own marker as well.
STYLES: dict[str, dict[str, Any]] = {
    "reference": {"color": "#000000", "marker": "s", "label": "NumPyro's Trace_ELBO"},
    "rival": {"color": "#0072B2", "marker": "o", "label": "other ways to save memory"},
    "rad2021": {"color": "#009E73", "marker": "^", "label": "RAD 2021 estimators, keep 0.1"},
    "ours": {"color": "#D55E00", "marker": "D", "label": "RAD_ELBO"},
}
MODE_STYLES: dict[str, dict[str, Any]] = {
    "recompute": {"color": "#0072B2", "marker": "o", "label": "recompute only"},
    "compress": {"color": "#009E73", "marker": "^", "label": "compress only"},
    "joint": {"color": "#D55E00", "marker": "D", "label": "joint"},
}
BESIDE_STYLES: dict[str, dict[str, Any]] = {
    "reference": STYLES["reference"],
    "rival": {"color": "#CC79A7", "marker": "v", "label": "jax.checkpoint and others"},
}
# Where a label may go, in points from its marker: nearest first.
ANGLES = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)]
OFFSETS = [(dx * r, dy * r) for r in (9, 16, 26, 38, 52, 70) for dx, dy in ANGLES]


def main(arguments: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Draw the figure and print the Markdown table of a stored benchmark.")
    parser.add_argument(
        "report", type=Path, help="JSON of one of the programs here, or of those in examples that write one"
    )
    parser.add_argument("--figure", type=Path, help="where the picture goes (default: beside the JSON, as .png)")
    parser.add_argument("--table-only", action="store_true", help="print the table, draw nothing")
    parser.add_argument("--into", type=Path, nargs="+", default=[], help="pages whose table is replaced")
    options = parser.parse_args(arguments)
    report = json.loads(options.report.read_text())
    if not options.table_only:
        picture = next((PICTURES[kind] for kind in PICTURES if kind in report), draw)
        picture(report, options.figure or options.report.with_suffix(".png"))
    for page in options.into:
        page.write_text(with_table(page.read_text(), options.report.stem, report))
    print(markdown_table(report))


def with_table(page: str, name: str, report: dict[str, Any]) -> str:
    """The page with the report's table between its markers, which are named as the report's file."""
    return between_markers(page, name, markdown_table(report))


def between_markers(page: str, name: str, table: str) -> str:
    """The page with a table between the markers of its name."""
    start, end = (f"<!-- {slash}{name}-table -->" for slash in ("", "/"))
    if page.count(start) != 1 or page.count(end) != 1:
        raise ValueError(f"The page needs one {start} and one {end}, with the table between them.")
    before, _, rest = page.partition(start)
    return before + start + "\n" + table + "\n" + end + rest.partition(end)[2]


def markdown_table(report: dict[str, Any]) -> str:
    """One row per rival, every ratio to ``exact``; below it the machine, the versions and what failed."""
    if "growth" in report:
        return growth_table(report)
    if "memory" in report:
        return memory_table(report)
    if "match" in report:
        return match_table(report)
    if "compiled" in report:
        return compiled_table(report)
    if "device" in report:
        return device_table(report)
    if "training" in report:
        return training_table(report)
    for kind, table in EVIDENCE.items():
        if kind in report:
            return f"{table(report)}\n\n{circumstances(report)}"
    measured = [row for row in report["rivals"] if "temp_bytes" in row]
    if "budgets" in report:
        lines = [
            "| step | budget (MiB) | T (MiB) | of exact | R (MiB) | time (s), quartiles | of exact | ρ "
            "| time x (1 + ρ), of exact | predicted added time | predicted added variance |",
            "| --- " + "| ---: " * 10 + "|",
        ]
        lines += [budget_row(row) for row in measured]
        lines += ["", budgets_footnote(report)]
    else:
        lines = [
            "| step | T (MiB) | of exact | R (MiB) | time (s), quartiles | of exact | compile (s) | of exact "
            "| gradient error | ρ |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        lines += [table_row(row, report["workload"]["batch"]) for row in measured]
        lines += ["", footnote(report)]
    failures = [f"- {row['label']}: `{row['failure']}`" for row in report["rivals"] if "failure" in row]
    if failures:
        lines += ["", "Infeasible or failed:" if "budgets" in report else "Failures:", "", *failures]
    return "\n".join(lines)


def table_row(row: dict[str, Any], batch: int) -> str:
    """The Markdown row of one rival; what was not measured stays empty."""
    ratio, compiled, step = row["ratio_to_exact"], row["compile"], row.get("step")
    label = row["label"]
    if "equal_memory" in row:
        fits = "" if row["equal_memory"]["reachable"] else ", still above the target"
        label += f" ({row['rows_per_step']} of {batch} rows{fits})"
    rho = row.get("gradient", {}).get("rho")
    cells = [
        label,
        f"{row['temp_bytes'] / MIB:.1f}",
        as_fraction(ratio["temp_bytes"]),
        "" if row["stored_bytes"] is None else f"{row['stored_bytes'] / MIB:.1f}",
        spread(step) if step else "",
        f"{ratio['step']:.2f}x" if step else "",
        f"{compiled['trace_and_lower_seconds']:.1f} + {compiled['compile_seconds']:.1f}",
        f"{ratio['compile']:.2f}x",
        gradient_error(row),
        "" if rho is None else f"{rho:.2g}",
    ]
    return "| " + " | ".join(cells) + " |"


def budget_row(row: dict[str, Any]) -> str:
    """The Markdown row of one mode within one budget, or of a rival."""
    ratio, step, predicted = row["ratio_to_exact"], row.get("step"), row.get("predicted") or {}
    rho = row.get("gradient", {}).get("rho")
    label = f"{row['label']} ({row['note']})" if row.get("mode") == "compress" else row["label"]
    cells = [
        label,
        f"{row['budget_bytes'] / MIB:.3g}" if "mode" in row else "",
        f"{row['temp_bytes'] / MIB:.3g}",
        as_fraction(ratio["temp_bytes"]),
        "" if row["stored_bytes"] is None else f"{row['stored_bytes'] / MIB:.3g}",
        spread(step) if step else "",
        f"{ratio['step']:.2f}x" if step else "",
        "" if rho is None else f"{rho:.2g}",
        f"{ratio['cost']:.3g}x" if "cost" in ratio else "",
        f"{predicted['added_seconds']:.2g}" if predicted else "",
        f"{predicted['added_variance']:.2g}" if predicted else "",
    ]
    return "| " + " | ".join(cells) + " |"


def growth_table(report: dict[str, Any]) -> str:
    """What each rival needs for one more layer, row, particle or iteration; below it how long planning takes."""
    lines = [
        "| what grows | step | T (MiB) at | and at | T for one more (KiB) | of exact | R for one more (KiB) | of T |",
        "| --- " * 2 + "| ---: " * 6 + "|",
    ]
    for axis, rows in report["growth"].items():
        exact = 0.0
        for rival in dict.fromkeys(row["rival"] for row in rows):
            mine = [row for row in rows if row["rival"] == rival]
            temp, stored = growth(mine, "temp_bytes"), growth(mine, "stored_bytes")
            exact = exact or temp
            ends = [f"{row['size']}: {row['temp_bytes'] / MIB:.3g}" for row in (mine[0], mine[-1])]
            cells = [
                axis,
                mine[0]["label"],
                *ends,
                f"{temp / 1024:.3g}",
                as_fraction(temp / exact) if temp > 0 else "nothing",
            ]
            cells += [f"{stored / 1024:.3g}", as_fraction(stored / exact)] if stored else ["", ""]
            lines.append("| " + " | ".join(cells) + " |")
    planned = {
        row["planning"]["residuals"]: row for rows in report["growth"].values() for row in rows if "planning" in row
    }
    times = ", ".join(f"{row['planning']['seconds']:.2g} s for {n} residuals" for n, row in sorted(planned.items()))
    return "\n".join(
        [
            *lines,
            "",
            f"{circumstances(report)} T: temporary bytes of the compiled `svi.update`. R: bytes stored between the "
            "sweeps, and their ratio to Trace_ELBO's T. For one more: between the two largest sizes.",
            "",
            f"Choosing a plan for a tenth of the exact residual bytes took {times}.",
        ]
    )


def memory_table(report: dict[str, Any]) -> str:
    """What each task takes, beside the step of 4 bits."""
    rows = report["memory"]
    step = next((row["program_bytes"] for row in rows if row["task"] == "step"), None)
    lines = ["| what | largest program (MiB) | of the step's | resident (MiB) |", "| --- | ---: | ---: | ---: |"]
    for row in rows:
        program, more = row["program_bytes"], row["resident_bytes"] / MIB
        share = "" if step is None else f"{program / step:.2f}"
        lines.append(f"| {row['label']} | {program / MIB:.1f} | {share} | {more:.0f} |")
    return "\n".join(
        [
            *lines,
            "",
            f"{circumstances(report)} Largest program: temporary and returned bytes, as the compiler says. Resident: "
            "highest resident memory of a fresh process less that before, with what the compiler takes.",
        ]
    )


def match_table(report: dict[str, Any]) -> str:
    """A rival in each row, and what RAD_ELBO does with its memory."""
    lines = [
        "| model | rival | T (MiB) | build (s) | time (s) | ours | T (MiB) | build (s) | time (s) | of the rival's "
        "| gradient |",
        "| --- | --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    rounds: set[int] = set()
    measured: dict[str, list[str]] = {}  # workloads, by when and where they were measured
    for name, found in report["match"].items():
        measured.setdefault(circumstances({**found, "workload": report["workload"]}), []).append(name.upper())
        for row in found["rows"]:
            rounds.add(len(row["step"]["all_seconds"]))
            ours, time = row["ours"], row["step"]["median_seconds"]
            added, difference = ours["added_variance"], ours["gradient"]["relative_difference"]
            took = ours["step"]["median_seconds"]
            gradient = f"ρ {added:.1g}" if added else f"differs by {difference:.0e}"
            way = "one pass" if ours["slices"] == 1 else f"{ours['slices']} slices"
            lines.append(
                f"| {found['title']} | {row['label']} | {row['temp_bytes'] / MIB:.1f} | {row['build_seconds']:.0f} "
                f"| {time:.3g} | {'left to JAX' if ours['untouched'] else way} | {ours['temp_bytes'] / MIB:.1f} "
                f"| {ours['build_seconds']:.0f} | {took:.3g} | {took / time:.2f}x | {gradient} |"
            )
    return "\n".join(
        [
            *lines,
            "",
            *(f"{', '.join(names)}: {where}" for where, names in measured.items()),
            f"Medians of {' or '.join(map(str, sorted(rounds)))} interleaved rounds. Ours is "
            "`RAD_ELBO(memory_budget=T)` with the T of the rival. Build: tracing and compiling. Gradient: its "
            "difference from that of `Trace_ELBO`, relative to its norm, or the predicted ρ where codes were taken.",
        ]
    )


def compiled_table(report: dict[str, Any]) -> str:
    """A way to take a step in each row, for each device what its compiler says; ratios to Trace_ELBO in brackets."""
    devices = report["compiled"]
    names = {name: found["title"] for device in devices.values() for name, found in device["rows"].items()}
    head = " | ".join(f"{d['device']}: T (MiB) | bytes accessed (GB) | predicted (ms)" for d in devices.values())
    lines = [f"| model | step | {head} |", "| --- | --- |" + " ---: |" * 3 * len(devices)]
    for name, title in names.items():
        tables = [
            {way["rival"]: way for way in device["rows"].get(name, {"ways": []})["ways"]} for device in devices.values()
        ]
        labels = {rival: way["label"] for table in tables for rival, way in table.items()}
        for rival, label in labels.items():
            cells = [cell for table in tables for cell in compiled_cells(table.get(rival, {}), table.get("exact", {}))]
            lines.append("| " + " | ".join([title, label, *cells]) + " |")
    reasons = {
        f"- {device['device']}, {way['label']}: `{way['failure']}`"
        for device in devices.values()
        for found in device["rows"].values()
        for way in found["ways"]
        if "failure" in way
    }
    return "\n".join(
        [
            *lines,
            "",
            *(circumstances({**d, "workload": {"title": f"For {d['device']}"}}) for d in devices.values()),
            "T: temporary bytes of the compiled `svi.update`. Bytes accessed: by all of its kernels, loops counted as "
            "often as they run. Predicted: max(bytes / bandwidth, operations / peak) and the starts of the kernels, by "
            "the data sheet. In brackets: of `Trace_ELBO`'s. What ours does: one pass, slices, or codes, with the "
            "predicted ρ.",
            *(line for device in devices.values() for line in hiding_latencies(device)),
            *sorted(reasons),
        ]
    )


def hiding_latencies(device: dict[str, Any]) -> list[str]:
    """What the scheduler that hides latencies makes of T, in a sentence; nothing where that is not a choice."""
    ratios = {
        (found["title"], way["label"]): way["hiding_temp_bytes"] / way["temp_bytes"]
        for found in device["rows"].values()
        for way in found["ways"]
        if "hiding_temp_bytes" in way
    }
    if not ratios:
        return []
    (title, label), most = max(ratios.items(), key=lambda item: item[1])
    return [
        f"With XLA's latency-hiding scheduler T for {device['device']} is {min(ratios.values()):.2f} to {most:.2f} of "
        f"what it is without (most: {title}, {label})."
    ]


def device_table(report: dict[str, Any]) -> str:
    """A way to take a step in each row, as it ran on a device; ratios to Trace_ELBO in brackets."""
    lines = [
        "| model | step | T (MiB) | most in use (MiB) | time (s), quartiles | of exact | build (s) |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    failures = []
    for found in report["device"].values():
        exact = next((way for way in found["ways"] if way["rival"] == "exact" and "step" in way), None)
        for way in found["ways"]:
            if "step" not in way:
                failures.append(f"- {found['title']}, {way['label']}: `{way['failure']}`")
                continue
            notes = "".join(f", {note}" for note in plan_notes(way.get("plan")))
            peak, took = way["peak_bytes"], way["step"]["median_seconds"]
            cells = [
                found["title"],
                way["label"],
                f"{way['temp_bytes'] / MIB:.4g}"
                + (f" ({as_fraction(way['temp_bytes'] / exact['temp_bytes'])}{notes})" if exact else ""),
                "" if peak is None else f"{peak / MIB:.4g}",
                spread(way["step"]),
                f"{took / exact['step']['median_seconds']:.2f}x" if exact else "",
                f"{way['build_seconds']:.0f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    told = (
        f"{circumstances(report)} Each in a process of its own, the median of {report['rounds']} steps. Most in use: "
        "by the process on the device, parameters, optimizer state and data included."
    )
    return "\n".join([*lines, "", told, *failures])


def plan_notes(plan: dict[str, Any] | None) -> list[str]:
    """What ours does, in words."""
    if not plan:
        return []
    notes = ["left to JAX"] if plan["untouched"] else []
    notes += [f"{plan['slices']} slices"] if plan["slices"] > 1 else []
    return notes + ([f"ρ {plan['added_variance']:.1g}"] if plan["added_variance"] else [])


def compiled_cells(way: dict[str, Any], exact: dict[str, Any]) -> list[str]:
    """The cells of one way on one device."""
    if "temp_bytes" not in way:
        return ["failed" if "failure" in way else "", "", ""]
    ratio = {field: way[field] / exact[field] for field in ("temp_bytes", "bytes_accessed", "predicted_seconds")}
    notes = plan_notes(way.get("plan"))
    return [
        f"{way['temp_bytes'] / MIB:.4g} ({as_fraction(ratio['temp_bytes'])}{''.join(f', {note}' for note in notes)})",
        f"{way['bytes_accessed'] / 1e9:.3g} ({ratio['bytes_accessed']:.2f}x)",
        f"{1e3 * way['predicted_seconds']:.3g} ({ratio['predicted_seconds']:.2f}x)",
    ]


def growth(rows: list[dict[str, Any]], field: str) -> float:
    """By how much something grows for one more, between the two largest sizes; 0 where it is not known."""
    before, last = rows[-2:]
    return (last[field] - before[field]) / (last["size"] - before["size"]) if field in last else 0.0


def spread(step: dict[str, Any]) -> str:
    """Median step time with its quartiles."""
    low, high = step["quartiles_seconds"]
    return f"{step['median_seconds']:.3g} ({low:.3g} to {high:.3g})"


def gradient_error(row: dict[str, Any]) -> str:
    """Relative variance of a randomized gradient, relative difference of a deterministic one."""
    gradient = row.get("gradient", {})
    if "relative_variance" in gradient:
        return f"variance {gradient['relative_variance']:.1e}"
    if "relative_difference" in gradient:
        return f"difference {gradient['relative_difference']:.1e}"
    return ""


def footnote(report: dict[str, Any]) -> str:
    """Where and how the numbers were measured, and what the columns mean."""
    return (
        f"{circumstances(report)} T: temporary bytes of the "
        "compiled `svi.update`. R: bytes stored between the sweeps. Compile: trace and lower + XLA. Gradient error: "
        "E‖g − g_exact‖²/‖g_exact‖² over the path noise, or ‖g − g_exact‖/‖g_exact‖ where nothing is random. ρ: added "
        "variance / variance of the exact stochastic gradient."
    )


def budgets_footnote(report: dict[str, Any]) -> str:
    """The same for the budget curves."""
    budgets = report["budgets"]
    return (
        f"{circumstances(report)} Budgets are shares of the exact residual bytes, "
        f"{budgets['exact_residual_bytes'] / MIB:.4g} MiB: the sum of the bytes of all residuals, each stored exactly "
        "(`explain(...).exact_bytes` of `RAD_ELBO(codec=Keep())`). T: temporary bytes of the compiled `svi.update`. R: "
        "bytes stored between the sweeps. ρ: added variance / variance of the exact stochastic gradient; 0 where "
        "nothing is random. Predicted: added time / time of the exact step, added variance as ρ, calibrated with "
        f"{budgets['calibration']['draws']} gradients."
    )


# The picture of budgets ends here: what costs more than so many exact steps is of no use, however much more.
MOST_COST = 3.5


@dataclass(frozen=True)
class Point:
    """A marker with its label: MiB, a ratio and the quartiles of that ratio."""

    x: float
    y: float
    low: float
    high: float
    label: str
    color: str


def draw(report: dict[str, Any], path: Path) -> None:
    """Memory against step time, one labelled point per rival; bars are the quartiles of the time."""
    measured = [row for row in report["rivals"] if "temp_bytes" in row and "step" in row]
    rows = [row for row in measured if not row["name"].endswith(("_dithered", "_rotated"))]  # beside the plain
    reference = next(row for row in rows if row["name"] == "exact")["step"]["median_seconds"]
    axes = new_figure()
    points = []
    for family, style in STYLES.items():
        mine = [point(row, style["color"], 1 / reference) for row in rows if row["family"] == family]
        if mine:
            draw_points(axes, mine, "none", style)
        points += mine
    finish(axes, f"{report['workload']['title']} (left and low is better)", "step time / Trace_ELBO's")
    save(axes, points, path)


def draw_budgets(report: dict[str, Any], path: Path) -> None:
    """Memory against time x (1 + ρ): a line for each mode through its budgets, the rivals as points."""
    rows = [row for row in report["rivals"] if "cost" in row["ratio_to_exact"]]
    reference = next(row for row in rows if row["name"] == "exact")["step"]["median_seconds"]
    axes = new_figure()
    points = []
    for family, style in BESIDE_STYLES.items():
        mine = [point(row, style["color"], 1 / reference) for row in rows if row["family"] == family]
        if mine:
            draw_points(axes, mine, "none", style)
        points += mine
    for mode, style in MODE_STYLES.items():
        mine = []
        for row in (row for row in rows if row.get("mode") == mode and "same_as" not in row):
            alike = [r for r in rows if r is row or r.get("same_as") == row["name"]]
            label = ", ".join(f"{r['budget_percent']:g}" for r in alike) + " %"
            factor = (1 + row["gradient"].get("rho", 0.0)) / reference
            mine.append(within_the_picture(point({**row, "label": label}, style["color"], factor)))
        if mine:
            draw_points(axes, mine, "-", style)
        points += mine
    title = f"{report['workload']['title']}: budgets in %\nof the exact residuals' bytes (left and low is better)"
    finish(axes, title, "time x (1 + ρ) / Trace_ELBO's")
    save(axes, points, path)


GROWTH_STYLES: dict[str, dict[str, Any]] = {
    "exact": STYLES["reference"],
    "checkpoint_layer": STYLES["rival"],
    "checkpoint_sqrt": STYLES["rival"],
    "checkpoint_map": STYLES["rival"],
    "ours_4bit": STYLES["ours"],
    "ours_2bit": {"color": "#E69F00", "marker": "P"},
    "ours_budget": {"color": "#56B4E9", "marker": "X"},
    "ours_segments": {"color": "#009E73", "marker": "^"},
    "weighed": STYLES["reference"],
    "weighed_map": STYLES["rival"],
    "weighed_budget": {"color": "#56B4E9", "marker": "X"},
}


def draw_growth(report: dict[str, Any], path: Path) -> None:
    """Memory against size, one panel for each quantity that grows."""
    plt.rcParams.update({"font.size": 10, "font.family": "DejaVu Sans"})
    _, panels = plt.subplots(2, 3, figsize=(12, 7), dpi=160, facecolor="white", layout="constrained")
    for axes in panels.flat[len(report["growth"]) :]:
        axes.set_axis_off()
    for axes, (name, rows) in zip(panels.flat, report["growth"].items(), strict=False):
        for rival in dict.fromkeys(row["rival"] for row in rows):
            mine = [row for row in rows if row["rival"] == rival]
            sizes, temps = [row["size"] for row in mine], [row["temp_bytes"] / MIB for row in mine]
            style = {"markersize": 7, "markeredgecolor": "white", "linestyle": "-", **GROWTH_STYLES[rival]}
            axes.plot(sizes, temps, **(style | {"label": mine[0]["label"]}))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        for one in (axes.xaxis, axes.yaxis):
            one.set_major_formatter(lambda value, _: f"{value:.5g}")
        axes.set_xlabel(name)
        axes.set_ylabel("temporary memory of a step (MiB)")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    plt.gcf().savefig(path)
    plt.close()


def draw_memory(report: dict[str, Any], path: Path) -> None:
    """A pair of bars for each task: what its largest program takes, and by how much the process grew."""
    rows = report["memory"][::-1]
    plt.rcParams.update({"font.size": 10, "font.family": "DejaVu Sans"})
    figure, axes = plt.subplots(figsize=(8.2, 1.2 + 0.5 * len(rows)), dpi=160, facecolor="white", layout="constrained")
    for shift, field, label, color in (
        (0.19, "program_bytes", "largest program: temporary and returned", "#D55E00"),
        (-0.19, "resident_bytes", "resident memory of the process, compiler included", "#0072B2"),
    ):
        sizes, places = [row[field] / MIB for row in rows], [i + shift for i in range(len(rows))]
        bars = axes.barh(places, sizes, height=0.36, color=color, label=label)
        axes.bar_label(bars, [f"{size:.0f}" for size in sizes], padding=3, fontsize=8.5)
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
    axes.set_xlabel("MiB more than before")
    axes.set_title(report["workload"]["title"], fontsize=11)
    axes.margins(x=0.1)
    axes.grid(alpha=0.25, axis="x")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    plt.gcf().savefig(path)
    plt.close()


# By what a report has.
PICTURES = {
    "budgets": draw_budgets,
    "growth": draw_growth,
    "memory": draw_memory,
    "training": draw_training,
    "bigger_than_memory": draw_memory_over_time,
    "path_sampling": draw_path_sampling,
}
EVIDENCE = {
    "posteriors": posteriors_table,
    "uci": uci_table,
    "bigger_than_memory": memory_limit_table,
    "path_sampling": path_sampling_table,
}


def point(row: dict[str, Any], color: str, factor: float) -> Point:
    """The point of a row, its time multiplied by ``factor``."""
    low, high = row["step"]["quartiles_seconds"]
    time = row["step"]["median_seconds"] * factor
    return Point(row["temp_bytes"] / MIB, time, low * factor, high * factor, row["label"], color)


def within_the_picture(point: Point) -> Point:
    """A point that is too far up stands at the edge, with its height in its label: the others stay apart."""
    if point.y <= MOST_COST:
        return point
    label = f"{point.label}: {point.y:.0f}x, above the picture"
    return Point(point.x, MOST_COST, MOST_COST, MOST_COST, label, point.color)


def new_figure() -> Axes:
    """Axes in the style of the pictures here."""
    plt.rcParams.update({"font.size": 10.5, "font.family": "DejaVu Sans"})
    _, axes = plt.subplots(figsize=(8.2, 5.0), dpi=160, facecolor="white", layout="constrained")
    return axes


def draw_points(axes: Axes, points: Sequence[Point], line: str, style: dict[str, Any]) -> None:
    """Markers with error bars."""
    look = {"markersize": 8, "linestyle": line, "elinewidth": 1, "markeredgecolor": "white", "zorder": 3}
    bars = [[p.y - p.low for p in points], [p.high - p.y for p in points]]
    axes.errorbar([p.x for p in points], [p.y for p in points], yerr=bars, **look, **style)


def finish(axes: Axes, title: str, vertical: str) -> None:
    """Scales, labels and the line at the exact step's time."""
    axes.axhline(1.0, color="0.75", linewidth=1, zorder=0)
    axes.set_xscale("log", base=2)
    low, high = axes.get_xlim()
    subs = (1.0, 1.5) if high > 4 * low else (1.0, 1.125, 1.25, 1.375, 1.5, 1.75)  # a narrow range has few powers
    axes.xaxis.set_major_locator(LogLocator(base=2, subs=subs))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
    axes.set_xlabel("temporary memory of one compiled SVI step (MiB, log scale)")
    axes.set_ylabel(vertical)
    axes.set_title(title, fontsize=11)
    axes.margins(x=0.14, y=0.14)
    # Never zoom in so far that timing noise looks like a difference.
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(min(bottom, 0.7), 0.0), max(top, 1.3))
    if top > 4:  # one slow rival must not push all others together
        axes.set_yscale("log", base=2)
        axes.set_ylim(min(0.5, 0.8 * axes.dataLim.ymin), 1.3 * top)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    columns = 2 if len(axes.get_legend_handles_labels()[0]) <= 4 else 3
    legend = axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=columns, frameon=False, fontsize=9.5)
    legend.set_in_layout(True)


def save(axes: Axes, points: Sequence[Point], path: Path) -> None:
    """Label the points and write the picture."""
    figure = axes.get_figure(root=True)
    assert figure is not None  # axes made by plt.subplots always have one
    figure.canvas.draw()
    place_labels(axes, figure, points)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def place_labels(axes: Axes, figure: Figure, points: Sequence[Point]) -> None:
    """Label each point at the nearest offset where the text touches no marker, bar, other label or edge."""
    renderer = figure.canvas.get_renderer()  # pyright: ignore[reportAttributeAccessIssue]
    reach = 5.5 * figure.dpi / 72  # half a marker, in pixels
    taken = []
    for p in points:
        (x, y), (_, y0), (_, y1) = axes.transData.transform([(p.x, p.y), (p.x, p.low), (p.x, p.high)])
        taken.append(Bbox.from_extents(x - reach, y - reach, x + reach, y + reach))
        taken.append(Bbox.from_extents(x - 2, y0, x + 2, y1))
    frame = axes.get_window_extent(renderer)
    # The most crowded points choose first, while there is still room around them.
    middles = [((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2) for box in taken[::2]]
    crowding = [sum(abs(x - u) + abs(y - v) < 40 * reach for u, v in middles) for x, y in middles]
    for i in sorted(range(len(points)), key=lambda i: -crowding[i]):
        for dx, dy in OFFSETS:
            note = annotate(axes, points[i], dx, dy)
            note.update_positions(renderer)
            box = Text.get_window_extent(note, renderer).padded(2)  # of the text alone, without its leader line
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            note.remove()
        else:  # no room anywhere: better on top of something than missing
            annotate(axes, points[i], *OFFSETS[0])


def annotate(axes: Axes, point: Point, dx: float, dy: float) -> Annotation:
    """The label at an offset in points, with a thin leader line when it had to move away."""
    far = max(abs(dx), abs(dy)) > 9
    return axes.annotate(
        point.label,
        (point.x, point.y),
        xytext=(dx, dy),
        textcoords="offset points",
        fontsize=9.5,
        color=point.color,
        path_effects=[withStroke(linewidth=2.5, foreground="white")],  # legible across a line
        zorder=4,
        ha="left" if dx > 0 else "right" if dx < 0 else "center",
        va="bottom" if dy > 0 else "top" if dy < 0 else "center",
        arrowprops={"arrowstyle": "-", "color": point.color, "linewidth": 0.6, "shrinkB": 4} if far else None,
    )


if __name__ == "__main__":
    main()
