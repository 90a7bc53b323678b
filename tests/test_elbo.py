"""``RAD_ELBO`` is ``Trace_ELBO`` with another way to the gradient: same values, same arguments, same places of use.

The slow twin throughout is ``Trace_ELBO`` itself. Values are compared to the bit where both run the same program.
Gradients of the exact plan (``codec=Keep()``) are compared in double precision, where a difference of 1e-9 is not
rounding; the random ones by z-scores over path keys.
"""

import copy
import dataclasses
import pickle
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from models import (
    bars,
    classes,
    logistic,
    network_regression,
    partial_pooling,
    seasons,
    stochastic_volatility,
    vae_guide,
    vae_model,
    wave,
)
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, autoguide
from numpyro.infer.autoguide import AutoDelta, AutoNormal
from numpyro.primitives import mutable
from programs import KEY, assert_close, assert_equal_trees, exact, few, flat, is_random, network, program, small_network
from zscores import assert_unbiased

from numpyro_rad import RAD_ELBO, BudgetError, Keep, NoiseKeys, StochasticRound, explain
from numpyro_rad.planning import Planner

DRAWS = 2048


# -- one word changed: the same value and, with the exact plan, the same gradient --------------------------------------


def test_is_a_trace_elbo_with_the_same_positional_arguments():
    one_particle_map = partial(jax.lax.map, batch_size=2)
    ours = RAD_ELBO(3, one_particle_map, True, False)
    theirs = Trace_ELBO(3, one_particle_map, True, False)
    assert isinstance(ours, Trace_ELBO)
    assert {name: getattr(ours, name) for name in vars(theirs)} == vars(theirs)
    assert RAD_ELBO.can_infer_discrete is Trace_ELBO.can_infer_discrete
    with pytest.raises(TypeError, match="positional"):
        RAD_ELBO(1, True, False, True, "64MiB")


@pytest.mark.parametrize(
    "options",
    [{}, *(pytest.param(o, marks=pytest.mark.slow) for o in ({"codec": Keep()}, {"memory_budget": "1MiB"}))],
    ids=str,
)
def test_value_is_the_value_of_trace_elbo_to_the_bit(options):
    problem = small_network()
    for key in (jax.random.key(KEY), jax.random.PRNGKey(KEY)):  # typed and raw
        ours = jax.jit(partial(problem.loss, RAD_ELBO(**options)))(key, problem.params)
        theirs = jax.jit(partial(problem.loss, Trace_ELBO()))(key, problem.params)
        np.testing.assert_array_equal(ours, theirs)
        # without jit the one program is compiled and the other runs operation by operation
        np.testing.assert_allclose(problem.loss(RAD_ELBO(**options), key, problem.params), theirs, rtol=1e-6)


def pooled(guide=AutoNormal, groups=8, **kwargs):
    return program(partial_pooling, guide(partial_pooling, **kwargs), *seasons(groups))


def split_guide():
    """One guide for a part of the model, another for the rest, by ``block``."""
    model = partial(robust, likelihood="normal")
    guide = autoguide.AutoGuideList(model)
    guide.append(AutoNormal(handlers.block(model, hide=["scale"])))
    guide.append(AutoDelta(handlers.block(model, expose=["scale"])))
    return program(model, guide, *wave(32))


def weighted(x, y, observed):
    """A likelihood that counts twice, and points that do not count."""
    w = numpyro.sample("w", dist.Normal(jnp.zeros(x.shape[1]), 1.0).to_event(1))
    with numpyro.plate("points", x.shape[0]), handlers.scale(scale=2.0), handlers.mask(mask=observed):
        numpyro.sample("y", dist.Normal(jnp.tanh(x @ w), 0.5), obs=y)


def running_mean(x, y):
    """A model with state: the mean of the inputs so far, used to centre them."""
    state = mutable("state", {"mean": jnp.zeros(x.shape[1])})
    state["mean"] = 0.9 * state["mean"] + 0.1 * x.mean(0)
    network(x - state["mean"], y)


def robust(x, y=None, *, likelihood, scale=None, degrees=4):
    """Arguments that are no arrays: a string, None, an int."""
    weights = numpyro.sample("weights", dist.Normal(jnp.zeros(x.shape[1]), 1.0).to_event(1))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0)) if scale is None else scale
    loc = jnp.tanh(x @ weights)
    noise = dist.StudentT(degrees, loc, scale) if likelihood == "student" else dist.Normal(loc, scale)
    with numpyro.plate("points", x.shape[0]):
        numpyro.sample("y", noise, obs=y)


def with_flax():
    """Weights of a flax network as parameters (a tree in one parameter) and batch statistics as mutable state."""
    linen = pytest.importorskip("flax.linen", reason="flax is not installed")
    from numpyro.contrib.module import flax_module

    class Network(linen.Module):
        @linen.compact
        def __call__(self, x):
            h = linen.BatchNorm(use_running_average=False)(linen.Dense(8)(x))
            return linen.Dense(1)(jnp.tanh(h))[:, 0]

    def model(x, y):
        network = flax_module("network", Network(), x, mutable=["batch_stats"])
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        numpyro.sample("y", dist.Normal(network(x), scale).to_event(1), obs=y)

    return program(model, AutoNormal(model), *wave(32))


def with_random_flax():
    linen = pytest.importorskip("flax.linen", reason="flax is not installed")
    from numpyro.contrib.module import random_flax_module

    def model(x, y):
        network = random_flax_module("network", linen.Dense(1), prior=dist.Normal(0.0, 1.0), input_shape=(x.shape[1],))
        numpyro.sample("y", dist.Normal(jnp.tanh(network(x)[:, 0]), 0.1).to_event(1), obs=y)

    return program(model, AutoNormal(model), *wave(32))


def with_stax():
    return program(vae_model, vae_guide, bars(16))


PROGRAMS = {
    "AutoNormal": pooled,
    "AutoDelta": partial(pooled, AutoDelta),
    "AutoDiagonalNormal": partial(pooled, autoguide.AutoDiagonalNormal),
    "AutoMultivariateNormal": partial(pooled, autoguide.AutoMultivariateNormal),
    "AutoLowRankMultivariateNormal": partial(pooled, autoguide.AutoLowRankMultivariateNormal),
    "AutoIAFNormal": partial(pooled, autoguide.AutoIAFNormal, num_flows=1),
    "AutoBNAFNormal": partial(pooled, autoguide.AutoBNAFNormal, num_flows=1, hidden_factors=[2]),
    "AutoLaplaceApproximation": partial(pooled, autoguide.AutoLaplaceApproximation),
    "AutoGuideList and block": split_guide,
    "network": small_network,
    "scale and mask": lambda: program(weighted, AutoNormal(weighted), *wave(32), np.arange(32) % 3 > 0),
    "plate of all points": lambda: program(logistic, AutoNormal(logistic), *classes(40)),
    "plate with a subsample": lambda: program(logistic, AutoNormal(logistic), *classes(40), batch_size=16),
    "scan": lambda: program(stochastic_volatility, AutoNormal(stochastic_volatility), jnp.ones((5, 2))),
    "strings, None, ints": lambda: program(robust, AutoNormal(robust), *wave(32), likelihood="student", scale=None),
    "trees of parameters": with_stax,
    "random flax module": with_random_flax,
}


@pytest.mark.parametrize(
    "name",
    few(PROGRAMS, "network", slow=5),
)
def test_exact_plan_has_the_gradient_of_trace_elbo(double, name):
    problem = PROGRAMS[name]()
    expected_value, expected = exact(problem)
    for options in ({"codec": Keep()}, {"exact": True, "slices": 3}):
        value, gradient = problem.value_and_grad(RAD_ELBO(**options))
        np.testing.assert_allclose(value, expected_value, rtol=1e-12)
        assert_close(gradient, expected, rtol=1e-9)


@pytest.mark.slow
def test_default_adds_little_to_the_noise_of_the_guide():
    """The measure of the added noise is how the gradient varies anyway from key to key; both are means over keys."""
    wide = partial(network_regression, hidden=(128, 128))  # in narrow layers codes take longer than they are worth
    problem = program(wide, AutoNormal(wide, init_scale=0.1), *wave(512))
    assert is_random(problem.explain(RAD_ELBO()))
    keys = jax.random.split(jax.random.key(9), 256)

    def gradients(elbo):
        gradient = lambda key: flat(jax.grad(partial(problem.loss, elbo, key))(problem.params))  # noqa: E731
        return jax.jit(lambda keys: jax.lax.map(gradient, keys, batch_size=64))(keys)

    theirs, ours = gradients(Trace_ELBO()), gradients(RAD_ELBO())
    added = jnp.mean(jnp.sum((ours - theirs) ** 2, 1))
    own = jnp.mean(jnp.sum((theirs - theirs.mean(0)) ** 2, 1))
    assert 0 < added < 1e-2 * own


LOOPS = {
    "vmap": True,
    "map": False,
    "map with checkpoint": lambda f, keys: jax.lax.map(jax.checkpoint(f), keys),
    "map in batches": lambda f, keys: jax.lax.map(f, keys, batch_size=2),
}


@pytest.mark.parametrize("loop", few(LOOPS, "vmap", slow=2))
def test_particles(double, loop):
    problem = small_network(16)
    options = {"num_particles": 4, "vectorize_particles": LOOPS[loop]}
    value, gradient = problem.value_and_grad(RAD_ELBO(**options, codec=Keep()))
    expected_value, expected = problem.value_and_grad(Trace_ELBO(**options))
    np.testing.assert_allclose(value, expected_value, rtol=1e-12)
    assert_close(gradient, expected, rtol=1e-9)


@pytest.mark.parametrize("loop", few(["map", "vmap"], slow=2))
def test_particles_have_path_randomness_of_their_own(encode_all, loop):
    """Particles that draw together would err together: averaged over 8 of them the error would not fall."""

    def model(x):  # a guide that is a point and a model with hardly any noise: particles differ by their paths alone
        x = x + 1e-6 * jax.random.normal(numpyro.prng_key(), x.shape)
        w = numpyro.sample("w", dist.Normal(jnp.zeros((8, 8)), 1.0).to_event(2))
        numpyro.factor("fit", -jnp.sum(jnp.sin(3.0 * jnp.tanh(x @ w) @ w) ** 2))

    def error(particles):
        elbo = RAD_ELBO(particles, LOOPS[loop], codec=StochasticRound(bits=1))
        gradient = lambda key: flat(jax.grad(partial(problem.loss, elbo, key))(problem.params))  # noqa: E731
        draws = jax.jit(lambda keys: jax.lax.map(gradient, keys, batch_size=32))(
            jax.random.split(jax.random.key(1), 256)
        )
        return float(jnp.mean(jnp.sum((draws - flat(exact(problem)[1])) ** 2, 1)))

    problem = program(model, AutoDelta(model), wave(16, 8)[0])
    # the mean of 256 squared errors in 64 dimensions is known to a few percent; with common draws the ratio is 1
    np.testing.assert_allclose(error(8), error(1) / 8, rtol=0.2)


@pytest.mark.slow
def test_multi_sample_guide(double):
    def model(x):
        loc = numpyro.sample("loc", dist.Normal(0.0, 3.0))
        numpyro.sample("x", dist.Normal(jnp.tanh(loc), 1.0).expand([len(x)]).to_event(1), obs=x)

    def guide(x):
        loc = numpyro.param("guide_loc", 0.3)
        numpyro.sample("loc", dist.Normal(loc, numpyro.param("guide_scale", 0.5)).expand([7]))

    elbo = RAD_ELBO(multi_sample_guide=True, codec=Keep())
    twin = Trace_ELBO(multi_sample_guide=True)
    problem = program(model, guide, wave(16)[1], elbo=elbo)
    for found, expected in zip(problem.value_and_grad(elbo), problem.value_and_grad(twin), strict=True):
        assert_close(found, expected, rtol=1e-9)


def test_contributions_of_sites():
    problem = pooled()
    elbos = RAD_ELBO(sum_sites=False), Trace_ELBO(sum_sites=False), Trace_ELBO()
    losses = jax.jit(lambda key: [problem.loss(elbo, key, problem.params) for elbo in elbos])
    ours, theirs, total = losses(jax.random.key(KEY))
    assert set(ours) == {"loc", "spread", "logit_decentered", "hits"} and set(ours) == set(theirs)
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5)
    np.testing.assert_allclose(sum(ours.values()), total, rtol=1e-5)
    svi = problem.svi(RAD_ELBO(sum_sites=False))
    state = svi.init(jax.random.key(0), *problem.args)
    assert set(jax.eval_shape(svi.evaluate, state, *problem.args)) == set(theirs)


# -- inside numpyro.infer.SVI ------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "optax adam": lambda: optax.adam(1e-2),
    "optax chain": lambda: optax.chain(optax.clip(1.0), optax.adam(optax.linear_schedule(0.02, 0.0, 20))),
    "Adam": lambda: numpyro.optim.Adam(1e-2),
    "ClippedAdam": lambda: numpyro.optim.ClippedAdam(1e-2, clip_norm=1.0),
    "Minimize": lambda: numpyro.optim.Minimize(options={"maxiter": 5}),
}


@pytest.mark.parametrize("name", few(OPTIMIZERS, slow=4))
def test_optimizers(double, name):
    problem = pooled()
    steps = 1 if name == "Minimize" else 20
    run = {}
    for elbo in (Trace_ELBO(), RAD_ELBO(codec=Keep())):
        svi = problem.svi(elbo, OPTIMIZERS[name]())
        run[type(elbo)] = svi.run(jax.random.key(2), steps, *problem.args, progress_bar=False)
    assert_close(run[RAD_ELBO].params, run[Trace_ELBO].params, rtol=1e-8)
    np.testing.assert_allclose(run[RAD_ELBO].losses, run[Trace_ELBO].losses, rtol=1e-8)


@pytest.mark.slow
def test_update_run_and_evaluate_agree(encode_all):
    """One trajectory, whichever of SVI's loops makes it, with the default's random gradients."""
    problem = small_network()
    svi = problem.svi(RAD_ELBO())
    state = start = svi.init(jax.random.key(2), *problem.args)
    losses = []
    for _ in range(4):
        state, loss = jax.jit(svi.update)(state, *problem.args)
        losses.append(loss)
    twin = problem.svi(Trace_ELBO())
    twin.init(jax.random.key(2), *problem.args)
    np.testing.assert_allclose(losses[0], jax.jit(twin.update)(start, *problem.args)[1], rtol=1e-6)
    bar = svi.run(jax.random.key(2), 4, *problem.args, progress_bar=True)
    scan = svi.run(jax.random.key(2), 4, *problem.args, progress_bar=False)
    stable = svi.run(jax.random.key(2), 4, *problem.args, progress_bar=False, stable_update=True)
    for result in (bar, scan, stable):
        np.testing.assert_allclose(result.losses, losses, rtol=1e-4)
        assert_close(result.params, svi.get_params(state), rtol=1e-3)
    np.testing.assert_allclose(svi.evaluate(state, *problem.args), svi.evaluate(bar.state, *problem.args), rtol=1e-3)
    continued = svi.run(jax.random.key(3), 1, *problem.args, progress_bar=False, init_state=state)
    assert np.isfinite(continued.losses).all()


@pytest.mark.slow
def test_debugging_finds_no_nan_of_ours(encode_all):
    problem = small_network(16)
    svi = problem.svi(RAD_ELBO(codec=StochasticRound(bits=1)))
    with jax.debug_nans(True):
        _, loss = jax.jit(svi.update)(svi.init(jax.random.key(0), *problem.args), *problem.args)
        assert np.isfinite(loss)


def test_stable_update_refuses_a_step_that_is_not_finite():
    problem = small_network()
    svi = problem.svi(RAD_ELBO())
    state = svi.init(jax.random.key(2), *problem.args)
    step = jax.jit(svi.stable_update)
    x, y = problem.args
    moved, loss = step(state, x, y)
    assert np.isfinite(loss) and not np.array_equal(flat(svi.get_params(moved)), flat(svi.get_params(state)))
    refused, loss = step(state, x.at[3, 1].set(jnp.nan), y)
    assert np.isnan(loss)
    assert_equal_trees(svi.get_params(refused), svi.get_params(state))


@pytest.mark.parametrize(
    "make",
    [
        lambda: program(running_mean, AutoNormal(running_mean), *wave(32)),
        pytest.param(with_flax, marks=pytest.mark.exhaustive),
    ],
    ids=["mutable", "flax"],
)
def test_mutable_state(make):
    problem = make()
    states = []
    for elbo in (Trace_ELBO(), RAD_ELBO(codec=Keep()), RAD_ELBO()):
        svi = problem.svi(elbo, optax.sgd(1e-4))  # Adam would blow up the rounding of gradients that are zero
        state = svi.init(jax.random.key(2), *problem.args)
        before, update = state.mutable_state, jax.jit(svi.update)
        for _ in range(2):
            state, loss = update(state, *problem.args)
        states.append((loss, state.mutable_state))
        assert np.abs(flat(before) - flat(state.mutable_state)).max() > 1e-3
    assert_close(states[1], states[0], rtol=1e-5)
    assert_close(states[2], states[0], rtol=1e-2)


def test_arguments_that_are_no_arrays_stay_what_they_are():
    """Positional, by keyword of ``update``, as static keywords of ``SVI``, and defaults."""
    seen = []

    def model(x, y=None, batch_size=64, kind="normal", flag=None):
        seen.append((type(batch_size), kind, flag))
        logistic(x, y, batch_size)

    guide = AutoNormal(model)
    svi = SVI(model, guide, optax.adam(1e-2), RAD_ELBO(), kind="other")
    x, y = classes(64)
    state = svi.init(jax.random.key(0), x, y, 16)
    state, loss = jax.eval_shape(lambda state: svi.update(state, x, y, 16, flag=True), state)
    assert jax.eval_shape(lambda state: svi.evaluate(state, x, y, batch_size=16), state) == loss
    assert {size for size, _, _ in seen} == {int} and {kind for _, kind, _ in seen} == {"other"}
    assert {flag for _, _, flag in seen} == {None, True}


@pytest.mark.slow
def test_stochastic_support_accepts_it():
    from numpyro.contrib.stochastic_support.sdvi import SDVI

    def model():
        kind = numpyro.sample("kind", dist.Bernoulli(0.5), infer={"branching": True})
        mean = numpyro.sample("a", dist.Normal(0.0, 1.0)) if kind == 0 else numpyro.sample("b", dist.Normal(1.0, 1.0))
        numpyro.sample("x", dist.Normal(mean, 1.0), obs=0.2)

    options = {"svi_num_steps": 20, "num_slp_samples": 10, "combine_elbo_particles": 10}
    weights = []
    for elbo in (Trace_ELBO(), RAD_ELBO()):
        result = SDVI(model, numpyro.optim.Adam(0.01), loss=elbo, **options).run(jax.random.key(0))
        weights.append([float(result.slp_weights[k]) for k in sorted(result.slp_weights)])
    assert len(weights[0]) == 2
    np.testing.assert_allclose(weights[1], weights[0], rtol=1e-4)


def test_pickle_and_deepcopy(encode_all):
    for elbo in (RAD_ELBO(), RAD_ELBO(2, False, memory_budget="20kB"), RAD_ELBO(codec=StochasticRound(bits=2))):
        for other in (pickle.loads(pickle.dumps(elbo)), copy.deepcopy(elbo)):
            assert type(other) is RAD_ELBO and type(other.base) is type(elbo.base)
            assert other.planner == elbo.planner
            assert vars(other.base) == vars(elbo.base)
    problem = small_network()
    assert_equal_trees(problem.value_and_grad(other), problem.value_and_grad(elbo))


def test_says_nothing_in_ordinary_use(capfd):
    problem = small_network()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        svi = problem.svi(RAD_ELBO())
        svi.run(jax.random.key(0), 2, *problem.args, progress_bar=False)
        problem.explain(RAD_ELBO())
    assert [w for w in caught if "numpyro_rad" in w.filename] == []
    assert capfd.readouterr() == ("", "")


# -- under other transformations ---------------------------------------------------------------------------------------

BOTH = pytest.mark.parametrize(
    "codec", [pytest.param(Keep(), marks=pytest.mark.exhaustive), None], ids=["exact", "default"]
)


@pytest.mark.slow
@BOTH
def test_vmap_and_scan_over_seeds(encode_all, codec):
    problem = small_network()
    gradient = jax.grad(partial(problem.loss, RAD_ELBO(codec=codec)), argnums=1)
    keys = jax.random.split(jax.random.key(0), 3)
    alone = [jax.jit(gradient)(key, problem.params) for key in keys]
    expected = jax.tree.map(lambda *g: jnp.stack(g), *alone)
    assert_close(jax.jit(jax.vmap(gradient, (0, None)))(keys, problem.params), expected, rtol=1e-4)
    scanned = jax.lax.scan(lambda carry, key: (carry, gradient(key, problem.params)), 0, keys)[1]
    assert_close(scanned, expected, rtol=1e-4)


@pytest.mark.slow
@BOTH
def test_vmap_over_parameters_inside_the_differentiated_function(double, encode_all, codec):
    """An ensemble: the loss itself is vectorized, so the sweeps are."""
    problem = small_network()
    keys = jax.random.split(jax.random.key(0), 3)
    params = jax.tree.map(lambda x: jnp.stack([x, 1.1 * x, 0.9 * x]), problem.params)

    def gradient(elbo):
        total = lambda params: jax.vmap(partial(problem.loss, elbo))(keys, params).sum()  # noqa: E731
        return jax.jit(jax.grad(total))(params)

    rtol = 1e-9 if codec else 0.1
    assert_close(gradient(RAD_ELBO(codec=codec)), gradient(Trace_ELBO()), rtol=rtol)


@pytest.mark.slow
@BOTH
def test_checkpoint(double, encode_all, codec):
    problem = small_network()
    loss = partial(problem.loss, RAD_ELBO(codec=codec), jax.random.key(KEY))
    plain = jax.jit(jax.value_and_grad(loss))(problem.params)
    checkpointed = jax.jit(jax.value_and_grad(jax.checkpoint(loss)))(problem.params)
    assert_close(checkpointed, plain, rtol=1e-9)


def test_gradient_of_a_model_argument(double):
    problem = small_network()
    found, expected = (
        jax.jit(jax.grad(partial(problem.loss, elbo, jax.random.key(KEY), problem.params), (0, 1)))(*problem.args)
        for elbo in (RAD_ELBO(codec=Keep()), Trace_ELBO())
    )
    assert_close(found, expected, rtol=1e-9)


def test_gradient_of_what_the_model_closes_over(double):
    """A tracer that reaches the model by closure and not as an argument, as in a model that is built inside a loss."""
    problem = small_network()

    def loss(elbo, width, params):
        model = partial(network, activation=lambda h: jnp.tanh(width * h))
        return elbo.loss(jax.random.key(KEY), params, model, problem.guide, *problem.args)

    found, expected = (
        jax.jit(jax.value_and_grad(jax.checkpoint(partial(loss, elbo)), argnums=(0, 1)))(1.3, problem.params)
        for elbo in (RAD_ELBO(codec=Keep()), Trace_ELBO())
    )
    assert_close(found, expected, rtol=1e-9)


def test_forward_mode_is_refused():
    problem = pooled()
    svi = problem.svi(RAD_ELBO())
    state = svi.init(jax.random.key(0), *problem.args)
    for step in (svi.update, svi.stable_update, jax.jit(svi.update, static_argnames="forward_mode_differentiation")):
        with pytest.raises(NotImplementedError, match=r"forward_mode_differentiation=True.*Trace_ELBO"):
            step(state, *problem.args, forward_mode_differentiation=True)


# -- the path randomness -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shrinking(StochasticRound):
    """A rule with a planted bias of one percent."""

    def decode(self, seed, code, like):
        return 0.99 * super().decode(seed, code, like)


def path_draws(problem, elbo, draws=DRAWS):
    """Gradients (draws, parameters) under one key of guide and model and many path keys, and the exact one."""

    def gradient(path_key):
        def loss(params):
            key = jax.random.key(KEY)
            return elbo.loss_with_keys(
                NoiseKeys(key, key, path_key), params, problem.model, problem.guide, *problem.args
            )

        return flat(jax.grad(loss)(problem.params))

    keys = jax.random.split(jax.random.key(9), draws)
    return jax.jit(lambda keys: jax.lax.map(gradient, keys, batch_size=64))(keys), flat(exact(problem)[1])


def test_path_key_moves_the_gradient_and_not_the_value(encode_all):
    problem = small_network(16)
    elbo = RAD_ELBO(codec=StochasticRound(bits=1))
    rest = (problem.params, problem.model, problem.guide, *problem.args)
    run = jax.jit(
        jax.value_and_grad(lambda params, path, key: elbo.loss_with_keys(NoiseKeys(key, key, path), params, *rest[1:]))
    )
    results = [run(problem.params, jax.random.key(i), jax.random.key(KEY)) for i in (0, 1, 1)]
    expected = exact(problem)
    assert results[0][0] == results[1][0]
    np.testing.assert_allclose(results[0][0], expected[0], rtol=1e-6)
    assert_equal_trees(results[1], results[2])
    assert jnp.linalg.norm(flat(results[0][1]) - flat(results[1][1])) > 1e-3 * jnp.linalg.norm(flat(expected[1]))
    raw = run(problem.params, jax.random.PRNGKey(1), jax.random.PRNGKey(KEY))
    np.testing.assert_allclose(raw[0], expected[0], rtol=1e-6)


@pytest.mark.in_one_go
@pytest.mark.parametrize(
    "codec", [None, pytest.param(StochasticRound(bits=1), marks=pytest.mark.exhaustive)], ids=["default", "1 bit"]
)
def test_gradient_is_unbiased_over_path_keys(double, encode_all, codec):
    """2048 draws see a bias of a tenth of an entry's standard deviation."""
    problem = small_network(16)
    elbo = RAD_ELBO(codec=codec)
    assert is_random(problem.explain(elbo))
    assert_unbiased(*path_draws(problem, elbo), "gradient")


def test_planted_bias_is_caught(double, encode_all):
    problem = small_network(16)
    draws, expected = path_draws(problem, RAD_ELBO(codec=Shrinking(bits=4)))
    with pytest.raises(AssertionError, match="gradient is biased"):
        assert_unbiased(draws, expected, "gradient")


def test_gradient_of_the_full_data_is_unbiased_over_minibatches_and_paths(double, encode_all):
    """With a guide that is a point, minibatch and path are all that is random under the loss's own key."""
    x, y = wave(48)
    problem = program(network, AutoDelta(network), x, y, batch_size=12)
    elbo = RAD_ELBO(codec=StochasticRound(bits=2))
    assert is_random(problem.explain(elbo))
    keys = jax.random.split(jax.random.key(9), DRAWS)
    gradient = lambda key: flat(jax.grad(partial(problem.loss, elbo, key))(problem.params))  # noqa: E731
    draws = jax.jit(lambda keys: jax.lax.map(gradient, keys, batch_size=64))(keys)
    full = dataclasses.replace(program(network, AutoDelta(network), x, y), params=problem.params)
    assert_unbiased(draws, flat(exact(full)[1]), "gradient")


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.in_one_go
@pytest.mark.parametrize("case", few([(1, True), (3, True), (3, False)], (3, True), slow=2), ids=str)
def test_budget_is_met(encode_all, case):
    (particles, loop), problem = case, small_network(128)
    most = problem.explain(RAD_ELBO(particles, loop, codec=Keep())).stored_bytes
    with pytest.raises(BudgetError) as caught:
        problem.explain(RAD_ELBO(particles, loop, memory_budget=0))
    least = caught.value.smallest_bytes
    assert 0 < least < most / 4
    for budget in (least, (least + most) // 3, most):
        elbo = RAD_ELBO(particles, loop, memory_budget=budget)
        assert problem.explain(elbo).stored_bytes <= budget
    exact = problem.explain(RAD_ELBO(particles, loop, memory_budget=most, exact=True))
    assert exact.stored_bytes <= most and not is_random(exact)
    assert np.isfinite(flat(problem.value_and_grad(RAD_ELBO(particles, loop, memory_budget=f"{least} B"))[1])).all()


@pytest.mark.slow
def test_impossible_budget_names_the_smallest(encode_all):
    problem = small_network(128)
    svi = problem.svi(RAD_ELBO(memory_budget=100))
    state = svi.init(jax.random.key(0), *problem.args)  # no gradient yet
    assert np.isfinite(svi.evaluate(state, *problem.args))
    with pytest.raises(BudgetError, match="memory_budget=100 bytes is too small") as caught:
        jax.jit(svi.update)(state, *problem.args)
    smallest = caught.value.smallest_bytes
    assert f"memory_budget={smallest}" in str(caught.value)
    svi = problem.svi(RAD_ELBO(memory_budget=smallest))
    _, loss = jax.jit(svi.update)(svi.init(jax.random.key(0), *problem.args), *problem.args)
    assert np.isfinite(loss)
    with pytest.raises(BudgetError) as again:
        problem.explain(RAD_ELBO(memory_budget=smallest - 1))
    assert again.value.smallest_bytes == smallest


def compiled(function, *args):
    return jax.jit(function).lower(*args).compile()


def test_evaluation_costs_what_it_costs_trace_elbo():
    problem = small_network()
    flops, temp = [], []
    for elbo in (Trace_ELBO(), RAD_ELBO()):
        svi = problem.svi(elbo)
        program = compiled(svi.evaluate, svi.init(jax.random.key(0), *problem.args), *problem.args)
        flops.append(program.cost_analysis()["flops"])
        temp.append(program.memory_analysis().temp_size_in_bytes)
    np.testing.assert_allclose(flops[1], flops[0], rtol=0.02)
    np.testing.assert_allclose(temp[1], temp[0], rtol=0.02)


@pytest.mark.slow
def test_compiled_step_needs_less_memory():
    """Six layers of 256 units: a plan is worth nothing if the compiler keeps what it drops."""
    model = partial(network_regression, hidden=(256,) * 6, scale=0.1)
    x, y = jax.ShapeDtypeStruct((2048, 16), jnp.float32), jax.ShapeDtypeStruct((2048,), jnp.float32)
    temp = []
    for elbo in (Trace_ELBO(), RAD_ELBO(codec=Keep()), RAD_ELBO(codec=StochasticRound(bits=4))):
        svi = SVI(model, AutoNormal(model), optax.adam(1e-3), elbo)
        state = jax.eval_shape(svi.init, jax.random.key(0), x, y)
        temp.append(compiled(svi.update, state, x, y).memory_analysis().temp_size_in_bytes)
    exact, keep, four_bits = temp
    assert keep < 0.8 * exact  # 0.75 with JAX 0.10: what one layer works with is much of so narrow a network
    # The CPU backend of JAX 0.10 drops barriers, and the order that replaces them costs copies.
    old = jax.__version_info__ < (0, 11)
    assert four_bits < (1 / 2 if old else 1 / 3) * exact  # measured: 0.40 with JAX 0.10, 0.31 with 0.12


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"codec": "4 bits"}, TypeError, r"codec='4 bits' is not a codec.*StochasticRound"),
        ({"calibration": 3}, TypeError, r"calibration=3 is not a Calibration\. Pass what RAD_ELBO\.calibrate returned"),
        ({"codec": StochasticRound}, TypeError, "not a codec"),
        ({"memory_budget": "lots"}, ValueError, "memory_budget='lots' cannot be read.*MiB"),
        ({"memory_budget": "5 MiBs"}, ValueError, "cannot be read"),
        ({"memory_budget": -1}, ValueError, "negative"),
        ({"memory_budget": "-1MiB"}, ValueError, "negative"),
        ({"memory_budget": 1.5}, TypeError, "memory_budget=1.5"),
        ({"memory_budget": True}, TypeError, "memory_budget=True"),
        ({"memory_budget": "1MiB", "codec": Keep()}, ValueError, "exclude each other"),
        ({"vectorize_particles": "yes"}, ValueError, "vectorize_particles"),
    ],
    ids=str,
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        RAD_ELBO(**options)


def test_wrong_targets_of_explain():
    problem = small_network()
    rest = (jax.random.key(0), problem.params, problem.model, problem.guide, *problem.args)
    with pytest.raises(TypeError, match=r"explain needs a RAD_ELBO.*Trace_ELBO"):
        explain(Trace_ELBO(), *rest)
    with pytest.raises(ValueError, match="param_map is empty"):
        explain(RAD_ELBO(), jax.random.key(0), {}, lambda: None, lambda: None)


def test_without_parameters_the_value_is_that_of_trace_elbo():
    model, guide = (lambda d=d: numpyro.sample("x", d()) for d in (dist.Normal, dist.Cauchy))
    rest = (jax.random.key(KEY), {}, model, guide)
    assert RAD_ELBO().loss(*rest) == Trace_ELBO().loss(*rest)
    assert jax.jit(lambda key: RAD_ELBO().loss(key, *rest[1:]))(rest[0]) == pytest.approx(
        float(Trace_ELBO().loss(*rest))
    )


def test_a_model_may_look_at_its_numbers_outside_of_transformations():
    """As with ``Trace_ELBO``: values are numbers unless something traces them."""
    seen = []

    def model():
        x = numpyro.sample("x", dist.Normal())
        seen.append(float(x))

    def guide():
        numpyro.sample("x", dist.Normal(numpyro.param("loc", 0.5), 1.0))

    rest = (jax.random.key(KEY), {"loc": jnp.asarray(0.5)}, model, guide)
    assert RAD_ELBO().loss(*rest) == Trace_ELBO().loss(*rest)
    assert seen[0] == seen[1]
    scale = jax.grad(lambda s: RAD_ELBO().loss(*rest[:2], lambda: numpyro.sample("x", dist.Normal(0.0, s)), guide))(2.0)
    assert scale != 0  # a value that the model closes over is traced although no argument is


def test_another_elbo_is_a_copy():
    before = RAD_ELBO(memory_budget="1MiB")
    elbo = before.replace(num_particles=4)
    assert elbo.base.num_particles == elbo.num_particles == 4 and before.num_particles == 1
    assert elbo.planner == before.planner and type(elbo) is RAD_ELBO
    problem = small_network()
    losses = jax.jit(lambda key: [problem.loss(e, key, problem.params) for e in (elbo, Trace_ELBO(4))])
    np.testing.assert_allclose(*losses(jax.random.key(KEY)))
    other = elbo.replace(memory_budget=None, codec=Keep())
    assert other.base is elbo.base and other.planner == Planner(codec=Keep())
    enumerates = elbo.replace(base=TraceEnum_ELBO())
    assert enumerates.can_infer_discrete and enumerates.num_particles == 1 and not elbo.can_infer_discrete


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"codec": Keep()}, ValueError, "codec= and memory_budget= exclude each other"),
        ({"memory_buget": 3}, TypeError, "Did you mean memory_budget="),
        ({"num_particles": 0}, ValueError, "at least 1"),
        ({"base": TraceMeanField_ELBO(), "num_particles": 2}, ValueError, "are set on the base"),
        ({"base": RAD_ELBO()}, TypeError, "not an instance"),
    ],
)
def test_another_elbo_is_validated_as_the_first(options, error, match):
    with pytest.raises(error, match=match):
        RAD_ELBO(memory_budget="1MiB").replace(**options)
    with pytest.raises(ValueError, match="are set on the base"):
        RAD_ELBO(base=TraceMeanField_ELBO()).replace(num_particles=2)


@pytest.mark.parametrize("name", ["planner", "base", "num_particles"])
def test_an_elbo_does_not_change(name):
    elbo = RAD_ELBO()
    before = vars(elbo).copy(), vars(elbo.base).copy()
    with pytest.raises(AttributeError, match=rf"{name} cannot be set.*elbo\.replace"):
        setattr(elbo, name, 4)
    assert (vars(elbo), vars(elbo.base)) == before


@pytest.mark.in_one_go
def test_no_tracer_outlives_the_gradient():
    problem = small_network(8)
    with jax.check_tracer_leaks(True):
        gradient = jax.grad(partial(problem.loss, RAD_ELBO(codec=Keep()), jax.random.key(KEY)))
        jax.make_jaxpr(gradient)(problem.params)


@pytest.mark.parametrize("key", [7, jnp.arange(5), None], ids=str)
def test_wrong_path_key(key):
    problem = pooled()
    with pytest.raises(TypeError, match="PRNG key"):
        keys = NoiseKeys(jax.random.key(0), jax.random.key(1), key)
        RAD_ELBO().loss_with_keys(keys, problem.params, problem.model, problem.guide, *problem.args)
