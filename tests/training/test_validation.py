"""The loss on held-out data is the exact one at the states of the run, and a run may stop by it."""

import dataclasses
import json

import fits
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from models import looks_at_data
from numpyro.infer import Trace_ELBO, TraceMeanField_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from numpyro.primitives import mutable

from numpyro_rad import RAD_ELBO, Plateau, report
from numpyro_rad.diagnostics.records import FitRecord, Validation, from_dict, to_dict
from numpyro_rad.report.verdict import findings, rise_since_lowest
from numpyro_rad.training.svi import RAD_SVI
from numpyro_rad.training.validation import _TAG, DRAWS, Validator

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X, X_OUT = (RNG.standard_normal((n, 3)).astype(np.float32) for n in (40, 15))
Y, Y_OUT = (x.sum(1) + RNG.standard_normal(len(x)).astype(np.float32) for x in (X, X_OUT))


SOME = slice(0, DRAWS, 5)  # of the draws: to compare


def linear(x, y=None):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with numpyro.plate("points", len(x)):
        numpyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def fit(model=linear, guide=None, loss=None):
    return RAD_SVI(model, guide or AutoNormal(model), optax.adam(1e-2), loss, tracking=None)


def run(steps, *data, svi=None, **options):
    return (svi or fit()).run(KEY, steps, *(data or (X, Y)), progress_bar=False, **options)


def draws(svi, first_state, params, *data, elbo=None, **kwargs):
    """The slow twin: NumPyro's loss, one draw after the other."""
    keys = jax.random.split(jax.random.fold_in(first_state.rng_key, _TAG), DRAWS)
    loss = (elbo or Trace_ELBO()).loss
    return np.array([loss(k, params, svi.model, svi.guide, *data, **kwargs) for k in keys[SOME]])


def same_run(a, b):
    a, b = (jax.tree.leaves((r.params, r.state.optim_state, r.losses)) for r in (a, b))
    return len(a) == len(b) and all(map(np.array_equal, a, b))


def test_it_is_the_exact_loss_and_changes_nothing(capsys):
    svi, seen = fit(), []
    options = {"callbacks": [seen.append], "validate": (X_OUT, Y_OUT)}
    result = svi.run(KEY, 250, X, Y, **options)
    assert "held out" in capsys.readouterr().err
    found = result.record.validation
    assert found.steps.tolist() == [100, 200, 250]  # there is one at the end
    first = fit().init(KEY, X, Y)
    for look, row in zip(seen, found.losses, strict=False):
        expected = draws(svi, first, svi.get_params(look.state), X_OUT, Y_OUT)
        np.testing.assert_allclose(row[SOME], expected, rtol=1e-5)
        assert look.validation.steps[-1] == look.step and np.array_equal(look.validation.losses[-1], row)
    np.testing.assert_allclose(found.losses[-1, SOME], draws(svi, first, result.params, X_OUT, Y_OUT), rtol=1e-5)
    assert same_run(result, run(250))
    text = result.report(format="markdown")
    assert "## Loss on held-out data" in text


@pytest.mark.slow
def test_a_resumed_run_looks_as_if_it_had_never_ended(tmp_path):
    options = {"validate": (X_OUT, Y_OUT), "stop": Plateau(patience=2)}
    whole = run(1500, **options)
    run(150, checkpoint=tmp_path, **options)  # its last look is none of the whole run
    rest = run(1500, checkpoint=tmp_path, **options)
    assert same_run(rest, whole)
    assert 300 <= whole.stopped_at == rest.stopped_at < 1500
    for field in ("steps", "losses"):
        assert np.array_equal(getattr(rest.record.validation, field), getattr(whole.record.validation, field))
    assert "held-out data had not fallen for 2 looks" in rest.record.options["ending"]
    with pytest.warns(UserWarning, match="has other data than the run that goes on"):  # of the same shape
        other = run(1500, checkpoint=tmp_path, validate=(X_OUT + 1, Y_OUT))
    assert other.record.validation.steps.tolist()[-1] == len(other.losses)


def scaled(x, scale=1.0, y=None):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    numpyro.sample("y", dist.Normal(x @ w, scale).to_event(1), obs=y)


@pytest.mark.slow
def test_batches_of_held_out_data():
    svi = fit(scaled, loss=RAD_ELBO(base=TraceMeanField_ELBO(num_particles=3)))
    parts = [{"x": X_OUT[:6], "y": Y_OUT[:6]}, {"x": X_OUT[6:12], "y": Y_OUT[6:12]}]
    result = svi.run(KEY, 3, batches=lambda _: [{"x": X, "y": Y}], scale=2.0, progress_bar=False, validate=parts)
    first = fit(scaled).init(KEY, X, 2.0, Y)
    elbo = TraceMeanField_ELBO()
    each = [draws(svi, first, result.params, elbo=elbo, scale=2.0, **part) for part in parts]
    np.testing.assert_allclose(result.record.validation.losses[-1, SOME], np.mean(each, 0), rtol=1e-5)


def counting(y):
    state = mutable("count", {"value": jnp.zeros(())})
    state["value"] = state["value"] + 1.0
    a = numpyro.sample("a", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(a + state["value"], 1).expand([len(y)]).to_event(1), obs=y)


def test_mutable_state_is_used_and_left_alone():
    svi = fit(counting)
    result = run(5, Y, svi=svi, validate=Y_OUT)
    count = float(result.state.mutable_state["count"]["value"])
    assert count == 5 + 1  # once for init
    values = {**result.params, "count": {"value": jnp.asarray(count)}}
    keys = jax.random.split(jax.random.fold_in(fit(counting).init(KEY, Y).rng_key, _TAG), DRAWS)
    elbo = Trace_ELBO()
    expected = [elbo.loss_with_mutable_state(k, values, counting, svi.guide, Y_OUT)["loss"] for k in keys[SOME]]
    np.testing.assert_allclose(result.record.validation.losses[-1, SOME], expected, rtol=1e-5)


@pytest.mark.slow
def test_a_model_that_looks_at_its_data():
    result = run(3, np.arange(12) % 3, np.arange(12.0), svi=fit(looks_at_data), validate=(np.arange(3), np.ones(3)))
    assert np.isfinite(result.record.validation.losses).all()


def local(x):
    with numpyro.plate("points", len(x)):
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("x", dist.Normal(z, 1), obs=x)


def amortized(x):
    slope = numpyro.param("slope", 0.1)
    with numpyro.plate("points", len(x)):
        numpyro.sample("z", dist.Normal(slope * x, 0.5))


def without_plates(x):
    z = numpyro.sample("z", dist.Normal(0, 1).expand([len(x)]).to_event(1))
    numpyro.sample("x", dist.Normal(z, 1).to_event(1), obs=x)


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal])
def test_parameters_of_rows_are_no_use_for_other_rows(guide):
    with pytest.raises(
        ValueError, match=r"parameters for each row of the training data .*z.* compute them from the data"
    ):
        run(3, Y, svi=fit(local, guide(local)), validate=np.resize(Y_OUT, len(Y)))  # the same number


def test_local_sites_of_amortized_guides_and_without_plates():
    result = run(3, Y, svi=fit(local, amortized), validate=Y_OUT)
    assert np.isfinite(result.record.validation.losses).all()
    with pytest.raises(ValueError, match="validate: the loss on the held-out data cannot be evaluated"):
        run(3, Y, svi=fit(without_plates), validate=Y_OUT)


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"Pass validate=\(x, y\)"):
        run(3, stop=Plateau())
    with pytest.raises(TypeError, match=r"Make one: stop=Plateau\(\)"):
        run(3, stop=Plateau, validate=(X, Y))
    with pytest.raises(ValueError, match="there are no held-out data"):
        run(3, validate=[])
    for wrong in ({"patience": 0}, {"patience": 1.5}, {"relative": 1}, {"relative": float("nan")}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            Plateau(**wrong)


@pytest.mark.parametrize(
    ("losses", "reached"),
    [
        ([], False),
        ([5, 4, 3, 2, 1], False),
        ([5, 4, 4.1, 4.2, 4], True),
        ([5, 4, 4.1, 4.2, 3], False),
        ([5, 4, 4.1, 4.2], False),
        ([-1, -5, -4.9999, -5.0001, -5.0002], True),  # less than a share of the fall is none
        ([np.nan, np.nan, np.nan], True),
        ([np.inf, 5, 4, np.nan, 3], False),
        ([5, np.nan, 4, 6, np.inf, np.nan], True),
        ([1, 2, 3], False),
        ([1, 2, 3, 4], True),
    ],
)
def test_plateau(losses, reached):
    assert Plateau(patience=3, relative=1e-3).reached(np.array(losses, float)) is reached


# -- what is made of it ------------------------------------------------------------------------------------------------


def looked(curve, jitter=1.0, draws=8, seed=0):
    """A curve of a fit, with what its draws have in common, what they have not, and the jitter of the iterates."""
    rng = np.random.default_rng(seed)
    curve = np.asarray(curve, float)
    own, moving = rng.normal(0, 30, draws), rng.normal(0, jitter, (len(curve), 1))
    losses = curve[:, None] + own + moving + rng.normal(0, jitter, (len(curve), draws))
    return Validation(np.arange(1, len(curve) + 1) * 100, losses)


def test_a_rise_beyond_noise_is_said():
    steps = np.linspace(0, 1, 60)
    rising = dataclasses.replace(fits.good(), validation=looked(500 * np.exp(-9 * steps) + 60 * steps))
    (found,) = [f for f in findings(rising) if "held-out data" in f.what]
    lowest = int(rising.validation.steps[np.argmin(rising.validation.mean)])
    assert found.level == "warning" and f"lowest at step {lowest:,} and has risen" in found.what
    assert "Held-out loss over time" in report.html(rising) and f"{lowest:,}" in report.terminal(rising)
    falling = dataclasses.replace(rising, validation=looked(500 * np.exp(-3 * steps)))
    (found,) = [f for f in findings(falling) if "held-out data" in f.what]
    assert found.level in ("good", "note")
    broken = dataclasses.replace(rising, validation=looked([5.0, np.nan, np.inf]))
    (found,) = [f for f in findings(broken) if "held-out data" in f.what]
    assert found.level == "warning" and "first at step 200" in found.what
    assert "held-out" in report.html(broken)


def test_flat_curves_rarely_seem_to_rise():
    found = [rise_since_lowest(looked(np.zeros(n), seed=s))[2] for s in range(150) for n in (8, 30, 200)]
    assert np.mean(found) < 0.02


def test_records_with_and_without_it(tmp_path):
    record = dataclasses.replace(fits.good(), validation=looked([3.0, 2.0, np.nan]))
    report.save(record, tmp_path / "fit.json")
    again = report.load(tmp_path / "fit.json").validation
    assert np.array_equal(again.losses, record.validation.losses, equal_nan=True)
    assert again.steps.tolist() == [100, 200, 300] and again.steps.dtype == record.validation.steps.dtype
    older = {k: v for k, v in to_dict(fits.good()).items() if k != "validation"}
    assert from_dict(FitRecord, json.loads(json.dumps(older))).validation is None
    with pytest.raises(ValueError, match="losses"):
        from_dict(FitRecord, {k: v for k, v in older.items() if k != "losses"})


def deep(x, y=None):
    for i in range(6):
        w = numpyro.sample(f"w{i}", dist.Normal(0, 1).expand([x.shape[1], 16]).to_event(2))
        x = jnp.tanh(x @ w)
    numpyro.sample("y", dist.Normal(x.sum(1), 1).to_event(1), obs=y)


@pytest.mark.slow
def test_nothing_is_kept_for_a_backward_sweep():
    x, y = np.ones((4096, 16), np.float32), np.ones(4096, np.float32)
    svi = fit(deep, loss=Trace_ELBO())
    state = svi.init(KEY, x, y)
    (look,) = Validator(svi, state, [((x, y), {})])._functions
    both = svi.update, lambda state, *args: look(state, args, {})
    step, looked_at = (jax.jit(f).lower(state, x, y).compile().memory_analysis().temp_size_in_bytes for f in both)
    assert looked_at < step / 2  # at most two layers of one draw, in place of all six
