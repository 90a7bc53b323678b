"""Train a network whose gradient does not fit in memory: Trace_ELBO ends in an error, RAD_ELBO at the end of the fit.

    python -m examples.bigger_than_memory
    python -m examples.bigger_than_memory --limit 3000 --steps 100

The model is a deep Bayesian neural network, all rows in one step. It is trained twice, each time in a process of its
own that may take no more than ``--limit`` MiB of memory (``ulimit -d``: all that it writes to and shares with nobody).
The processes run this same file and differ in one word, the ELBO. This takes Linux. It ends with two lines, a JSON and
a picture of the memory of both while they ran.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from numpyro.infer import SVI, Trace_ELBO

from examples.benchmarks import measure
from examples.benchmarks.networks import BayesianMLP
from examples.benchmarks.record import circumstances, log, write
from examples.evidence import draw_memory_over_time
from numpyro_rad import RAD_ELBO

DEFAULT_OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "bigger_than_memory.json"
ROOT = Path(__file__).resolve().parents[1]
BUDGET = "256MiB"
ELBOS = {"Trace_ELBO": "Trace_ELBO()", "RAD_ELBO": f'RAD_ELBO(memory_budget="{BUDGET}")'}
MIB = 2**20
SEED = 0
SAMPLE_SECONDS = 0.5
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "MemoryError", "bad_alloc", "out of memory", "Cannot allocate memory")


# Many rows in a narrow network: much to store, little to compute.
ROWS = 196_608
NETWORK = BayesianMLP(
    name="bigger_than_memory",
    title=f"12 x 128 GELU Bayesian neural network, all {ROWS:,} rows in a step",
    depth=12,
    width=128,
    inputs=128,
    batch=ROWS,
    data_size=ROWS,
    initial_gain=1.2,
    learning_rate=3e-3,
    micro_batches=1,
    training_steps=0,
    draws=0,
    repeats=0,
)


def fit(options: argparse.Namespace) -> None:
    """What a process does: take the steps within the limit, and say on standard output what comes of it, as JSON."""
    import resource  # only Unix has it, and only Linux limits what is meant here

    resource.setrlimit(resource.RLIMIT_DATA, (options.limit * MIB, options.limit * MIB))
    workload, data = NETWORK.load(SEED, None)
    model = workload.model()
    elbo = RAD_ELBO(memory_budget=BUDGET) if options.fit == "RAD_ELBO" else Trace_ELBO()
    svi = SVI(model, workload.guide(model), workload.optimizer(), elbo)
    state = svi.init(jax.random.key(SEED), *(x[:64] for x in data))  # no parameter belongs to a row
    update = jax.jit(svi.update).lower(state, *data).compile()
    say(temp_bytes=measure.temp_size(update))
    for _ in range(options.steps):
        state, loss = update(state, *data)
        say(loss=float(loss) / workload.data_size)


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def watched(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run a fit in a process of its own; how it ended, and its resident memory over time."""
    command = [sys.executable, "-m", "examples.bigger_than_memory", "--fit", name]
    command += ["--limit", str(options.limit), "--steps", str(options.steps)]
    memory: list[tuple[float, int]] = []
    most = 0
    with tempfile.TemporaryFile("w+") as output:
        started = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                sizes = status(process.pid)
                if "VmRSS" in sizes:  # a process that is ending has none
                    memory.append((round(time.monotonic() - started, 2), sizes["VmRSS"]))
                    most = sizes["VmHWM"]  # the highest so far, between two looks too
                time.sleep(SAMPLE_SECONDS)
        finally:
            process.kill()
        seconds = time.monotonic() - started
        output.seek(0)
        lines = output.read().splitlines()
    said = [json.loads(line) for line in lines if line.startswith("{")]
    result = {
        "elbo": ELBOS[name],
        "seconds": round(seconds, 1),
        "temp_bytes": next((s["temp_bytes"] for s in said if "temp_bytes" in s), None),
        "losses": [s["loss"] for s in said if "loss" in s],
        "exit_status": process.returncode,
        "ended": ending(process.returncode, lines),
        "most_resident_bytes": most,
        "resident_bytes": memory,
    }
    log(f"{name}: { ({k: v for k, v in result.items() if k not in ('losses', 'resident_bytes')}) }")
    return result


def status(pid: int) -> dict[str, int]:
    """The memory of a process by its kinds, in bytes, as Linux counts it; nothing once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.startswith("Vm"))
    return {name.rstrip(":"): 1024 * int(size) for name, size, _ in fields}


def ending(exit_status: int, lines: list[str]) -> str:
    """How a process ended, in words."""
    if exit_status == 0:
        return "trained to the end"
    last = next((line for line in reversed(lines) if any(sign in line for sign in OUT_OF_MEMORY)), None)
    if last is not None:
        return f"out of memory: {last.rpartition('Error: ')[2].strip().rstrip('.')}"
    if exit_status < 0:
        return f"ended by {signal.Signals(-exit_status).name}"
    return f"failed: {lines[-1] if lines else 'it said nothing'}"


def sentence(run: dict[str, Any]) -> str:
    """A run in one line."""
    losses = run["losses"]
    trained = f", {len(losses)} steps, loss per row {losses[0]:.4g} to {losses[-1]:.4g}" if losses else ""
    most = f"at most {run['most_resident_bytes'] / MIB:.0f} MiB resident"
    return f"{run['elbo']}: {run['ended']}{trained}, {most}, {run['seconds']:.0f} s"


def main(arguments: list[str] | None = None) -> dict[str, Any] | None:
    """Run both fits, one after the other, and store what became of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--limit", type=int, default=2048, help="MiB that a process may take (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="of each fit (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="where the JSON goes, the picture beside")
    parser.add_argument("--fit", choices=list(ELBOS), help=argparse.SUPPRESS)  # in this very process
    options = parser.parse_args(arguments)
    if sys.platform != "linux":
        raise SystemExit("bigger_than_memory.py: the memory of a process is limited and measured as Linux does it.")
    if options.fit:
        return fit(options)
    report = {
        "workload": {"name": "bigger_than_memory", "title": NETWORK.title},
        **circumstances(),
        "limit_bytes": options.limit * MIB,
        "bigger_than_memory": {name: watched(name, options) for name in ELBOS},
    }
    for run in report["bigger_than_memory"].values():
        print(sentence(run))
    write(report, options.output)
    log(f"wrote {options.output}")
    draw_memory_over_time(report, options.output.with_suffix(".png"))
    return report


if __name__ == "__main__":
    main()
