"""Train the networks and the control problem of the RAD paper with each estimator of the gradient, and compare them.

    python -m examples.benchmarks.training fc --data-dir DIR
    python -m examples.benchmarks.training p2 --quick --guides AutoNormal --estimators small_batch,ours_4bit
    python -m examples.benchmarks.figures docs/benchmarks/training_fc.json    # the figure, and the table

The experiments are those of Oktay et al. (*Randomized Automatic Differentiation*, ICLR 2021): a fully connected
network on MNIST (``fc``), a recurrent one that reads MNIST pixel by pixel (``p2``), a convolutional one on CIFAR-10
(``p3``), and the control of a reaction-diffusion equation (``p4``). Each has deterministic weights, as published
(``AutoDelta``: the mode of the posterior), and is Bayesian as well (``AutoNormal``).

- **Pairs.** Runs of one seed start at the same values and take steps on the same rows with the same noise of the guide.
  The small batch takes the first of these rows, as many as the paper gave it. Only the noise of the estimators differs.
- **Learning rates.** Each estimator tries the same few, with a seed that is not used again; the one with the least
  final loss is taken.
- **Losses.** A few times on the way each run is evaluated, exactly, on the same rows of the training data and with the
  same draw of the guide: the loss per row, and the part of it that the data have. Evaluations are averaged with the
  three before. The step that is called final comes after four fifths of a run, so that who is slower is seen to arrive.
- **Costs.** T, R and the time of a step are those of ``measure.py``; all estimators take turns.
- **The exact ones**, whose plan has no codes, follow the curve of ``exact`` up to rounding: that is checked for a few
  steps, and they are not trained again.

The JSON is written after each run. A run that is there already, with the same settings, is not repeated. Steps follow
each other in Python, not in a ``lax.scan``: XLA's compiler for CPUs has no fast code for gradients of convolutions in
loops.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.handlers import seed as seeded
from numpyro.handlers import substitute
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.util import compute_log_probs
from numpyro.optim import optax_to_numpyro

from examples.benchmarks import measure
from examples.benchmarks.curves import LOSSES, summarize, trailing_mean
from examples.benchmarks.layers import VARIANTS
from examples.benchmarks.record import circumstances, log, write
from examples.benchmarks.rivals import RIVALS, Rival
from examples.benchmarks.run import DEFAULT_FOLDER, ROUNDING, describe, positive_int
from examples.benchmarks.workload import Arrays, Classifier, Workload
from examples.benchmarks.workloads import WORKLOADS
from examples.bnn import classification_scores
from numpyro_rad import RAD_ELBO, explain
from numpyro_rad.codecs import Codec, Keep, RandomProjection, SampleAxis
from numpyro_rad.planning.explain import Explanation

GUIDES = ["AutoDelta", "AutoNormal"]
DATA_SEED = TUNING_SEED = 0  # the compared runs have the seeds from 1
EVALUATIONS = 80  # until the final step
AVERAGED = 4  # evaluations in a row
EVALUATED_ROWS = 500
TESTED_ROWS, TEST_DRAWS, ROWS_AT_ONCE = 2000, 8, 500
TIMED_ROUNDS = 10
CHECKED_STEPS = 10  # of an exact estimator beside Trace_ELBO


def _published(name: str, label: str, make: Callable[[float], Codec]) -> list[Rival]:
    """One of the paper's estimators, at both of its fractions."""
    return [
        Rival(
            f"{name}_{100 * keep:.0f}",
            f"RAD 2021, {label}, keep {keep:g}",
            "rad2021",
            "randomized",
            lambda _, keep=keep: RAD_ELBO(codec=make(keep)),
            note=repr(make(keep)),
        )
        for keep in (0.1, 0.05)
    ]


# Its budget is known when the model is: see ``Training.estimator``.
_BUDGET = replace(
    RIVALS["ours_default"],
    name="ours_budget",
    label="ours, the small batch's bytes",
    note="RAD_ELBO(memory_budget=R of the small batch, slices=1)",
)
_ALL = [
    RIVALS["exact"],
    RIVALS["small_batch"],
    *_published("same_sample", "same sample", partial(SampleAxis, per="shared")),
    *_published("different_sample", "different sample", partial(SampleAxis, per="row")),
    *_published("projection", "projection", RandomProjection),
    *(RIVALS[name] for name in ("ours_default", "ours_4bit", "ours_2bit")),
    _BUDGET,
    *(RIVALS[name] for name in ("ours_8slices", "accumulate", "accumulate_unrolled")),
    *(RIVALS[name] for name in ("checkpoint_layer", "checkpoint_sqrt")),
]
ESTIMATORS: dict[str, Rival] = {rival.name: rival for rival in _ALL}


@dataclass(frozen=True)
class Experiment:
    """How a workload is trained.

    :param steps: after so many the loss is called final; a run has a quarter more.
    :param rates: the learning rates that each estimator tries.
    :param small_rows: rows of the small batch: 20 (MNIST), 21 (IRNN) and 22 (CIFAR-10) of 150 in the paper's code.
    :param without: estimators that are left out, besides those that make no sense for the workload.
    """

    steps: int
    rates: tuple[float, ...]
    small_rows: int = 1
    without: tuple[str, ...] = ()

    def estimators(self, workload: Workload) -> list[str]:
        return [name for name in ESTIMATORS if name not in (*self.without, *workload.without)]

    def evaluated_at(self) -> list[int]:
        """The steps after which a run is evaluated."""
        every = max(self.steps // EVALUATIONS, 1)
        return sorted({*range(0, self.steps + self.steps // 4 + 1, every), self.steps})


_NETWORK = ("accumulate_unrolled",)
_CONVOLUTIONS = ("accumulate",)  # in a loop it takes forty times as long
# As codes cost several times the time of a step there, fewer of them.
_CONTROL = ("same_sample_5", "different_sample_5", "projection_10", "projection_5", "ours_2bit", "ours_budget")
# name on the command line -> (full size, quick size)
EXPERIMENTS: dict[str, tuple[Experiment, Experiment]] = {
    "fc": (
        Experiment(2000, (3e-4, 1e-3, 3e-3, 1e-2), small_rows=20, without=_NETWORK),
        Experiment(80, (1e-3, 3e-3, 1e-2), small_rows=8, without=_NETWORK),
    ),
    "p2": (
        Experiment(400, (1e-5, 3e-5, 1e-4, 3e-4), small_rows=21, without=_NETWORK),
        Experiment(80, (3e-4, 1e-3, 3e-3), small_rows=4, without=_NETWORK),
    ),
    "p3": (
        Experiment(320, (1e-3, 3e-3, 1e-2), small_rows=22, without=_CONVOLUTIONS),
        Experiment(80, (1e-3, 3e-3, 1e-2), small_rows=5, without=_CONVOLUTIONS),
    ),
    "p4": (
        Experiment(80, (3e-3, 1e-2, 3e-2, 1e-1), without=_CONTROL),
        Experiment(80, (3e-3, 1e-2, 3e-2, 1e-1), without=_CONTROL),
    ),
}


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line asks for and is not there yet."""
    options = parse_arguments(arguments)
    experiment = EXPERIMENTS[options.workload][options.quick]
    base, data = WORKLOADS[options.workload][options.quick].load(DATA_SEED, options.data_dir)
    held_out = base.held_out(DATA_SEED, options.data_dir)
    output = options.output or DEFAULT_FOLDER / f"training_{base.name}.json"
    report = continued(output, base, experiment)
    for guide in options.guides:
        entry = report["training"]["guides"].setdefault(guide, {"costs": {}, "tuning": [], "runs": [], "summary": {}})
        training = Training(replace(base, guide_name=guide), data, held_out, experiment, entry)
        training.run(options.estimators, range(1, options.seeds + 1), partial(write, report, output))
    log(f"{output} is complete")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, with the list of estimators in its help."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n    python")[0],
        epilog="Estimators:\n" + "\n".join(f"  {r.name:<21}{r.note}" for r in ESTIMATORS.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    titles = "; ".join(f"{name}: {WORKLOADS[name][0].title}" for name in EXPERIMENTS)
    parser.add_argument("workload", choices=EXPERIMENTS, help=titles)
    parser.add_argument("--quick", action="store_true", help="the small size of the workload, for trying things out")
    parser.add_argument("--guides", nargs="+", choices=GUIDES, default=GUIDES, help="which weights (default: both)")
    parser.add_argument("--estimators", metavar="A,B,C", help="by the names below (default: all that make sense)")
    parser.add_argument("--seeds", type=positive_int, default=5, metavar="N", help="paired runs (default: %(default)s)")
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="folder with mnist/ for fc, p2 and cifar10/ for p3 (default: scikit-learn's digits, synthetic images)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.json",
        help="where the JSON goes (default: docs/benchmarks/training_*.json)",
    )
    options = parser.parse_args(arguments)
    sensible = EXPERIMENTS[options.workload][options.quick].estimators(WORKLOADS[options.workload][0])
    wanted = options.estimators.split(",") if options.estimators else sensible
    wrong = [name for name in wanted if name not in sensible]
    if wrong:
        parser.error(f"{', '.join(wrong)}: the estimators of {options.workload} are {', '.join(sensible)}")
    options.estimators = [name for name in sensible if name in wanted or name == "exact"]  # the others need it
    return options


def continued(output: Path, workload: Workload, experiment: Experiment) -> dict[str, Any]:
    """The report that is there, if it was made with the same settings, or else one without runs."""
    fresh = {
        "workload": workload.parameters(),
        **circumstances(),
        "training": {
            "settings": {
                **asdict(experiment),
                "at_steps": experiment.evaluated_at(),
                "averaged_evaluations": AVERAGED,
                "evaluated_rows": min(EVALUATED_ROWS, workload.data_size),
                "tested_rows": TESTED_ROWS,
                "test_draws": TEST_DRAWS,
                "timed_rounds": TIMED_ROUNDS,
                "data_seed": DATA_SEED,
                "tuning_seed": TUNING_SEED,
            },
            "guides": {},
        },
    }
    fresh = json.loads(json.dumps(fresh))  # tuples are lists there
    if output.exists():
        found = json.loads(output.read_text())
        same = [found.get(part) == fresh[part] for part in ("workload", "machine", "versions")]
        if all(same) and found["training"]["settings"] == fresh["training"]["settings"]:
            return found
        log(f"{output} has other settings, and is replaced")
    return fresh


def chosen_rate(tuning: list[dict[str, Any]], name: str) -> float:
    """The learning rate of the least final loss; the lowest one if each run diverged."""
    mine = [run for run in tuning if run["estimator"] == name]
    sound = [run for run in mine if not run["diverged"]]
    return min(sound, key=lambda run: run["final_loss"])["rate"] if sound else min(run["rate"] for run in mine)


def adds_noise(plan: Explanation) -> bool:
    """Whether a plan has codes. Of one with a codec for all nothing is predicted, but its rows say what is coded."""
    if plan.predicted is None:
        return any(row.relative_variance for row in plan.rows)
    return plan.predicted.added_variance > 0


@dataclass(frozen=True)
class Curves:
    """What became of a run.

    :param losses: for each of ``LOSSES`` its evaluations, averaged; None where it is not finite.
    :param diverged: whether it was not finite at some time, or ends above where it began.
    :param state: that of the final step; None if it never came there.
    """

    losses: dict[str, list[float | None]]
    final_loss: float | None
    diverged: bool
    state: Any


class Training:
    """All runs of one workload with one guide.

    ``entry`` is their part of the JSON: ``costs`` by estimator, ``tuning`` and ``runs``, and the ``summary`` of these.
    """

    def __init__(
        self, workload: Workload, data: Arrays, held_out: Arrays | None, experiment: Experiment, entry: dict[str, Any]
    ) -> None:
        self.workload, self.data, self.held_out = workload, data, held_out
        self.experiment, self.entry = experiment, entry
        self.at = experiment.evaluated_at()
        self.compiled: dict[str, Any] = {}
        self.starts: dict[int, tuple[Any, np.ndarray]] = {}
        self.pick = jax.jit(lambda data, rows: tuple(array[rows] for array in data))

    def run(self, names: list[str], seeds: range, save: Callable[[], None]) -> None:
        """Measure, tune and train what is missing, and save after each piece; ``exact`` is the first of the names."""
        if not all(name in self.entry["costs"] for name in names):
            self.measure_costs(names)
            save()
        for name in names:
            cost = self.entry["costs"][name]
            if "failure" in cost:
                continue
            if cost["follows_exact"]:
                if "check" not in cost:
                    cost["check"] = self.check(name)
                    save()
                continue
            for rate in self.experiment.rates:
                if not any((run["estimator"], run["rate"]) == (name, rate) for run in self.entry["tuning"]):
                    self.entry["tuning"].append(self.tuned(name, rate))
                    save()
            rate = chosen_rate(self.entry["tuning"], name)
            for seed in seeds:
                if not any((run["estimator"], run["seed"]) == (name, seed) for run in self.entry["runs"]):
                    self.entry["runs"].append(self.trained(name, seed, rate))
                    self.entry["summary"] = summarize(self.entry["runs"], self.at, self.experiment.steps)
                    save()

    def measure_costs(self, names: list[str]) -> None:
        """T, R and the time of a step of all estimators; a failure ends an estimator's part and nothing else."""
        costs = {}
        for name in names:
            log(f"{self.workload.name} {self.workload.guide_name}: compiling {name}")
            costs[name] = describe(ESTIMATORS[name])
            try:
                costs[name] |= self.cost(name)
            except Exception as error:
                if name == "exact":
                    raise
                costs[name]["failure"] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
                log(costs[name]["failure"])
        rate, state = jnp.float32(self.experiment.rates[0]), self.reference.state
        calls = {name: partial(self.compiled[name], state, rate, *self.batch(name)) for name in self.compiled}
        for name, seconds in measure.interleaved_times(calls, TIMED_ROUNDS, DATA_SEED).items():
            costs[name]["step"] = measure.summarize_times(seconds)
        self.entry["costs"] |= costs

    def cost(self, name: str) -> dict[str, Any]:
        """What one step takes, but for its time; the step is compiled for later."""
        rival, stored, noisy = self.estimator(name), None, False
        if name in ("exact", "small_batch"):
            stored = self.exactly_stored(name)
        elif rival.family in ("ours", "rad2021"):
            plan = self.explanation(cast(RAD_ELBO, rival.elbo(self.workload)), name)
            stored = self.exactly_stored(name) if plan.untouched else int(plan.stored_bytes)
            noisy = adds_noise(plan)
        return {
            "rows_per_step": len(self.batch(name)[0]),
            "stored_bytes": stored,
            "temp_bytes": measure.temp_size(self.prepare(name)),
            "follows_exact": rival.kind in ("exact", "randomized") and name != "exact" and not noisy,
        }

    def estimator(self, name: str) -> Rival:
        if name != "ours_budget":
            return ESTIMATORS[name]
        budget = self.exactly_stored("small_batch")
        return replace(ESTIMATORS[name], elbo=lambda _: RAD_ELBO(memory_budget=budget, slices=1))

    def batch(self, name: str) -> tuple[jax.Array, ...]:
        """Some rows, as many as the estimator takes."""
        rows = self.experiment.small_rows if name == "small_batch" else self.workload.batch
        return tuple(array[:rows] for array in self.reference.batch)

    def exactly_stored(self, name: str) -> int:
        """R where the residuals of the estimator's rows are stored exactly, but for what is cheap to compute again."""
        return int(self.explanation(RAD_ELBO(codec=Keep()), name).stored_bytes)

    def explanation(self, elbo: RAD_ELBO, name: str) -> Explanation:
        """The plan of an ELBO for the estimator's rows."""
        svi, key = self.reference.svi, jax.random.key(0)
        return explain(elbo, key, svi.get_params(self.reference.state), svi.model, svi.guide, *self.batch(name))

    def prepare(self, name: str) -> Any:
        """The compiled step of an estimator, a function of state, learning rate and rows."""
        if name not in self.compiled:
            rival, svi = self.estimator(name), copy.copy(self.reference.svi)
            if rival.layer != "plain":
                svi = self.build(rival, DATA_SEED).svi
            svi.loss = rival.elbo(self.workload)

            def update(state: Any, rate: jax.Array, *batch: jax.Array) -> Any:
                tuned = copy.copy(svi)
                tuned.optim = optax_to_numpyro(replace(self.workload, learning_rate=rate).optimizer())
                return tuned.update(state, *batch)

            operands = self.reference.state, jnp.float32(self.workload.learning_rate), *self.batch(name)
            self.compiled[name] = jax.jit(update).lower(*operands).compile()
        return self.compiled[name]

    def build(self, rival: Rival, seed: int) -> measure.Step:
        return measure.build(rival, self.workload, self.data, seed, self.workload.batch)

    @cached_property
    def reference(self) -> measure.Step:
        """``Trace_ELBO`` with the plain model, whose parts all but a few estimators share."""
        return self.build(RIVALS["exact"], DATA_SEED)

    def start(self, seed: int) -> tuple[Any, np.ndarray]:
        """The state from which every run of a seed starts, and its rows, ``(steps, batch)``."""
        if seed not in self.starts:
            draw = np.random.default_rng([seed, 1])
            size, batch = self.workload.data_size, self.workload.batch
            rows = np.stack([draw.choice(size, batch, replace=False) for _ in range(self.at[-1])])
            step = self.reference if seed == DATA_SEED else self.build(RIVALS["exact"], seed)
            self.starts[seed] = step.state, rows.astype(np.int32)
        return self.starts[seed]

    @cached_property
    def evaluate(self) -> Callable[[Any], jax.Array]:
        """``LOSSES`` per row of the training data, of a state: the negative ELBO, and the negative log likelihood."""
        svi = self.reference.svi
        size, key = self.workload.data_size, jax.random.key(DATA_SEED)
        rows = np.random.default_rng([DATA_SEED, 2]).permutation(size)[:EVALUATED_ROWS]

        @jax.jit
        def losses(state: Any, data: Arrays) -> jax.Array:
            params = svi.get_params(state)
            guide_terms, drawn = compute_log_probs(seeded(svi.guide, key), data, {}, params)
            latents = {name: site["value"] for name, site in drawn.items() if site["type"] == "sample"}
            model = seeded(substitute(svi.model, data=latents), key)
            terms, sites = compute_log_probs(model, data, {}, params)
            observed = sum(jnp.sum(term) for name, term in terms.items() if sites[name]["is_observed"])
            elbo = sum(map(jnp.sum, terms.values())) - sum(map(jnp.sum, guide_terms.values()))
            return -jnp.stack([elbo, jnp.asarray(observed)]) / size

        return partial(losses, data=self.pick(self.data, rows))

    def follow(self, name: str, seed: int, rate: float, steps: int) -> Curves:
        """One run."""
        take, (state, rows) = self.prepare(name), self.start(seed)
        own, fixed_rate, evaluations, final = len(self.batch(name)[0]), jnp.float32(rate), [], None
        for k in range(steps + 1):
            if k in self.at:
                evaluations.append(np.asarray(self.evaluate(state), np.float64))
                if not np.isfinite(evaluations[-1]).all():
                    break
            if k == self.experiment.steps:
                final = state
            if k < steps:
                state, _ = take(state, fixed_rate, *self.pick(self.data, rows[k, :own]))
        missing = [None] * (sum(k <= steps for k in self.at) - len(evaluations))
        curves = {}
        for i, field in enumerate(LOSSES):
            means = trailing_mean([values[i] for values in evaluations], AVERAGED)
            curves[field] = [float(f"{mean:.8g}") if math.isfinite(mean) else None for mean in means] + missing
        first, last = (curves["loss"][self.at.index(k)] for k in (0, self.experiment.steps))
        diverged = None in curves["loss"] or first is None or last is None or last > first
        return Curves(curves, last, diverged, final)

    def tuned(self, name: str, rate: float) -> dict[str, Any]:
        """One run with one learning rate, for the JSON."""
        found = self.follow(name, TUNING_SEED, rate, self.experiment.steps)
        log(f"{self.workload.name} {self.workload.guide_name}: {name} at {rate:g} ends at {found.final_loss}")
        return {"estimator": name, "rate": rate, "final_loss": found.final_loss, "diverged": found.diverged}

    def trained(self, name: str, seed: int, rate: float) -> dict[str, Any]:
        """One run of the comparison, for the JSON."""
        found = self.follow(name, seed, rate, self.at[-1])
        log(f"{self.workload.name} {self.workload.guide_name}: {name}, seed {seed}, ends at {found.final_loss}")
        return {
            "estimator": name,
            "seed": seed,
            "rate": rate,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "diverged": found.diverged,
            **found.losses,
            "test": None if found.diverged else self.test(found.state),
        }

    def test(self, state: Any) -> dict[str, float] | None:
        """Accuracy and log likelihood per row of the posterior predictive, on the first of the held-out rows."""
        if self.held_out is None or not isinstance(self.workload, Classifier):
            return None
        x, y = (array[:TESTED_ROWS] for array in self.held_out)
        svi, draws = self.reference.svi, 1 if self.workload.guide_name == "AutoDelta" else TEST_DRAWS
        key, guide = jax.random.key(DATA_SEED), cast(AutoGuide, svi.guide)
        latents = guide.sample_posterior(key, svi.get_params(state), sample_shape=(draws,))
        pieces = [x[i : i + ROWS_AT_ONCE] for i in range(0, len(x), ROWS_AT_ONCE)]
        logits = [
            np.concatenate([self.outputs(jax.tree.map(lambda values, d=d: values[d], latents), x) for x in pieces])
            for d in range(draws)
        ]
        scores, _ = classification_scores(np.stack(logits).astype(np.float64), np.asarray(y))
        return {name: scores[name] for name in ("accuracy", "log_likelihood")}

    @cached_property
    def outputs(self) -> Callable[..., jax.Array]:
        """Logits of some rows under one draw of the weights."""
        workload = cast(Classifier, self.workload)

        @jax.jit
        def logits(weights: dict[str, jax.Array], x: jax.Array) -> jax.Array:
            return substitute(workload.outputs, data=weights)(x, VARIANTS["plain"](workload.layer))

        return logits

    def check(self, name: str) -> dict[str, Any]:
        """The first steps of an estimator beside those of ``exact``: relative differences of their losses."""
        rate, losses = jnp.float32(chosen_rate(self.entry["tuning"], "exact")), {}
        for who in ("exact", name):
            take, (state, rows), losses[who] = self.prepare(who), self.start(1), []
            for k in range(min(CHECKED_STEPS, len(rows))):
                state, loss = take(state, rate, *self.pick(self.data, rows[k]))
                losses[who].append(float(loss))
        exact, mine = np.array(losses["exact"]), np.array(losses[name])
        difference = float(np.abs(mine - exact).max() / np.abs(exact).max())
        log(f"{self.workload.name} {self.workload.guide_name}: {name} differs from exact by {difference:.1e}")
        return {"steps": len(exact), "largest_difference": difference, "equals_exact": difference <= ROUNDING}


if __name__ == "__main__":
    main()
