"""Runs that are saved, killed, resumed: the same bits as without; and checkpoints that are damaged or of others."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer.autoguide import AutoNormal
from programs import same_run

from numpyro_rad import RAD_ELBO
from numpyro_rad.ad._jax import digest
from numpyro_rad.codecs import SampleAxis, StochasticRound
from numpyro_rad.diagnostics.tracking import Tracking
from numpyro_rad.planning.calibration import Calibration, ResidualNoise
from numpyro_rad.training.checkpoints import Checkpoint, CheckpointError, Store, check_same_run
from numpyro_rad.training.fingerprint import checksum, fingerprint, inside
from numpyro_rad.training.svi import RAD_SVI

X = np.random.default_rng(0).standard_normal((60, 3)).astype(np.float32)
Y = X.sum(1)


def model(x, y=None, scale=0.5):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    numpyro.sample("y", dist.Normal(x @ w, scale).to_event(1), obs=y)


def fit(optimizer=None, loss=None, **options):
    options = {"tracking": Tracking(10, on_alarm="record"), **options}
    return RAD_SVI(model, AutoNormal(model), optimizer or optax.adam(1e-2), loss, **options)


def run(steps, folder=None, key=0, svi=None, every=7, data=(X, Y), **options):
    checkpoint = None if folder is None else Checkpoint(folder, every)
    svi = fit() if svi is None else svi
    return svi.run(jax.random.PRNGKey(key), steps, *data, progress_bar=False, checkpoint=checkpoint, **options)


def shuffled(epoch):
    order = np.random.default_rng(epoch).permutation(60)
    return [(X[order[i : i + 25]], Y[order[i : i + 25]]) for i in (0, 25, 50)]


def test_a_run_that_is_asked_for_more_steps_goes_on(tmp_path):
    whole = run(40)
    first = run(15, tmp_path)
    assert len(first.losses) == 15
    rest = run(40, tmp_path)
    assert same_run(rest, whole)
    assert rest.track.steps.tolist() == [10, 20, 30, 40]
    assert np.array_equal(rest.track.total, whole.track.total)
    with pytest.warns(UserWarning, match="nothing is left to do.* all 40 steps were taken before"):
        again = run(40, tmp_path)
    assert same_run(again, whole) and again.record.options["ending"].startswith("nothing was left to do")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["35", "40"]
    with pytest.raises(ValueError, match="has 40 steps already"):
        run(30, tmp_path)


@pytest.mark.slow
def test_batches_go_on_where_they_were(tmp_path):
    whole = run(11, data=(), batches=shuffled)
    for steps in (4, 6, 11):
        found = run(steps, tmp_path, data=(), batches=shuffled)
    assert same_run(found, whole)


@pytest.mark.slow
def test_the_newest_that_can_be_read_is_used(tmp_path):
    whole = run(40)
    run(20, tmp_path)
    for file in (tmp_path / "20").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.warns(UserWarning, match="that of step 20 in .* is damaged .* goes on from step 14"):
        found = run(40, tmp_path)
    assert same_run(found, whole)
    assert (tmp_path / "broken-20").exists() and (tmp_path / "40").exists()


def test_nothing_that_can_be_read(tmp_path):
    run(7, tmp_path)
    shutil.rmtree(tmp_path / "7" / "arrays")
    with pytest.raises(CheckpointError, match=f"none of the 1 checkpoints in {tmp_path} can be read"):
        run(40, tmp_path)


@pytest.mark.slow
def test_checkpoints_of_another_run(tmp_path):
    run(7, tmp_path)
    wider = RAD_SVI(lambda x, y: model(x, y, 1.0), AutoNormal(model), optax.adam(1e-2))
    other = {"w_auto_loc": np.ones(3, np.float32), "w_auto_scale": np.ones(3, np.float32)}
    wrong = {
        "state of the optimizer": lambda: run(9, tmp_path, svi=fit(optax.sgd(1e-2))),
        r"optimizer: scale\.update_fn\.step_size is -0.01 in the checkpoint and -0.02 here\.": lambda: run(
            9, tmp_path, svi=fit(optax.adam(2e-2))
        ),
        "rng_key: it is another key": lambda: run(9, tmp_path, key=1),
        r"in arguments: argument 1 'x' is float32\[60, 3\] in the checkpoint and float32\[59, 3\]": lambda: run(
            9, tmp_path, data=(X[:59], Y[:59])
        ),
        r"in data: argument 2 'y' has other values\.": lambda: run(9, tmp_path, data=(X, -Y)),
        "in data: argument 1 'x' has other values, argument 2 'y'": lambda: run(9, tmp_path, data=(X[::-1], Y[::-1])),
        "initial values: init_params": lambda: run(9, tmp_path, init_params=other),
        "ELBO": lambda: run(9, tmp_path, svi=fit(loss=RAD_ELBO(codec=StochasticRound(2)))),
        "options": lambda: run(9, tmp_path, stable_update=True),
        "program: model, guide or ELBO compute something else": lambda: run(9, tmp_path, svi=wider),
        "keyword argument 'scale' is not there": lambda: run(9, tmp_path, svi=fit(scale=0.25)),
    }
    for what, attempt in wrong.items():
        with pytest.raises(CheckpointError, match=f"{tmp_path} belongs to another run; they differ .*{what}"):
            attempt()


@pytest.mark.slow
def test_batches_of_another_run(tmp_path):
    """The first batch of the epoch is compared, of whichever epoch the run had come to."""
    run(5, tmp_path, data=(), batches=shuffled)
    for wrong in (lambda epoch: shuffled(epoch + 7), lambda epoch: [(x, -y) for x, y in shuffled(epoch)]):
        with pytest.raises(CheckpointError, match=r"differ in data: argument .*A loader that shuffles has to"):
            run(9, tmp_path, data=(), batches=wrong)


RATE = 0.1


def test_what_an_optimizer_holds_is_found():
    def named(optimizer):
        return inside(fit(optimizer).optim)

    def rate(step):
        return 0.1 / (step + ten)

    ten = 10
    assert named(optax.adam(0.1)) == named(optax.adam(0.1))
    assert named(optax.adam(rate))[f"{test_what_an_optimizer_holds_is_found.__name__}.rate.ten"] == "10"
    assert "0.25" in named(numpyro.optim.ClippedAdam(0.1, clip_norm=0.25)).values()
    assert "0.9" in named(numpyro.optim.Momentum(0.1, 0.9)).values()
    pairs = [
        (optax.adam(0.1), optax.adam(0.2)),
        (optax.adam(0.1, b2=0.99), optax.adam(0.1)),
        (optax.chain(optax.clip(1.0), optax.sgd(0.1)), optax.chain(optax.clip(2.0), optax.sgd(0.1))),
        (optax.adam(lambda step: 0.1 * step), optax.adam(lambda step: 0.2 * step)),
        (optax.adam(partial(pow, 0.5)), optax.adam(partial(pow, 0.6))),
        (numpyro.optim.Adam(0.1), numpyro.optim.Adam(0.2)),
        (numpyro.optim.Minimize(tol=0.1), numpyro.optim.Minimize(tol=0.2)),
        (optax.inject_hyperparams(optax.adam)(0.1), optax.inject_hyperparams(optax.adam)(0.2)),
    ]
    for one, other in pairs:
        assert named(one) != named(other)


@pytest.mark.slow
def test_what_is_no_closure_of_the_optimizer_is_in_its_program(monkeypatch):
    """A rate that a schedule reads from a global variable."""

    def fingerprint_of(optimizer):
        svi = fit(optimizer)
        return fingerprint(svi, svi.init(jax.random.key(0), X, Y), {}, ((X, Y), {}))["update"]

    def update():
        return fingerprint_of(optax.sgd(lambda step: RATE / (1.0 + step)))

    rates = {f"{fingerprint_of(optax.inject_hyperparams(optax.adam)(rate))}" for rate in (0.1, 0.1, 0.2)}
    assert len(rates) == 2  # they are in its first state
    before, again = update(), update()
    monkeypatch.setitem(globals(), "RATE", 0.2)
    assert before == again != update()


def test_programs_that_differ_in_a_parameter_alone():
    """What calls another program, and what chooses by an enumeration."""

    def summed(x, reverse):
        return jax.lax.scan(lambda carry, x: (carry * x, carry), 1.0, x, reverse=reverse)[1]

    x = jnp.ones(3)
    assert len({digest(partial(summed, reverse=on), x) for on in (False, True)}) == 2
    assert len({digest(partial(jnp.take, indices=jnp.arange(2), mode=mode), x) for mode in ("clip", "fill")}) == 2


def test_an_optimizer_that_changes_what_it_holds_is_the_same(tmp_path):
    """The schedule makes a float of its number of steps when it is first called."""
    svi = fit(optax.adam(optax.cosine_decay_schedule(1e-2, 100)))
    run(2, tmp_path, svi=svi)
    with pytest.warns(UserWarning, match="nothing is left to do"):
        assert len(run(2, tmp_path, svi=svi).losses) == 2


def test_large_arrays_are_told_apart_by_any_entry(monkeypatch):
    monkeypatch.setattr("numpyro_rad.training.fingerprint._CHUNK_BYTES", 100)
    values = np.arange(60.0)
    sums = {checksum(values), checksum(-values), checksum(values[::-1]), checksum(values.reshape(6, 10))}
    for entry in (0, 31, 59):
        changed = values.copy()
        changed[entry] += 1e-9
        sums.add(checksum(changed))
    assert len(sums) == 7
    assert checksum(values) == checksum(values.copy()) == checksum(np.stack([values, values], 1)[:, 0])
    assert checksum(jax.random.key(0)) != checksum(jax.random.key(1))


def test_checkpoints_of_older_versions(tmp_path):
    saved = {"program": "ab", "versions": "numpyro_rad 0.0"}
    with pytest.raises(CheckpointError, match=f"{tmp_path} was written by an older version .* Choose another folder"):
        check_same_run(tmp_path, saved, {**saved, "data": {}})


@pytest.mark.parametrize("name", ["notes.txt", "2023/january.csv", "figures/1.png"])
def test_files_of_others_are_neither_touched_nor_mixed_with(tmp_path, name):
    """Orbax would delete folders that are called like numbers."""
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("of somebody else")
    top = name.split("/")[0]
    with pytest.raises(
        CheckpointError, match=f"holds what is no checkpoint of numpyro_rad: {top}.*{tmp_path}/checkpoints"
    ):
        run(7, tmp_path)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [file.name]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".DS_Store").write_text("of the system")
    (tmp_path / "checkpoints" / "80.orbax-checkpoint-tmp").mkdir()  # of a run that was killed while it saved
    (tmp_path / "checkpoints" / "81.orbax-checkpoint-tmp-1234").mkdir()
    Store(Checkpoint(tmp_path / "checkpoints")).__exit__()


def test_a_folder_that_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way")
    with pytest.raises(CheckpointError, match=f"{file}/inner cannot be written.*No step was taken"):
        run(7, file / "inner")


@pytest.mark.slow
def test_a_disk_that_fills_up_does_not_end_the_run(tmp_path, monkeypatch):
    from numpyro_rad.training.checkpoints import Store

    def full(self, snapshot):
        raise CheckpointError(f"checkpoint: step {snapshot.step} could not be written.")

    monkeypatch.setattr(Store, "save", full)
    with pytest.warns(UserWarning, match="could not be written\\. The run goes on"):
        found = run(20, tmp_path)
    assert same_run(found, run(20)) and {a.kind for a in found.alarms} == {"checkpoint"}


@pytest.mark.slow
def test_an_error_of_the_source_loses_nothing(tmp_path):
    def broken(epoch):
        yield from shuffled(epoch)
        if epoch == 1:
            raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        run(11, tmp_path, data=(), batches=broken, every=100)
    assert (tmp_path / "6").exists()
    assert same_run(run(11, tmp_path, data=(), batches=shuffled), run(11, data=(), batches=shuffled))


def test_without_orbax(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"numpyro_rad\[checkpoint\]"):
        run(7, tmp_path)


def test_wrong_options():
    with pytest.raises(ValueError, match="every=0"):
        Checkpoint("folder", every=0)
    with pytest.raises(TypeError, match="folder=3"):
        Checkpoint(3)


def test_calibrations_survive_json():
    residuals = {(1, 2): ResidualNoise((0.1, 1e-30), (0.7, 2 / 3), 1e-3)}
    made = Calibration("ab", 0.1, 1 / 3, (StochasticRound(4), SampleAxis(0.1)), residuals, (1.0, 0.1), 3)
    again = Calibration.from_dict(json.loads(json.dumps(made.to_dict())))
    assert again == made
    with pytest.raises(ValueError, match="Calibrate again"):
        Calibration.from_dict({"program": "ab"})


# Other processes import what these tests do.
PATH = {"PYTHONPATH": os.pathsep.join(sys.path)}

SAME_PROGRAM = """
import sys
from test_checkpoints import RAD_ELBO, X, Y, fit
from numpyro_rad.training.fingerprint import fingerprint
import jax, json
svi = fit()
state = svi.init(jax.random.key(0), X, Y)
print(json.dumps(fingerprint(svi, state, {}, ((X, Y), {"scale": float(sys.argv[1])}))))
"""


@pytest.mark.slow
def test_the_program_of_a_run_is_known_in_other_processes():
    """NumPyro adds up sites in the order of a set of names, which is another one with another seed of the hashes."""

    def of_process(seed, scale):
        env = {**os.environ, **PATH, "PYTHONHASHSEED": str(seed)}
        done = subprocess.run([sys.executable, "-c", SAME_PROGRAM, scale], env=env, capture_output=True, text=True)
        return json.loads(done.stdout)

    known = [of_process(seed, "0.5") for seed in (0, 1)]
    assert known[0] == known[1] and len(known[0]["program"]) == len(known[0]["update"]) == 16
    other = of_process(0, "0.25")
    assert {name for name in other if other[name] != known[0][name]} == {"arguments", "program"}


# -- kill -9 -----------------------------------------------------------------------------------------------------------

STEPS = 3000

PROGRAM = """
import sys
import numpy as np
from test_checkpoints import Checkpoint, jax, long_run
result = long_run(Checkpoint(sys.argv[1], 40) if sys.argv[1] != "None" else None)
np.savez(sys.argv[2], *jax.tree.leaves(result.params), losses=result.losses)
"""


def long_run(checkpoint=None):
    tracking = Tracking(50, replan=(1e6, 2e6), on_alarm="record")  # any ρ is far below: it plans again and again
    svi = fit(loss=RAD_ELBO(added_variance=0.1), tracking=tracking)
    return svi.run(jax.random.key(5), STEPS, batches=shuffled, progress_bar=False, checkpoint=checkpoint)


def start(folder, out):
    cache = {"DIR": str(out) + ".cache", "MIN_COMPILE_TIME_SECS": "0", "MIN_ENTRY_SIZE_BYTES": "0"}  # for speed alone
    names = {"DIR": "JAX_COMPILATION_CACHE_DIR"}
    env = {names.get(k, f"JAX_PERSISTENT_CACHE_{k}"): v for k, v in cache.items()}
    # NumPyro adds up sites in the order of a set of names: the same bits take the same order
    env["PYTHONHASHSEED"] = "0"
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder), str(out)], env={**os.environ, **PATH, **env})


def kill_and_resume(tmp_path, kills, seed):
    """Kill a run so many times, each time some while after it wrote a new checkpoint; then let it end."""
    rng = np.random.default_rng(seed)
    folder, out = tmp_path / "fit", tmp_path / "killed.npz"
    for _ in range(kills):
        before = set(folder.glob("[0-9]*"))
        process = start(folder, out)
        new, end = 0, math.inf
        while process.poll() is None and new < 2 and time.monotonic() < end:  # before it is through all the steps
            time.sleep(0.002)
            new = len(set(folder.glob("[0-9]*")) - before)
            if new and end == math.inf:
                end = time.monotonic() + rng.uniform(0, 0.2)
        assert process.poll() is None, "it ended before it could be killed"
        process.kill()
        process.wait()
    assert start(folder, out).wait() == 0
    undisturbed = tmp_path / "whole.npz"
    assert start(None, undisturbed).wait() == 0
    killed, whole = np.load(out), np.load(undisturbed)
    assert len(whole["losses"]) == STEPS and killed.files == whole.files
    assert all(np.array_equal(killed[name], whole[name]) for name in whole.files)


@pytest.mark.parametrize("left", ["", "_CHECKPOINT_METADATA", "commit_success.txt", "meta"])
def test_a_checkpoint_that_was_being_deleted_is_no_obstacle(tmp_path, left):
    (tmp_path / "40" / left).mkdir(parents=True)
    with Store(Checkpoint(tmp_path)) as store:
        assert store.folder == tmp_path


@pytest.mark.slow
def test_kill_and_resume_three_times(tmp_path):
    kill_and_resume(tmp_path, 3, seed=1)


@pytest.mark.slow
def test_ctrl_c_saves(tmp_path, ctrl_c):
    stop_at = iter([False, True])

    def interrupt(look):
        if next(stop_at, False):
            signal.raise_signal(signal.SIGINT)

    half = run(100, tmp_path, every=1000, callbacks=[interrupt])
    assert half.interrupted and 20 <= len(half.losses) < 100
    assert same_run(run(100, tmp_path), run(100))
