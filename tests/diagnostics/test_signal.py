"""``gradient_signal`` against gradients of known mean and variance, and in every place where optimizers are nested."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from programs import few
from zscores import assert_unbiased

from numpyro_rad.diagnostics.signal import GradientSignalState, gradient_signal, nonfinite_gradients, signal_to_noise

SEEDS = 32


def watched(gradients, params=None, decay=0.9):
    """The state after gradients that are stacked along their first axis."""
    watch = gradient_signal(decay)
    params = jax.tree.map(lambda g: g[0], gradients) if params is None else params

    def step(state, gradient):
        return watch.update(gradient, state, params)[1], None

    return jax.lax.scan(step, watch.init(params), gradients)[0]


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def noisy_gradients(steps, ratio, size=500):
    """Gradients with unit noise and a mean of this signal-to-noise ratio, for each of many seeds."""
    noise = np.random.default_rng(0).standard_normal((SEEDS, steps, size), np.float32)
    return {"x": jnp.asarray(noise + np.float32(np.sqrt(ratio)))}


@pytest.mark.parametrize("steps", [2, 5, 100])
@pytest.mark.parametrize("ratio", [0.0, 0.05, 2.0])
def test_ratio_is_that_of_independent_gradients(steps, ratio):
    states = jax.jit(jax.vmap(watched))(noisy_gradients(steps, ratio))
    states = jax.device_get(states)
    each = [jax.tree.map(lambda x, i=i: x[i], states) for i in range(SEEDS)]
    draws = np.asarray([[signal_to_noise(state)["x"]] for state in each])
    assert_unbiased(draws, np.full(1, ratio), "signal-to-noise ratio")


def test_planted_ratio_that_takes_the_noise_of_the_average_for_signal_is_caught():
    states = jax.jit(jax.vmap(watched))(noisy_gradients(100, 0.05))
    squared, square = (states.mean["x"] ** 2).sum(-1), states.square["x"]
    with pytest.raises(AssertionError, match="biased"):
        assert_unbiased(np.asarray(squared / (square - squared))[:, None], np.full(1, 0.05))


def test_a_mean_that_moves_counts_as_noise():
    """What the docstring confesses: gradients almost without noise, whose mean moves along, have a finite ratio."""
    moving = {"x": 10.0 + jnp.arange(500.0)[:, None] * jnp.ones(3)}
    still = {"x": 10.0 + 1e-3 * jax.random.normal(jax.random.key(0), (500, 3))}
    assert signal_to_noise(watched(moving))["x"] < 1e4 < signal_to_noise(watched(still))["x"]


def test_too_few_gradients_and_gradients_without_noise():
    assert np.isnan(signal_to_noise(gradient_signal().init({"x": jnp.ones(2)}))["x"])
    assert np.isnan(signal_to_noise(watched({"x": jnp.ones((1, 2))}))["x"])
    assert signal_to_noise(watched({"x": jnp.zeros((9, 2))}))["x"] != 0  # no signal and no noise: unknown
    assert signal_to_noise(watched({"x": jnp.full((9, 1), 2.0)}, decay=0.5))["x"] > 1e5


def test_bad_gradients_are_counted_and_left_out():
    good = jax.random.normal(jax.random.key(0), (20, 3)) + 1
    bad = good.at[4, 1].set(jnp.nan).at[9, 0].set(jnp.inf).at[12].set(1e30)
    state = watched({"hurt": bad, "well": good})
    alone = watched({"hurt": good[np.asarray([i for i in range(20) if i not in (4, 9, 12)])]})
    assert nonfinite_gradients(state) == {"hurt": 3, "well": 0}
    assert signal_to_noise(state) == {
        **signal_to_noise(alone),
        "well": signal_to_noise(watched({"well": good}))["well"],
    }


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_structure_never_changes_whatever_the_precision(dtype):
    params = {"a": jnp.ones((3, 2), dtype), "nested": {"b": jnp.ones((), dtype)}}
    watch = gradient_signal()
    state = watch.init(params)
    passed, after = jax.jit(watch.update)(params, state)
    kinds = [jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), one) for one in (state, after)]
    assert kinds[0] == kinds[1]
    assert_same(passed, params)
    assert {x.dtype for x in jax.tree.leaves(after.mean)} == {jnp.dtype(jnp.float32)}
    assert list(signal_to_noise(after)) == ["a", "nested.b"]


def test_double_precision_stays(double):
    state = watched({"x": jnp.ones((4, 3), jnp.float64)})
    assert state.mean["x"].dtype == state.square["x"].dtype == jnp.float64


# -- where it is found -------------------------------------------------------------------------------------------------


def model(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    bias = numpyro.sample("bias", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(slope * x + bias, 1.0), obs=y)


DATA = np.linspace(-1, 1, 20), np.linspace(-1, 2, 20)
NAMES = {f"{site}_auto_{what}" for site in ("slope", "bias") for what in ("loc", "scale")}


def of_scales(params):
    return {name: name.endswith("scale") for name in params}


OPTIMIZERS = {
    "chain": lambda: optax.chain(gradient_signal(), optax.adam(0.01)),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), gradient_signal(), optax.adam(0.01)),
    "multi_transform": lambda: optax.multi_transform(
        {
            True: optax.chain(gradient_signal(), optax.adam(0.01)),
            False: optax.chain(gradient_signal(), optax.sgd(0.01)),
        },
        of_scales,
    ),
    "every second": lambda: optax.MultiSteps(
        optax.chain(gradient_signal(), optax.adam(0.01)), 2
    ).gradient_transformation(),
}


@pytest.mark.parametrize("progress_bar", few([True, False], True, slow=0))
@pytest.mark.parametrize("kind", few(OPTIMIZERS, "chain", slow=9))
def test_is_found_in_a_run_of_svi_and_changes_nothing(kind, progress_bar):
    svi = SVI(model, AutoNormal(model), OPTIMIZERS[kind](), Trace_ELBO())
    result = svi.run(jax.random.key(0), 20, *DATA, progress_bar=progress_bar)
    for state in (result, result.state, result.state.optim_state, result.state.optim_state[1][1]):
        ratios = signal_to_noise(state)
        assert set(ratios) == NAMES and np.isfinite(list(ratios.values())).all()
    assert set(nonfinite_gradients(result).values()) == {0}
    if kind == "chain":
        plain = SVI(model, AutoNormal(model), optax.adam(0.01), Trace_ELBO())
        assert_same(plain.run(jax.random.key(0), 20, *DATA, progress_bar=progress_bar).params, result.params)


def test_masked_parameters_are_left_out():
    optimizer = optax.chain(optax.masked(gradient_signal(), of_scales), optax.adam(0.01))
    svi = SVI(model, AutoNormal(model), optimizer, Trace_ELBO())
    result = svi.run(jax.random.key(0), 5, *DATA, progress_bar=False)
    assert set(signal_to_noise(result.state)) == {name for name in NAMES if name.endswith("scale")}


@pytest.mark.slow
def test_ratio_in_svi_is_that_of_its_gradients():
    """With a learning rate of zero the gradients of all steps are independent draws at one point."""
    optimizer = optax.chain(gradient_signal(0.999), optax.sgd(0.0))
    svi = SVI(model, AutoNormal(model, init_scale=0.3), optimizer, Trace_ELBO())
    state = svi.init(jax.random.key(0), *DATA)
    result = svi.run(jax.random.key(0), 4000, *DATA, init_state=state, progress_bar=False)
    params = svi.optim.get_params(state.optim_state)

    def loss(free, key):
        return Trace_ELBO().loss(key, svi.constrain_fn(free), model, svi.guide, *DATA)

    keys = jax.random.split(jax.random.key(7), 20_000)
    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, keys)
    for name, ratio in signal_to_noise(result).items():
        expected = float(gradients[name].mean() ** 2 / gradients[name].var())
        error = np.sqrt((4 * expected + 2 * expected**2 + 2 / 2000) / 2000)  # of a ratio from about 2000 draws
        assert abs(ratio - expected) < 4 * error, name


def test_state_that_is_not_there_or_there_twice():
    params = {"x": jnp.ones(2)}
    with pytest.raises(ValueError, match="no state of gradient_signal in this tuple"):
        signal_to_noise(optax.adam(0.1).init(params))
    with pytest.raises(ValueError, match="no state of gradient_signal in this dict"):
        nonfinite_gradients(params)
    twice = optax.chain(gradient_signal(), optax.clip(1.0), gradient_signal()).init(params)
    with pytest.raises(ValueError, match="more than once for x"):
        signal_to_noise(twice)
    assert isinstance(twice[0], GradientSignalState) and list(signal_to_noise(twice[0])) == ["x"]


@pytest.mark.parametrize("decay", [0, 1, 1.5, -0.1, float("nan")])
def test_wrong_decay(decay):
    with pytest.raises(ValueError, match="decay="):
        gradient_signal(decay)
