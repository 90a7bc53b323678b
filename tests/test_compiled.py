"""Programs compiled for an accelerator that is not there: what their text says, and what the benchmark makes of it."""

import argparse
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from examples.benchmarks import compiled, device, figures, hlo, record
from examples.benchmarks.compiled import CASES, DEVICES, Device
from numpyro_rad.planning import costs

ROOT = Path(__file__).resolve().parents[1]
FLOAT = 4
HAS_COMPILER = "jax-cuda12-pjrt" in {d.name for d in importlib.metadata.distributions()}


def read(f, *shapes):
    """What the CPU's compiler makes of a function, and the bytes that it counts itself."""
    program = jax.jit(f).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile()
    analysis = program.cost_analysis()
    return hlo.read(program.as_text()), analysis["bytes accessed"]


def test_bytes_are_those_of_xla_where_nothing_loops():
    found, counted = read(lambda x, w: jnp.sort(jnp.sin(x @ w)) @ w, (300, 200), (200, 200))
    assert found.bytes_accessed == pytest.approx(counted, rel=0.02)
    assert found.bytes_accessed > FLOAT * (300 * 200 + 200 * 200) and found.kernels > 1


def test_loops_count_as_often_as_they_run():
    def loop(n):
        return read(lambda x, w: lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ w), x), (64, 64), (64, 64))[0]

    few, more, most = loop(10), loop(20), loop(40)
    assert more.kernels > few.kernels and more.bytes_accessed > few.bytes_accessed
    assert most.kernels - more.kernels == 2 * (more.kernels - few.kernels)
    assert most.bytes_accessed - more.bytes_accessed == 2 * (more.bytes_accessed - few.bytes_accessed)
    assert more.bytes_accessed - few.bytes_accessed >= 10 * 3 * FLOAT * 64 * 64  # each reads both and writes one


def test_of_an_array_what_is_taken_counts():
    """An iteration that takes a row of a large array and puts one into another does not move the arrays."""
    n = 1000
    found, _ = read(lambda x: lax.scan(lambda c, row: (c + row.sum(), jnp.sin(row)), 0.0, x)[1], (n, 256))
    array = FLOAT * n * 256
    assert 2 * array <= found.bytes_accessed < 20 * array  # with the arrays as a whole it would be 2000


TEXT = """HloModule small

%body (t: (s32[], f32[1024,512])) -> (s32[], f32[1024,512]) {
  %t = (s32[], f32[1024,512]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[1024,512]{1,0} get-tuple-element(%t), index=1
  %copy.1 = f32[1024,512]{0,1} copy(%x)
  %add.1 = s32[] add(%i, %i)
  ROOT %out = (s32[], f32[1024,512]) tuple(%add.1, %copy.1)
}

%condition (t.1: (s32[], f32[1024,512])) -> pred[] {
  %t.1 = (s32[], f32[1024,512]) parameter(0)
  %i.1 = s32[] get-tuple-element(%t.1), index=0
  %n = s32[] constant(7)
  ROOT %less = pred[] compare(%i.1, %n), direction=LT
}

ENTRY %main (x.1: f32[1024,512]) -> (s32[], f32[1024,512]) {
  %x.1 = f32[1024,512]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], /*index=1*/f32[1024,512]) tuple(%zero, %x.1)
  ROOT %loop = (s32[], f32[1024,512]) while(%start), condition=%condition, body=%body
}
"""


def test_copies_and_loops_whose_length_nobody_wrote_down():
    """The length is in the condition; a copy moves its array twice, an addition of two numbers 12 bytes."""
    copied = 2 * FLOAT * 1024 * 512
    assert hlo.read(TEXT) == hlo.Program(kernels=14, bytes_accessed=7 * (copied + 12), large_copies=7)
    marked = TEXT.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}')
    assert hlo.read(marked).large_copies == 3


def test_operations_are_counted_through_loops():
    def f(x, w):
        return lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=5)[0] @ w

    jaxpr = jax.make_jaxpr(f)(jnp.ones((8, 16)), jnp.ones((16, 16)))
    assert compiled.multiplied(jaxpr) == {"float32": 6 * 8 * 16 * 16}


def test_a_time_is_that_of_the_roofline():
    device = Device(costs.H200)
    memory = hlo.Program(kernels=0, bytes_accessed=4_800_000_000, large_copies=0)
    assert device.seconds(memory, {"float32": 1e9}) == pytest.approx(1e-3)
    assert device.seconds(hlo.Program(0, 0, 0), {"float32": 247e9}) == pytest.approx(1e-3)
    assert device.seconds(hlo.Program(1000, 0, 0), {}) == pytest.approx(1.5e-3)


@pytest.mark.slow
def test_a_workload_is_compared():
    """The whole comparison for the device that is here, and its table."""
    here = Device(costs.CPU)
    names = ["exact", "accumulate", "ours_default", "ours_8slices"]
    found = compiled.compared(CASES["p1"][1], names, here, jax.devices()[0])
    ways = {way["rival"]: way for way in found["ways"]}
    assert list(ways) == [*names, "ours_matched"] and not any("failure" in way for way in ways.values())
    assert ways["ours_8slices"]["temp_bytes"] < ways["exact"]["temp_bytes"] / 2
    assert ways["ours_8slices"]["plan"]["slices"] == 8 and ways["ours_default"]["plan"]["untouched"]
    products = {name: sum(way["multiplications"].values()) for name, way in ways.items()}
    assert products["ours_8slices"] == pytest.approx(products["exact"], rel=0.02)  # nothing runs twice
    report = {"compiled": {"here": {**record.circumstances(), "device": "here", "rows": {"p1": found}}}}
    lines = figures.compiled_table(report).splitlines()
    assert sum(line.startswith("| 4 x 64") for line in lines) == len(ways)
    assert any("8 slices" in line for line in lines) and any("left to JAX" in line for line in lines)


def test_what_hiding_latencies_takes_is_said():
    ways = [{"label": name, "temp_bytes": 100, "hiding_temp_bytes": size} for name, size in (("one", 97), ("two", 125))]
    rows = {"p1": {"title": "a network", "ways": [*ways, {"label": "three", "failure": "no"}]}}
    (said,) = figures.hiding_latencies({"device": "a GPU", "rows": rows})
    assert "for a GPU is 0.97 to 1.25 of" in said and "(most: a network, two)" in said
    del ways[0]["hiding_temp_bytes"], ways[1]["hiding_temp_bytes"]
    assert figures.hiding_latencies({"device": "a TPU", "rows": rows}) == []


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="needs XLA's compiler for GPUs")
def test_gpus_are_compiled_for(tmp_path):
    output = tmp_path / "compiled.json"
    command = [sys.executable, "-m", "examples.benchmarks.compiled", "h200", "--quick", "--workloads", "p1"]
    subprocess.run([*command, "--output", str(output)], cwd=ROOT, check=True, timeout=900)
    ways = {w["rival"]: w for w in json.loads(output.read_text())["compiled"]["h200"]["rows"]["p1"]["ways"]}
    assert ways["ours_8slices"]["temp_bytes"] < ways["exact"]["temp_bytes"] / 4
    assert ways["ours_codes"]["temp_bytes"] < ways["exact"]["temp_bytes"]
    assert all(w["hiding_temp_bytes"] < 1.5 * w["temp_bytes"] for w in ways.values())


@pytest.mark.slow
def test_the_device_that_is_here_is_run(tmp_path):
    """Each way in a process of its own; one that fails is a row that says why."""
    output = tmp_path / "device.json"
    ways = ["exact", "accumulate"]
    device.main(["--workloads", "p1", "--rivals", *ways, "--quick", "--rounds", "2", "--output", str(output)])
    report = json.loads(output.read_text())
    rows = {row["rival"]: row for row in report["device"]["p1"]["ways"]}
    assert list(rows) == [*ways, "ours_matched"] and report["machine"]["backend"] == "cpu"
    assert rows["ours_matched"]["temp_bytes"] <= 1.1 * rows["accumulate"]["temp_bytes"]
    assert [row["loss"] for row in rows.values()] == pytest.approx([rows["exact"]["loss"]] * 3, rel=1e-5)
    assert all(row["step"]["median_seconds"] > 0 for row in rows.values())
    assert figures.markdown_table(report).count("| 4 x 64") == len(rows)
    broken = device.in_a_process("p1", "accumulate", 0, argparse.Namespace(rounds=-9, quick=True))
    assert "exit status 1" in broken["failure"] and broken["label"] == "accumulation"


def test_devices_have_costs_of_their_own():
    assert all(name in device.costs.name.lower() for name, device in DEVICES.items())
