"""Compare RAD_ELBO with its rivals on one workload, in one process, and write the numbers as JSON.

    python -m examples.benchmarks.run p1 --quick
    python -m examples.benchmarks.run p1 --rivals exact,checkpoint_layer,accumulate,ours_2bit
    python -m examples.benchmarks.run p2 --data-dir DIR                 # MNIST; without it, scikit-learn's digits
    python -m examples.benchmarks.figures docs/benchmarks/p1.json      # the figure, and the table on standard output

What each number means is said in ``measure.py``, who is compared in ``rivals.py``, and on what in ``workload.py``. A
rival that fails keeps the numbers it has and gets a ``failure``; ratios are to ``exact``, which is always run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax

from examples.benchmarks import measure
from examples.benchmarks.record import circumstances, log, write
from examples.benchmarks.rivals import RIVALS, Rival
from examples.benchmarks.workload import Workload
from examples.benchmarks.workloads import WORKLOADS

DEFAULT_FOLDER = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"
# The small minibatch must fit in this part of the exact step's T when there is no 2-bit row to equal.
DEFAULT_MEMORY_RATIO = 12
# Float32 sums in another order differ by less than this; a wrong gradient by much more.
ROUNDING = 1e-4
# Path noise is measured at so many draws of guide and minibatch, in turns: their exact gradients are held.
CASES = 16
# The variance of the exact gradient, which all others are referred to, is over at least so many draws: squared norms of
# gradients may differ by a factor of ten and more between draws of guide and minibatch.
REFERENCE_DRAWS = 32


def main(arguments: list[str] | None = None) -> None:
    """Run the comparison that the command line asks for and write its JSON."""
    options = parse_arguments(arguments)
    workload = WORKLOADS[options.workload][1 if options.quick else 0]
    benchmark = Benchmark(workload, options)
    output = options.output or DEFAULT_FOLDER / f"{workload.name}.json"
    report = benchmark.run()
    write(report, output)
    log(f"wrote {output}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, with the list of rivals in its help."""
    parser = common_parser(__doc__ or "", "docs/benchmarks/WORKLOAD.json, WORKLOAD-quick.json with --quick")
    options = parser.parse_args(arguments)
    options.rivals = sensible_rivals(parser, options, list(RIVALS))
    return options


def common_parser(
    doc: str, output: str, rivals: str = "all that make sense for the workload"
) -> argparse.ArgumentParser:
    """The options that every program here has.

    :param doc: the docstring of the program.
    :param output: where the JSON goes unless told.
    :param rivals: who takes part unless told.
    """
    parser = argparse.ArgumentParser(
        description=doc.split("\n\n    python")[0],
        epilog="Rivals:\n" + "\n".join(f"  {r.name:<18}{r.note}" for r in RIVALS.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    workloads = "; ".join(f"{name}: {full.title} (--quick: {quick.title})" for name, (full, quick) in WORKLOADS.items())
    parser.add_argument("workload", choices=WORKLOADS, help=workloads)
    parser.add_argument(
        "--rivals",
        type=parse_rivals,
        metavar="A,B,C",
        help=f"who takes part, by the names below (default: {rivals})",
    )
    parser.add_argument("--quick", action="store_true", help="the small size of the workload, for trying things out")
    parser.add_argument(
        "--repeats", type=positive_int, metavar="N", help="timed rounds, one more is dropped (default: the workload's)"
    )
    parser.add_argument(
        "--draws", type=at_least_two, metavar="N", help="draws per gradient variance (default: the workload's)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of data, parameters, keys and order (default: 0)")
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="folder with mnist/ for fc, p2, p5vae, cifar10/ for p3 (default: scikit-learn's digits, synthetic images)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help=f"where the JSON goes (default: {output})")
    return parser


def sensible_rivals(parser: argparse.ArgumentParser, options: argparse.Namespace, default: list[str]) -> list[str]:
    """The rivals that were asked for, or those of ``default`` that make sense for the workload."""
    without = WORKLOADS[options.workload][0].without
    senseless = [name for name in options.rivals or () if name in without]
    if senseless:
        parser.error(f"{', '.join(senseless)} makes no sense for {options.workload}, see its source")
    return options.rivals or [name for name in default if name not in without]


def parse_rivals(text: str) -> list[str]:
    """Names separated by commas, in the order of the tables; ``exact`` is always among them."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in RIVALS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"unknown rival {', '.join(unknown)!r}; choose from {', '.join(RIVALS)}")
    return [name for name in RIVALS if name in names or name == "exact"]


def positive_int(text: str) -> int:
    """An argument of at least one."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def at_least_two(text: str) -> int:
    """An argument of at least two."""
    if int(text) < 2:
        raise argparse.ArgumentTypeError("a variance needs at least 2 draws")
    return int(text)


class Benchmark:
    """One comparison: compile every rival, time them in turns, then look at their gradients.

    ``rows`` (the JSON's table) holds what is known about each rival; a failure ends that rival's part and nothing else.
    """

    def __init__(self, workload: Workload, options: argparse.Namespace) -> None:
        self.seed = options.seed
        self.repeats = options.repeats or workload.repeats
        self.draws = options.draws or workload.draws
        self.workload, self.data = workload.load(self.seed, options.data_dir)
        self.rivals: dict[str, Rival] = {name: RIVALS[name] for name in options.rivals}
        self.rows: dict[str, dict[str, Any]] = {name: describe(rival) for name, rival in self.rivals.items()}
        self.steps: dict[str, measure.Step] = {}
        self.compiled: dict[str, measure.Compiled] = {}
        self.explanations: dict[str, Any] = {}
        self.state: Any = None  # after the training steps
        self.cases: list[tuple[tuple, Any]] = []  # draws of guide and minibatch, with the exact gradient there

    def run(self) -> dict[str, Any]:
        started = circumstances()
        # Set up first, compile second: compiling empties JAX's caches. The first use of the compiler is not counted.
        self.set_up_all()
        if "exact" not in self.compiled:
            measure.compile_step(self.steps["exact"])
        for name in list(self.steps):
            self.attempt(name, "compile", self.measure_compiled)
        # The small batch comes last, because its size depends on what the others need.
        if "small_batch" in self.rows:
            self.attempt("small_batch", "set up", self.set_up_small_batch)
            if "small_batch" in self.steps:
                self.attempt("small_batch", "compile", self.measure_compiled)
        for name in self.steps:
            if self.rivals[name].family in ("ours", "rad2021") and self.rows[name]["stored_bytes"] is None:
                self.attempt(name, "explain", self.explain)
        self.measure_times()
        self.train()
        self.measure_gradients(self.steps["exact"])
        self.add_ratios()
        return {
            "workload": self.workload.parameters(),
            **started,
            "settings": {"seed": self.seed, "repeats": self.repeats, "draws": self.draws, "dtype": "float32"},
            "exact_gradient": self.exact_gradient,
            "rivals": list(self.rows.values()),
        }

    def set_up_all(self) -> None:
        """Set up everybody whose batch is the workload's."""
        for name in self.rows:
            if name != "small_batch":
                self.attempt(name, "set up", self.set_up)

    def attempt(self, name: str, phase: str, action: Callable[[str], None]) -> None:
        """Run one phase of one rival; an error becomes part of its ``failure``, except for the reference."""
        started = time.perf_counter()
        try:
            action(name)
        except Exception as error:
            if name == "exact":
                raise
            reason = f"{phase}: {type(error).__name__}: {' '.join(str(error).split())[:500]}"
            earlier = self.rows[name].get("failure")
            self.rows[name]["failure"] = f"{earlier}; {reason}" if earlier else reason
            log(f"{name:<18}{reason}")
        else:
            log(f"{name:<18}{phase} ({time.perf_counter() - started:.1f} s)")

    def set_up(self, name: str, rows: int | None = None) -> None:
        rows = rows or self.workload.batch
        self.rows[name]["rows_per_step"] = rows
        self.steps[name] = measure.build(self.rivals[name], self.workload, self.data, self.seed, rows)

    def set_up_small_batch(self, name: str) -> None:
        """As many rows as fit in the memory of our 2-bit row, or in a fixed part of the exact step's."""
        target, source = self.rows.get("ours_2bit", {}).get("temp_bytes"), "ours_2bit"
        if target is None:
            target, source = self.rows["exact"]["temp_bytes"] / DEFAULT_MEMORY_RATIO, f"exact / {DEFAULT_MEMORY_RATIO}"
        found = measure.rows_of_equal_memory(self.workload, self.data, self.seed, target)
        self.rows[name]["equal_memory"] = {**found, "target": source}
        self.set_up(name, found["rows"])

    def measure_compiled(self, name: str) -> None:
        """T and compile times."""
        row, step = self.rows[name], self.steps[name]
        compiled = self.compiled[name] = measure.compile_step(step)
        row["temp_bytes"] = compiled.temp_bytes
        row["compile"] = {
            "trace_and_lower_seconds": compiled.trace_and_lower_seconds,
            "compile_seconds": compiled.compile_seconds,
            "total_seconds": compiled.trace_and_lower_seconds + compiled.compile_seconds,
        }

    def explain(self, name: str) -> None:
        """R: the bytes that the plan says are stored between the sweeps."""
        import numpyro_rad  # late, because the other rivals do without it

        row, step = self.rows[name], self.steps[name]
        svi = step.svi
        params = svi.get_params(step.state)
        plan = numpyro_rad.explain(svi.loss, jax.random.key(self.seed), params, svi.model, svi.guide, *step.batch)
        row["stored_bytes"], row["exact_stored_bytes"] = int(plan.stored_bytes), int(plan.exact_bytes)
        predicted = asdict(plan.predicted).items() if plan.predicted is not None else ()
        row["predicted"] = dict(predicted)
        self.explanations[name] = plan

    def measure_times(self) -> None:
        """Step times of everything that compiled; a rival that cannot run is left out before the rounds begin."""
        calls = {}
        for name, compiled in self.compiled.items():
            step = self.steps[name]
            call = partial(compiled.step, step.state, *step.batch)

            def first_call(name: str, call: Callable[[], Any] = call) -> None:
                jax.block_until_ready(call())
                calls[name] = call

            self.attempt(name, "first step", first_call)
        for name, seconds in measure.interleaved_times(calls, self.repeats, self.seed).items():
            self.rows[name]["step"] = measure.summarize_times(seconds)
            log(f"{name:<18}{self.rows[name]['step']['median_seconds']:.4f} s per step")

    def train(self) -> None:
        """Take the exact training steps after which gradients are measured, once; keep parameters, key and state."""
        if self.state is not None:
            return
        step, run = self.steps["exact"], self.compiled["exact"].step
        state = step.state
        for key in jax.random.split(jax.random.key(self.seed + 3), self.workload.training_steps):
            state, loss = run(state, *self.workload.minibatch(key, self.data, self.workload.batch))
        self.state = state
        self.params = step.svi.optim.get_params(state.optim_state)
        self.key = state.rng_key
        log(f"trained for {self.workload.training_steps} steps, loss {float(loss):.4g}")

    def measure_gradients(self, exact_step: measure.Step) -> None:
        """The exact gradient and its variance, then every other rival's difference from it or added variance."""
        gradient = exact_step.gradient()
        self.exact = gradient(self.params, self.key, exact_step.batch)
        moments = measure.Moments()
        for key, batch in self.draws_of(self.workload.batch):
            value = gradient(self.params, key, batch)
            moments.add(value)
            if len(self.cases) < CASES:
                self.cases.append(((key, batch), jax.device_get(value)))
        self.exact_gradient = {
            "square_norm": float(measure.square_norm(self.exact)),
            "stochastic_variance": moments.variance,
        }
        actions = {
            "exact": self.compare_gradient,
            "rounded": self.compare_gradient,
            "randomized": self.measure_path_noise,
            "small_batch": self.measure_small_batch,
        }
        for name in self.compiled:
            self.attempt(name, "gradient", actions[self.rivals[name].kind])

    def draws_of(self, rows: int) -> Iterator[tuple[jax.Array, tuple[jax.Array, ...]]]:
        draws = max(self.draws, REFERENCE_DRAWS)
        return measure.draws_of(self.workload, self.data, rows, self.seed, draws)

    def compare_gradient(self, name: str) -> None:
        step = self.steps[name]
        difference = measure.gradient_difference(step.gradient()(self.params, self.key, step.batch), self.exact)
        equal = difference["relative_difference"] <= ROUNDING
        self.rows[name]["gradient"] = {**difference, "equals_exact_to_rounding": equal}

    def measure_path_noise(self, name: str) -> None:
        step = self.steps[name]
        gradient = step.gradient_with_path_key()
        noise = measure.path_variance(partial(gradient, self.params), self.cases, self.seed, self.draws)
        rho = noise["added_variance"] / self.exact_gradient["stochastic_variance"]
        self.rows[name]["gradient"] = {**noise, "rho": rho}

    def measure_small_batch(self, name: str) -> None:
        """What fewer rows add to the variance, in the same unit as rho."""
        gradient, moments = self.steps[name].gradient(), measure.Moments()
        for key, batch in self.draws_of(self.rows[name]["rows_per_step"]):
            moments.add(gradient(self.params, key, batch))
        rho = moments.variance / self.exact_gradient["stochastic_variance"] - 1.0
        self.rows[name]["gradient"] = {"stochastic_variance": moments.variance, "rho": rho}

    def add_ratios(self) -> None:
        """T, step and compile time of each row, divided by those of ``exact``."""
        reference = self.rows["exact"]
        for row in self.rows.values():
            ratios: dict[str, float] = {}
            if "temp_bytes" in row:
                ratios["temp_bytes"] = row["temp_bytes"] / reference["temp_bytes"]
                ratios["compile"] = row["compile"]["total_seconds"] / reference["compile"]["total_seconds"]
            if "step" in row:
                ratios["step"] = row["step"]["median_seconds"] / reference["step"]["median_seconds"]
            row["ratio_to_exact"] = ratios


def describe(rival: Rival) -> dict[str, Any]:
    """A rival's row before anything is measured."""
    labels = {
        "name": rival.name,
        "label": rival.label,
        "family": rival.family,
        "kind": rival.kind,
        "note": rival.note,
    }
    return {**labels, "stored_bytes": None}


if __name__ == "__main__":
    main()
