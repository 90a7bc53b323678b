"""Convergence of iterates, against processes and models known in closed form."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zscores import assert_unbiased

from numpyro_rad.diagnostics.convergence import IterateAverage, Iterates, effective_sample_size, split_r_hat

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
    assert recorded(jumped).r_hat() == np.inf and not recorded(jumped).converged()


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
