"""Minibatches for ``RAD_SVI.run``: every kind of source, read ahead, and what is wrong with them said by number."""

import threading
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoNormal

from numpyro_rad import RAD_ELBO
from numpyro_rad.diagnostics.tracking import Tracking
from numpyro_rad.report.verdict import findings
from numpyro_rad.training.batches import Batches
from numpyro_rad.training.svi import RAD_SVI

X = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
Y = X.sum(1)
TUPLES = [(X[i : i + 20], Y[i : i + 20]) for i in (0, 20, 40)]  # the last one is smaller


def read(source, most, **position):
    with Batches(source, most, **position) as reader:
        found = []
        while (batch := reader.next()) is not None:
            found.append(batch)
        return found


def places(found):
    return [(b.epoch, b.index) for b in found]


class Loader:
    """An object that can be iterated again, and has a length."""

    def __iter__(self):
        yield from TUPLES


def generator():
    yield from TUPLES


@pytest.mark.parametrize("source", [TUPLES, Loader(), lambda epoch: TUPLES, lambda epoch: generator()])
def test_sources_that_repeat(source):
    found = read(source, 5)
    assert places(found) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    for batch in found:
        x, y = batch.args
        assert isinstance(x, jax.Array) and np.array_equal(x, TUPLES[batch.index][0])
        assert np.array_equal(y, TUPLES[batch.index][1]) and batch.kwargs == {}


def test_an_iterator_ends_and_is_not_read_further_than_needed():
    assert places(read(generator(), 100)) == [(0, 0), (0, 1), (0, 2)]
    numbers = iter([np.ones(2)] * 10)
    assert len(read(numbers, 4)) == 4
    assert len(list(numbers)) == 6


def test_dictionaries_arrays_and_memmaps(tmp_path):
    (batch, *_) = read([{"x": X, "n": 3, "name": "a", "rate": 0.5}], 1)
    assert batch.args == () and batch.kwargs["n"] == 3 and batch.kwargs["name"] == "a"
    assert isinstance(batch.kwargs["rate"], jax.Array)
    on_disk = np.memmap(tmp_path / "rows", np.float32, "w+", shape=(5, 4))
    on_disk[:] = np.arange(20).reshape(5, 4)
    found = read(on_disk, 7)
    assert [float(b.args[0][0]) for b in found] == [0, 4, 8, 12, 16, 0, 4]
    (batch,) = read(jnp.arange(6.0).reshape(3, 2), 1)
    assert np.array_equal(batch.args[0], [0, 1])


def test_a_source_may_reuse_its_buffer():
    def reusing():
        buffer = np.zeros(4, np.float32)
        for i in range(6):
            buffer[:] = i
            yield buffer

    assert [float(b.args[0][0]) for b in read(reusing(), 6)] == [0, 1, 2, 3, 4, 5]


def test_functions_get_the_number_of_the_epoch_and_positions_are_found_again():
    def epochs(epoch):
        return [np.full(2, 10 * epoch + i) for i in range(3)]

    all_of_them = [float(b.args[0][0]) for b in read(epochs, 9)]
    assert all_of_them == [0, 1, 2, 10, 11, 12, 20, 21, 22]
    for skipped in range(9):
        rest = read(epochs, 9 - skipped, epoch=skipped // 3, index=skipped % 3)
        assert [float(b.args[0][0]) for b in rest] == all_of_them[skipped:]
    assert places(read(epochs, 1, epoch=0, index=3)) == [(1, 0)]
    with pytest.raises(ValueError, match="has 3 batches, but the run to be resumed had taken 4"):
        read(epochs, 5, epoch=0, index=4)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ([], ValueError, "no batch in epoch 1, it is empty"),
        (iter(()), ValueError, "no batch in epoch 1"),
        (3, TypeError, "an iterable of batches is expected"),
        ("xyz", TypeError, "an iterable of batches is expected"),
        ({"x": X}, TypeError, "an iterable of batches is expected"),
        (lambda epoch: 3, TypeError, r"batches\(0\) returned int"),
        ([["a"]], TypeError, "batch 1 of epoch 1 is"),
        ([()], TypeError, "batch 1 of epoch 1 is"),
        ([np.array(["a", "b"])], TypeError, "dtype"),
    ],
)
def test_sources_that_are_none(source, error, message):
    with pytest.raises(error, match=message):
        read(source, 3)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ((X,), r"expected float32 of 1 axes, got nothing there"),
        ((X, Y, Y), "expected nothing there, got float32 of 1 axes"),
        ((X, Y.astype(np.int32)), "expected float32 of 1 axes, got int32 of 1 axes"),
        ((X, Y[:, None]), "expected float32 of 1 axes, got float32 of 2 axes"),
        ({"x": X, "y": Y}, "expected"),
        ((X, 3), "expected float32 of 1 axes, got int"),
    ],
)
def test_batches_of_changing_structure(second, message):
    with pytest.raises(ValueError, match="batch 2 of epoch 1 differs from batch 1 of epoch 1.*" + message):
        read([(X, Y), second], 5)


def test_an_object_that_can_be_read_once_only():
    class Once:
        def __init__(self):
            self.left = iter(TUPLES)

        def __iter__(self):
            return iter(list(self.left))

    with pytest.raises(ValueError, match="epoch 2 is empty although"):
        read(Once(), 10)


def test_what_the_source_raises_comes_in_its_turn_and_with_its_traceback():
    def broken():
        yield TUPLES[0]
        yield TUPLES[1]
        raise OSError("disk gone")

    with Batches(broken(), 10) as reader:
        assert reader.next() is not None
        assert len(reader.peek(3)) == 1
        assert reader.next() is not None
        with pytest.raises(OSError, match="disk gone") as caught:
            reader.next()
    assert "in broken" in "".join(traceback.format_tb(caught.value.__traceback__))


def threads():
    return [t for t in threading.enumerate() if t.name == "numpyro_rad-batches"]


def test_it_reads_ahead_and_the_thread_ends():
    read_so_far = []

    def counting():
        for i in range(100):
            read_so_far.append(i)
            yield np.ones(2)

    with Batches(counting(), 100) as reader:
        reader.next()
        deadline = time.monotonic() + 20
        while len(read_so_far) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert 3 <= len(read_so_far) <= 6
        assert threads()
    assert not threads()


def test_settings_of_the_calling_thread_hold(double):
    (batch,) = read([np.ones(2)], 1)
    assert batch.args[0].dtype == np.float64


# -- in a run ----------------------------------------------------------------------------------------------------------


def model(x, y=None):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with numpyro.plate("points", 50, subsample_size=x.shape[0]):
        numpyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def fit(tracking=None):
    return RAD_SVI(model, AutoNormal(model), optax.adam(1e-2), tracking=tracking)


def test_a_run_over_batches_is_the_loop_that_one_would_write():
    svi = SVI(model, AutoNormal(model), optax.adam(1e-2), RAD_ELBO())
    state, losses = svi.init(jax.random.key(0), *TUPLES[0]), []
    update = jax.jit(lambda state, *batch: svi.update(state, *batch))
    for i in range(8):
        state, loss = update(state, *TUPLES[i % 3])
        losses.append(float(loss))
    result = fit(Tracking(2, on_alarm="record")).run(jax.random.key(0), 8, batches=TUPLES, progress_bar=False)
    np.testing.assert_allclose(result.losses, losses, rtol=1e-6)
    assert result.track.steps.tolist() == [2, 4, 6, 8] and not threads()


@pytest.mark.slow
def test_a_run_over_one_batch_is_a_run():
    fixed = fit().run(jax.random.key(0), 10, X, Y, progress_bar=False)
    for source in ([(X, Y)], [{"x": X, "y": Y}], lambda epoch: iter([(X, Y)])):
        found = fit().run(jax.random.key(0), 10, batches=source, progress_bar=False)
        assert np.array_equal(found.losses, fixed.losses)
    found = fit().run(jax.random.key(0), 10, X, batches=[Y], progress_bar=False)
    assert np.array_equal(found.losses, fixed.losses)


@pytest.mark.slow
def test_a_generator_that_ends_ends_the_run():
    with pytest.warns(UserWarning, match="batches ended after step 3 of 100: .* Pass a list, or a function"):
        result = fit().run(jax.random.key(0), 100, batches=generator(), progress_bar=False)
    (found,) = [f for f in findings(result.record) if "early end" in f.what]
    assert found.level == "warning" and "after step 3 of 100" in found.advice
    assert result.stopped_at == len(result.losses) == 3 and not result.interrupted
    assert "batches ended" in result.record.options["ending"]


@pytest.mark.slow
def test_nan_is_named_by_batch():
    bad = [*TUPLES[:2], *TUPLES[:2]]
    bad[2] = (X[:20], np.full(20, np.nan, np.float32))
    result = fit(Tracking(100, on_alarm="record")).run(jax.random.key(0), 4, batches=bad, progress_bar=False)
    assert result.alarms[0].step == 3
    assert "args[1]" in result.alarms[0].message and "batch 3 of epoch 1" in result.alarms[0].message


def test_an_argument_given_twice():
    with pytest.raises(TypeError, match="x is given both to run and by batch 1 of epoch 1"):
        fit().run(jax.random.key(0), 4, x=X, batches=[{"x": X, "y": Y}], progress_bar=False)
    assert not threads()
