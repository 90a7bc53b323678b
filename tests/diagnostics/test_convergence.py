"""Convergence of iterates, against processes and models known in closed form."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from fits import small_budget
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from traces import KINDS, outcomes
from zscores import assert_unbiased

from numpyro_rad.diagnostics.convergence import IterateAverage, Iterates, effective_sample_size, split_r_hat
from numpyro_rad.diagnostics.records import FitRecord, from_dict, to_dict
from numpyro_rad.report.verdict import findings
from numpyro_rad.training.svi import RAD_SVI

STEPS = 1200


def chain(correlation, steps=STEPS, columns=64, seed=0):
    """Stationary autoregressive processes of unit variance, (steps, columns)."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((steps, columns)) * np.sqrt(1 - correlation**2)
    rows = [rng.standard_normal(columns)]
    for e in noise[1:]:
        rows.append(correlation * rows[-1] + e)
    return np.stack(rows)


def recorded(rows, loss=None, **options):
    iterates = Iterates(**options)
    iterates.record(np.arange(len(rows)), rows, np.zeros(len(rows)) if loss is None else loss)
    return iterates


# -- random projections ------------------------------------------------------------------------------------------------


def parameters(seed=0):
    """Arrays on both sides of 4096 entries, where a sketch goes two ways."""
    rng = np.random.default_rng(seed)
    shapes = {"a": (), "b": (7,), "c": (90, 100), "d": (8192,)}
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


def test_sketch_keeps_inner_products_on_average():
    params, others = parameters(0), parameters(1)
    sketch = jax.jit(jax.vmap(Iterates.sketch, (None, 0)))
    numbers = jnp.arange(2000, dtype=jnp.uint32)
    ours, theirs = sketch(params, numbers), sketch(others, numbers)
    pairs = {(0, 0): (params, params), (0, 1): (params, others)}
    expected = [sum(jnp.vdot(a[n], b[n]) for n in a) for a, b in pairs.values()]
    draws = jnp.stack([(ours**2).sum(1), (ours * theirs).sum(1)], 1)
    assert_unbiased(np.asarray(draws, float), np.asarray(expected, float), "inner product of sketches")
    assert_unbiased(np.asarray(ours, float), np.zeros(64), "sketch")


def test_planted_sketch_without_signs_is_caught():
    buckets = jnp.asarray(np.random.default_rng(0).integers(0, 64, (200, 7)))
    draws = jax.vmap(lambda b: (jnp.zeros(64).at[b].add(1.0) ** 2).sum())(buckets)
    with pytest.raises(AssertionError, match="biased"):
        assert_unbiased(np.asarray(draws)[:, None], np.full(1, 7.0))


def test_sketch_is_linear_and_the_same_in_every_program():
    params, others = parameters(0), parameters(1)
    sketch = jax.jit(Iterates.sketch)
    both = jax.tree.map(lambda a, b: 2 * a - b, params, others)
    np.testing.assert_allclose(sketch(both), 2 * sketch(params) - sketch(others), rtol=1e-3, atol=1e-3)
    in_a_scan = jax.lax.scan(lambda carry, _: (carry, Iterates.sketch(carry)), params, None, length=2)[1]
    np.testing.assert_allclose(in_a_scan, np.stack([sketch(params)] * 2), rtol=1e-4, atol=1e-4)
    assert Iterates.sketch({}).shape == (64,)
    assert sketch({"half": jnp.ones(9, jnp.bfloat16), "none": jnp.zeros((0, 3))}).dtype == jnp.float32


def test_sketch_keeps_double_precision(double):
    near = [jax.jit(Iterates.sketch)({"x": jnp.full(100, x)}) for x in (1.0, 1 + 2.0**-40)]
    assert near[0].dtype == jnp.float64
    assert np.any(near[0] != near[1])


# -- the rule ----------------------------------------------------------------------------------------------------------


def test_stationary_iterates_have_converged():
    iterates = recorded(chain(0.3))
    assert iterates.r_hat() < 1.1
    assert 1 / np.sqrt(STEPS / 2) < iterates.mcse() < 0.1
    assert iterates.stationary() and iterates.converged()


@pytest.mark.parametrize("what", ["drift", "random walk", "loss falls", "one parameter drifts"])
def test_iterates_that_move_have_not_converged(what):
    rows, loss = chain(0.0), np.random.default_rng(1).standard_normal(STEPS)
    slope = np.linspace(0, 6, STEPS)
    if what == "drift":
        rows += slope[:, None]
    elif what == "random walk":
        rows = np.cumsum(rows, 0)
    elif what == "loss falls":
        loss -= slope
    else:
        rows[:, 17] += slope
    iterates = recorded(rows, loss)
    assert iterates.r_hat() > 1.1
    assert not iterates.stationary() and not iterates.converged()


def test_correlated_iterates_are_stationary_long_before_their_mean_is_known():
    """ESS is a quarter of what 0.1 needs, so MCSE is about 0.2 in an average column and more in the worst."""
    rows = chain(0.99, 60_000)[:, :1] * np.ones(64)
    iterates = recorded(rows[-10_000:], every=10)
    assert iterates.mcse() > 0.1 and not iterates.converged()


def test_too_few_or_bad_iterates_are_not_judged():
    few = recorded(chain(0.0, 99))
    assert few.r_hat() is None and few.mcse() is None and not few.converged()
    rows = chain(0.0)
    rows[-8:, 3] = np.nan
    assert recorded(rows).r_hat() == recorded(rows).mcse() == np.inf and not recorded(rows).converged()


def test_iterates_that_stand_still_have_converged():
    """Deterministic gradients end in rounding, and buckets without parameters stay at zero."""
    rounding = np.random.default_rng(0).choice([0.0, 2.0**-23], (200, 64))
    iterates = recorded(1 + rounding * (np.arange(64) > 5))
    assert (iterates.r_hat(), iterates.mcse(), iterates.converged()) == (1, 0, True)
    jumped = np.repeat([[0.0], [1.0]], [150, 50], 0) * np.ones(64)
    assert recorded(jumped).r_hat() > 1.2 and not recorded(jumped).converged()


@pytest.mark.parametrize("name", ["independent", "AR(1), half 4 and half 150 steps", "transient, 300 steps"])
def test_a_rule_that_is_asked_again_and_again_stops_once_a_trace_has_settled(name):
    found = outcomes(name, 4, 2)
    assert all(KINDS[name].settled <= (s or np.inf) <= 6000 for s in found)


@pytest.mark.parametrize("name", ["random walk", "drift, 20 spreads, in one", "slow periodic", "staircase, in one"])
def test_a_rule_that_is_asked_again_and_again_has_no_false_alarms(name):
    assert outcomes(name, 4, 2) == [None, None]


def test_a_planted_rule_has_false_alarms():
    """The smallest R-hat alone, as one might have it."""
    found = outcomes("slow periodic", 4, 2, lambda iterates: (iterates.r_hat() or 2) < 1.1)
    assert None not in found


@pytest.mark.slow
def test_false_alarms_and_delay_are_as_the_docstring_says():
    """Its rates are of 30 traces, whose first 12 are within three standard deviations of them."""
    rows = [line.split("|") for line in Iterates.__doc__.splitlines() if line.strip().startswith("| ")]
    stated = {name.strip(): share.strip(" %") for _, name, share, *_ in rows if name.strip() in KINDS}
    assert set(stated) == set(KINDS)
    for name, share in stated.items():
        early = [s is not None and s < KINDS[name].settled for s in outcomes(name, 4, 12)]
        expected = float(share or 0) / 100
        assert abs(np.mean(early) - expected) < 3 * np.sqrt((expected * (1 - expected) + 0.01) / 12), name


def regression(seed, num_steps, **options):
    """Five latent variables, and the exact posterior: mean and standard deviation."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((200, 5)).astype(np.float32)
    y = (x @ rng.standard_normal(5) + 0.5 * rng.standard_normal(200)).astype(np.float32)

    def model(x, y):
        w = numpyro.sample("w", dist.Normal(0, 1).expand([5]).to_event(1))
        numpyro.sample("y", dist.Normal(x @ w, 0.5).to_event(1), obs=y)

    precision = np.eye(5) + x.T @ x / 0.25
    svi = RAD_SVI(model, AutoNormal(model), optax.adam(0.03), Trace_ELBO(), tracking=None)
    result = svi.run(jax.random.key(seed), num_steps, x, y, progress_bar=False, **options)
    return result, np.linalg.solve(precision, x.T @ y / 0.25), 1 / np.sqrt(np.diag(precision))


@pytest.mark.slow
def test_a_linear_regression_stops_where_its_posterior_is_found():
    result, mean, sd = regression(0, num_steps=5000, stop="converged")
    assert result.stopped_at is not None and 1000 <= result.stopped_at < 5000
    assert np.abs((result.params["w_auto_loc"] - mean) / sd).max() < 1  # the noise of one iterate; 40 at first
    np.testing.assert_allclose(result.params["w_auto_scale"], sd, rtol=0.25)
    (found,) = [f for f in findings(result.record) if "iterates" in f.what]
    assert found.level == "good" and "split R-hat" in found.what


def test_a_run_that_never_stops_says_how_far_it_was():
    with pytest.warns(
        UserWarning, match=r'stop="converged", but all 300 steps were taken: the largest split R-hat is \d'
    ):
        result, *_ = regression(0, num_steps=300, stop="converged")
    assert result.stopped_at is None and "had not converged" in result.record.options["ending"]
    (found,) = [f for f in findings(result.record) if "split R-hat" in f.what]
    assert found.level == "note" and found.what.startswith("The loss is level, but the parameters")
    falling = dataclasses.replace(small_budget(), quality=None, convergence=result.record.convergence)
    (found,) = [f for f in findings(falling) if "split R-hat" in f.what]
    assert found.level == "warning" and "not converged" in found.what
    text = result.report(format="markdown")
    assert "Convergence" in text and "has to be below 1.1" in text
    assert from_dict(FitRecord, to_dict(result.record)).convergence == result.record.convergence
    older = {k: v for k, v in to_dict(result.record).items() if k != "convergence"}
    assert from_dict(FitRecord, older).convergence is None


def test_r_hat_of_the_definition():
    draws = np.asarray([[1.0, 2, 4, 3, 7, 5]]).T
    within = (np.var([1, 2, 4], ddof=1) + np.var([3, 7, 5], ddof=1)) / 2
    between = 3 * np.var([7 / 3, 5], ddof=1)
    np.testing.assert_allclose(split_r_hat(draws), np.sqrt((2 / 3 * within + between / 3) / within))
    np.testing.assert_array_equal(split_r_hat(np.concatenate([[[100.0]], draws])), split_r_hat(draws))


@pytest.mark.parametrize("correlation", [0.0, 0.6, 0.9, -0.4])
def test_effective_sample_size_predicts_the_variance_of_the_mean(correlation):
    """Var(mean) = 1 / ESS for unit variance; 3 % is the error of a variance from 2000 columns."""
    rows = chain(correlation, 2000, 2000)
    size = effective_sample_size(rows)
    expected = 2000 * (1 - correlation) / (1 + correlation)
    assert abs(1 / rows.mean(0).var() / expected - 1) < 0.15  # the processes are what they should be
    assert abs(np.median(size) / expected - 1) < 0.15


# -- the record --------------------------------------------------------------------------------------------------------


def test_memory_is_bounded_and_the_rows_depend_on_the_steps_alone():
    rows = chain(0.0, 5000)
    whole, pieces = recorded(rows), Iterates()
    for i, row in enumerate(rows):
        if pieces.wants(i):
            pieces.record(i, row, 0.0)
    assert len(whole) < 1024 and whole.stride == 8
    np.testing.assert_array_equal(whole.steps, np.arange(0, 5000, 8))
    np.testing.assert_array_equal(whole.rows[:, :64], rows[::8])
    assert whole.to_dict() == pieces.to_dict()


def test_restored_iterates_go_on_to_the_bit():
    rows = chain(0.0, 3000)
    whole, first = recorded(rows, every=2), recorded(rows[:1234], every=2)
    rest = Iterates.restore(json.loads(json.dumps(first.to_dict())))
    rest.record(np.arange(1234, 3000), rows[1234:], np.zeros(1766))
    assert rest.to_dict() == whole.to_dict()
    assert rest.r_hat() == whole.r_hat() and rest.mcse() == whole.mcse()
    assert Iterates.restore(json.loads(json.dumps(Iterates().to_dict()))).to_dict() == Iterates().to_dict()


@pytest.mark.parametrize(
    "change",
    [{"stride": 0}, {"rows": "AAAA"}, {"rows": "?"}, {"steps": [1]}, {"steps": None}, {"stride": "x"}],
    ids=str,
)
def test_foreign_data_is_refused(change):
    with pytest.raises(ValueError, match=r"Iterates\.to_dict|every="):
        Iterates.restore({**recorded(chain(0.0, 10)).to_dict(), **change})
    with pytest.raises(ValueError, match=r"Iterates\.to_dict"):
        Iterates.restore({})


def test_records_parameters_as_their_sketch():
    params = parameters()
    ours, theirs = Iterates(), Iterates()
    ours.record(3, params, jnp.float32(2.0))
    theirs.record(jnp.asarray([3]), jax.jit(Iterates.sketch)(params)[None], jnp.asarray([2.0]))
    assert ours.to_dict() == theirs.to_dict()


def test_wrong_records_are_refused_and_leave_nothing():
    iterates = recorded(chain(0.0, 10))
    before = iterates.to_dict()
    for step, sketch, loss in [(10, np.zeros(63), 0.0), ([10, 11], np.zeros((2, 64)), 0.0), (10, np.zeros((1, 65)), 0)]:
        with pytest.raises(ValueError, match=r"sketch|concat"):
            iterates.record(step, sketch, loss)
    for steps in ([9], [11, 10]):
        with pytest.raises(ValueError, match="do not increase"):
            iterates.record(steps, np.zeros((len(steps), 64)), np.zeros(len(steps)))
    assert iterates.to_dict() == before
    with pytest.raises(ValueError, match="every=0"):
        Iterates(every=0)


# -- averaging ---------------------------------------------------------------------------------------------------------


def test_average_is_better_than_the_last_iterate_on_a_noisy_quadratic():
    """Gradient descent on x²/2 with noise: the last iterate has variance rate / (2 - rate), the mean far less."""
    rate, steps, size = 0.3, 1000, 2000

    def step(carry, key):
        x, average = carry
        x = x - rate * (x + jax.random.normal(key, (size,)))
        return (x, average.update({"x": x})), None

    x = jax.random.normal(jax.random.key(0), (size,)) * np.sqrt(rate / (2 - rate))
    start = (x, IterateAverage.start({"x": x}))
    (last, average), _ = jax.lax.scan(step, start, jax.random.split(jax.random.key(1), steps))
    assert int(average.count) == steps + 1
    # the mean of n steps of an AR(1) process: variance 1 / n for unit noise in the gradient
    expected = np.asarray([rate / (2 - rate), 1 / steps])
    np.testing.assert_allclose([np.mean(last**2), np.mean(average.mean["x"] ** 2)], expected, rtol=0.15)


def test_average_of_half_precision_is_kept_in_single_precision():
    values = 1 + np.arange(256) / 128
    average = IterateAverage.start({"x": jnp.asarray(values[:1], jnp.bfloat16)})
    for value in values[1:]:
        average = average.update({"x": jnp.asarray([value], jnp.bfloat16)})
    assert average.mean["x"].dtype == jnp.float32
    np.testing.assert_allclose(
        average.mean["x"], np.asarray(jnp.asarray(values, jnp.bfloat16), float).mean(), rtol=1e-6
    )
