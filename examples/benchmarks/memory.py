"""What runs and diagnostics take of the memory beside a plain training step, each in a process of its own.

    python -m examples.benchmarks.memory
    python -m examples.benchmarks.figures docs/benchmarks/memory.json    # the figure, and the table

A process sets up SVI, compiles a plain ``svi.update`` and takes three steps; then it calls what is measured. Two
numbers are taken of each:

- **program**: temporary and returned bytes of the largest program that is compiled meanwhile, single operations
  included: what an execution takes, as the compiler says.
- **resident**: by how much the resident memory of the process rises at most, above what it was before. The memory of
  the compiler itself, machine code and what the allocator keeps count here as well.

The steps themselves are measured in the same way, above a process that is set up and has compiled nothing for them.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from numpyro.infer import SVI, Trace_ELBO

from examples.benchmarks.record import circumstances, log, write
from examples.benchmarks.run import DEFAULT_FOLDER
from examples.benchmarks.workloads import WORKLOADS
from numpyro_rad import RAD_ELBO, RAD_SVI, StochasticRound, gradient_variance, to_arviz
from numpyro_rad.diagnostics import fit_quality, shadow

KEY = 0
ROOT = Path(__file__).resolve().parents[2]

Task = Callable[[RAD_SVI, Any, tuple], Any]


def exact_step(svi: RAD_SVI, state: Any, batch: tuple) -> None:
    plain = SVI(svi.model, svi.guide, svi.optim, Trace_ELBO())
    plain.constrain_fn = svi.constrain_fn
    steps(plain, state, batch)


def steps(svi: SVI, state: Any, batch: tuple) -> None:
    """Three plain steps."""
    update = jax.jit(svi.update)
    for _ in range(3):
        state, loss = update(state, *batch)
    jax.block_until_ready(loss)


def run(svi: RAD_SVI, state: Any, batch: tuple) -> Any:
    """With one look at the noise of the gradient."""
    return svi.run(jax.random.key(KEY), 200, *batch, init_state=state, progress_bar=False)


def report(svi: RAD_SVI, state: Any, batch: tuple) -> None:
    svi.run(jax.random.key(KEY), 3, *batch, init_state=state, progress_bar=False).report()


def assess(svi: RAD_SVI, state: Any, batch: tuple) -> None:
    svi.run(jax.random.key(KEY), 3, *batch, init_state=state, progress_bar=False).assess(*batch, draws=8)


TASKS: dict[str, tuple[str, Task]] = {
    "exact_step": ("step, Trace_ELBO", exact_step),
    "step": ("step, 4 bits", steps),
    "run": ("run, 200 steps", run),
    "report": ("run, 3 steps, and report", report),
    "assess": ("run, 3 steps, and assess", assess),
    "gradient_variance": (
        "gradient_variance",
        lambda svi, state, batch: gradient_variance(svi, state, *batch, draws=2),
    ),
    "quality": (
        "fit_quality with k-hat",
        lambda svi, state, batch: fit_quality(svi, state, *batch, key=jax.random.key(KEY)),
    ),
    "to_arviz": (
        "to_arviz, 20 draws",
        lambda svi, state, batch: to_arviz(svi, svi.get_params(state), *batch, key=jax.random.key(KEY), num_samples=20),
    ),
    "shadow": (
        "shadow, 2 seeds",
        lambda svi, state, batch: shadow(svi, jax.random.key(KEY), 2, *batch, num_seeds=2),
    ),
    "calibrate": (
        "calibrate",
        lambda svi, state, batch: svi.loss.calibrate(svi, state, *batch),  # pyright: ignore[reportAttributeAccessIssue]
    ),
}


def main(arguments: list[str] | None = None) -> None:
    """Measure every task in a process of its own and write the JSON, in which other tasks stay as they were."""
    parser = argparse.ArgumentParser(description="Memory of runs and diagnostics beside a step.")
    parser.add_argument("--quick", action="store_true", help="a tiny network, for trying things out")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="what is measured")
    parser.add_argument("--alone", choices=TASKS, help=argparse.SUPPRESS)  # in this very process
    parser.add_argument("--output", type=Path, default=DEFAULT_FOLDER / "memory.json", help="where the JSON goes")
    options = parser.parse_args(arguments)
    if options.alone:
        print(json.dumps(measured(options.alone, options.quick)))
        return
    title, rows = network(options.quick).title, {}
    if options.output.exists():
        old = json.loads(options.output.read_text())
        rows = {row["task"]: row for row in old["memory"]} if old["workload"]["title"] == title else {}
    for task in options.tasks:
        command = [sys.executable, "-m", "examples.benchmarks.memory", "--alone", task, *["--quick"] * options.quick]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if result.returncode:
            raise SystemExit(result.stderr)
        rows[task] = {"task": task, "label": TASKS[task][0], **json.loads(result.stdout.splitlines()[-1])}
        log(f"{rows[task]}")
        found = {
            "workload": {"name": "memory", "title": title},
            **circumstances(),
            "memory": [rows[name] for name in TASKS if name in rows],
        }
        write(found, options.output)
    log(f"wrote {options.output}")


def network(quick: bool) -> Any:
    """P1, with fewer and narrower layers."""
    depth, width, batch = (2, 32, 512) if quick else (6, 256, 4096)
    title = f"{depth} x {width} GELU Bayesian neural network, batch {batch}"
    p1: Any = WORKLOADS["p1"][0]
    return replace(p1, title=title, depth=depth, width=width, inputs=width, batch=batch, data_size=batch)


def measured(task: str, quick: bool) -> dict[str, int]:
    """Bytes of a task, in this process."""
    warnings.simplefilter("ignore")
    workload, data = network(quick).load(0, None)
    model = workload.model("plain")
    svi = RAD_SVI(model, workload.guide(model, "plain"), workload.optimizer(), RAD_ELBO(codec=StochasticRound(4)))
    batch = workload.minibatch(jax.random.key(KEY), data, workload.batch)
    state = svi.init(jax.random.key(KEY), *batch)
    if task not in ("step", "exact_step"):
        steps(svi, state, batch)
    gc.collect()  # with the program of these steps
    programs = watched_programs()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    TASKS[task][1](svi, state, batch)
    return {
        "resident_bytes": resident("VmHWM") - before,
        "resident_before_bytes": before,
        "program_bytes": max(programs),
    }


def watched_programs() -> list[int]:
    """A list to which the bytes of each program are added that is compiled from now on."""
    found: list[int] = []
    client = jax.local_devices()[0].client

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            for executable in client.live_executables():
                sizes = executable.get_compiled_memory_stats()
                taken = sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
                found.append(int(taken))

    jax.monitoring.register_event_duration_secs_listener(listen)
    return found


def resident(field: str) -> int:
    """Resident memory of this process, as Linux counts it: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status says nothing of {field}: this takes Linux.")


if __name__ == "__main__":
    main()
