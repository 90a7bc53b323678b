"""Give RAD_ELBO the memory that a rival takes: is it as fast, with as exact a gradient?

    python -m examples.benchmarks.match
    python -m examples.benchmarks.match --workloads p3 p5 --rivals accumulate
    python -m examples.benchmarks.figures docs/benchmarks/match.json --table-only

For each workload, every rival with an exact gradient is compiled, and ``RAD_ELBO(memory_budget=T)`` for its temporary
memory T; all of them take steps in turn, in one process. Workloads that are not named stay in the JSON as they were.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from examples.benchmarks import measure
from examples.benchmarks.record import circumstances, log, write
from examples.benchmarks.rivals import RIVALS, Rival
from examples.benchmarks.workload import Workload
from examples.benchmarks.workloads import WORKLOADS
from numpyro_rad import RAD_ELBO

DEFAULT_OUTPUT = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "match.json"
EXACT_RIVALS = ["exact", "checkpoint_layer", "accumulate", "accumulate_unrolled"]
SEED = 0


def main(arguments: list[str] | None = None) -> None:
    """Compare on every workload and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    names = ["p1", "p2", "p3", "p5", "p5vae"]
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=names, help="which models")
    parser.add_argument("--rivals", nargs="+", choices=EXACT_RIVALS, default=EXACT_RIVALS, help="whose memory is given")
    parser.add_argument("--quick", action="store_true", help="tiny models, for trying things out")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each that count (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="where the JSON goes")
    options = parser.parse_args(arguments)
    found = json.loads(options.output.read_text())["match"] if options.output.exists() else {}
    for name in options.workloads:
        workload = WORKLOADS[name][options.quick]
        rivals = [RIVALS[r] for r in options.rivals if r not in workload.without]
        found[name] = {
            "title": workload.title,
            **circumstances(),
            "rows": compared(workload, rivals, options.rounds),
        }
        report = {
            "workload": {"name": "match", "title": "RAD_ELBO with the memory of its rivals"},
            "match": {n: found[n] for n in WORKLOADS if n in found},
        }
        write(report, options.output)
    log(f"wrote {options.output}")


def compared(workload: Workload, rivals: list[Rival], rounds: int) -> list[dict[str, Any]]:
    """A row for each rival."""
    workload, data = workload.load(SEED, None)
    rows: list[dict[str, Any]] = []
    runs = {}
    for rival in rivals:
        step, compiled = runs[rival.name] = built(rival, workload, data)
        row: dict[str, Any] = {
            "rival": rival.name,
            "label": rival.label,
            "temp_bytes": compiled.temp_bytes,
            "build_seconds": compiled.trace_and_lower_seconds + compiled.compile_seconds,
        }
        rows.append(row)
        ours = replace(rival, elbo=lambda _, size=compiled.temp_bytes: RAD_ELBO(memory_budget=size), layer="plain")
        step, compiled = runs[f"ours, {rival.name}"] = built(ours, workload, data)
        plan, _ = step.svi.loss.plan_of_update(step.svi, step.state, *step.batch)
        row["ours"] = {
            "temp_bytes": compiled.temp_bytes,
            "build_seconds": compiled.trace_and_lower_seconds + compiled.compile_seconds,
            "peak_bytes": plan.peak_bytes,
            "untouched": plan.untouched,
            "slices": 1 if plan.graph.slices is None else plan.graph.slices.number,
            "added_variance": 0.0 if plan.predicted is None else plan.predicted.added_variance,
        }
        log(f"{workload.name}: {row}")
    steps = {name: lambda s=step, c=compiled: c.step(s.state, *s.batch) for name, (step, compiled) in runs.items()}
    times = measure.interleaved_times(steps, rounds, SEED)
    exact = gradient_of(runs[rivals[0].name][0])
    for row in rows:
        ours = f"ours, {row['rival']}"
        row["step"] = measure.summarize_times(times[row["rival"]])
        row["ours"]["step"] = measure.summarize_times(times[ours])
        row["ours"]["gradient"] = measure.gradient_difference(gradient_of(runs[ours][0]), exact)
    return rows


def built(rival: Rival, workload: Workload, data: Any) -> tuple[measure.Step, measure.Compiled]:
    step = measure.build(rival, workload, data, SEED, workload.batch)
    return step, measure.compile_step(step)


def gradient_of(step: measure.Step) -> Any:
    """The gradient at the starting point."""
    return step.gradient()(step.svi.optim.get_params(step.state.optim_state), jax.random.key(1), step.batch)


if __name__ == "__main__":
    main()
