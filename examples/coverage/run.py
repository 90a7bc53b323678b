"""Measure ``RAD_ELBO`` against ``Trace_ELBO`` on models of the kinds in NumPyro's examples; write a table.

    python -m examples.coverage.run                    # all models: docs/coverage.json and docs/coverage.md
    python -m examples.coverage.run vae annotation     # these again; the other rows stay as they are
    python -m examples.coverage.run --table-only       # the Markdown from the stored JSON

What is measured, for each model and with the guide's first parameters:

- **residuals**: what 4-bit codes at the fewest bytes do with them, from ``numpyro_rad.explain`` (see
  ``residual_shares``).
- **T**, **compile** (CPU seconds of tracing, lowering and XLA) and **step time**: of the compiled ``svi.update``, as
  in ``examples/benchmarks/measure.py``, with ``Trace_ELBO``, ``RAD_ELBO`` without options and the plan of fewest bytes;
  they take turns in one process.
- **value**: whether the jitted loss has the same bits under the same key.
- **gradient**: relative difference of the plan with ``codec=Keep()``, in float32.
- **training**: ``Trace_ELBO`` and the plan of fewest bytes from the same state under the same keys, their losses
  averaged over the last fifth.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import SVI, Trace_ELBO

from examples.benchmarks import measure
from examples.benchmarks.record import circumstances, log, write
from examples.coverage.models import MODELS, Example, Problem
from examples.coverage.table import SMALL_BYTES, markdown
from numpyro_rad import RAD_ELBO, Keep, StochasticRound, explain

DOCS = Path(__file__).resolve().parents[2] / "docs"
KEPT_SHOWN = 5


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line asks for; the JSON is written after each model, the Markdown at the end."""
    options = parse_arguments(arguments)
    output = options.output
    if options.table_only:
        report = json.loads(output.read_text())
    else:
        report = empty_report(options)
        kept = rows_to_keep(report, output) if options.models else {}
        for name in MODELS:
            if name in kept and name not in options.models:
                report["models"].append(kept[name])
            elif not options.models or name in options.models:
                report["models"].append(measure_model(MODELS[name], options))
                write(report, output)
        report["models"].sort(key=lambda row: list(MODELS).index(row["name"]))
        write(report, output)
    output.with_suffix(".md").write_text(markdown(report))
    log(f"wrote {output} and {output.with_suffix('.md')}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="models: " + ", ".join(MODELS),
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="models to measure (default: all)")
    parser.add_argument("--small", action="store_true", help="the sizes of the tests")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="training steps (default: 100)")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="timed rounds (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of parameters, keys and order (default: 0)")
    parser.add_argument("--table-only", action="store_true", help="measure nothing, write the Markdown again")
    parser.add_argument(
        "--output",
        type=Path,
        default=DOCS / "coverage.json",
        metavar="FILE.json",
        help="where the numbers go, the table beside them as .md (default: docs/coverage.json)",
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.models if name not in MODELS]
    if unknown:
        parser.error(f"unknown model {', '.join(unknown)}; choose from {', '.join(MODELS)}")
    if options.steps < 5 or options.repeats < 1:
        parser.error("at least 5 steps and 1 round are needed")
    return options


def empty_report(options: argparse.Namespace) -> dict[str, Any]:
    """Where, with what and how; no models yet."""
    return {
        **circumstances(),
        "settings": {
            "seed": options.seed,
            "repeats": options.repeats,
            "steps": options.steps,
            "small": options.small,
            "dtype": "float32",
        },
        "models": [],
    }


def rows_to_keep(report: dict[str, Any], stored: Path) -> dict[str, Any]:
    """Rows of an earlier run that may stand beside new ones: measured in the same place and way."""
    if not stored.exists():
        return {}
    earlier = json.loads(stored.read_text())
    different = [part for part in ("machine", "versions", "settings") if earlier[part] != report[part]]
    if different:
        raise SystemExit(f"{stored} has another {' and '.join(different)}: measure all models, or set --output.")
    return {row["name"]: row for row in earlier["models"]}


def measure_model(entry: Example, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the report. A phase that fails is named in ``failures`` and leaves the others alone."""
    row: dict[str, Any] = {"name": entry.name, "source": entry.source, "failures": {}}
    if entry.missing:
        row["failures"]["set up"] = f"needs {', '.join(entry.missing)}"
        return row
    started = time.perf_counter()

    def attempt(phase: str, action: Callable[[], dict[str, Any]]) -> None:
        try:
            row.update(action())
        except Exception as error:
            row["failures"][phase] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"

    measured = _Measured(entry.make(small=options.small), options)
    for phase in ("residuals", "compiled", "times", "value", "gradient", "training"):
        attempt(phase, getattr(measured, phase))
    failed = f", failed: {row['failures']}" if row["failures"] else ""
    log(f"{entry.name:<30}{time.perf_counter() - started:6.1f} s{failed}")
    return row


class _Measured:
    """One problem with ``Trace_ELBO``, ``RAD_ELBO`` and the plan of fewest bytes, from one initial state."""

    def __init__(self, problem: Problem, options: argparse.Namespace) -> None:
        self.problem, self.options = problem, options
        self.key = jax.random.key(options.seed + 1)
        fewest = RAD_ELBO(**problem.elbo, codec=StochasticRound(bits=4))
        elbos = {"exact": Trace_ELBO(**problem.elbo), "ours": RAD_ELBO(**problem.elbo), "fewest": fewest}
        self.fits = {name: SVI(problem.model, problem.guide, problem.optimizer, elbo) for name, elbo in elbos.items()}
        self.exact = self.fits["exact"]
        self.state = self.exact.init(jax.random.key(options.seed), *problem.args, **problem.settings)
        for svi in self.fits.values():
            svi.constrain_fn = self.exact.constrain_fn  # all that init would add: the state is the same
        self.params = self.exact.optim.get_params(self.state.optim_state)
        self.steps: dict[str, measure.Compiled] = {}

    def loss(self, elbo: Any) -> Callable[..., jax.Array]:
        """``loss(unconstrained parameters, key)``."""
        p, constrain = self.problem, self.exact.constrain_fn
        return lambda params, key: elbo.loss(key, constrain(params), p.model, p.guide, *p.args, **p.settings)

    def residuals(self) -> dict[str, Any]:
        p = self.problem
        operands = (self.key, self.exact.get_params(self.state), p.model, p.guide, *p.args)
        own = jax_residual_bytes(lambda params: self.loss(Trace_ELBO(**p.elbo))(params, self.key), self.params)
        plan = explain(self.fits["fewest"].loss, *operands, **p.settings)
        found = {**residual_shares(plan.rows, own), "stored_bytes": plan.stored_bytes}
        untouched = explain(self.fits["ours"].loss, *operands, **p.settings).untouched
        return {"residuals": {**found, "safe_defaults": list(plan.defaults)}, "untouched": untouched}

    def compiled(self) -> dict[str, Any]:
        """T and compile time of each; whatever is compiled first in a process pays for more, so that is thrown away."""
        jax.block_until_ready(jax.jit(jnp.sin)(1.0))
        result: dict[str, Any] = {"temp_bytes": {}, "compile_cpu_seconds": {}}
        for name, svi in self.fits.items():
            update = partial(svi.update, **self.problem.settings)
            self.steps[name] = measure.compile_update(update, self.state, *self.problem.args)
            result["temp_bytes"][name] = self.steps[name].temp_bytes
            result["compile_cpu_seconds"][name] = round(self.steps[name].cpu_seconds, 3)
        return result

    def times(self) -> dict[str, Any]:
        calls = {name: partial(c.step, self.state, *self.problem.args) for name, c in self.steps.items()}
        seconds = measure.interleaved_times(calls, self.options.repeats, self.options.seed)
        found: dict[str, Any] = {name: measure.summarize_times(values) for name, values in seconds.items()}
        for name in ("ours", "fewest"):
            ratios = np.array(seconds[name]) / np.array(seconds["exact"])
            low, median, high = np.percentile(ratios, [25, 50, 75]).tolist()
            found[name] |= {"median_ratio": median, "quartiles_ratio": [low, high]}
        return {"step": found}

    def value(self) -> dict[str, Any]:
        exact, coded = (
            np.asarray(jax.jit(self.loss(self.fits[name].loss))(self.params, self.key)) for name in ("exact", "fewest")
        )
        same = exact.tobytes() == coded.tobytes()
        return {"value": {"exact": float(exact), "fewest": float(coded), "same_bits": same}}

    def gradient(self) -> dict[str, Any]:
        elbos = self.exact.loss, RAD_ELBO(**self.problem.elbo, codec=Keep())
        exact, ours = (jax.jit(jax.grad(self.loss(elbo)))(self.params, self.key) for elbo in elbos)
        return {"gradient": measure.gradient_difference(ours, exact)}

    def training(self) -> dict[str, Any]:
        losses: dict[str, list[float]] = {}
        for name in ("exact", "fewest"):
            compiled = self.steps[name]
            state, values = self.state, []
            for _ in range(self.options.steps):
                state, loss = compiled.step(state, *self.problem.args)
                values.append(loss)
            losses[name] = np.asarray(jnp.stack(values), float).tolist()
        last = {name: np.array(values[-max(self.options.steps // 5, 1) :]) for name, values in losses.items()}
        noise = float(last["exact"].std())
        difference = float(last["fewest"].mean() - last["exact"].mean())
        return {
            "training": {
                "first_loss": losses["exact"][0],
                "last_loss": {name: float(values.mean()) for name, values in last.items()},
                "difference": difference,
                "noise": noise,
                "within_noise": abs(difference) <= noise,
            }
        }


def residual_shares(rows: Any, jax_bytes: int) -> dict[str, Any]:
    """What becomes of the residuals: bytes that are eliminated, compressed, recomputed and kept.

    ``jax_bytes`` are those of reverse mode as JAX does it. Of these, what exceeds the residuals that are left once
    derivatives are fused is eliminated; each of the rest counts as if it were stored exactly.

    Inputs that are alive anyway do not count, and of several rows that share one code only the first does. Values that
    are not residuals but kept so that residuals can be computed from them count as kept, and the recomputed bytes are
    less by as much: what needs a stored copy as large as itself is not free.
    """
    total = compressed = kept = 0
    places: dict[tuple[str, str, str], int] = {}
    for row in rows:
        source = row.operation == "recomputation"
        if row.decision == "alive" or (source and row.decision != "keep"):
            continue
        coded = row.decision not in ("keep", "recompute")
        if coded and not row.stored_bytes:
            continue  # shares its code with an earlier row
        if not source:
            total += row.exact_bytes
        if coded:
            compressed += row.exact_bytes
        elif row.decision == "keep":
            kept += row.stored_bytes
            place = (row.line, row.operation, reason(row))
            places[place] = places.get(place, 0) + row.stored_bytes
    eliminated = max(0, jax_bytes - total)
    largest = sorted(places.items(), key=lambda item: -item[1])[:KEPT_SHOWN]
    return {
        "total_bytes": total + eliminated,
        "jax_bytes": jax_bytes,
        "eliminated_bytes": eliminated,
        "compressed_bytes": compressed,
        "kept_bytes": kept,
        "recomputed_bytes": total - compressed - kept,
        "kept": [{"line": p[0], "read_by": p[1], "reason": p[2], "bytes": size} for p, size in largest],
    }


def reason(row: Any) -> str:
    """Why a row is kept exactly."""
    if row.exact_bytes < SMALL_BYTES:
        return "small"
    if row.operation == "recomputation":
        return "source of recomputation"
    if not row.dtype.startswith(("float", "bfloat")):
        return row.dtype
    return "no code"


def jax_residual_bytes(loss: Callable[..., jax.Array], params: Any) -> int:
    """Bytes that ``jax.vjp`` of ``loss`` would store, as it is traced; data and parameters are not counted."""
    found: dict[int, int] = {}

    def trace(params: Any) -> None:
        _, pullback = jax.vjp(loss, params)
        inputs = {id(x) for x in jax.tree.leaves(params)}
        for leaf in jax.tree.leaves(pullback):
            if isinstance(leaf, jax.core.Tracer) and id(leaf) not in inputs:
                found[id(leaf)] = leaf.size * leaf.dtype.itemsize

    jax.eval_shape(trace, params)
    return sum(found.values())


if __name__ == "__main__":
    main()
