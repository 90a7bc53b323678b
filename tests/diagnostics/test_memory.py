"""What diagnostics take of the memory: no more than about twice a training step, whatever the number of draws; a
diagnostic for which memory is short is left out alone; many fits in one process leave nothing behind."""

import contextlib
import copy
import gc
import json
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import fits
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI
from programs import few

from numpyro_rad import RAD_ELBO, RAD_SVI, BudgetError, StochasticRound, Tracking, report
from numpyro_rad.diagnostics import quality, tracking
from numpyro_rad.diagnostics.quality import fit_quality, shadow
from numpyro_rad.diagnostics.tracking import Tracker
from numpyro_rad.diagnostics.variance import gradient_variance
from numpyro_rad.report.archive import to_arviz
from numpyro_rad.training import results

ROOT = Path(__file__).parents[2]
ROWS, WIDTH, DEPTH = 4096, 32, 2


def network(x, y=None):
    """Its activations take sixteen times the bytes of its weights and more."""
    h = x
    for i in range(DEPTH):
        w = numpyro.sample(f"w{i}", dist.Normal(0.0, 1.0).expand([WIDTH, WIDTH]).to_event(2))
        h = jnp.tanh(h @ w / WIDTH**0.5)
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Normal(h.sum(-1), 10.0), obs=y)


def normals(x, y=None):
    for i in range(DEPTH):
        loc = numpyro.param(f"loc{i}", jnp.eye(WIDTH))
        numpyro.sample(f"w{i}", dist.Normal(loc, 0.01).to_event(2))


def data(rows=ROWS, seed=0):
    x = np.random.default_rng(seed).standard_normal((rows, WIDTH)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(x.sum(-1))


# -- measured ----------------------------------------------------------------------------------------------------------

_WATCHED: list[list[int]] = []


def _compiled(event, duration_secs, **_):
    """Bytes that an execution of what has just been compiled takes: what is temporary and what is returned."""
    if _WATCHED and event.endswith("backend_compile_duration"):
        for executable in jax.local_devices()[0].client.live_executables():
            sizes = executable.get_compiled_memory_stats()
            taken = sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
            _WATCHED[-1].append(taken)


jax.monitoring.register_event_duration_secs_listener(_compiled)


@contextlib.contextmanager
def watched():
    """The bytes of each program that is compiled inside."""
    jax.clear_caches()
    gc.collect()
    _WATCHED.append([])
    try:
        yield _WATCHED[-1]
    finally:
        _WATCHED.pop()


@pytest.fixture(scope="module")
def fitted():
    """An ``SVI``, a state of it, its data, and the bytes that a step takes."""
    x, y = data()
    svi = SVI(network, normals, optax.sgd(1e-6), RAD_ELBO(codec=StochasticRound(4)))
    state = svi.init(jax.random.key(0), x, y)
    with watched() as bytes_of:
        jax.jit(svi.update).lower(state, x, y).compile()
    return svi, state, (x, y), max(bytes_of)


DIAGNOSTICS = {
    "quality": lambda svi, state, args, n: fit_quality(
        svi, state, *args, key=jax.random.key(1), max_particles=n, standard_error=1e-9
    ),
    "variance": lambda svi, state, args, n: gradient_variance(svi, state, *args, draws=n),
    "look": lambda svi, state, args, n: Tracker(svi, Tracking(on_alarm="record")).look(n, state, args),
    "arviz": lambda svi, state, args, n: to_arviz(
        svi, svi.get_params(state), *args, key=jax.random.key(1), num_samples=n
    ),
    "shadow": lambda svi, state, args, n: shadow(svi, jax.random.key(1), n, *args, num_seeds=2),
}


@pytest.mark.parametrize("name", few(DIAGNOSTICS, slow=3))
def test_no_diagnostic_takes_more_than_twice_a_step(fitted, name):
    """Whatever it compiles, single operations included: for 60 draws, and for the thousand of k-hat."""
    svi, state, args, step = fitted
    if name == "arviz":
        pytest.importorskip("arviz")
    with watched() as bytes_of:
        found = DIAGNOSTICS[name](svi, state, args, 60 if name == "arviz" else 4)
    assert 0 < max(bytes_of) < 2 * step
    assert name != "quality" or found.pareto_k is not None


@pytest.mark.slow
def test_calibration_keeps_to_its_bound(fitted):
    svi, state, args, step = fitted
    before = svi.loss.planner
    with pytest.raises(BudgetError, match=f"most_bytes={step}") as error:
        svi.loss.calibrate(svi, state, *args, most_bytes=step)
    assert error.value.smallest_bytes > step and svi.loss.planner is before


# -- where memory is short ---------------------------------------------------------------------------------------------

SHORT = {
    "device": jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes."),
    "host": MemoryError(),
}


def short(error):
    def raises(*args, **kwargs):
        raise error

    return raises


@pytest.fixture(scope="module")
def short_fit():
    x, y = data(16)
    svi = RAD_SVI(network, normals, optax.sgd(1e-6), RAD_ELBO(codec=StochasticRound(4)), tracking=None)
    return svi.run(jax.random.key(0), 3, x, y, progress_bar=False)


@pytest.mark.parametrize("error", few(SHORT, "device", slow=0))
@pytest.mark.parametrize(
    ("module", "function", "lost"),
    [
        pytest.param(
            *(results, "gradient_variance", "gradient_variance was not measured: memory is too short"),
            marks=pytest.mark.slow,
        ),
        (results, "fit_quality", "quality was not measured: memory is too short"),
        (results, "posterior_summary", "posterior was not measured: memory is too short"),
        (quality, "_elbo_draws", "No ELBO: memory is too short"),
        (quality, "psis_diagnostic", "No Pareto k-hat: memory is too short"),
    ],
)
def test_diagnostic_without_memory_is_lost_alone(short_fit, monkeypatch, error, module, function, lost):
    others = {"gradient_variance", "_elbo_draws", "_pareto_k", "posterior_summary"} - {function}
    if function == "psis_diagnostic":
        others.discard("_pareto_k")
    quick = {
        "gradient_variance": (results, fits.good().gradient_variance),
        "posterior_summary": (results, fits.good().posterior),
        "_elbo_draws": (quality, np.array([1.0, 3.0])),
        "_pareto_k": (quality, (0.25, "")),
    }
    for name in others:  # what is not asked about here takes no time
        owner, value = quick[name]
        monkeypatch.setattr(owner, name, lambda *_, value=value, **__: value)
    monkeypatch.setattr(module, function, short(SHORT[error]))
    record = copy.copy(short_fit).assess(*short_fit.args, svi=short_fit.svi).record
    assert lost in report.html(record)
    assert (record.gradient_variance is None) == (function == "gradient_variance")
    assert (record.quality is None) == (function == "fit_quality")
    assert (record.posterior is None) == (function == "posterior_summary")
    if record.quality is not None:
        assert record.quality.pareto_k == (None if function == "psis_diagnostic" else 0.25)
        assert np.isfinite(record.quality.elbo.value) == (function != "_elbo_draws")


def test_other_errors_are_not_taken_for_it(short_fit, monkeypatch):
    monkeypatch.setattr(results, "gradient_variance", short(jax.errors.JaxRuntimeError("INTERNAL: a fault")))
    with pytest.raises(jax.errors.JaxRuntimeError, match="a fault"):
        short_fit.assess()


def test_look_without_memory_does_not_end_the_run(monkeypatch):
    monkeypatch.setattr(tracking.Gradient, "__call__", short(SHORT["device"]))
    tracked = Tracking(interval=2, on_alarm="record")
    svi = RAD_SVI(network, normals, optax.sgd(1e-6), RAD_ELBO(codec=StochasticRound(4)), tracking=tracked)
    result = svi.run(jax.random.key(0), 6, *data(16), progress_bar=False)
    assert len(result.losses) == 6
    (alarm,) = result.alarms
    assert (alarm.step, alarm.kind) == (2, "memory") and "no more looks" in alarm.message


@pytest.mark.slow
@pytest.mark.parametrize("error", SHORT)
def test_calibration_without_memory_is_left_out(monkeypatch, error):
    monkeypatch.setattr(RAD_ELBO, "calibrate", short(SHORT[error]))
    svi = RAD_SVI(network, normals, optax.sgd(1e-6), RAD_ELBO(memory_budget="1MiB"), tracking=None)
    with pytest.warns(UserWarning, match="Variances were not measured, plans are made without"):
        result = svi.run(jax.random.key(0), 2, *data(16), progress_bar=False)
    assert len(result.losses) == 2 and svi.loss.planner.calibration is None


# -- many fits ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_many_fits_leave_nothing_behind():
    """Neither the SVI objects, nor their arrays, nor what was compiled for them."""

    def fit(seed):
        x, y = data(8, seed)
        tracked = Tracking(interval=2, on_alarm="record")
        svi = RAD_SVI(network, normals, optax.sgd(1e-6), RAD_ELBO(codec=StochasticRound(4)), tracking=tracked)
        svi.run(jax.random.key(seed), 2, x, y, progress_bar=False)
        return weakref.ref(svi), weakref.ref(svi.loss)

    def left():
        gc.collect()
        client = jax.local_devices()[0].client
        return len(jax.live_arrays()), len(client.live_executables())

    fit(0)
    fit(1)
    before = left()
    refs = [ref for seed in range(2, 7) for ref in fit(seed)]
    after = left()
    assert [ref() for ref in refs] == [None] * len(refs)
    assert after == before


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", few([".html", ".htm", ".md", ".txt", ".json"], ".html", ".json", slow=0))
def test_reports_leave_no_file_open(tmp_path, suffix):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report.write(fits.good(), tmp_path / f"fit{suffix}")
        gc.collect()


# -- resident memory ---------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive  # the benchmark of memory measures it
def test_process_grows_by_no_more_than_a_step_and_its_compiler():
    """Draws for ArviZ in a fresh process: what they take besides the compiler is far below the 200 MiB of 20 draws at
    once. A process that compiles a plain step stands for the compiler."""
    program = [sys.executable, "-m", "examples.benchmarks.memory", "--alone"]
    rows = {}
    for task in ("step", "to_arviz"):
        result = subprocess.run([*program, task], cwd=ROOT, capture_output=True, text=True, timeout=900)
        assert result.returncode == 0, result.stderr
        rows[task] = json.loads(result.stdout.splitlines()[-1])
    assert rows["to_arviz"]["program_bytes"] < 2 * rows["step"]["program_bytes"]
    assert rows["to_arviz"]["resident_bytes"] < rows["step"]["resident_bytes"] + 2 * rows["step"]["program_bytes"]
