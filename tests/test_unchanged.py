"""No ELBO ever changes: what is measured for it is returned, and ``RAD_SVI`` puts it into a copy of its own."""

import contextlib

import jax
import numpy as np
import optax
import pytest
from models import linear
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoNormal

from numpyro_rad import RAD_ELBO, RAD_SVI, Tracking, advise, explain, gradient_variance

pytestmark = [pytest.mark.in_one_go, pytest.mark.usefixtures("few_codecs")]

KEY = jax.random.PRNGKey(3)
X = np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32)
Y = (X @ np.array([1.0, -2.0, 0.5], np.float32)).astype(np.float32)


def made(elbo, kind=RAD_SVI, **options):
    return kind(linear, AutoNormal(linear), optax.adam(0.05), elbo, **options)


@contextlib.contextmanager
def unchanged(elbo):
    """Whether it holds the same objects afterwards, and its base does."""
    before = [dict(vars(x)) for x in (elbo, elbo.base)]
    yield
    for held, now in zip(before, (vars(elbo), vars(elbo.base)), strict=True):
        assert held.keys() == now.keys() and all(held[name] is now[name] for name in held), "the ELBO has changed"


@pytest.mark.parametrize(
    "measure",
    [
        lambda elbo, *fit: elbo.calibrate(*fit, X, Y, draws=2),
        lambda elbo, svi, state: elbo.fit_step(svi, state, "1GiB", X, Y),
        lambda elbo, *fit: gradient_variance(*fit, X, Y, draws=2),
        lambda elbo, *fit: advise(*fit, X, Y, budgets=["1kB"], repeats=0),
        lambda elbo, *fit: explain(*fit, X, Y),
    ],
    ids=["calibrate", "fit_step", "gradient_variance", "advise", "explain"],
)
def test_looking_at_a_fit_changes_nothing(measure):
    elbo = RAD_ELBO(memory_budget="1MiB")
    svi = made(elbo, SVI)
    state = svi.init(KEY, X, Y)
    with unchanged(elbo):
        found = measure(elbo, svi, state)
    assert found is not None and svi.loss is elbo


def test_runs_with_one_elbo_are_independent():
    elbo = RAD_ELBO(memory_budget="1MiB")
    one, other = made(elbo), made(elbo, calibrate=False)
    with unchanged(elbo):
        result = one.run(KEY, 4, X, Y, progress_bar=False)
        assert other.loss is elbo and one.loss is not elbo
        alone = other.run(KEY, 4, X, Y, progress_bar=False)
    assert result.svi is one and one.loss.planner.calibration is not None and one.loss.base is elbo.base
    assert other.loss is elbo and elbo.planner.calibration is None
    again = made(RAD_ELBO(memory_budget="1MiB"), calibrate=False).run(KEY, 4, X, Y, progress_bar=False)
    assert alone.losses.tolist() == again.losses.tolist()


@pytest.mark.slow
def test_new_plans_and_resumed_runs_go_into_the_svi(tmp_path):
    elbo = RAD_ELBO(added_variance=0.1)
    options = {"tracking": Tracking(2, replan=(1e6, 2e6), on_alarm="record")}  # any ρ is far below
    svi = made(elbo, **options)
    with unchanged(elbo):
        state = svi.init(KEY, X, Y)
        first = svi.loss.planner.calibration
        svi.run(KEY, 12, X, Y, progress_bar=False, init_state=state, checkpoint=tmp_path)
    replanned = svi.loss.planner.calibration
    assert first is not None and replanned is not first and replanned is not None
    resumed = made(elbo, **options)
    with unchanged(elbo):
        resumed.run(KEY, 14, X, Y, progress_bar=False, init_state=state, checkpoint=tmp_path)
    assert resumed.loss.planner.calibration == replanned


def test_a_calibration_of_the_users_is_left_alone():
    svi = made(RAD_ELBO(memory_budget="1MiB"), SVI)
    found = svi.loss.calibrate(svi, svi.init(KEY, X, Y), X, Y, draws=2)
    elbo = RAD_ELBO(memory_budget="1MiB", calibration=found)
    given = made(elbo)
    given.run(KEY, 2, X, Y, progress_bar=False)
    assert given.loss is elbo
    given.plan_by(found)
    assert given.loss is not elbo and given.loss.planner == elbo.planner
    with pytest.raises(TypeError, match="whose gradients have no plan"):
        made(elbo.base).plan_by(found)


def test_a_calibration_keeps_to_its_size():
    svi = made(RAD_ELBO(memory_budget="1MiB"), calibrate="10 B")
    with pytest.warns(UserWarning, match=r"Variances were not measured.* and most_bytes=10\."):
        svi.init(KEY, X, Y)
    assert svi.loss.planner.calibration is None


def test_a_change_is_noticed(monkeypatch):
    calibrate = RAD_ELBO.calibrate

    def changing(self, *args, **kwargs):
        found = calibrate(self, *args, **kwargs)
        vars(self)["planner"] = self.replace(calibration=found).planner
        return found

    monkeypatch.setattr(RAD_ELBO, "calibrate", changing)
    for test in (test_runs_with_one_elbo_are_independent, lambda: test_looking_at_a_fit_changes_nothing(calibrates)):
        with pytest.raises(AssertionError, match="has changed"):
            test()


def calibrates(elbo, *fit):
    return elbo.calibrate(*fit, X, Y, draws=2)
