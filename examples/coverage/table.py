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
    "model | NumPyro's example | T exact | T default | step time (quartiles) | compile | T 4 bits | step time "
    "| eliminated | compressed | recomputed | kept | kept exactly, and where"
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
    n = len(rows)
    left = [row for row in rows if row["untouched"]]
    grown = [f"{row['name']} ({temp_ratio(row):.2f}x)" for row in rows if temp_ratio(row) > 1.02]
    times = {row["name"]: row["step"]["ours"]["median_ratio"] for row in rows}
    slower = [f"{name} ({ratio:.2f}x)" for name, ratio in times.items() if ratio > 1.05]
    compiling = median(compile_ratio(row) for row in rows)
    large = [row for row in rows if row["residuals"]["total_bytes"] >= 100 * KIB]
    kept = [f"{row['name']} ({covered_share(row):.0%})" for row in large if not is_covered(row)]
    smaller = [row for row in rows if temp_ratio(row, "fewest") <= 0.5]
    no_gain = [row["name"] for row in large if temp_ratio(row, "fewest") > 0.9]
    coded = {row["name"]: row["step"]["fewest"]["median_ratio"] for row in rows}
    bits = [row["name"] for row in rows if "value" in row and not row["value"]["same_bits"]]
    wrong = [row["name"] for row in rows if "gradient" in row and not gradient_agrees(row)]
    apart = [row["name"] for row in rows if not row["training"]["within_noise"]]
    return [
        f"**No regret.** Without options `RAD_ELBO` leaves {len(left)} of {n} models to JAX, since there is little to "
        "gain: their residuals take less than 16 MiB. Such a step has the operations of `Trace_ELBO`'s, at most in "
        "another order, so that where it is faster or slower that is the noise of the measurement. The median step "
        f"takes {median(times.values()):.2f} times as long as with `Trace_ELBO`, and compiling {compiling:.2f} times. "
        f"{listed('More than 5 % slower:', slower)} {listed('More than 2 % more temporary memory:', grown)}",
        "",
        "What codes do if they are asked for, by the plan of fewest bytes (`codec=StochasticRound(bits=4)`): "
        f"{len(large)} models have more than 100 KiB of residuals. At least {COVERED:.0%} of them are eliminated, "
        f"compressed or recomputed in {len(large) - len(kept)} models. {listed('Less in', kept)} The temporary memory "
        f"of the step falls to half or less in {len(smaller)} of all. "
        f"{listed('It falls by less than a tenth, or grows, in', no_gain)} The median step takes "
        f"{median(coded.values()):.2f} times as long.",
        "",
        f"With codes the value has the bits of `Trace_ELBO`'s in {n - len(bits)} models{but(bits)}; the gradient of "
        f"the exact plan (`codec=Keep()`) agrees to {ROUNDING:g} in {n - len(wrong)}{but(wrong)}; training with codes "
        f"ends within the noise of the loss in {n - len(apart)}{but(apart)}.",
    ]


def listed(start: str, names: list[str]) -> str:
    """A sentence with a list, or one that says that the list is empty."""
    return f"{start} {', '.join(names)}." if names else f"{start} none."


def but(names: list[str]) -> str:
    """The exceptions, in brackets."""
    return f" (not in {', '.join(names)})" if names else ""


def covered_share(row: dict[str, Any]) -> float:
    """Share of the residual bytes that the plan of fewest bytes does not keep."""
    found = row["residuals"]
    return 1.0 - found["kept_bytes"] / found["total_bytes"] if found["total_bytes"] else 1.0


def is_covered(row: dict[str, Any]) -> bool:
    return covered_share(row) >= COVERED


def gradient_agrees(row: dict[str, Any]) -> bool:
    return row["gradient"]["relative_difference"] <= ROUNDING


def temp_ratio(row: dict[str, Any], plan: str = "ours") -> float:
    """T of a plan / T of Trace_ELBO."""
    return row["temp_bytes"][plan] / max(row["temp_bytes"]["exact"], 1)


def compile_ratio(row: dict[str, Any]) -> float:
    return row["compile_cpu_seconds"]["ours"] / row["compile_cpu_seconds"]["exact"]


def table_row(row: dict[str, Any]) -> str:
    """One model; what failed stays empty."""
    found = row["residuals"]
    total = found["total_bytes"]
    cells = [f"`{row['name']}`", row["source"]]
    sizes, step = row.get("temp_bytes", {}), row.get("step")
    low, high = step["ours"]["quartiles_ratio"] if step else ("", "")
    cells += [size(sizes[name]) if name in sizes else "" for name in ("exact", "ours")]
    cells.append(f"{step['ours']['median_ratio']:.2f}x ({low:.2f} to {high:.2f})" if step else "")
    cells.append(f"{compile_ratio(row):.2f}x" if "compile_cpu_seconds" in row else "")
    cells.append(f"{size(sizes['fewest'])} ({temp_ratio(row, 'fewest'):.2f}x)" if "fewest" in sizes else "")
    cells.append(f"{step['fewest']['median_ratio']:.2f}x" if step else "")
    parts = ("eliminated", "compressed", "recomputed", "kept")
    cells += [f"{found[f'{part}_bytes'] / total:.1%}" if total else "" for part in parts]
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
        "T: temporary bytes of the compiled `svi.update`. Step time: median and quartiles of the ratio within each "
        "round, the ELBOs taking turns in one process; compile: ratio of the CPU seconds of tracing, lowering and XLA. "
        "Both belong to `RAD_ELBO` without options, all that follows to 4 bits at the fewest bytes. "
        "Eliminated, compressed, recomputed and kept are shares of the bytes of residuals that JAX's own reverse mode "
        "asks for (or of ours, each stored exactly, where these are more). Eliminated is what is not needed at all "
        "once derivatives are fused. Parameters, data and other inputs that are alive anyway do not count, nor do rows "
        "that share the code of an earlier one. What is kept so "
        "that something else can be recomputed from it counts as kept, and the recomputed share is less by as much. "
        "Broadcast arrays count in full, although a compiler may never make them, so a share says what the plan does, "
        "and T says what that is worth. A kept residual is small (a row under "
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
        "`python -m examples.coverage.run`."
    )
