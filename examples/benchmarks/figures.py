"""Draw the figure and print the table of a stored benchmark; both come from the JSON alone.

    python examples/benchmarks/figures.py docs/benchmarks/p1.json

writes ``docs/benchmarks/p1.png`` and prints the Markdown table of the same numbers; with ``--into PAGE.md`` the table
also replaces what stands between ``<!-- p1-table -->`` and ``<!-- /p1-table -->`` on that page.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.text import Annotation, Text
from matplotlib.ticker import LogLocator
from matplotlib.transforms import Bbox

MIB = 2**20
# Okabe-Ito colours, which stay apart for colour-blind readers; each family has its own marker as well.
STYLES: dict[str, dict[str, Any]] = {
    "reference": {"color": "#000000", "marker": "s", "label": "NumPyro's Trace_ELBO"},
    "rival": {"color": "#0072B2", "marker": "o", "label": "other ways to save memory"},
    "rad2021": {"color": "#009E73", "marker": "^", "label": "RAD 2021 estimators, keep 0.1"},
    "ours": {"color": "#D55E00", "marker": "D", "label": "RAD_ELBO"},
}
# Where a label may go, in points from its marker: nearest first.
ANGLES = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)]
OFFSETS = [(dx * r, dy * r) for r in (9, 16, 26, 38, 52, 70) for dx, dy in ANGLES]


def main(arguments: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Draw the figure and print the Markdown table of a stored benchmark.")
    parser.add_argument("report", type=Path, help="JSON written by run.py")
    parser.add_argument("--figure", type=Path, help="where the picture goes (default: beside the JSON, as .png)")
    parser.add_argument("--table-only", action="store_true", help="print the table, draw nothing")
    parser.add_argument("--into", type=Path, nargs="+", default=[], help="pages whose table is replaced")
    options = parser.parse_args(arguments)
    report = json.loads(options.report.read_text())
    if not options.table_only:
        draw(report, options.figure or options.report.with_suffix(".png"))
    for page in options.into:
        page.write_text(with_table(page.read_text(), report))
    print(markdown_table(report))


def with_table(page: str, report: dict[str, Any]) -> str:
    """The page with the report's table between its markers."""
    start, end = (f"<!-- {slash}{report['workload']['name']}-table -->" for slash in ("", "/"))
    if page.count(start) != 1 or page.count(end) != 1:
        raise ValueError(f"The page needs one {start} and one {end}, with the table between them.")
    before, _, rest = page.partition(start)
    return before + start + "\n" + markdown_table(report) + "\n" + end + rest.partition(end)[2]


def markdown_table(report: dict[str, Any]) -> str:
    """One row per rival, every ratio to ``exact``; below it the machine, the versions and what failed."""
    lines = [
        "| step | T (MiB) | of exact | R (MiB) | time (s), quartiles | of exact | compile (s) | of exact "
        "| gradient error | ρ |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [table_row(row, report["workload"]["batch"]) for row in report["rivals"] if "temp_bytes" in row]
    lines += ["", footnote(report)]
    failures = [f"- {row['label']}: `{row['failure']}`" for row in report["rivals"] if "failure" in row]
    if failures:
        lines += ["", "Failures:", "", *failures]
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


def as_fraction(ratio: float) -> str:
    """Memory ratios as the targets state them: 1/9.2 rather than 0.11."""
    return f"1/{1 / ratio:.1f}" if ratio < 0.5 else f"{ratio:.2f}"


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
    machine, versions, settings = report["machine"], report["versions"], report["settings"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{report['workload']['title']}; {report['date'][:10]}; {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['os']}, backend {machine['backend']}; {packages}; seed {settings['seed']}, median of "
        f"{settings['repeats']} interleaved rounds, {settings['draws']} draws per variance. T: temporary bytes of the "
        "compiled `svi.update`. R: bytes stored between the sweeps. Compile: trace and lower + XLA. Gradient error: "
        "E‖g − g_exact‖²/‖g_exact‖² over the path noise, or ‖g − g_exact‖/‖g_exact‖ where nothing is random. ρ: added "
        "variance / variance of the exact stochastic gradient."
    )


def draw(report: dict[str, Any], path: Path) -> None:
    """Memory against step time, one labelled point per rival; bars are the quartiles of the time."""
    rows = [row for row in report["rivals"] if "temp_bytes" in row and "step" in row]
    reference = next(row for row in rows if row["name"] == "exact")["step"]["median_seconds"]
    plt.rcParams.update({"font.size": 10.5, "font.family": "DejaVu Sans"})
    figure, axes = plt.subplots(figsize=(8.2, 5.0), dpi=160, facecolor="white", layout="constrained")
    for family, style in STYLES.items():
        mine = [row for row in rows if row["family"] == family]
        if not mine:
            continue
        times = [row["step"]["median_seconds"] / reference for row in mine]
        low = [t - row["step"]["quartiles_seconds"][0] / reference for t, row in zip(times, mine, strict=True)]
        high = [row["step"]["quartiles_seconds"][1] / reference - t for t, row in zip(times, mine, strict=True)]
        memory = [row["temp_bytes"] / MIB for row in mine]
        look = {"markersize": 8, "linestyle": "none", "elinewidth": 1, "markeredgecolor": "white", "zorder": 3}
        axes.errorbar(memory, times, yerr=[low, high], **look, **style)
    axes.axhline(1.0, color="0.75", linewidth=1, zorder=0)
    axes.set_xscale("log", base=2)
    low, high = axes.get_xlim()
    subs = (1.0, 1.5) if high > 4 * low else (1.0, 1.125, 1.25, 1.375, 1.5, 1.75)  # a narrow range has few powers
    axes.xaxis.set_major_locator(LogLocator(base=2, subs=subs))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
    axes.set_xlabel("temporary memory of one compiled SVI step (MiB, log scale)")
    axes.set_ylabel("step time / Trace_ELBO's")
    axes.set_title(f"{report['workload']['title']} (left and low is better)", fontsize=11)
    axes.margins(x=0.14, y=0.14)
    # Never zoom in so far that timing noise looks like a difference.
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(min(bottom, 0.7), 0.0), max(top, 1.3))
    if top > 4:  # one slow rival must not push all others together
        axes.set_yscale("log", base=2)
        axes.set_ylim(0.5, 1.3 * top)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    legend = axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False, fontsize=9.5)
    legend.set_in_layout(True)
    figure.canvas.draw()
    place_labels(axes, rows, reference)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def place_labels(axes: Axes, rows: list[dict[str, Any]], reference: float) -> None:
    """Label each point at the nearest offset where the text touches no marker, bar, other label or edge."""
    figure = axes.get_figure(root=True)
    assert figure is not None  # axes made by plt.subplots always have one
    renderer = figure.canvas.get_renderer()  # pyright: ignore[reportAttributeAccessIssue]
    reach = 5.5 * figure.dpi / 72  # half a marker, in pixels
    taken, points = [], []
    for row in rows:
        memory, (low, high) = row["temp_bytes"] / MIB, row["step"]["quartiles_seconds"]
        points.append((memory, row["step"]["median_seconds"] / reference))
        (x, y), (_, y0), (_, y1) = axes.transData.transform(
            [points[-1], (memory, low / reference), (memory, high / reference)]
        )
        taken.append(Bbox.from_extents(x - reach, y - reach, x + reach, y + reach))
        taken.append(Bbox.from_extents(x - 2, y0, x + 2, y1))
    frame = axes.get_window_extent(renderer)
    # The most crowded points choose first, while there is still room around them.
    middles = [((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2) for box in taken[::2]]
    crowding = [sum(abs(x - u) + abs(y - v) < 40 * reach for u, v in middles) for x, y in middles]
    for i in sorted(range(len(rows)), key=lambda i: -crowding[i]):
        color = STYLES[rows[i]["family"]]["color"]
        for dx, dy in OFFSETS:
            note = annotate(axes, points[i], rows[i]["label"], color, dx, dy)
            note.update_positions(renderer)
            box = Text.get_window_extent(note, renderer).padded(2)  # of the text alone, without its leader line
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            note.remove()
        else:  # no room anywhere: better on top of something than missing
            annotate(axes, points[i], rows[i]["label"], color, *OFFSETS[0])


def annotate(axes: Axes, point: tuple[float, float], label: str, color: str, dx: float, dy: float) -> Annotation:
    """The label at an offset in points, with a thin leader line when it had to move away."""
    far = max(abs(dx), abs(dy)) > 9
    return axes.annotate(
        label,
        point,
        xytext=(dx, dy),
        textcoords="offset points",
        fontsize=9.5,
        color=color,
        ha="left" if dx > 0 else "right" if dx < 0 else "center",
        va="bottom" if dy > 0 else "top" if dy < 0 else "center",
        arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkB": 4} if far else None,
    )


if __name__ == "__main__":
    main()
