"""``RAD_SVI.run`` against ``SVI.run``: the same numbers, whatever is watched, saved or shown on the way."""

import copy
import dataclasses
import pickle
import signal

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from models import PROBLEMS, linear, logistic, looks_at_data, network_regression, wave
from numpyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from programs import few, same, same_run, words

from numpyro_rad import RAD_ELBO, BudgetError
from numpyro_rad.diagnostics.records import FitRecord
from numpyro_rad.diagnostics.tracking import Tracking
from numpyro_rad.training import fit_record, results
from numpyro_rad.training.results import RAD_SVIRunResult
from numpyro_rad.training.svi import RAD_SVI

KEY = 3


def assert_runs_agree(a, b):
    """To rounding: two loops are two programs, whose sums the compiler may fuse differently."""
    for x, y in zip(words((a.params, a.state)), words((b.params, b.state)), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(a.losses, b.losses, rtol=1e-5)


def quiet(interval=7, **options):
    return Tracking(interval=interval, on_alarm="record", **options)


X = np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32)
Y = (X @ np.array([1.0, -2.0, 0.5], np.float32)).astype(np.float32)


def small(loss=None, **options):
    options = {"tracking": None, **options}
    return RAD_SVI(linear, AutoNormal(linear), optax.adam(1e-2), loss, **options)


# NumPyro says so of NaN in data that it can look at
OUT_OF_SUPPORT = pytest.mark.filterwarnings("ignore:Out-of-support values")


# -- the numbers are those of SVI --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", few(["autoencoder", "hierarchy", "linear model"], "linear model", slow=2))
@pytest.mark.parametrize(
    "loss", [pytest.param(Trace_ELBO, marks=pytest.mark.exhaustive), RAD_ELBO], ids=["Trace_ELBO", "RAD_ELBO"]
)
def test_it_gives_what_svi_gives(name, loss):
    p, steps = PROBLEMS[name](), 40
    key = jax.random.PRNGKey(KEY)
    expected = SVI(p.model, p.guide, p.optimizer, loss()).run(key, steps, *p.args, progress_bar=False, **p.kwargs)
    svi = RAD_SVI(p.model, p.guide, p.optimizer, loss(), tracking=quiet(15))
    found = svi.run(key, steps, *p.args, progress_bar=False, **p.kwargs)
    assert_runs_agree(found, expected)
    params, state, losses = found
    assert losses.shape == (steps,) and params is found.params and state is found.state


@pytest.mark.parametrize(
    ("guide", "optimizer", "loss"),
    [
        (AutoDelta, numpyro.optim.Adam(1e-2), Trace_ELBO()),
        pytest.param(
            AutoMultivariateNormal,
            optax.chain(optax.clip(1.0), optax.sgd(1e-3)),
            RAD_ELBO(),
            marks=pytest.mark.exhaustive,
        ),
        (AutoNormal, numpyro.optim.Momentum(1e-4, 0.9), RAD_ELBO(base=TraceMeanField_ELBO(num_particles=3))),
    ],
)
def test_guides_optimizers_and_elbos(guide, optimizer, loss):
    key = jax.random.key(KEY)
    expected = SVI(linear, guide(linear), optimizer, loss).run(key, 20, X, Y, progress_bar=False)
    found = RAD_SVI(linear, guide(linear), optimizer, loss, tracking=quiet()).run(key, 20, X, Y, progress_bar=False)
    assert_runs_agree(found, expected)


def test_with_a_progress_bar_too(capsys):
    expected = SVI(linear, AutoNormal(linear), optax.adam(1e-2), RAD_ELBO()).run(jax.random.key(KEY), 30, X, Y)
    capsys.readouterr()
    found = small(tracking=quiet(10)).run(jax.random.key(KEY), 30, X, Y)
    shown = capsys.readouterr().err
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)
    assert "loss" in shown and "ρ" in shown and "residuals" in shown


def test_nothing_that_happens_on_the_way_changes_a_number():
    key, seen = jax.random.key(KEY), []
    plain = small().run(key, 50, X, Y, progress_bar=False)
    for tracking in (quiet(1), quiet(13)):
        watched = small(tracking=tracking).run(
            key, 50, X, Y, progress_bar=False, callbacks=[seen.append], stop=lambda *_: False
        )
        assert same_run(watched, plain)
    assert [look.step for look in seen][-3:] == [13, 26, 39]


def test_a_run_goes_on_from_a_state_with_a_fresh_object():
    key = jax.random.key(KEY)
    whole = small().run(key, 30, X, Y, progress_bar=False)
    half = small().run(key, 12, X, Y, progress_bar=False)
    rest = small().run(key, 18, X, Y, progress_bar=False, init_state=half.state)
    assert same((rest.params, rest.state), (whole.params, whole.state))
    assert same(np.concatenate([half.losses, rest.losses]), whole.losses)
    assert same(half.state, small().run(key, 12, X, Y, progress_bar=False).state)  # nothing of it was given away


@pytest.mark.slow
def test_update_evaluate_and_get_params_are_those_of_svi():
    svi, plain = small(RAD_ELBO()), SVI(linear, AutoNormal(linear), optax.adam(1e-2), RAD_ELBO())
    state, expected = svi.init(jax.random.key(0), X, Y), plain.init(jax.random.key(0), X, Y)
    assert same(state, expected)

    def steps(svi):
        step = jax.jit(
            lambda state: (svi.update(state, X, Y), svi.stable_update(state, X, Y), svi.evaluate(state, X, Y))
        )
        return step(state)

    assert all(map(same, steps(svi), steps(plain)))
    assert same(svi.get_params(state), plain.get_params(state))
    states = jax.vmap(lambda key: svi.init(key, X, Y))(jax.random.split(jax.random.key(0), 3))
    assert jax.tree.leaves(states.optim_state)[1].shape[0] == 3


def with_memory(x, y=None):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
    mean = numpyro.primitives.mutable("mean", {"count": jnp.zeros(())})
    mean["count"] = mean["count"] + 1.0
    numpyro.sample("y", dist.Normal(x @ w, 0.5).to_event(1), obs=y)


def test_mutable_state():
    key, guide = jax.random.key(KEY), AutoNormal(with_memory)
    expected = SVI(with_memory, guide, optax.adam(1e-2), RAD_ELBO()).run(key, 20, X, Y, progress_bar=False)
    svi = RAD_SVI(with_memory, guide, optax.adam(1e-2), tracking=quiet())
    found = svi.run(key, 20, X, Y, progress_bar=False)
    assert_runs_agree(found, expected)
    assert found.state.mutable_state["mean"]["count"] == 20 + 1  # once for init


@pytest.mark.slow
def test_forward_mode_is_for_exact_elbos():
    key, options = jax.random.key(KEY), {"progress_bar": False, "forward_mode_differentiation": True}
    expected = SVI(linear, AutoNormal(linear), optax.adam(1e-2), Trace_ELBO()).run(key, 10, X, Y, **options)
    assert_runs_agree(small(Trace_ELBO(), tracking=quiet(3)).run(key, 10, X, Y, **options), expected)
    with pytest.raises(NotImplementedError, match="no forward mode"):
        small().run(key, 10, X, Y, **options)


@pytest.mark.slow
def test_a_model_that_looks_at_its_data():
    key, data = jax.random.key(KEY), (np.arange(12) % 3, np.arange(12.0))
    guide = AutoNormal(looks_at_data)
    expected = SVI(looks_at_data, guide, optax.adam(1e-2), RAD_ELBO()).run(key, 10, *data, progress_bar=False)
    found = RAD_SVI(looks_at_data, guide, optax.adam(1e-2), tracking=quiet(4)).run(key, 10, *data, progress_bar=False)
    assert_runs_agree(found, expected)


def looks_at_a_largest_value(y, groups, options=None):
    """What works with NumPy arrays alone while a program is made: a size, a branch; initial values of NumPy."""
    start = np.ones(int(groups.max()) + 1) * y.mean()
    if options is not None and options["spread"] > 0.5:
        start = start + options["spread"] * np.arange(len(start))
    levels = numpyro.param("levels", start)
    w = numpyro.sample("w", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(levels[groups] + w, 1.0).to_event(1), obs=y)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kwargs",
    (pytest.param({}, marks=pytest.mark.exhaustive), {"options": {"spread": np.asarray(0.7)}}),
    ids=("size", "branch by keyword"),
)
def test_a_model_that_looks_at_numpy_arrays(kwargs, tmp_path):
    """In the steps, the tracker, the calibration, the fingerprint of a checkpoint and on held-out data."""
    key, data = jax.random.key(KEY), (np.arange(12.0), np.arange(12) % 3)
    guide = AutoNormal(looks_at_a_largest_value)
    expected = SVI(looks_at_a_largest_value, guide, optax.adam(1e-2), RAD_ELBO()).run(
        key, 10, *data, progress_bar=False, **kwargs
    )
    svi = RAD_SVI(looks_at_a_largest_value, guide, optax.adam(1e-2), tracking=quiet(4), calibrate=True)
    options = {"progress_bar": False, "checkpoint": tmp_path / "fit", "validate": (data[0] + 1, data[1])}
    found = svi.run(key, 10, *data, **options, **kwargs)
    assert_runs_agree(found, expected)
    assert np.isfinite(found.record.validation.losses).all()
    with pytest.warns(UserWarning, match="this very run"):
        svi.run(key, 10, *data, **options, **kwargs)


def test_an_optimizer_whose_state_changes_its_structure():
    calls = []

    def update(grads, state, params=None):
        calls.append(1)
        return jax.tree.map(lambda g: -1e-3 * g, grads), {"seen": grads}

    optimizer = optax.GradientTransformation(lambda params: {}, update)
    key = jax.random.key(KEY)
    expected = SVI(linear, AutoNormal(linear), optimizer, Trace_ELBO()).run(key, 10, X, Y)
    svi = RAD_SVI(linear, AutoNormal(linear), optimizer, Trace_ELBO(), tracking=None)
    assert_runs_agree(svi.run(key, 10, X, Y, progress_bar=False), expected)


@pytest.mark.slow
def test_static_arguments():
    key = jax.random.key(KEY)
    p = PROBLEMS["linear model"]()
    expected = SVI(logistic, p.guide, p.optimizer, RAD_ELBO(), batch_size=100).run(key, 10, *p.args, progress_bar=False)
    found = RAD_SVI(logistic, p.guide, p.optimizer, batch_size=100, tracking=quiet(5)).run(
        key, 10, *p.args, progress_bar=False
    )
    assert_runs_agree(found, expected)


# -- planning ----------------------------------------------------------------------------------------------------------


def deep(x, y):
    return network_regression(x, y, hidden=(32, 32), scale=0.1)


@pytest.mark.slow
def test_a_budget_that_nothing_meets_is_told_by_init():
    x, y = wave(4096, 8)
    svi = RAD_SVI(deep, AutoNormal(deep), optax.adam(1e-3), RAD_ELBO(memory_budget=10), calibrate=False)
    with pytest.raises(BudgetError):
        svi.init(jax.random.key(0), x, y)
    with pytest.raises(BudgetError):
        svi.run(jax.random.key(0), 5, x, y, progress_bar=False)


@pytest.mark.exhaustive
def test_plans_by_price_are_calibrated_once_for_each_fit():
    x, y = wave(4096, 8)
    svi = RAD_SVI(
        deep, AutoNormal(deep, init_scale=0.05), optax.adam(1e-3), RAD_ELBO(memory_budget="256KiB"), tracking=None
    )
    first = svi.run(jax.random.key(0), 5, x, y, progress_bar=False)
    measured = svi.loss.planner.calibration
    assert measured is not None
    again = svi.run(jax.random.key(0), 5, x, y, progress_bar=False)
    assert svi.loss.planner.calibration is measured  # the same fit
    assert same_run(first, again)
    svi.run(jax.random.key(0), 5, x, y, progress_bar=False, init_state=again.state)
    assert svi.loss.planner.calibration is measured
    svi.run(jax.random.key(1), 5, x, y, progress_bar=False)
    assert svi.loss.planner.calibration is not measured
    plan = first.record.plan
    assert 0 < plan.stored_bytes <= 2**18 < plan.exact_bytes
    assert max(held for _, held, _ in plan.timeline) <= 1.001 * plan.stored_bytes


@pytest.mark.slow
def test_a_band_of_rho_replans():
    tracking = quiet(2, replan=(1e6, 2e6))  # any ρ is far below
    svi = small(RAD_ELBO(added_variance=0.1), tracking=tracking)
    result = svi.run(jax.random.key(0), 20, X, Y, progress_bar=False)
    replans = [a for a in result.alarms if a.kind == "replan"]
    assert replans and "measured again" in replans[0].message
    assert len(result.losses) == 20


# -- callbacks, stopping, Ctrl-C ---------------------------------------------------------------------------------------


def test_callbacks_see_the_run_and_may_end_it():
    seen = []

    def watch(look):
        seen.append(look)
        return look.step >= 20

    result = small(tracking=quiet(10)).run(jax.random.key(0), 100, X, Y, progress_bar=False, callbacks=[watch])
    assert [look.step for look in seen] == [10, 20]
    assert result.stopped_at == 20 and len(result.losses) == 20 and not result.interrupted
    assert seen[0].loss == seen[1].losses[9] and seen[1].track.steps.tolist() == [10, 20]
    assert np.isfinite(words(seen[0].state.optim_state)[1]).all()  # still there


def test_a_rule_stops():
    result = small().run(
        jax.random.key(0), 1000, X, Y, progress_bar=False, stop=lambda step, losses: losses[-1] < losses[0] / 2
    )
    assert result.stopped_at == len(result.losses) < 1000
    with pytest.raises(ValueError, match="converged"):
        small().run(jax.random.key(0), 10, X, Y, stop="when it is done")


@pytest.mark.slow
def test_it_stops_when_the_iterates_have_converged():
    svi = RAD_SVI(linear, AutoNormal(linear), optax.adam(5e-2), tracking=None)
    result = svi.run(jax.random.key(0), 20_000, X, Y, progress_bar=False, stop="converged")
    assert result.stopped_at is not None and result.stopped_at < 20_000
    assert result.iterates.converged()
    late = result.losses[-200:].mean()
    longer = svi.run(jax.random.key(1), 3000, X, Y, progress_bar=False, init_state=result.state)
    spread = longer.losses.std() / np.sqrt(200)
    assert abs(longer.losses[-2000:].mean() - late) < 5 * spread


def press_ctrl_c():
    """What Ctrl-C does, here and at once: a signal sent to the process may reach another thread, or two become one."""
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_returns_what_there_is(ctrl_c):
    def press(look):
        if look.step == 30:
            press_ctrl_c()
        return look.step >= 1000  # it must not go on for ever if nobody listens

    result = small(tracking=quiet(10)).run(jax.random.key(0), 100_000_000, X, Y, progress_bar=False, callbacks=[press])
    assert result.interrupted and result.stopped_at is None
    n = len(result.losses)
    assert 30 <= n < 1000
    assert same(result.losses[:10], small().run(jax.random.key(0), 10, X, Y, progress_bar=False).losses)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
def test_a_second_ctrl_c_raises(ctrl_c):
    survived = []

    def press_twice(look):
        press_ctrl_c()
        survived.append(look.step)
        press_ctrl_c()
        survived.append("both")

    with pytest.raises(KeyboardInterrupt):
        small(tracking=quiet(10)).run(jax.random.key(0), 1000, X, Y, progress_bar=False, callbacks=[press_twice])
    assert survived == [10]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@OUT_OF_SUPPORT
def test_nan_in_the_data_is_named():
    y = Y.copy()
    y[5] = np.nan
    svi = small(tracking=quiet(10))
    options = {"progress_bar": False, "init_state": svi.init(jax.random.key(0), X, Y)}
    result = svi.run(jax.random.key(0), 30, X, y, **options)
    (alarm,) = [a for a in result.alarms if "loss" in a.message][:1]
    assert alarm.kind == "nonfinite" and "args[1]" in alarm.message and alarm.step == 1
    assert not np.isfinite(result.losses).any() and len(result.losses) == 30  # it goes on, as SVI does


@pytest.mark.slow
def test_a_fit_that_diverges_is_diagnosed_at_the_step_before():
    svi = RAD_SVI(linear, AutoNormal(linear), optax.sgd(10.0), tracking=quiet(1000))
    result = svi.run(jax.random.key(0), 50, X, Y, progress_bar=False)
    first = int(np.flatnonzero(~np.isfinite(result.losses))[0]) + 1
    alarm = result.alarms[0]
    assert alarm.kind == "nonfinite" and alarm.step == first > 1
    without = RAD_SVI(linear, AutoNormal(linear), optax.sgd(10.0), tracking=None)
    (plain,) = without.run(jax.random.key(0), 50, X, Y, progress_bar=False).alarms
    assert (plain.kind, plain.step) == ("nonfinite", first)


@pytest.mark.slow
@OUT_OF_SUPPORT
def test_stable_update_does_not_take_bad_steps():
    y, svi = np.full_like(Y, np.nan), small()
    options = {"progress_bar": False, "stable_update": True, "init_state": svi.init(jax.random.key(0), X, Y)}
    result = svi.run(jax.random.key(0), 10, X, y, **options)
    assert_runs_agree(result, SVI.run(svi, jax.random.key(0), 10, X, y, **options))
    assert all(np.isfinite(x).all() for x in words(result.params)) and not result.alarms


def test_no_steps():
    with pytest.raises(ValueError, match="num_steps=0"):
        small().run(jax.random.key(0), 0, X, Y)


# -- the result --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_result_reports(tmp_path):
    result = small(tracking=quiet(10)).run(jax.random.key(0), 40, X, Y, progress_bar=False)
    record = result.record
    assert isinstance(record, FitRecord)
    assert record.num_steps == 40 and record.num_params == 6 and record.title == "linear with AutoNormal"
    assert record.track is result.track and result.track.steps.tolist() == [10, 20, 30, 40]
    assert np.array_equal(record.losses, result.losses)
    for name in ("fit.html", "fit.md", "fit.txt"):
        assert result.report(tmp_path / name).stat().st_size > 1000
    assert result.report(format="markdown").startswith("# linear with AutoNormal")
    with pytest.raises(ValueError, match="html"):
        result.report(format="pdf")
    summary = str(result).splitlines()
    assert summary[0] == "RAD_SVIRunResult: linear with AutoNormal, 40 steps, all steps were taken"
    assert any(line.startswith("  loss at the end") for line in summary) and "alarms" in summary[-2]
    assert "result.assess(...)" in summary[-1] and max(map(len, summary)) < 120 and repr(result) == str(result)
    assert len(result) == 3 and str(RAD_SVIRunResult({}, None, X)) == "RAD_SVIRunResult(params, state, losses)"
    result.save(tmp_path / "fit.json")
    assert (tmp_path / "fit.json").stat().st_size > 1000


@pytest.mark.slow
def test_what_takes_draws_of_its_own_is_added():
    result = small(tracking=quiet(10)).run(jax.random.key(0), 40, X, Y, progress_bar=False)
    assert result.assess(X, Y, draws=4, pareto_k=False) is result
    record = result.record
    assert record.gradient_variance.draws == 4 and record.gradient_variance.total.size == 6
    assert np.isfinite(record.quality.elbo.value) and record.quality.pareto_k is None
    assert "Where the noise comes from" in result.report()
    assert record.posterior.notes == () and record.posterior.sites and record.posterior.checks
    plan = record.plan
    assert plan.exact_temporary_bytes > 0 < plan.temporary_bytes and plan.exact_loss == "Trace_ELBO()"
    bare = dataclasses.replace(plan, exact_temporary_bytes=None)
    bare = dataclasses.replace(record, plan=bare)
    half = results._with_exact_step(bare, result.svi, result.state, (X[::2], Y[::2]), {})
    assert half is bare  # a smaller step is no step of this run
    broken = results._with_exact_step(bare, result.svi, result.state, ("no", "data"), {})
    assert broken is bare


@OUT_OF_SUPPORT
def test_a_loop_of_ones_own_has_a_record():
    svi = SVI(linear, AutoNormal(linear), optax.adam(1e-2), Trace_ELBO())
    state = svi.init(jax.random.key(0), X, Y)
    losses = []
    for _ in range(3):
        state, loss = svi.update(state, X, Y)
        losses.append(loss)
    record = fit_record(svi, state, losses, X, Y, seconds=1.5)
    assert (record.num_steps, record.num_params, record.plan) == (3, 6, None)
    bad = fit_record(svi, state, losses, X, np.full_like(Y, np.nan), assess=True, draws=2, pareto_k=False)
    assert bad.gradient_variance is None and "w_auto_loc" in bad.alarms[0].message  # named, and the rest is there
    assert bad.quality is not None


def test_results_and_objects_are_copied_and_pickled():
    svi = small(tracking=quiet(10))
    result = svi.run(jax.random.PRNGKey(0), 20, X, Y, progress_bar=False)
    for again in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
        assert same_run(again, result) and again.record.title == result.record.title
    assert result.svi is svi and same(result.args, (X, Y))
    other = copy.deepcopy(svi)
    assert same_run(other.run(jax.random.PRNGKey(0), 20, X, Y, progress_bar=False), result)


# -- how long it takes to begin ----------------------------------------------------------------------------------------


@pytest.fixture
def calibrations(monkeypatch):
    """Counts them, and has each take a while."""
    made, calibrate = [], RAD_ELBO.calibrate

    def counted(self, *args, **kwargs):
        made.append(calibrate(self, *args, **kwargs))
        return made[-1]

    monkeypatch.setattr(RAD_ELBO, "calibrate", counted)
    return made


@pytest.mark.slow
def test_init_and_run_calibrate_once(calibrations):
    """For the same start and data; what comes from elsewhere is measured anew."""
    svi = small(RAD_ELBO(memory_budget="1MiB"))
    svi.init(jax.random.key(KEY), X, Y)
    first = svi.run(jax.random.key(KEY), 2, X, Y, progress_bar=False)
    assert len(calibrations) == 1
    assert same_run(small(RAD_ELBO(memory_budget="1MiB")).run(jax.random.key(KEY), 2, X, Y, progress_bar=False), first)
    assert len(calibrations) == 2
    svi.run(jax.random.key(KEY), 2, X, -Y, progress_bar=False)
    assert len(calibrations) == 3
    svi.run(jax.random.key(4), 2, X, -Y, progress_bar=False)
    assert len(calibrations) == 4


@pytest.mark.slow
def test_time_is_told(calibrations, capsys):
    """While it passes and afterwards; all of it is accounted for."""
    svi = small(RAD_ELBO(memory_budget="1MiB"), tracking=quiet(interval=2))
    validate = X[:5], Y[:5]
    result = svi.run(jax.random.key(KEY), 4, X, Y, validate=validate, callbacks=[lambda look: None])
    shown = capsys.readouterr().err
    assert [name in shown for name in ("initial values", "calibrating", "tracing", "compiling")] == [True] * 4
    assert "4/4" in shown
    found = result.record.activities
    parts = {"initial values", "tracing", "calibrating", "compiling", "looking at the noise", "held-out data"}
    assert {*parts, "callbacks", "steps"} == set(found)
    assert min(found.values()) >= 0 and found["calibrating"] > 0
    assert sum(found.values()) == pytest.approx(result.record.seconds)
    text = result.report(format="markdown")
    assert "Wall time" in text and all(name in text for name in parts)


@pytest.mark.slow
def test_time_of_a_resumed_run_goes_on(tmp_path):
    first = small().run(jax.random.key(KEY), 2, X, Y, checkpoint=tmp_path / "c", progress_bar=False).record.activities
    again = small().run(jax.random.key(KEY), 4, X, Y, checkpoint=tmp_path / "c", progress_bar=False).record.activities
    assert {"compiling", "saving"} <= set(first)
    assert all(again[name] > s for name, s in first.items() if name in ("compiling", "steps"))
