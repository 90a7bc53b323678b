"""Tracking: looks are unbiased, alarms come when they should and only then, and training does not notice."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from closed_form import BATCH, SIZE, START, A, B, initialised, linear_guide, linear_model, linear_parts
from numpyro.infer import SVI, Trace_ELBO
from programs import assert_equal_trees, normal
from zscores import assert_unbiased

from numpyro_rad import RAD_ELBO, StochasticRound
from numpyro_rad.codecs import SampleAxis
from numpyro_rad.diagnostics import tracking
from numpyro_rad.diagnostics.tracking import Tracker, Tracking, TrackingWarning

pytestmark = pytest.mark.usefixtures("arrays_of_any_size_count")

COARSE = StochasticRound(2)


def keys_of(state, number):
    """The state at other keys: what a look would see at other steps if the parameters stood still."""
    return [state._replace(rng_key=key) for key in jax.random.split(jax.random.key(3), number)]


def looks(tracker, state, number, args=(A, B), **options):
    """Alarms of so many looks at the same parameters."""
    alarms = []
    for i, at in enumerate(keys_of(state, number)):
        alarms += tracker.look(10 * i, at, args, options)
    return alarms


def tracks(elbo, size=None, number=400):
    svi, state = initialised(elbo, size=size)
    tracker = Tracker(svi, Tracking(on_alarm="record"))
    looks(tracker, state, number, size=size)
    return tracker


def assert_looks_are_unbiased(track, expected):
    path, total = expected["path"], sum(expected[part] for part in ("path", "guide", "minibatch"))
    draws = np.stack([track.path[:, 0], track.total[:, 0], track.squared_norm[:, 0]], axis=1)
    assert_unbiased(draws, np.array([path, total, expected["squared_norm"]]), "look")


def test_looks_are_unbiased():
    tracker = tracks(RAD_ELBO(codec=COARSE), BATCH)
    expected, track = linear_parts(BATCH, COARSE), tracker.track
    assert track.names == ("loc",) and track.path.shape == (400, 1) and track.rho.shape == (400,)
    assert_looks_are_unbiased(track, expected)
    assert tracker.rho == pytest.approx(expected["path"] / (expected["guide"] + expected["minibatch"]), rel=0.3)
    assert tracker.rho == track.rho[-1]


def test_a_shared_path_key_is_caught(monkeypatch):
    right = tracking._keys

    def planted(rng_key):
        a, _, c = right(rng_key)
        return a, a, c

    monkeypatch.setattr(tracking, "_keys", planted)
    track = tracks(RAD_ELBO(codec=COARSE), BATCH, number=40).track
    with pytest.raises(AssertionError, match="biased"):
        assert_looks_are_unbiased(track, linear_parts(BATCH, COARSE))


def test_without_codes_there_is_no_path_noise():
    tracker = tracks(Trace_ELBO(), number=100)
    assert_looks_are_unbiased(tracker.track, linear_parts())
    assert tracker.rho == 0 and not tracker.track.path.any()


def test_another_batch_counts():
    svi, state = initialised(Trace_ELBO())
    tracker = Tracker(svi, Tracking(on_alarm="record"))
    pool = [B + normal(len(B), seed=i) for i in range(2)]
    for i, at in enumerate(keys_of(state, 300)):
        tracker.look(i, at, (A, pool[i % 2]), other=((A, pool[1 - i % 2]), {}))
    apart = float(((A.T @ (pool[0] - pool[1])) ** 2).sum()) / 2
    assert_unbiased(tracker.track.total[:, 0], np.array(linear_parts()["guide"] + apart), "total")


# Alarms


def test_rho_above_its_bound():
    svi, state = initialised(RAD_ELBO(codec=SampleAxis(0.02)))
    tracker = Tracker(svi)
    with pytest.warns(TrackingWarning, match="larger memory_budget") as caught:
        alarms = looks(tracker, state, 30)
    (alarm,) = alarms
    assert len(caught) == 1 and alarm.message == str(caught[0].message)
    assert (alarm.kind, alarm.site) == ("rho", "") and alarm.step >= 40
    assert tracker.rho > 0.5 and "bound 0.5" in alarm.message


@pytest.mark.parametrize(("rho", "alarms"), [(0.25, 0), (4.0, 1)])
def test_gradients_that_shrink_a_hundredfold(rho, alarms):
    """The first looks do not decide alone: in fifty runs, of twenty looks with ten degrees of freedom each."""
    rng, raised = np.random.default_rng(0), []
    for _ in range(50):
        tracker = Tracker(initialised(RAD_ELBO())[0], Tracking(on_alarm="record"))
        tracker._names, found = ("site",), []
        for step in range(20):
            path, total = np.array([rho, 1.0 + rho]) * rng.chisquare(10, 2) / 10 * 100 ** (-step / 10)
            look = np.array([[path], [total], [0.1 * total]])
            tracker._average.add(look)
            found += [a for a in tracker._judge(step, look) if a.kind == "rho"]
        raised.append(len(found))
    assert abs(np.mean(raised) - alarms) <= 0.04, raised


def test_no_alarm_without_a_reason():
    """Warnings are errors here."""
    svi, state = initialised(RAD_ELBO(codec=StochasticRound(8)))
    tracker = Tracker(svi)
    assert looks(tracker, state, 60) == [] and not tracker.wants_replan
    assert 0 < tracker.rho < 0.01


def test_codes_that_do_no_harm_to_a_gradient_without_noise():
    def model(a, b):
        z = numpyro.param("z", START * jnp.ones(SIZE))
        numpyro.sample("b", dist.Normal(jnp.tanh(a @ z), 1.0).to_event(1), obs=b)

    svi, state = initialised(RAD_ELBO(codec=StochasticRound(8)), model, lambda a, b: None)
    tracker = Tracker(svi)
    assert looks(tracker, state, 20) == [] and tracker.track.path.all()


def two_sites(data, weight):
    for name in ("good", "bad"):
        z = numpyro.sample(name, dist.Normal(jnp.zeros(3), 1.0).to_event(1))
        numpyro.factor(f"{name} fits", (data[name] * z).sum() * weight)


def two_locations(data, weight):
    for name in ("good", "bad"):
        numpyro.sample(name, dist.Normal(numpyro.param(f"{name} loc", jnp.ones(3)), 1.0).to_event(1))


def two(elbo=None):
    data = {"good": jnp.ones(3), "bad": jnp.ones(3)}
    svi, state = initialised(elbo or Trace_ELBO(), two_sites, two_locations, (data, 1.0))
    return svi, state, data, data | {"bad": data["bad"].at[1].set(jnp.nan)}


def test_a_gradient_that_is_not_finite():
    svi, state, data, broken = two(RAD_ELBO())
    tracker = Tracker(svi)
    looks(tracker, state, 6, (data, 1.0))
    before = tracker.rho
    with pytest.warns(TrackingWarning, match=r"step 70 the gradient is not finite in bad loc\."):
        (alarm,) = tracker.look(70, state, (broken, 1.0), {})
    assert (alarm.step, alarm.kind, alarm.site) == (70, "nonfinite", "bad loc")
    assert tracker.look(80, state, (broken, 1.0), {}) == ()
    track = tracker.track
    assert np.isnan(track.total[-1, 0]) and np.isfinite(track.total[-1, 1])
    assert tracker.rho == before


def test_where_a_loss_that_is_not_finite_comes_from():
    svi, state, data, broken = two()
    tracker = Tracker(svi, Tracking(on_alarm="record"))
    (alarm,) = tracker.diagnose(3, state, (broken, 1.0), {}, jnp.nan)
    assert (alarm.step, alarm.kind, alarm.site) == (3, "nonfinite", "bad loc")
    for part in (
        "loss of step 3 is nan",
        "in the data: args[0].bad;",
        "gradients that are not finite: bad loc",
        "mask",
    ):
        assert part in alarm.message
    assert tracker.diagnose(4, state, (broken, 1.0), {}, jnp.nan) == ()

    params = svi.optim.get_params(state.optim_state)
    diverged = svi.optim.init(params | {"good loc": jnp.full(3, jnp.inf)})
    (alarm,) = Tracker(svi, Tracking(on_alarm="record")).diagnose(
        5, state._replace(optim_state=diverged), (data,), {"weight": 1.0}, -jnp.inf
    )
    assert "is -inf; parameters that are not finite: good loc" in alarm.message and "learning rate" in alarm.message
    (alarm,) = Tracker(svi, Tracking(on_alarm="record")).diagnose(6, state, (data, 1.0), {}, jnp.nan)
    assert alarm.site == "" and "are finite at this state" in alarm.message


def test_a_signal_that_is_lost():
    """A parameter at its optimum has a gradient of noise alone; that is recorded, and no reason for a warning."""

    def model():
        for name in ("lost", "strong"):
            numpyro.sample(name, dist.Normal(jnp.zeros(2000), 1.0).to_event(1))

    def guide():
        for name, at in (("lost", 0.0), ("strong", 3.0)):
            numpyro.sample(name, dist.Normal(numpyro.param(f"{name} loc", jnp.full(2000, at)), 1.0).to_event(1))

    svi, state = initialised(Trace_ELBO(), model, guide, ())
    tracker = Tracker(svi, Tracking(snr_min=0.05, rho_max=0.7))
    assert tracker.track.rho_max == 0.7
    (alarm,) = looks(tracker, state, 40, ())
    assert (alarm.kind, alarm.site) == ("signal", "lost loc") and "convergence" in alarm.message


def test_alarms_go_where_they_are_wanted():
    svi, state, _, broken = two()
    heard = []
    tracker = Tracker(svi, Tracking(on_alarm=heard.append))
    assert list(tracker.look(1, state, (broken, 1.0), {})) == heard != []


# A new plan


@pytest.mark.slow
def test_the_wish_for_a_new_plan():
    svi, state = initialised(RAD_ELBO(codec=COARSE))
    inside, above, below = (
        Tracker(svi, Tracking(replan=band, on_alarm="record")) for band in ((1e-4, 50.0), (1e-6, 1e-4), (50.0, 60.0))
    )
    for tracker in (inside, above, below):
        tracker._gradient = inside._gradient  # compiled once
        looks(tracker, state, 4)
        assert not tracker.wants_replan  # too early to say
        looks(tracker, state, 20)
    assert [t.wants_replan for t in (inside, above, below)] == [False, True, True]
    svi.loss = svi.loss.replace(calibration=svi.loss.calibrate(svi, state, A, B, draws=2))
    assert not above.wants_replan
    before = above.rho
    looks(above, state, 1)
    assert above.rho != before and above.rho == above.track.rho[-1] and len(above.track.steps) == 25
    assert not above.wants_replan


# Runs


def run(update, state, steps, tracker=None, start=0):
    losses = []
    for step in range(start, start + steps):
        state, loss = update(state, A, B)
        losses.append(float(loss))
        if tracker is not None:
            tracker.look(step, state, (A, B), {}, seconds=float(step))
    return state, losses


def test_training_does_not_notice():
    svi, state = initialised(RAD_ELBO(codec=COARSE))
    update = jax.jit(svi.update)
    alone, losses = run(update, state, 6)
    watched, also = run(update, state, 6, Tracker(svi, Tracking(on_alarm="record")))
    assert losses == also
    assert_equal_trees(jax.random.key_data(watched.rng_key), jax.random.key_data(alone.rng_key))
    assert_equal_trees(watched.optim_state, alone.optim_state)


@pytest.mark.slow
def test_a_restored_tracker_goes_on():
    svi, state = initialised(RAD_ELBO(codec=SampleAxis(0.02)))
    options = Tracking(on_alarm="record", replan=(1e-6, 1e-3))
    whole, update = Tracker(svi, options), jax.jit(svi.update)
    middle, _ = run(update, state, 4, whole)
    saved = json.loads(json.dumps(whole.to_dict()))
    run(update, middle, 8, whole, 4)

    resumed = Tracker(svi, options)
    resumed.restore(saved)
    run(update, middle, 8, resumed, 4)
    assert json.dumps(resumed.to_dict()) == json.dumps(whole.to_dict())
    assert resumed.wants_replan and whole.wants_replan
    assert looks(resumed, middle, 1) == []  # the alarm of rho was issued before


def test_an_empty_tracker_is_saved_too():
    svi, state = initialised(Trace_ELBO())
    tracker = Tracker(svi)
    assert np.isnan(tracker.rho) and tracker.track.path.shape == (0, 0)
    other = Tracker(svi)
    other.restore(json.loads(json.dumps(tracker.to_dict())))
    assert looks(other, state, 1) == [] and other.track.path.shape == (1, 1)


# Bad input


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"interval": 0}, "interval=0 is not a positive number"),
        ({"interval": 1.5}, "interval=1.5"),
        ({"rho_max": -1.0}, "rho_max=-1.0"),
        ({"snr_min": float("nan")}, "snr_min=nan"),
        ({"replan": (0.3, 0.1)}, "replan="),
        ({"on_alarm": "shout"}, "on_alarm='shout'"),
    ],
)
def test_wrong_options(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        Tracking(**options)


def test_what_is_no_tracker():
    svi, _ = initialised(Trace_ELBO())
    for data in ({}, {"track": 3}, []):
        with pytest.raises(ValueError, match=r"not what Tracker\.to_dict"):
            Tracker(svi).restore(data)
    with pytest.raises(ValueError, match="not been initialised"):
        Tracker(SVI(linear_model, linear_guide, optax.adam(1e-2), Trace_ELBO()))
