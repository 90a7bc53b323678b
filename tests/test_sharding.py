"""Data-parallel SVI over eight devices: the numbers of one device, and the collectives of ``Trace_ELBO``.

The devices have to be asked for before JAX starts, so the programs run in a process of their own, which reports once
for all tests: the loss, the first gradients, and the collectives in the compiled ``svi.update``.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

DEVICES = 8
SIZES = ((512, 64), (520, 50))  # (points, features): rows of a code that fit the shares, and rows that have to be cut
DEFAULT = (("codec=StochasticRound(4)", SIZES[1]), ("slices=3", SIZES[0]))
OTHERS = (
    ("codec=Keep()", SIZES[0]),
    ("codec=StochasticRound(1)", SIZES[1]),
    ("codec=SampleAxis(0.1)", SIZES[0]),
    ("codec=RandomProjection(0.1)", SIZES[1]),
)

PROGRAM = '''
import json, sys
import jax, jax.numpy as jnp, numpy as np, numpyro, numpyro.distributions as dist, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro_rad import RAD_ELBO, explain
from numpyro_rad.codecs import Keep, RandomProjection, SampleAxis, StochasticRound
from numpyro_rad.ad import _jax
from numpyro_rad.planning.costs import CPU
import dataclasses

PRICES = dataclasses.replace(CPU, least_encoded_bytes=1024)  # vectors over the batch are encoded too

def model(x, y):
    width = x.shape[1]
    h = x
    for i, activation in enumerate(2 * (jax.nn.gelu, jax.nn.relu)):
        w = numpyro.sample(f"w{i}", dist.Normal(0.0, 1.0).expand([width, width]).to_event(2))
        h = activation(h @ (w / np.sqrt(width)))
    numpyro.sample("y", dist.StudentT(4.0, h[:, 0], 1.0).to_event(1), obs=y)

def same_code(elbo, x):
    """Codes draw by index, wherever an entry lives: the decoded array does not depend on the sharding."""
    codec = getattr(elbo, "codec", None) or StochasticRound(4)
    seed, like = np.asarray([1, 2], np.uint32), jax.ShapeDtypeStruct(x.shape, x.dtype)
    decode = jax.jit(lambda x: codec.decode(seed, codec.encode(seed, x), like))
    return bool(jnp.allclose(decode(x), decode(jnp.asarray(np.asarray(x))), rtol=1e-5, atol=1e-5))

def run(points, features, elbo, sharded):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((points, features)), jnp.float32)
    y = x[:, 0]
    svi = SVI(model, AutoNormal(model, init_scale=0.1), optax.adam(1e-2), elbo)
    state = svi.init(jax.random.key(0), x, y)
    if sharded:
        mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))
        x, y = (jax.device_put(a, NamedSharding(mesh, PartitionSpec("batch"))) for a in (x, y))
        state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    update = jax.jit(svi.update, donate_argnums=0).lower(state, x, y).compile()
    devices = []
    jax.jit(lambda x: devices.append(_jax.devices_of([jax.typeof(x)]))).lower(x)
    loss, gradient = jax.jit(jax.value_and_grad(
        lambda p, x, y: elbo.loss(jax.random.key(1), svi.constrain_fn(p), model, svi.guide, x, y)
    ))(svi.optim.get_params(state.optim_state), x, y)
    return {
        "loss": float(loss),
        "gradient": np.asarray(gradient["w0_auto_loc"]).tolist(),
        "program": update.as_text(),
        "temporary": update.memory_analysis().temp_size_in_bytes,
        "devices": devices,
        "same code": same_code(elbo, x),
        "losses": [float(update(state, x, y)[1])],
    }

assert jax.device_count() == DEVICES
report = {}
for size in {size for _, size in CASES}:
    report[f"Trace_ELBO {size}"] = [run(*size, Trace_ELBO(), sharded) for sharded in (False, True)]
for options, size in CASES:
    elbo = eval(f"RAD_ELBO(costs=PRICES, {options})")
    report[options] = [run(*size, elbo, sharded) for sharded in (False, True)]
json.dump(report, sys.stdout)
'''

COLLECTIVE = re.compile(r"(all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\(")


def report(cases):
    """What the program says: for each ELBO, the run on one device and the run on all."""
    settings = f"DEVICES, CASES = {DEVICES}, {cases}\n"
    flags = f"--xla_force_host_platform_device_count={DEVICES}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    command = [sys.executable, "-W", "error", "-c", settings + PROGRAM]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


def collectives(run):
    return sorted(COLLECTIVE.findall(run["program"]))


def in_loops(run):
    """The collectives in bodies of loops."""
    bodies = re.findall(r"body=%?([\w.\-]+)", run["program"])
    texts = [re.search(rf"^%?{re.escape(b)} \(.*?^}}", run["program"], re.DOTALL | re.MULTILINE) for b in bodies]
    return [found for text in texts if text for found in COLLECTIVE.findall(text.group())]


@pytest.mark.slow
@pytest.mark.parametrize(
    "cases", [pytest.param(DEFAULT, id="default"), pytest.param(OTHERS, id="others", marks=pytest.mark.exhaustive)]
)
def test_sharded_step(cases):
    """Same loss, a gradient with as much noise, and no collective of our own."""
    runs = report(cases)
    for options, size in cases:
        alone, sharded = runs[options]
        exact_alone, exact = runs[f"Trace_ELBO {size}"]
        assert sharded["loss"] == pytest.approx(exact["loss"], rel=1e-5)
        assert sharded["losses"] == pytest.approx(exact_alone["losses"], rel=1e-5)
        errors = [np.subtract(run["gradient"], exact_alone["gradient"]) for run in (sharded, alone, exact)]
        noise, expected, rounding = map(np.linalg.norm, errors)
        assert 0.5 * expected - 10 * rounding <= noise <= 2 * expected + 10 * rounding
        assert sharded["same code"]
        assert not collectives(alone)
        assert collectives(exact), "the exact step sums gradients over devices: there is something to compare with"
        assert len(collectives(sharded)) <= len(collectives(exact)), (options, collectives(sharded))
        assert not in_loops(sharded)
        assert (alone["devices"], sharded["devices"]) == ([1], [DEVICES])
        if "slices" in options:
            least = 0.8 if jax.__version_info__ >= (0, 11) else 1.0  # with so few rows older compilers save little
            assert sharded["temporary"] < least * exact["temporary"]
