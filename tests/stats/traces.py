"""Synthetic traces of iterates, and how a rule that stops fits does on them: false alarms and delay.

Each kind of trace is 10,000 steps of some projections, in units of the spread that the noise alone has. A rule is asked
every 200 steps. To stop while some projection is still farther than one spread from where it is going is a false alarm.
``python tests/stats/traces.py`` prints the table of the docstring of ``Iterates``.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from scipy.signal import lfilter

from numpyro_rad.diagnostics.convergence import Iterates

STEPS, STRIDE, EVERY = 10_000, 10, 200

TIME = np.arange(1, STEPS + 1)[:, None]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of trace.

    :ivar make: from a generator and a number of projections to an array of shape (steps, projections).
    :ivar settled: the step from which on it is near to where it goes; steps + 1 if it never is.
    """

    make: Callable[[np.random.Generator, int], np.ndarray]
    settled: int = 0


NEVER = STEPS + 1


def noise(rng: np.random.Generator, columns: int, time: float = 1.0) -> np.ndarray:
    """Stationary autoregressive processes of unit variance.

    :param time: steps that one independent iterate takes, (1 + correlation) / (1 - correlation).
    """
    correlation = (time - 1) / (time + 1)
    drawn = rng.standard_normal((STEPS, columns)) * np.sqrt(1 - correlation**2)
    drawn[0] /= np.sqrt(1 - correlation**2)
    return lfilter([1.0], [1.0, -correlation], drawn, axis=0)  # type: ignore


def some(curve: np.ndarray, columns: int, moving: int | None = None) -> np.ndarray:
    """A curve in the first projections, all if there is no number, nothing in the others."""
    return curve * (np.arange(columns) < (columns if moving is None else moving))


def decay(time: float) -> np.ndarray:
    return 10 * np.exp(-TIME / time)


def mixed(rng: np.random.Generator, columns: int) -> np.ndarray:
    """Half fast, half slow, as locations and scales of a guide are under Adam."""
    return np.where(np.arange(columns) % 2, noise(rng, columns, 4.0), noise(rng, columns, 150.0))


KINDS = {
    "independent": Kind(lambda rng, k: noise(rng, k)),
    "AR(1), 20 steps": Kind(lambda rng, k: noise(rng, k, 20.0)),
    "AR(1), 60 steps": Kind(lambda rng, k: noise(rng, k, 60.0)),
    "AR(1), half 4 and half 150 steps": Kind(mixed),
    "heavy tails (Student t, 2 degrees)": Kind(lambda rng, k: rng.standard_t(2, (STEPS, k))),
    "fast periodic": Kind(lambda rng, k: noise(rng, k, 20.0) + some(3 * np.sin(2 * np.pi * TIME / 100), k)),
    "transient, 300 steps": Kind(lambda rng, k: noise(rng, k, 20.0) + some(decay(300), k), 691),
    "transient, 1000 steps": Kind(lambda rng, k: noise(rng, k, 20.0) + some(decay(1000), k), 2303),
    "transient, 2500 steps, in one": Kind(lambda rng, k: noise(rng, k, 20.0) + some(decay(2500), k, 1), 5756),
    "step at 900": Kind(lambda rng, k: noise(rng, k, 20.0) + some(8.0 * (TIME < 900), k), 900),
    "drift, 10 spreads": Kind(lambda rng, k: noise(rng, k, 20.0) + some(10 * TIME / STEPS, k), NEVER),
    "drift, 20 spreads, in one": Kind(lambda rng, k: noise(rng, k, 20.0) + some(20 * TIME / STEPS, k, 1), NEVER),
    "drift, 10 spreads, in one": Kind(lambda rng, k: noise(rng, k, 20.0) + some(10 * TIME / STEPS, k, 1), NEVER),
    "staircase, in one": Kind(lambda rng, k: noise(rng, k, 20.0) + some(2.0 * (TIME // 500), k, 1), NEVER),
    "slow periodic": Kind(lambda rng, k: noise(rng, k, 20.0) + some(3 * np.sin(2 * np.pi * TIME / 5000), k), NEVER),
    "random walk": Kind(lambda rng, k: np.cumsum(rng.standard_normal((STEPS, k)), 0), NEVER),
    "random walk in one, below noise": Kind(
        lambda rng, k: noise(rng, k) + some(np.cumsum(rng.normal(0, 0.1, (STEPS, 1)), 0), k, 1), NEVER
    ),
}


def stopped_at(rows: np.ndarray, loss: np.ndarray, rule: Callable[[Iterates], bool] = Iterates.converged) -> int | None:
    """The first step at which a rule says so.

    :param rows: shape (steps, projections), up to 64 of them.
    """
    iterates = Iterates(STRIDE)
    padded = np.zeros((len(rows), 64))
    padded[:, : rows.shape[1]] = rows
    for start in range(0, len(rows), EVERY):
        taken = np.arange(start + STRIDE, start + EVERY + 1, STRIDE)
        iterates.record(taken, padded[taken - 1], loss[taken - 1])
        if rule(iterates):
            return start + EVERY
    return None


def outcomes(name: str, columns: int, traces: int, rule: Callable[[Iterates], bool] = Iterates.converged):
    """When a rule stops on so many traces of a kind; None where it does not."""
    kind, found = KINDS[name], []
    for number in range(traces):
        rng = np.random.default_rng([columns, number, list(KINDS).index(name)])
        found.append(stopped_at(kind.make(rng, columns), rng.standard_normal(STEPS), rule))
    return found


def told(name: str, found: list[int | None]) -> tuple[str, str]:
    """Share of false alarms, and the median step of those that stopped rightly."""
    early = [s for s in found if s is not None and s < KINDS[name].settled]
    right = sorted(s for s in found if s is not None and s >= KINDS[name].settled)
    share = "" if KINDS[name].settled == 0 else f"{100 * len(early) / len(found):.0f} %"
    stops = (
        f"{right[len(right) // 2]:,}"
        if 2 * len(right) > len(found)
        else "none"
        if not right
        else f"{len(right)} of {len(found)}"
    )
    return share, stops


if __name__ == "__main__":
    print("| trace | false alarms, 4 | false alarms, 64 | stops at, 4 | stops at, 64 |")
    for name in KINDS:
        (few, few_at), (many, many_at) = (told(name, outcomes(name, k, n)) for k, n in ((4, 30), (64, 6)))
        print(f"| {name} | {few} | {many} | {few_at} | {many_at} |", flush=True)
