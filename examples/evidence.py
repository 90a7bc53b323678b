"""Tables and pictures of posteriors, uci, bigger_than_memory and path_sampling, from their JSON alone.

``examples/benchmarks/figures.py`` prints them, with when and where they were measured.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

MIB = 2**20
OKABE_ITO = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#000000")
COLOURS = {"Trace_ELBO": "#0072B2", "RAD_ELBO": "#D55E00"}


def posteriors_table(report: dict[str, Any]) -> str:
    """A model and an estimator in each row."""
    lines = [
        "| model, guide | gradient | in codes | means, from the closed form | from Trace_ELBO | bias ratio "
        "| standard deviations, from the closed form | from Trace_ELBO | bias ratio | steps | of Trace_ELBO's |",
        "| --- | --- |" + " ---: |" * 9,
    ]
    for model in report["posteriors"].values():
        first = model["rows"][0]
        title = f"{model['title']}, {model['guide']}, {model['latents']} latent variables"
        bound = first["closed_form"]["means"]["bound"]
        for row in model["rows"]:
            plan, steps = row.get("plan"), row["steps"]
            cells = [
                f"{title} (t below {bound:.0f})" if row is first else "",
                row["estimator"],
                "" if plan is None else share_in_codes(plan),
            ]
            for part in ("means", "deviations"):
                cells.append(with_t(row["closed_form"][part]))
                cells += (
                    ["", ""]
                    if row is first
                    else [with_t(row["exact"][part]), f"{row['exact'][part]['bias_ratio']:.2g}"]
                )
            cells.append("not reached" if None in steps else f"{sum(steps) / len(steps):.0f}")
            ratio = None if row is first else row.get("steps_ratio")
            cells.append("" if ratio is None else f"{ratio:.3f} ± {row['steps_ratio_error']:.3f}")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(
        [
            *lines,
            "",
            f"After {report['steps']:,} steps, {report['seeds']} seeds. From: root mean square over the latent "
            "variables of the mean difference over the seeds, for means in standard deviations of the best guide, for "
            "standard deviations relative to them; in brackets the largest t-score of a latent variable, which without "
            "a bias is below the bound of its model with probability 0.999. Bias ratio: squared length of the mean "
            "difference from Trace_ELBO / what chance makes of it, 1 on average without a bias. Steps: until the KL "
            f"divergence from the posterior is within {report['near']:g} nats of its minimum.",
        ]
    )


def share_in_codes(plan: dict[str, Any]) -> str:
    """How much of the bytes of its residuals a plan codes."""
    return "left to JAX" if plan["untouched"] else f"{100 * plan['coded_bytes'] / plan['exact_bytes']:.0f} %"


def with_t(scores: dict[str, float]) -> str:
    """A difference and its largest t-score, and whether that is more than chance makes of it."""
    text = f"{scores['difference']:.2g} ({scores['largest_t']:.1f})"
    return text if scores["largest_t"] < scores["bound"] else f"**{text}**"


def uci_table(report: dict[str, Any]) -> str:
    """A set in each row: the exact fit, how far the others are from it, and what was published."""
    sets = report["uci"]
    estimators = list(next(iter(sets.values()))["estimators"])
    exact, *ours = estimators
    sources = report["sources"]
    lines = []
    for score, label in (("rmse", "RMSE"), ("log_likelihood", "log likelihood")):
        lines += [
            f"| {label} | splits | {exact} | "
            + " | ".join(f"{name}, difference" for name in ours)
            + " | "
            + " | ".join(sources.values())
            + " |",
            "| --- |" + " ---: |" * (2 + len(ours) + len(sources)),
        ]
        for name, found in sets.items():
            rows = found["estimators"]
            differences = [rows[other][f"{score}_difference"] for other in ours]
            cells = [name, str(found["splits"]), with_error(rows[exact][score])]
            cells += [
                with_error(d) + ("" if d["within_one_standard_error"] else ", beyond one standard error")
                for d in differences
            ]
            cells += [with_error(found["published"].get(setup, {}).get(score)) for setup in sources]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    shares = "; ".join(f"{name}: {coded_shares(sets, name)} of residual bytes in codes" for name in ours)
    return "\n".join(
        [
            *lines,
            "Mean ± standard error over the splits, in the unit of the target; differences are split by split. "
            f"{report['steps']:,} steps of Adam, {report['batch']} rows in each; {report['posterior_draws']} posterior "
            f"draws. {shares}. Published figures: `mc_dropout_summary.csv`, computed from the results in "
            "yaringal/DropoutUncertaintyExps.",
        ]
    )


def coded_shares(sets: dict[str, Any], estimator: str) -> str:
    """The range of the shares over the sets."""
    shares = [round(100 * found["estimators"][estimator]["coded_share"]) for found in sets.values()]
    return f"{min(shares)} %" if min(shares) == max(shares) else f"{min(shares)} to {max(shares)} %"


def with_error(score: dict[str, Any] | None) -> str:
    """Mean ± standard error, to two digits of the error."""
    if score is None:
        return ""
    mean, error = score["mean"], score["standard_error"]
    places = max(0, 1 - int(f"{error:.1e}".split("e")[1])) if error else 2
    return f"{mean:.{places}f} ± {error:.{places}f}"


def memory_limit_table(report: dict[str, Any]) -> str:
    """A run in each row."""
    lines = [
        "| step | T (MiB) | most resident (MiB) | steps | loss per row | seconds | how it ended |",
        "| --- |" + " ---: |" * 5 + " --- |",
    ]
    for run in report["bigger_than_memory"].values():
        losses = run["losses"]
        cells = [
            f"`{run['elbo']}`",
            "" if run["temp_bytes"] is None else f"{run['temp_bytes'] / MIB:.0f}",
            f"{run['most_resident_bytes'] / MIB:.0f}",
            str(len(losses)),
            f"{losses[0]:.4g} to {losses[-1]:.4g}" if losses else "",
            f"{run['seconds']:.0f}",
            run["ended"],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(
        [
            *lines,
            "",
            f"Each process may take {report['limit_bytes'] / MIB:.0f} MiB (`ulimit -d`), the interpreter, the compiler "
            "and the data included; of resident memory, shared libraries do not count there. T: temporary bytes of the "
            "compiled step, as the compiler says.",
        ]
    )


def draw_memory_over_time(report: dict[str, Any], path: Path) -> None:
    """Resident memory of both processes against time, the limit, and what the step that failed would have taken."""
    plt.rcParams.update({"font.size": 10.5, "font.family": "DejaVu Sans"})
    figure, axes = plt.subplots(figsize=(8.2, 4.4), dpi=160, facecolor="white", layout="constrained")
    limit = report["limit_bytes"] / MIB
    for name, run in report["bigger_than_memory"].items():
        times, sizes = zip(*run["resident_bytes"], strict=True)
        resident, color = [size / MIB for size in sizes], COLOURS[name]
        axes.plot(times, resident, color=color, label=f"{run['elbo']}: {run['ended'].split(':')[0]}")
        failed = run["exit_status"] != 0
        axes.plot(times[-1], resident[-1], "X" if failed else "o", color=color, markersize=9)
        if failed and run["temp_bytes"]:
            needed = (run["most_resident_bytes"] + run["temp_bytes"]) / MIB
            axes.plot([times[-1]] * 2, [resident[-1], needed], ":", color=color)
            axes.plot(times[-1], needed, "X", color=color, fillstyle="none", markersize=9)
            told = {"xytext": (9, -4), "textcoords": "offset points", "color": color}
            axes.annotate(f"its first step would take {needed:,.0f} MiB", (times[-1], needed), **told)
    axes.axhline(limit, color="0.3", linestyle="--", label="limit of a process")
    axes.set(xlabel="seconds", ylabel="resident memory (MiB)")
    axes.set_ylim(bottom=0)
    axes.set_title(report["workload"]["title"], fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def path_sampling_table(report: dict[str, Any]) -> str:
    """A graph in each row: what was measured at each depth, and below it the closed form."""
    graphs = report["path_sampling"]
    depths = [row["depth"] for row in next(iter(graphs.values()))["rows"]]
    lines = [
        "| graph | gradient | " + " | ".join(f"{depth} layers" for depth in depths) + " |",
        "| --- | --- |" + " ---: |" * len(depths),
    ]
    for graph in graphs.values():
        rows = graph["rows"]
        told = {
            "sampled, measured": [measured(row.get("sampled")) for row in rows],
            "sampled, closed form": [f"{row['closed_form']:.3g}" for row in rows],
            "sampled at every step, closed form": [
                f"{row['every_step']:.3g}" if "every_step" in row else "" for row in rows
            ],
            "4 bits, measured": [measured(row.get("rounded")) for row in rows],
        }
        title = graph["title"]
        for kind, cells in told.items():
            if any(cells):
                lines.append("| " + " | ".join([title, kind, *cells]) + " |")
                title = ""
    return "\n".join(
        [
            *lines,
            "",
            f"Variance of the gradient / squared length of the exact one, of one row; {report['draws']:,} draws, ± "
            f"standard error. Sampled: one of {report['stratum']} entries kept, so a quarter of the bytes; 4 bits are "
            "an eighth, and scales. Deeper than six layers a few draws in a million would make the mean.",
        ]
    )


def measured(value: dict[str, float] | None) -> str:
    """Mean ± standard error."""
    return "" if value is None else f"{value['mean']:.3g} ± {value['standard_error']:.1g}"


def draw_path_sampling(report: dict[str, Any], path: Path) -> None:
    """Left a layered graph and what is kept of it, right the variance against its depth."""
    plt.rcParams.update({"font.size": 10.5, "font.family": "DejaVu Sans"})
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 4.8), dpi=120, facecolor="white", layout="constrained", width_ratios=(1, 1.5)
    )
    draw_sampled_graph(left, report["kept"], report["stratum"])
    for i, (name, graph) in enumerate(report["path_sampling"].items()):
        rows, color = graph["rows"], OKABE_ITO[i]
        depths = [row["depth"] for row in rows]
        width = 5.0 if name == "alone" else 1.5  # it lies below that of the weights
        right.plot(depths, [row["closed_form"] for row in rows], color=color, linewidth=width, label=graph["title"])
        for kind, marker in (("sampled", "o"), ("rounded", "x")):
            found = [(row["depth"], row[kind]["mean"]) for row in rows if kind in row]
            right.plot(*zip(*found, strict=True), marker, color=color)
        if name == "alone":
            every = [row["every_step"] for row in rows]
            right.plot(depths, every, ":", color=color, label="the same, each step sampled")
    marks = {"color": "0.3", "linestyle": "none"}
    right.plot([], [], "o", label="sampled, measured", **marks)
    right.plot([], [], "x", label="4 bits, measured", **marks)
    right.set_yscale("log")
    right.set_ylim(top=1e7)
    right.set(xlabel="layers", ylabel="variance / squared gradient")
    right.set_title(f"one of {report['stratum']} units kept in each layer; lines: closed form", fontsize=10.5)
    right.grid(alpha=0.25)
    right.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path)
    plt.close(figure)


def draw_sampled_graph(axes: Axes, kept: list[list[bool]], stratum: int) -> None:
    """Every unit of some layers, all edges between them, and the paths through the units that were kept."""
    layers = [[True], *kept, [True]]
    places = [[(i, j - (len(layer) - 1) / 2) for j in range(len(layer))] for i, layer in enumerate(layers)]
    for here, there, these, those in zip(places, places[1:], layers, layers[1:], strict=False):
        for a, kept_a in zip(here, these, strict=True):
            for b, kept_b in zip(there, those, strict=True):
                strong = kept_a and kept_b
                style = (
                    {"color": "#D55E00", "linewidth": 1.6, "zorder": 2} if strong else {"color": "0.88", "zorder": 1}
                )
                axes.plot(*zip(a, b, strict=True), **style)
    for points, layer in zip(places, layers, strict=True):
        for (x, y), is_kept in zip(points, layer, strict=True):
            fill = "#D55E00" if is_kept else "white"
            axes.plot(x, y, "o", color=fill, markeredgecolor="0.4", markersize=9, zorder=3)
    axes.set_axis_off()
    ways, through = (math.prod(map(count, layers)) for count in (len, sum))
    axes.set_title(f"{through} of {ways} paths, each times {stratum ** len(kept)}", fontsize=10.5)
