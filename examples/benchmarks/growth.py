"""How the memory of a step grows with depth, batch, particles and the length of a loop, and how long planning takes.

    python -m examples.benchmarks.growth
    python -m examples.benchmarks.figures docs/benchmarks/growth.json    # the figure, and the table

Programs are compiled and not run, without LLVM's optimizations: what memory they need is decided before those. T and R
are those of ``run.py``. Planning is timed alone, once the graph of the program is there: the choice of a plan for a
tenth of the exact residual bytes.
"""

from __future__ import annotations

import os

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.infer import RenyiELBO, Trace_ELBO

from examples.benchmarks import measure
from examples.benchmarks.record import circumstances, log, write
from examples.benchmarks.rivals import Rival
from examples.benchmarks.run import DEFAULT_FOLDER
from examples.benchmarks.workload import Workload
from examples.benchmarks.workloads import WORKLOADS
from numpyro_rad import RAD_ELBO, BudgetError, Keep, StochasticRound

Size = int
Loss = Callable[..., Trace_ELBO]


@dataclass(frozen=True)
class Axis:
    """One quantity that grows, all others fixed.

    :param sizes: its values, from small to large.
    :param quick: the values with ``--quick``.
    :param workload: the workload of a size.
    :param rivals: names of those who take part, keys of ``RIVALS``.
    """

    sizes: tuple[Size, ...]
    quick: tuple[Size, ...]
    workload: Callable[[Size], Workload]
    rivals: tuple[str, ...]


def network(depth: int = 4, batch: int = 1024) -> Workload:
    """P1 with layers of 128 units."""
    p1: Any = WORKLOADS["p1"][0]
    return replace(p1, depth=depth, width=128, inputs=128, batch=batch, data_size=batch)


def recurrent(steps: int) -> Workload:
    """P2 with images of so many pixels, and 32 units."""
    p2: Any = WORKLOADS["p2"][0]
    return replace(p2, side=round(steps**0.5), units=32, batch=64)


AXES: dict[str, Axis] = {
    "depth": Axis(
        (4, 8, 16, 32, 64, 96),
        (2, 3),
        lambda depth: network(depth=depth),
        ("exact", "checkpoint_layer", "ours_4bit", "ours_2bit"),
    ),
    "batch": Axis(
        (256, 1024, 4096, 16384),
        (64, 128),
        lambda batch: network(batch=batch),
        ("exact", "checkpoint_layer", "ours_4bit", "ours_2bit", "ours_budget"),
    ),
    "particles": Axis(
        (1, 4, 16, 64),
        (1, 2),
        lambda _: network(batch=256),
        ("exact", "checkpoint_map", "ours_4bit", "ours_2bit", "ours_budget"),
    ),
    "weighed particles": Axis(
        (4, 16, 64),
        (2, 3),
        lambda _: network(batch=256),
        ("weighed", "weighed_map", "weighed_budget"),
    ),
    "loop length": Axis(
        (64, 256, 1024, 4096, 16384),
        (16, 64),
        recurrent,
        ("exact", "checkpoint_sqrt", "ours_2bit", "ours_segments"),
    ),
}


class WeighedOneByOne(Trace_ELBO):
    """The bound of ``RenyiELBO`` for an order of 0, each particle under ``jax.checkpoint``."""

    def __init__(self, num_particles: int) -> None:
        super().__init__()
        self.number = num_particles

    def loss_with_mutable_state(self, rng_key, param_map, model, guide, *args, **kwargs) -> Any:
        one = super().loss_with_mutable_state

        def elbo(key: jax.Array) -> jax.Array:
            return -one(key, param_map, model, guide, *args, **kwargs)["loss"]

        elbos = jax.lax.map(jax.checkpoint(elbo), jax.random.split(rng_key, self.number))
        return {"loss": jnp.log(self.number) - jax.nn.logsumexp(elbos), "mutable_state": None}


def weighed_within(num_particles: int) -> RAD_ELBO:
    return RAD_ELBO(base=RenyiELBO(num_particles=num_particles), memory_budget="2MiB")


ONE_BY_ONE: dict[str, Any] = {"vectorize_particles": lambda f, keys: jax.lax.map(jax.checkpoint(f), keys)}
RIVALS: dict[str, tuple[str, str, Loss, str]] = {  # label, family, loss, layer
    "exact": ("Trace_ELBO", "reference", Trace_ELBO, "plain"),
    "checkpoint_layer": ("checkpoint, layer", "rival", Trace_ELBO, "checkpoint"),
    "checkpoint_sqrt": ("checkpoint, segments", "rival", Trace_ELBO, "checkpoint_sqrt"),
    "checkpoint_map": ("checkpoint, particle by particle", "rival", partial(Trace_ELBO, **ONE_BY_ONE), "plain"),
    "ours_4bit": ("ours, 4 bits", "ours", partial(RAD_ELBO, codec=StochasticRound(4)), "plain"),
    "ours_2bit": ("ours, 2 bits", "ours", partial(RAD_ELBO, codec=StochasticRound(2)), "plain"),
    "ours_budget": ("ours, 2 MiB", "ours", partial(RAD_ELBO, memory_budget="2MiB"), "plain"),
    "weighed": ("RenyiELBO", "reference", RenyiELBO, "plain"),
    "weighed_map": ("checkpoint, particle by particle", "rival", WeighedOneByOne, "plain"),
    "weighed_budget": ("ours, 2 MiB", "ours", weighed_within, "plain"),
    "ours_segments": ("ours, exact, smallest", "ours", partial(RAD_ELBO, exact=True, memory_budget=0), "plain"),
}


def main(arguments: list[str] | None = None) -> None:
    """Compile everything and write the JSON, in which axes that are not asked for stay as they were."""
    parser = argparse.ArgumentParser(description="How the memory of a step grows with the size of the model.")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for trying things out")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES), help="what grows (default: all)")
    parser.add_argument("--output", type=Path, default=DEFAULT_FOLDER / "growth.json", help="where the JSON goes")
    options = parser.parse_args(arguments)
    found = json.loads(options.output.read_text())["growth"] if options.output.exists() else {}
    found |= {name: grow(name, options.quick) for name in options.axes}
    report = {
        "workload": {"name": "growth", "title": "Growth of memory with the size of a model"},
        **circumstances(),
        "growth": {name: found[name] for name in AXES if name in found},
    }
    write(report, options.output)
    log(f"wrote {options.output}")


def grow(name: str, quick: bool) -> list[dict[str, Any]]:
    """All sizes of all rivals along one axis."""
    axis, rows = AXES[name], []
    for size in axis.quick if quick else axis.sizes:
        workload, data = axis.workload(size).load(0, None)
        for rival in axis.rivals:
            label, family, loss, layer = RIVALS[rival]
            options = {"num_particles": size} if name.endswith("particles") else {}
            elbo = partial(loss, **options)
            if rival == "ours_segments":
                elbo = partial(elbo, memory_budget=smallest_budget(elbo, workload, data))
            step = set_up(elbo, layer, workload, data)
            row = {"size": size, "rival": rival, "label": label, "family": family}
            row["temp_bytes"] = measure.compile_step(step).temp_bytes
            if family == "ours":
                row["stored_bytes"] = plan(step).stored_bytes
            if rival == "ours_4bit":
                row["planning"] = planning(partial(RAD_ELBO, **options), workload, data)
            rows.append(row)
            log(f"{name} {row}")
    return rows


def set_up(elbo: Loss, layer: str, workload: Workload, data: tuple[jax.Array, jax.Array]) -> measure.Step:
    """SVI with a loss on the first minibatch."""
    rival = Rival("", "", "ours", "exact", lambda _: elbo(), layer)
    return measure.build(rival, workload, data, 0, workload.batch)


def plan(step: measure.Step) -> Any:
    """The plan of a step of ours."""
    elbo: Any = step.svi.loss
    return elbo.plan_of_update(step.svi, step.state, *step.batch)[0]


def smallest_budget(elbo: Loss, workload: Workload, data: tuple[jax.Array, jax.Array]) -> int:
    """The fewest bytes that fit."""
    try:
        plan(set_up(partial(elbo, memory_budget=0), "plain", workload, data))
    except BudgetError as error:
        return error.smallest_bytes
    return 0


def planning(elbo: Loss, workload: Workload, data: tuple[jax.Array, jax.Array]) -> dict[str, Any]:
    """How long it takes to choose the plan for a tenth of the bytes."""
    exact = plan(set_up(partial(elbo, codec=Keep()), "plain", workload, data))
    loss: Any = elbo(memory_budget=exact.stored_bytes // 10)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        loss.planner(exact.graph)
        seconds.append(time.perf_counter() - started)
    residuals = {r for g in exact.graph.walk() for edge in g.edges for r in edge.residuals}
    return {"residuals": len(residuals), "seconds": sorted(seconds)[1]}


if __name__ == "__main__":
    main()
