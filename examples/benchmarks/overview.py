"""What the stored benchmarks say together: work, and which way to save memory.

    python -m examples.benchmarks.overview

reads ``docs/benchmarks/p1.json`` and its like, and writes the table of work into ``docs/benchmarks.md`` and that of
ways into ``docs/ways.md``, with their pictures.

Twice the variance takes twice the steps, so what an estimator of the gradient costs is its variance times what a step
takes: **variance x seconds** where time is short, **variance x bytes** where memory is, each in relation to that of
``Trace_ELBO``. With ρ, the variance that is added to that of the exact stochastic gradient, these are
``(1 + ρ) x seconds`` and ``(1 + ρ) x bytes``.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from examples.benchmarks.figures import STYLES, Point, between_markers, place_labels
from examples.benchmarks.rivals import RIVALS
from examples.benchmarks.wording import MIB, as_fraction

DOCS = Path(__file__).resolve().parents[2] / "docs"
FOLDER = DOCS / "benchmarks"
TITLES = {
    "p1": "P1, deep network",
    "p2": "P2, recurrent network",
    "p3": "P3, convolutions",
    "p4": "P4, differential equation",
    "p5": "P5, Transformer",
    "p5vae": "autoencoder",
}
# Arithmetic in half precision and residuals in it are biased: no variance says what they cost.
BIASED = ("bf16", "bf16_compute")
MOST_WORK = 20  # times that of Trace_ELBO; more is of no use, however much more


def main(arguments: list[str] | None = None) -> None:
    """Table and pictures, from the JSON alone."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n    python")[0])
    parser.parse_args(arguments)
    reports = stored()
    for page in PAGES:
        page.write_text(filled(page, reports))
    draw_work(reports, FOLDER / "work.png")
    draw_ways(reports, FOLDER / "ways.png")


def filled(page: Path, reports: dict[str, dict[str, Any]]) -> str:
    """The text of a page, with its tables made anew."""
    text = page.read_text()
    for name, table in PAGES[page].items():
        text = between_markers(text, name, table(reports))
    return text


def stored() -> dict[str, dict[str, Any]]:
    """The reports of all workloads, and what else is asked, by their names."""
    files = {name: FOLDER / f"{name}.json" for name in (*TITLES, "growth")} | {"coverage": DOCS / "coverage.json"}
    return {name: json.loads(file.read_text()) for name, file in files.items()}


def work(report: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Variance x seconds and variance x bytes of each step that was measured, in relation to those of Trace_ELBO."""
    found = {}
    for row in report["rivals"]:
        ratio = row.get("ratio_to_exact", {})
        if "step" in ratio and row["name"] not in BIASED:
            rho = row.get("gradient", {}).get("rho") or 0.0
            found[row["name"]] = (1 + rho) * ratio["step"], (1 + rho) * ratio["temp_bytes"]
    return found


def work_table(reports: dict[str, dict[str, Any]]) -> str:
    """A step in each row, a workload in each column; the least of a column is bold."""
    works = {name: work(reports[name]) for name in TITLES}
    least = {name: [min(values[i] for values in found.values()) for i in (0, 1)] for name, found in works.items()}
    lines = ["| step | " + " | ".join(TITLES.values()) + " |", "| --- |" + " ---: |" * len(TITLES)]
    for rival in RIVALS.values():
        values = [works[name].get(rival.name) for name in TITLES]
        if any(values):
            cells = ["" if pair is None else cell(pair, least[name]) for name, pair in zip(works, values, strict=True)]
            lines.append(f"| {rival.label} | " + " | ".join(cells) + " |")
    return "\n".join(
        [
            *lines,
            "",
            "(1 + ρ) x seconds / (1 + ρ) x T, both in relation to those of `Trace_ELBO`: what the same accuracy takes "
            "of time, and of memory. Bold: the least of a column. From the tables below.",
        ]
    )


def cell(values: tuple[float, float], least: list[float]) -> str:
    """Both numbers of a step."""
    texts = (f"{value:.2g}" if value < 99.5 else f"{value:.0e}" for value in values)
    return " / ".join(f"**{text}**" if v == m else text for text, v, m in zip(texts, values, least, strict=True))


# The others lie between two of these, or beside one.
SHOWN = (
    "exact",
    "checkpoint_layer",
    "checkpoint_sqrt",
    "small_batch",
    "accumulate",
    "accumulate_unrolled",
    "rad2021_sample",
    "rad2021_project",
    "ours_exact",
    "ours_8slices",
    "ours_4bit",
    "ours_2bit",
    "ours_default",
)


def draw_work(reports: dict[str, dict[str, Any]], path: Path) -> None:
    """A panel for each workload: variance x bytes against variance x seconds."""
    plt.rcParams.update({"font.size": 10, "font.family": "DejaVu Sans"})
    figure, panels = plt.subplots(2, 3, figsize=(15, 9), dpi=110, facecolor="white", layout="constrained")
    drawn: list[tuple[Axes, list[Point]]] = []
    for axes, (name, title) in zip(panels.flat, TITLES.items(), strict=True):
        points, beyond = [], []
        for rival, (seconds, memory) in work(reports[name]).items():
            if rival not in SHOWN:
                continue
            if max(seconds, memory) > MOST_WORK:
                beyond.append(RIVALS[rival].label)
                continue
            style = STYLES[RIVALS[rival].family]
            axes.plot(memory, seconds, style["marker"], color=style["color"], markersize=8, markeredgecolor="white")
            points.append(Point(memory, seconds, seconds, seconds, RIVALS[rival].label, style["color"]))
        axes.set_xscale("log")
        heights = [point.y for point in points]
        wide = max(heights) > 4 * min(heights)
        axes.set_yscale("log" if wide else "linear")
        axes.margins(0.18)
        for one in (axes.xaxis, axes.yaxis) if wide else (axes.xaxis,):
            one.set_major_formatter(lambda value, _: f"{value:g}")
            one.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
        axes.axhline(1, color="0.7", linewidth=0.8, zorder=0)
        axes.axvline(1, color="0.7", linewidth=0.8, zorder=0)
        axes.set_title(title + (f"\nfar beyond: {', '.join(beyond)}" if beyond else ""), fontsize=10)
        axes.set_xlabel("variance x bytes / Trace_ELBO's")
        axes.set_ylabel("variance x seconds / Trace_ELBO's")
        axes.spines[["top", "right"]].set_visible(False)
        drawn.append((axes, points))
    handles = [
        plt.Line2D([], [], color=s["color"], marker=s["marker"], linestyle="none", label=s["label"])
        for s in STYLES.values()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.canvas.draw()
    for axes, points in drawn:
        place_labels(axes, figure, points)
    figure.savefig(path)
    plt.close(figure)


def saved(report: dict[str, Any], rival: str = "ours_default", noise: bool = False) -> str:
    """Memory and time of a step in relation to those of Trace_ELBO, in words."""
    (row,) = [row for row in report["rivals"] if row["name"] == rival]
    ratio = row["ratio_to_exact"]
    rho = row["gradient"]["rho"] if noise else 0.0
    added = f", ρ {rho:.0f}" if rho > 9.5 else f", ρ {rho:.1g}" if noise else ""
    return f"{as_fraction(ratio['temp_bytes'])} at {ratio['step']:.2f}x{added}"


@dataclass(frozen=True)
class Decision:
    """A question about a program, and what a yes leads to.

    :param question: as the picture asks it, in two lines at most.
    :param told: the same for the table, in Markdown.
    :param answer: in a word or two.
    :param about: what that is, and how to ask for it.
    :param measured: examples, in four lines at most.
    """

    question: str
    told: str
    answer: str
    about: str
    measured: tuple[str, ...]


def decisions(reports: dict[str, dict[str, Any]]) -> list[Decision]:
    """The first *yes* decides."""
    weighed = {row["rival"]: row["temp_bytes"] for row in reports["growth"]["growth"]["weighed particles"]}
    models = [model["untouched"] for model in reports["coverage"]["models"]]
    return [
        Decision(
            "Less than 16 MiB\nof residuals?",
            "Does the step take less than about 16 MiB of residuals?",
            "Trace_ELBO",
            "or `RAD_ELBO()`, which then is the same step",
            (f"{sum(models)} of {len(models)} models:\nthe same memory and time",),
        ),
        Decision(
            "Do rows or particles stay apart\nuntil their likelihoods are added?",
            "Do rows, images, sequences or particles stay to themselves until their log likelihoods are summed up?",
            "slices",
            "a part of them at a time, forward and backward together. Exact, nothing is computed twice. `RAD_ELBO()`, "
            "or `slices=8`",
            (
                f"deep network {saved(reports['p1'])}",
                f"ConvNet {saved(reports['p3'])}",
                f"Transformer {saved(reports['p5'])}",
                f"autoencoder {saved(reports['p5vae'])}",
            ),
        ),
        Decision(
            "Is most of it a long loop?",
            "Is most of it a long loop (`lax.scan`)?",
            "segments",
            "carries are stored at the beginning of each, and it runs again on the way back. Exact, one more forward "
            "run. `RAD_ELBO()`, or `exact=True` with a budget",
            (f"recurrent network {saved(reports['p2'])}", f"differential equation {saved(reports['p4'])}"),
        ),
        Decision(
            "Is what is cheap to compute\nagain enough?",
            "May what is cheap be computed again, and is that enough?",
            "recomputation",
            "elementwise steps and random numbers are made anew. `exact=True`",
            (f"deep network {saved(reports['p1'], 'ours_exact')}",),
        ),
        Decision(
            "Do rows or particles meet\nafter a long part of their own?",
            "Are particles weighed by each other (`RenyiELBO`), or do rows meet after a network for each of them?",
            "slices that run again",
            "forward, and once more on the way back. Exact, one more forward run of the part. `memory_budget=` or "
            "`slices=8`",
            (
                f"64 particles of a RenyiELBO:\n{weighed['weighed_budget'] / MIB:.2g} of "
                f"{weighed['weighed'] / MIB:.3g} MiB",
            ),
        ),
        Decision(
            "Do rows meet everywhere?",
            "Do rows meet everywhere (attention over rows, one large Gaussian process), so that nothing can be cut?",
            "codes",
            "residuals in a few random bits, right on average. `memory_budget=`, and look at ρ",
            (f"deep network in 4 bits:\n{saved(reports['p1'], 'ours_4bit', noise=True)}",),
        ),
        Decision(
            "Are parameters and optimizer\nmost of the memory?",
            "Are parameters and optimizer state most of the memory?",
            "less state",
            "nothing of this helps: an optimizer with less state (`optax.adafactor`, `optax.sgd`), half precision for "
            "parameters, fewer particles",
            (),
        ),
        Decision(
            "Does nothing fit?",
            "Does nothing fit?",
            "smaller minibatch",
            "its gradient has more noise than that of 4 bits by orders of magnitude",
            (f"deep network, 1 row of 4096:\n{saved(reports['p1'], 'small_batch', noise=True)}",),
        ),
    ]


def ways_table(reports: dict[str, dict[str, Any]]) -> str:
    """The same questions, with more words."""
    lines = ["| question | then | memory and time, of `Trace_ELBO`'s |", "| --- | --- | --- |"]
    for d in decisions(reports):
        lines.append(f"| {d.told} | **{d.answer}**: {d.about} | {'; '.join(d.measured).replace(chr(10), ' ')} |")
    return "\n".join(lines)


def draw_ways(reports: dict[str, dict[str, Any]], path: Path) -> None:
    """The questions from above to below, to the right of each its answer, on the arrow what was measured."""
    rows = decisions(reports)
    plt.rcParams.update({"font.size": 10.5, "font.family": "DejaVu Sans"})
    figure, axes = plt.subplots(figsize=(10.5, 1.15 * len(rows)), dpi=120, facecolor="white", layout="constrained")
    axes.set_xlim(0, 10.5)
    axes.set_ylim(-len(rows) + 0.45, 0.55)
    axes.set_axis_off()
    for i, decision in enumerate(rows):
        box(axes, 0.1, -i, 3.5, decision.question, "#0072B2")
        box(axes, 7.9, -i, 2.5, decision.answer, "#D55E00")
        axes.annotate("", (7.85, -i), (3.65, -i), arrowprops={"arrowstyle": "->", "color": "0.3"})
        axes.text(3.85, 0.06 - i, "yes", color="0.3", fontsize=9.5, va="bottom")
        if decision.measured:
            told = "\n".join(decision.measured)
            axes.text(6.0, -i, told, ha="center", va="center", fontsize=9.5, backgroundcolor="white")
        if i < len(rows) - 1:
            axes.annotate("", (1.85, -i - 0.65), (1.85, -i - 0.36), arrowprops={"arrowstyle": "->", "color": "0.3"})
            axes.text(1.95, -i - 0.5, "no", color="0.3", fontsize=9.5, va="center")
    figure.savefig(path)
    plt.close(figure)


def box(axes: Axes, x: float, y: float, width: float, text: str, color: str) -> None:
    """A box with its text."""
    style = "round,pad=0.02,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x, y - 0.32), width, 0.64, style, facecolor="white", edgecolor=color, linewidth=1.6))
    axes.text(x + width / 2, y, text, ha="center", va="center")


PAGES = {DOCS / "benchmarks.md": {"work": work_table}, DOCS / "ways.md": {"ways": ways_table}}


if __name__ == "__main__":
    main()
