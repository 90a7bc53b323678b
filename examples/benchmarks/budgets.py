"""What a budget of bytes costs on one workload: recomputation alone, codes alone, and both chosen jointly.

    python -m examples.benchmarks.budgets p1 --quick
    python -m examples.benchmarks.budgets p1 --modes joint,recompute --rivals checkpoint_layer
    python -m examples.benchmarks.figures docs/benchmarks/budgets_p1.json    # the figure, and the table

Budgets are shares of the exact residual bytes: the sum of the bytes of all residuals if each were stored exactly, as
``explain(...).exact_bytes`` of the exact plan (``RAD_ELBO(codec=Keep())``) says. Within each budget there are three
ways to plan, the *modes*:

- **recompute**: ``RAD_ELBO(memory_budget=..., exact=True)``, values stored exactly and others made again from them;
- **compress**: ``RAD_ELBO(codec=StochasticRound(bits))`` with the most bits of 8, 4, 2 and 1 that fit. The same width
  everywhere, and nothing is planned; but as in every plan, what a cheap step makes from what is there is not stored;
- **joint**: ``RAD_ELBO(memory_budget=...)``, the plan of least added time and variance.

All of them run the whole batch at once (``slices=1``); what slices do is measured by ``match.py``.

Prices are calibrated after the exact training steps, where gradients are measured too. A plan that one mode finds for
two budgets is measured once. Everything is measured as in ``run.py``, beside ``jax.checkpoint`` and ``Trace_ELBO``. A
step costs its time times (1 + rho), in proportion to the time until a gradient of given accuracy.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from examples.benchmarks import measure
from examples.benchmarks.record import log, write
from examples.benchmarks.rivals import RIVALS, Kind, Rival
from examples.benchmarks.run import DEFAULT_FOLDER, Benchmark, common_parser, describe, sensible_rivals
from examples.benchmarks.workloads import WORKLOADS
from numpyro_rad import RAD_ELBO, NoiseKeys, StochasticRound
from numpyro_rad.planning import Calibration
from numpyro_rad.transform import path_seed, randomized, site_leaves

MODES: dict[str, tuple[str, Kind]] = {
    "recompute": ("recompute only", "exact"),
    "compress": ("compress only", "randomized"),
    "joint": ("joint", "randomized"),
}
PERCENT = (50.0, 20.0, 10.0, 5.0, 3.0)
BITS = (8, 4, 2, 1)
BESIDE = ["exact", "checkpoint_step", "checkpoint_layer", "checkpoint_sqrt", "checkpoint_dots"]
CALIBRATION_DRAWS = 16
# What a row takes over from an earlier one with the same plan.
MEASURED = ("stored_bytes", "exact_stored_bytes", "predicted", "temp_bytes", "compile", "step", "gradient", "failure")


def main(arguments: list[str] | None = None) -> None:
    """Measure the curves that the command line asks for and write their JSON."""
    options = parse_arguments(arguments)
    workload = WORKLOADS[options.workload][1 if options.quick else 0]
    output = options.output or DEFAULT_FOLDER / f"budgets_{workload.name}.json"
    report = Curves(workload, options).run()
    write(report, output)
    log(f"wrote {output}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line: that of ``run.py``, with modes and budgets."""
    output = "docs/benchmarks/budgets_WORKLOAD.json, budgets_WORKLOAD-quick.json with --quick"
    parser = common_parser(__doc__ or "", output, f"of {', '.join(BESIDE)} those that make sense for the workload")
    parser.add_argument(
        "--modes",
        type=parse_modes,
        default=list(MODES),
        metavar="A,B",
        help=f"ways to plan within a budget (default: {','.join(MODES)})",
    )
    parser.add_argument(
        "--budgets",
        type=parse_budgets,
        default=list(PERCENT),
        metavar="P,Q",
        help=f"percent of the exact residual bytes (default: {','.join(f'{p:g}' for p in PERCENT)})",
    )
    options = parser.parse_args(arguments)
    options.rivals = sensible_rivals(parser, options, BESIDE)
    return options


def parse_modes(text: str) -> list[str]:
    """Names separated by commas, in the order of the tables."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in MODES]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"unknown mode {', '.join(unknown)!r}; choose from {', '.join(MODES)}")
    return [name for name in MODES if name in names]


def parse_budgets(text: str) -> list[float]:
    """Percentages separated by commas, from the largest to the smallest."""
    budgets = sorted({float(part) for part in text.split(",")}, reverse=True)
    if budgets[-1] <= 0:
        raise argparse.ArgumentTypeError("budgets are more than 0 percent")
    return budgets


class SameProgram(RAD_ELBO):
    """``RAD_ELBO`` whose loss with a path key of its own is the program of ``loss``, so that its calibration holds.

    ``NoiseKeys`` separate guide and minibatch too, and that makes another program. Here both draw from the guide's key.
    """

    def loss_with_keys(self, keys: NoiseKeys, param_map: Any, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        loss = partial(self.base.loss, keys.guide, param_map, model, guide, *args, **kwargs)
        return randomized(loss, self.planner, path_seed(keys.path), site_leaves(param_map))


class Curves(Benchmark):
    """The rivals of a comparison, and every mode within every budget.

    ``same_as`` of a row names an earlier row of the mode whose plan it has; its numbers are those of that row.
    """

    def __init__(self, workload: Any, options: argparse.Namespace) -> None:
        super().__init__(workload, options)
        self.modes, self.percent = options.modes, options.budgets
        self.stored_at: dict[int, int] = {}

    def run(self) -> dict[str, Any]:
        report = super().run()
        definition = "explain(...).exact_bytes of RAD_ELBO(codec=Keep()): all residuals, each stored exactly"
        return {
            **report,
            "budgets": {
                "percent": self.percent,
                "modes": self.modes,
                "exact_residual_bytes": self.exact_residual_bytes,
                "definition": definition,
                "calibration": {
                    "draws": self.calibration.n_draws,
                    "gradient_variance": self.calibration.gradient_variance,
                    "gradient_norm": self.calibration.gradient_norm,
                    "seconds": self.calibration_seconds,
                },
            },
        }

    def set_up_all(self) -> None:
        """The rivals; then the exact steps and the calibration, which the plans need."""
        super().set_up_all()
        self.compiled["exact"] = measure.compile_step(self.steps["exact"])
        self.train()
        self.exact_residual_bytes = int(self.explanation("ours_exact", RIVALS["ours_exact"]).exact_bytes)
        started = time.perf_counter()
        self.calibration = self.calibrate()
        self.calibration_seconds = time.perf_counter() - started
        log(f"{self.exact_residual_bytes} bytes of residuals; calibrated in {self.calibration_seconds:.1f} s")
        for mode in self.modes:
            for percent in self.percent:
                self.add(mode, percent)

    def calibrate(self) -> Calibration:
        """What codes add to the variance after the training steps, from several minibatches."""
        step = self.build(RIVALS["ours_default"])
        keys = jax.random.split(jax.random.key(self.seed + 4), CALIBRATION_DRAWS - 1)
        batches = [self.workload.minibatch(key, self.data, self.workload.batch) for key in keys]
        elbo: Any = step.svi.loss
        return elbo.calibrate(step.svi, self.state, *step.batch, batches=batches, draws=CALIBRATION_DRAWS)

    def build(self, rival: Rival) -> measure.Step:
        return measure.build(rival, self.workload, self.data, self.seed, self.workload.batch)

    def explanation(self, name: str, rival: Rival) -> Any:
        """The plan of a rival, without making it one of the rows."""
        self.steps[name], self.rows[name] = self.build(rival), describe(rival)
        try:
            self.explain(name)
        finally:
            del self.steps[name], self.rows[name]
        return self.explanations.pop(name)

    def add(self, mode: str, percent: float) -> None:
        """One mode within one budget; where there is no plan the row says why."""
        label, kind = MODES[mode]
        budget = int(percent / 100 * self.exact_residual_bytes)
        name = f"{mode}_{percent:g}"
        options = {
            "recompute": lambda: {"memory_budget": budget, "exact": True, "slices": 1},
            "compress": lambda: {"codec": StochasticRound(bits=self.bits_within(budget))},
            "joint": lambda: {"memory_budget": budget, "slices": 1},
        }[mode]
        self.rivals[name] = Rival(name, f"{label}, {percent:g} %", "ours", kind, self.builder(options))
        self.rows[name] = describe(self.rivals[name])
        self.rows[name] |= {"mode": mode, "budget_percent": percent, "budget_bytes": budget}
        self.attempt(name, "plan", self.plan)

    def builder(self, options: Callable[[], dict[str, Any]]) -> Callable[[Any], RAD_ELBO]:
        return lambda _: SameProgram(calibration=self.calibration, **options())

    def plan(self, name: str) -> None:
        """Plan, and find out whether the plan is that of an earlier row."""
        self.set_up(name)
        row = self.rows[name]
        try:
            self.explain(name)
        except Exception:
            del self.steps[name]
            raise
        codecs = [self.steps[name].svi.loss.planner.codec] if row["mode"] == "compress" else []
        row["note"] = ", ".join(map(str, codecs))
        for other, found in self.explanations.items():
            if other != name and self.rows[other]["mode"] == row["mode"] and found.rows == self.explanations[name].rows:
                row["same_as"] = other
                del self.steps[name], self.explanations[name]
                break

    def bits_within(self, budget: int) -> int:
        """The most bits at which everything that may be coded, coded alike, fits."""
        for bits in BITS:
            if bits not in self.stored_at:
                rival = Rival("", "", "ours", "randomized", self.builder(lambda b=bits: {"codec": StochasticRound(b)}))
                self.stored_at[bits] = int(self.explanation("", rival).stored_bytes)
            if self.stored_at[bits] <= budget:
                return bits
        raise ValueError(f"{budget} bytes are too few: with 1 bit everywhere {self.stored_at[1]} bytes are stored")

    def add_ratios(self) -> None:
        """Besides those of each row its cost, time x (1 + rho), in seconds and divided by that of ``exact``."""
        for row in self.rows.values():
            other = self.rows[row["same_as"]] if "same_as" in row else {}
            row |= {key: other[key] for key in MEASURED if key in other}
        super().add_ratios()
        reference = self.rows["exact"]["step"]["median_seconds"]
        for row in self.rows.values():
            if "step" in row and "gradient" in row:
                seconds = row["step"]["median_seconds"] * (1 + row["gradient"].get("rho", 0.0))
                row["cost_seconds"] = seconds
                row["ratio_to_exact"]["cost"] = seconds / reference


if __name__ == "__main__":
    main()
