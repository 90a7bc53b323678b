"""The coverage table in Markdown, made from the stored JSON alone."""

from __future__ import annotations

from statistics import median
from typing import Any

MIB, KIB = 2**20, 2**10
SMALL_BYTES = 8192
"""Residuals below this size are kept by design: their added variance is not worth the bytes."""
COVERED = 0.95
ROUNDING = 1e-4

HEADER = (
    "model | NumPyro's example | eliminated | compressed | recomputed | kept | kept at fewest bytes | T exact | T RAD "
    "| ratio | step time (quartiles) | compile | kept exactly, and where"
)


def markdown(report: dict[str, Any]) -> str:
    """The whole page."""
    rows = report["models"]
    complete = [row for row in rows if "residuals" in row and "training" in row]
    lines = ["# Coverage of NumPyro's examples", "", *summary(complete), "", f"| {HEADER} |"]
    lines.append("| --- | --- |" + " ---: |" * 10 + " --- |")
    lines += [table_row(row) for row in rows if "residuals" in row]
    lines += ["", legend(), "", footnote(report)]
    failures = [f"- {row['name']}, {phase}: `{text}`" for row in rows for phase, text in row["failures"].items()]
    if failures:
        lines += ["", "Failures:", "", *failures]
    return "\n".join(lines) + "\n"


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """What the table says, wins and losses, counted."""
    if not rows:
        return ["Nothing was measured."]
    large = [row for row in rows if row["residuals"]["total_bytes"] >= 100 * KIB]
    fewest = [row for row in large if is_covered(row, "fewest_bytes")]
    kept = [
        f"{row['name']} ({covered_share(row, 'fewest_bytes'):.0%})"
        for row in large
        if not is_covered(row, "fewest_bytes")
    ]
    smaller = [row for row in rows if temp_ratio(row) <= 0.5]
    no_gain = [row["name"] for row in large if temp_ratio(row) > 0.9]
    step_ratios = {row["name"]: row["step"]["median_ratio"] for row in rows}
    slower = [f"{name} ({ratio:.1f}x)" for name, ratio in step_ratios.items() if ratio > 1.2]
    bits = [row["name"] for row in rows if "value" in row and not row["value"]["same_bits"]]
    wrong = [row["name"] for row in rows if "gradient" in row and not gradient_agrees(row)]
    apart = [row["name"] for row in rows if not row["training"]["within_noise"]]
    times = median(step_ratios.values())
    compile_times = median(compile_ratio(row) for row in rows)
    return [
        f"Of {len(rows)} models {len(large)} have more than 100 KiB of residuals. The plan of fewest bytes "
        f"(`codec=StochasticRound(bits=4)`) eliminates, compresses or recomputes at least {COVERED:.0%} of them in "
        f"{len(fewest)} models. {listed('Less in', kept)} The default plan, which keeps what takes longer to encode or "
        f"to compute again than it is worth, does so in {sum(is_covered(row) for row in large)}.",
        "",
        f"The temporary memory of the step falls to half or less in {len(smaller)} models. "
        f"{listed('It falls by less than a tenth, or grows, in', no_gain)} The median step takes {times:.2f} times as "
        f"long as with `Trace_ELBO`, and compiling {compile_times:.1f} times. "
        f"{listed('More than a fifth slower:', slower)}",
        "",
        f"The value has the bits of `Trace_ELBO`'s in {len(rows) - len(bits)} models{but(bits)}; the gradient of the "
        f"exact plan agrees to {ROUNDING:g} in {len(rows) - len(wrong)}{but(wrong)}; training ends within the noise of "
        f"the loss in {len(rows) - len(apart)}{but(apart)}.",
    ]


def listed(start: str, names: list[str]) -> str:
    """A sentence with a list, or one that says that the list is empty."""
    return f"{start} {', '.join(names)}." if names else f"{start} none."


def but(names: list[str]) -> str:
    """The exceptions, in brackets."""
    return f" (not in {', '.join(names)})" if names else ""


def covered_share(row: dict[str, Any], plan: str = "residuals") -> float:
    """Share of the residual bytes that a plan does not keep."""
    found = row[plan]
    return 1.0 - found["kept_bytes"] / found["total_bytes"] if found["total_bytes"] else 1.0


def is_covered(row: dict[str, Any], plan: str = "residuals") -> bool:
    return covered_share(row, plan) >= COVERED


def gradient_agrees(row: dict[str, Any]) -> bool:
    return row["gradient"]["relative_difference"] <= ROUNDING


def temp_ratio(row: dict[str, Any]) -> float:
    """T of RAD_ELBO / T of Trace_ELBO."""
    return row["temp_bytes"]["ours"] / max(row["temp_bytes"]["exact"], 1)


def compile_ratio(row: dict[str, Any]) -> float:
    return row["compile_cpu_seconds"]["ours"] / row["compile_cpu_seconds"]["exact"]


def table_row(row: dict[str, Any]) -> str:
    """One model; what failed stays empty."""
    found = row["residuals"]
    total = found["total_bytes"]
    parts = ("eliminated", "compressed", "recomputed", "kept")
    shares = [f"{found[f'{part}_bytes'] / total:.1%}" if total else "" for part in parts]
    shares.append(f"{1 - covered_share(row, 'fewest_bytes'):.1%}")
    cells = [f"`{row['name']}`", row["source"], *shares]
    if "temp_bytes" in row:
        cells += [size(row["temp_bytes"]["exact"]), size(row["temp_bytes"]["ours"]), f"{temp_ratio(row):.2f}"]
    else:
        cells += [""] * 3
    if "step" in row:
        low, high = row["step"]["quartiles_ratio"]
        cells.append(f"{row['step']['median_ratio']:.2f}x ({low:.2f} to {high:.2f})")
    else:
        cells.append("")
    cells.append(f"{compile_ratio(row):.1f}x" if "compile_cpu_seconds" in row else "")
    worth_naming = [k for k in found["kept"] if k["bytes"] >= 0.01 * total][:2]
    cells.append("; ".join(place(k) for k in worth_naming))
    return "| " + " | ".join(cells) + " |"


def place(kept: dict[str, Any]) -> str:
    """A place that keeps bytes: how many, where, read by what and why."""
    return f"{size(kept['bytes'])} {kept['line'] or 'inside NumPyro'} {kept['read_by']} ({kept['reason']})"


def size(n_bytes: int) -> str:
    """A size for people."""
    if n_bytes >= MIB:
        return f"{n_bytes / MIB:.1f} MiB"
    return f"{n_bytes / KIB:.1f} KiB" if n_bytes >= KIB else f"{n_bytes} B"


def legend() -> str:
    """What is counted."""
    return (
        "Eliminated, compressed, recomputed and kept are shares of the bytes of residuals that JAX's own reverse mode "
        "asks for (or of ours, each stored exactly, where these are more). Eliminated is what is not needed at all "
        "once derivatives are fused. Parameters, data and other inputs that are alive anyway do not count, nor do rows "
        "that share the code of an earlier one. What is kept so "
        "that something else can be recomputed from it counts as kept, and the recomputed share is less by as much. "
        "Broadcast arrays count in full, although a compiler may never make them, so a share says what the plan does, "
        "and T says what that is worth: the temporary bytes of the compiled `svi.update`. Step time: median and "
        "quartiles of the ratio within each round, the two ELBOs taking turns in one process; compile: ratio of the "
        "CPU seconds of tracing, lowering and XLA. A kept residual is small (a row under "
        f"{SMALL_BYTES // KIB} KiB is not worth the variance), a source of recomputation, of another dtype, or there "
        "is no code for it (its reader's pullback is not linear in it or has no rule, or it is one number per loop "
        "step)."
    )


def footnote(report: dict[str, Any]) -> str:
    """Where and how."""
    machine, settings = report["machine"], report["settings"]
    packages = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return (
        f"{report['date'][:10]}; {machine['cpu']}, {machine['cores']} cores, {machine['os']}, backend "
        f"{machine['backend']}; {packages}; seed {settings['seed']}, {settings['repeats']} interleaved rounds, "
        f"{settings['steps']} training steps{', small sizes' if settings['small'] else ''}. Generated by "
        "`python examples/coverage/run.py`."
    )
