"""Training curves in numbers: how many steps a run takes to a loss, and how paired runs differ.

A curve is a list of losses at steps that all runs share, ``None`` where a loss is not finite. Runs of one seed form a
pair: they start at the same values and see the same rows, so the spread of their differences and ratios is smaller than
that of what they reach.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

# What a run is judged by: the loss that it minimizes, and the part of it that the data have.
LOSSES = ("loss", "data_loss")
# The runs whose final losses are targets for the others.
TARGETS = ("exact", "small_batch")

Curve = Sequence[float | None]


def trailing_mean(values: Sequence[float], window: int) -> list[float]:
    """Each value averaged with those before it, ``window`` of them where there are as many."""
    return [float(np.mean(values[max(0, i + 1 - window) : i + 1])) for i in range(len(values))]


def steps_to(at: Sequence[int], curve: Curve, target: float) -> float | None:
    """The step at which a curve first is at the target or below it, between two points on a straight line.

    :param at: the step of each point.
    :return: None if it never is.
    """
    for i, value in enumerate(curve):
        if value is None or value > target:
            continue
        before = curve[i - 1] if i else None
        if before is None:
            return float(at[i])
        return at[i - 1] + (at[i] - at[i - 1]) * (before - target) / (before - value)
    return None


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean and standard error over seeds; there is no mean where a value is missing.

    :return: besides these the values, and ``there``, how many of them are not missing.
    """
    there = [value for value in values if value is not None]
    whole = len(there) == len(values) > 0
    error = float(np.std(there, ddof=1)) / math.sqrt(len(there)) if whole and len(there) > 1 else None
    return {
        "mean": float(np.mean(there)) if whole else None,
        "standard_error": error,
        "there": len(there),
        "values": list(values),
    }


def summarize(runs: Sequence[dict[str, Any]], at: Sequence[int], last: int) -> dict[str, dict[str, Any]]:
    """What the runs of each estimator reach and how fast, beside the runs of the same seed.

    :param runs: with ``estimator``, ``seed``, ``diverged`` and the curves ``LOSSES``.
    :param at: the steps of the curves.
    :param last: the step whose loss is final; the curves go on a little, for those who arrive later.
    :return: for each estimator and each of ``LOSSES`` the ``final`` loss, its ``difference`` from that of ``exact``,
        and for each of ``TARGETS`` the steps to its final loss as a ratio to the steps that it takes itself.
    """
    found = {(run["estimator"], run["seed"]): run for run in runs}
    end = list(at).index(last)

    def final(name: str, seed: int, field: str) -> float | None:
        run = found.get((name, seed))
        return None if run is None or run["diverged"] else run[field][end]

    def ratio(name: str, target: str, seed: int, field: str) -> float | None:
        goal = final(target, seed, field)
        if goal is None or found[name, seed]["diverged"]:
            return None
        steps, reference = (steps_to(at, found[who, seed][field], goal) for who in (name, target))
        return None if steps is None or not reference else steps / reference

    summary: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(run["estimator"] for run in runs):
        mine = [run for run in runs if run["estimator"] == name]
        seeds = sorted(run["seed"] for run in mine)
        summary[name] = {"runs": len(mine), "diverged": sum(run["diverged"] for run in mine)}
        for field in LOSSES:
            pairs = [(final(name, seed, field), final("exact", seed, field)) for seed in seeds]
            summary[name][field] = {
                "final": spread([mine for mine, _ in pairs]),
                "difference": spread([None if None in pair else pair[0] - pair[1] for pair in pairs]),
                "steps_to": {
                    target: spread([ratio(name, target, seed, field) for seed in seeds])
                    for target in TARGETS
                    if all((target, seed) in found for seed in seeds)
                },
            }
    return summary
