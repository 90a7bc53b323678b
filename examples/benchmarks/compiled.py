"""Compile the workloads and their rivals for an accelerator that is not there, and write what the compiler says.

    python -m examples.benchmarks.compiled h200                     # one device in a process; rows of others stay
    python -m examples.benchmarks.compiled v5e --workloads p1 p5
    python -m examples.benchmarks.figures docs/benchmarks/compiled.json --table-only

``make bench-compiled DEVICE=h200`` installs what that takes (XLA's compilers as wheels) and runs it. Memory is that of
the device, to the byte. **Nothing is run**: the time is a prediction by roofline,

    max(bytes accessed / bandwidth, multiplications and additions / peak) + kernels x what starting one takes,

with the numbers of the data sheet (``numpyro_rad.planning.costs``). Bytes and kernels are those of the compiled program
(``hlo.py``), operations those of the traced one.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from examples.benchmarks import hlo, measure
from examples.benchmarks.record import circumstances, log, write
from examples.benchmarks.rivals import RIVALS, Rival
from examples.benchmarks.workload import Workload
from examples.benchmarks.workloads import WORKLOADS
from numpyro_rad import RAD_ELBO, StochasticRound
from numpyro_rad.ad import primitives
from numpyro_rad.ad.work import Multiplications, OneOf, Together, Work
from numpyro_rad.planning import costs
from numpyro_rad.planning.costs import CostModel

DEFAULT_OUTPUT = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "compiled.json"
_P1: Any = WORKLOADS["p1"][0]
_LARGE = replace(
    _P1,
    name="p1large",
    title="24 x 2048 GELU Bayesian neural network, batch 16384",
    width=2048,
    inputs=2048,
    batch=16384,
)
CASES: dict[str, tuple[Workload, Workload]] = {
    "p1": WORKLOADS["p1"],
    "p1large": (_LARGE, WORKLOADS["p1"][1]),
    **{name: WORKLOADS[name] for name in ("p2", "p3", "p5", "p5vae")},
}
"""Full size, and quick. P1 is small for an accelerator: it comes in a size that fills one as well."""

ROWS_AT_FIRST = 8  # with so many the starting point is made: it does not depend on how many there are


@dataclass(frozen=True)
class Device:
    """A kind of accelerator.

    :ivar topology: its name for XLA's compiler; for GPUs made of ``specification``.
    :ivar specification: what XLA's compiler for GPUs wants to know, in its own form.
    :ivar options: of the compiler.
    :ivar hiding: what turns on the scheduler that hides latencies, where that is a choice.
    """

    costs: CostModel
    topology: str = ""
    specification: str = ""
    options: tuple[tuple[str, Any], ...] = ()
    hiding: tuple[tuple[str, Any], ...] = ()

    def described(self) -> jax.Device:
        """The device, as programs are compiled for it."""
        if self.specification:
            found = topologies.get_topology_desc(
                "ahead of time", "cuda", target_config=self.specification, topology="1x1x1"
            )
        else:
            found = topologies.get_topology_desc(self.topology, "tpu")
        return found.devices[0]

    @property
    def launch(self) -> float:
        """Nanoseconds between two kernels."""
        return self.costs.slice_start / costs.SLICE_KERNELS

    def seconds(self, program: hlo.Program, multiplications: dict[str, float]) -> float:
        """The predicted time of a step."""
        moving = program.bytes_accessed * self.costs.keep_per_byte / 2
        product = self.costs.product
        computing = sum(n * product.get(kind, product["float32"]) for kind, n in multiplications.items())
        return 1e-9 * (max(moving, computing) + program.kernels * self.launch)


def _gpu(
    model: CostModel,
    name: str,
    *,
    cores: int,
    units: int,
    ghz: float,
    bandwidth: int,
    memory: int,
    cache: int,
    shared: int,
    capability: str,
) -> Device:
    """A GPU of NVIDIA's by its data sheet and the compute capabilities of the CUDA C++ Programming Guide.

    :param cores: multiprocessors, each with so many ``units`` for single precision.
    :param bandwidth: in GB/s; ``memory``, ``cache`` and ``shared`` (of a multiprocessor) in bytes.
    """
    text = f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}000000000
  l2_cache_size: {cache}
  clock_rate_ghz: {ghz}
  device_memory_size: {memory}
  shared_memory_per_block_optin: {shared - 1024}
  cuda_compute_capability {{ {capability} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""
    return Device(model, specification=text, hiding=(("xla_gpu_enable_latency_hiding_scheduler", True),))


_HOPPER: dict[str, Any] = {
    "cores": 132,
    "units": 128,
    "ghz": 1.98,
    "cache": 50 * 2**20,
    "shared": 228 * 2**10,
    "capability": "major: 9 feature_extension: ACCELERATED_FEATURES",
}
_NO_VMEM = (("xla_vf_vmem_memory_space_assignment", False),)  # else what is in VMEM is not in T

DEVICES = {
    "a100": _gpu(
        costs.A100,
        "NVIDIA A100",
        cores=108,
        units=64,
        ghz=1.41,
        bandwidth=1555,
        memory=40 * 10**9,
        cache=40 * 2**20,
        shared=164 * 2**10,
        capability="major: 8",
    ),
    "h100": _gpu(costs.H100, "NVIDIA H100", bandwidth=3350, memory=80 * 10**9, **_HOPPER),
    "h200": _gpu(costs.H200, "NVIDIA H200", bandwidth=4800, memory=141 * 10**9, **_HOPPER),
    "b200": _gpu(
        costs.B200,
        "NVIDIA B200",
        cores=148,
        units=128,
        ghz=1.965,
        bandwidth=8000,
        memory=180 * 10**9,
        cache=126 * 2**20,
        shared=228 * 2**10,
        capability="major: 10 feature_extension: ACCELERATED_FEATURES",
    ),
    "v5e": Device(costs.V5E, "v5e:1x1", options=_NO_VMEM),
    "v6e": Device(costs.V6E, "v6e:1x1"),
}


def _ours(name: str, label: str, **options: Any) -> Callable[[Device], Rival]:
    def rival(device: Device) -> Rival:
        return Rival(name, label, "ours", "exact", lambda _: RAD_ELBO(costs=device.costs, **options))

    return rival


def _four_bits(device: Device) -> Rival:
    """4 bits wherever they are smaller, in groups of whole rows where the device wants them."""

    def elbo(workload: Workload) -> RAD_ELBO:
        group = getattr(workload, "width", 256) if device.costs.whole_rows else 256
        return RAD_ELBO(costs=device.costs, codec=StochasticRound(4, group=group))

    return replace(RIVALS["ours_4bit"], elbo=elbo)


COMPARED: dict[str, Callable[[Device], Rival]] = {
    **{name: lambda _, name=name: RIVALS[name] for name in ("exact", "checkpoint_layer", "accumulate")},
    "ours_4bit": _four_bits,
    "ours_codes": _ours("ours_codes", "ours, codes, ρ at most 0.01", added_variance=0.01),
    "ours_default": _ours("ours_default", "ours, default"),
    "ours_exact": _ours("ours_exact", "ours, exact, one pass", exact=True, slices=1),
    "ours_8slices": _ours("ours_8slices", "ours, exact, 8 slices", exact=True, slices=8),
}


def main(arguments: list[str] | None = None) -> None:
    """Compile for one device and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("device", choices=DEVICES, help="what is compiled for")
    parser.add_argument(
        "--workloads", nargs="+", choices=CASES, default=[n for n in CASES if n != "p2"], help="which models"
    )
    parser.add_argument("--rivals", nargs="+", choices=COMPARED, default=list(COMPARED), help="which ways")
    parser.add_argument("--quick", action="store_true", help="tiny models, for trying things out")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="where the JSON goes")
    options = parser.parse_args(arguments)
    found = json.loads(options.output.read_text())["compiled"] if options.output.exists() else {}
    jax.config.update("jax_platforms", "cpu")  # where arrays are; the accelerator is that of the compiler alone
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "TPU_SKIP_MDS_QUERY": "1"}  # there is no TPU to ask what it is
    device = DEVICES[options.device]
    target = device.described()
    rows = found.get(options.device, {}).get("rows", {})
    for name in options.workloads:
        rows[name] = compared(CASES[name][options.quick], options.rivals, device, target)
        found[options.device] = {
            "device": device.costs.name.split(",")[0],
            **circumstances(),
            "rows": {n: rows[n] for n in CASES if n in rows},
        }
        report = {
            "workload": {"name": "compiled", "title": "Compiled ahead of time"},
            "compiled": {n: found[n] for n in DEVICES if n in found},
        }
        write(report, options.output)
    log(f"wrote {options.output}")


def compared(workload: Workload, names: list[str], device: Device, target: jax.Device) -> dict[str, Any]:
    """All ways to take one workload's step, compiled; and ours within the memory of accumulation by hand."""
    rivals = [COMPARED[name](device) for name in names if name not in workload.without]
    ways = [compiled(rival, workload, device, target) for rival in rivals]
    by_hand = next((way for way in ways if way["rival"] == "accumulate" and "temp_bytes" in way), None)
    if by_hand is not None:
        size = by_hand["temp_bytes"]
        matched = _ours("ours_matched", "ours, within the memory of accumulation", memory_budget=size)(device)
        ways.append(compiled(matched, workload, device, target))
    return {"title": workload.title, "ways": ways}


def compiled(rival: Rival, workload: Workload, device: Device, target: jax.Device) -> dict[str, Any]:
    """One row: what the compiler says of a step, or why there is none."""
    row: dict[str, Any] = {"rival": rival.name, "label": rival.label, "family": rival.family}
    try:
        row |= _compiled(rival, workload, device, target)
    except Exception as error:
        row["failure"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    log(f"{workload.name} {row}")
    return row


def _compiled(rival: Rival, workload: Workload, device: Device, target: jax.Device) -> dict[str, Any]:
    small, data = replace(workload, data_size=64).load(0, None)
    workload = replace(workload, data=small.data, data_size=max(workload.data_size, workload.batch))
    step = measure.build(rival, workload, data, 0, ROWS_AT_FIRST)
    batch = [jax.ShapeDtypeStruct((workload.batch, *a.shape[1:]), a.dtype) for a in step.batch]
    state = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), step.state)
    jax.clear_caches()
    started = time.perf_counter()
    lowered = jax.jit(step.svi.update, in_shardings=SingleDeviceSharding(target)).lower(state, *batch)
    lowered_at = time.perf_counter()
    program = lowered.compile(compiler_options=dict(device.options) or None)
    done = time.perf_counter()
    sizes = program.memory_analysis()
    read = hlo.read(program.as_text())
    multiplications = multiplied(jax.make_jaxpr(step.svi.update)(state, *batch))
    found = {
        "temp_bytes": sizes.temp_size_in_bytes,
        "argument_bytes": sizes.argument_size_in_bytes,
        "code_bytes": sizes.generated_code_size_in_bytes,
        "lower_seconds": lowered_at - started,
        "compile_seconds": done - lowered_at,
        **read._asdict(),
        "multiplications": multiplications,
        "predicted_seconds": device.seconds(read, multiplications),
    }
    if device.hiding:
        hiding = lowered.compile(compiler_options=dict(device.options + device.hiding))
        found["hiding_temp_bytes"] = hiding.memory_analysis().temp_size_in_bytes
    if isinstance(step.svi.loss, RAD_ELBO):
        found["plan"] = plan_record(step, [jnp.zeros(a.shape, a.dtype) for a in batch])
    return found


def plan_record(step: measure.Step, batch: Sequence[jax.Array]) -> dict[str, Any]:
    """What a step of ours does, in a few numbers."""
    elbo: Any = step.svi.loss
    plan = elbo.plan_of_update(step.svi, step.state, *batch)[0]
    return {
        "untouched": plan.untouched,
        "slices": 1 if plan.graph.slices is None else plan.graph.slices.number,
        "codes": sum(len(p.encoded) for p in plan.walk()),
        "peak_bytes": plan.peak_bytes,
        "added_variance": 0.0 if plan.predicted is None else plan.predicted.added_variance,
    }


def multiplied(jaxpr: Any) -> dict[str, float]:
    """Multiplications in the matrix products and convolutions of a traced program, by their dtype."""
    total: Counter[str] = Counter()

    def add(work: Work, times: float) -> None:
        if isinstance(work, Multiplications):
            total[work.dtype] += times * work.number
        elif isinstance(work, Together | OneOf):
            for part in work.parts:
                add(part, times * (work.times if isinstance(work, Together) else 1))

    for equation in jaxpr.jaxpr.eqns:
        add(primitives.work(equation), 1)
    return dict(total)


if __name__ == "__main__":
    main()
