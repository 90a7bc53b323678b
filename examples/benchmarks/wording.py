"""What the tables of all stored benchmarks say in the same words."""

from __future__ import annotations

from typing import Any

MIB = 2**20


def as_fraction(ratio: float) -> str:
    """Memory ratios as the targets state them: 1/9.2 rather than 0.11."""
    return f"1/{1 / ratio:.1f}" if 0 < ratio < 0.5 else f"{ratio:.2f}"


def circumstances(report: dict[str, Any]) -> str:
    """What was measured when, where, with what and how often."""
    machine, versions, settings = report["machine"], report["versions"], report.get("settings")
    measured = (
        f"; seed {settings['seed']}, median of {settings['repeats']} interleaved rounds, {settings['draws']} draws per "
        "variance"
        if settings
        else ""
    )
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{report['workload']['title']}; {report['date'][:10]}; {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['os']}, backend {machine['backend']}; {packages}{measured}."
    )
