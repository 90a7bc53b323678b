"""Run the workloads and their rivals on the accelerator that is here, each in a process of its own.

    python -m examples.benchmarks.device                       # make bench-device
    python -m examples.benchmarks.device --workloads p1 --rivals exact ours_default
    python -m examples.benchmarks.figures docs/benchmarks/device.json --table-only

A process takes no memory before it needs it, and says the most that its device held (``peak_bytes_in_use``, with
parameters, optimizer state and data), what the compiled step takes besides those (T), and the median time of a step.
Within the memory of accumulation by hand the budget is that rival's T. A process that runs out of memory is a row that
says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

from examples.benchmarks import measure
from examples.benchmarks.compiled import CASES, plan_record
from examples.benchmarks.record import log, machine, versions, write
from examples.benchmarks.rivals import RIVALS, Rival
from numpyro_rad import RAD_ELBO

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_OUTPUT = ROOT / "docs" / "benchmarks" / "device.json"
COMPARED = ["exact", "checkpoint_layer", "accumulate", "ours_default", "ours_4bit"]
WORKLOADS = ["p1", "p2", "p3", "p5", "p5vae"]
MATCHED = "ours_matched"
WARM_UP = 2


def main(arguments: list[str] | None = None) -> None:
    """Run everything and write the JSON, or in a process of its own one step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--workloads", nargs="+", choices=[*WORKLOADS, "p1large"], default=WORKLOADS, help="models")
    parser.add_argument("--rivals", nargs="+", choices=list(RIVALS), default=COMPARED, help="which ways")
    parser.add_argument("--quick", action="store_true", help="tiny models, for trying things out")
    parser.add_argument("--rounds", type=int, default=10, help="steps of each that count (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="where the JSON goes")
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "WAY", "BUDGET"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        workload, way, budget = options.one
        print(json.dumps(one(workload, way, int(budget), options.quick, options.rounds)))
        return
    started = datetime.now(UTC)
    found: dict[str, Any] = {}
    where: dict[str, Any] = {}
    for name in options.workloads:
        case = CASES[name][options.quick]
        ways = [in_a_process(name, way, 0, options) for way in options.rivals if way not in case.without]
        by_hand = next((way for way in ways if way["rival"] == "accumulate" and "temp_bytes" in way), None)
        if by_hand is not None:
            ways.append(in_a_process(name, MATCHED, by_hand["temp_bytes"], options))
        for way in ways:
            where = way.pop("where", where)
        found[name] = {"title": case.title, "ways": ways}
        report = {
            "workload": {"name": "device", "title": "Run on an accelerator"},
            "date": started.isoformat(timespec="seconds"),
            **where,
            "rounds": options.rounds,
            "device": found,
        }
        write(report, options.output)
    log(f"wrote {options.output}")


def in_a_process(workload: str, way: str, budget: int, options: argparse.Namespace) -> dict[str, Any]:
    """The row of one way to take a step, from a fresh process."""
    command = [sys.executable, "-m", "examples.benchmarks.device", "--one", workload, way, str(budget)]
    command += ["--rounds", str(options.rounds), *(["--quick"] if options.quick else [])]
    env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    if ended.returncode == 0:
        row = json.loads(ended.stdout.splitlines()[-1])
    else:
        last = (ended.stderr.strip().splitlines() or ["nothing was said"])[-1]
        row = {**labels(rival_of(way, budget)), "failure": f"{last[:300]} (exit status {ended.returncode})"}
    log(f"{workload} {row}")
    return row


def rival_of(way: str, budget: int) -> Rival:
    """One of the benchmarks' rivals, or ours within a budget."""
    if way != MATCHED:
        return RIVALS[way]
    label = "ours, within the memory of accumulation"
    return Rival(way, label, "ours", "exact", lambda _: RAD_ELBO(memory_budget=budget))


def labels(rival: Rival) -> dict[str, Any]:
    """How a row begins."""
    return {"rival": rival.name, "label": rival.label, "family": rival.family}


def one(name: str, way: str, budget: int, quick: bool, rounds: int) -> dict[str, Any]:
    """Take steps of one rival on the default device."""
    rival = rival_of(way, budget)
    case = CASES[name][quick]
    workload, data = replace(case, data_size=case.batch).load(0, None)
    step = measure.build(rival, workload, data, 0, workload.batch)
    compiled = measure.compile_step(step)
    row = {
        **labels(rival),
        "temp_bytes": compiled.temp_bytes,
        "build_seconds": compiled.trace_and_lower_seconds + compiled.compile_seconds,
    }
    state, seconds = step.state, []
    for _ in range(WARM_UP + rounds):
        started = time.perf_counter()
        state, loss = jax.block_until_ready(compiled.step(state, *step.batch))
        seconds.append(time.perf_counter() - started)
    row |= {"step": measure.summarize_times(seconds[WARM_UP:]), "loss": float(loss)}
    statistics = jax.devices()[0].memory_stats() or {}
    row["peak_bytes"] = statistics.get("peak_bytes_in_use")
    if isinstance(step.svi.loss, RAD_ELBO):
        row["plan"] = plan_record(step, step.batch)
    return {**row, "where": {"machine": machine(), "versions": versions()}}


if __name__ == "__main__":
    main()
