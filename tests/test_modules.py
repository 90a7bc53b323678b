"""Models with networks from Flax, NNX and Equinox: parameters that are pytrees, and mutable state."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from modules import MUTABLE, TREES, line
from numpyro.infer import SVI, Trace_ELBO
from programs import few

from numpyro_rad import (
    RAD_ELBO,
    RAD_SVI,
    Checkpoint,
    Keep,
    Tracking,
    compare,
    explain,
    gradient_variance,
    plan_figure,
    to_arviz,
)
from numpyro_rad.diagnostics import fit_quality, shadow, signal_to_noise
from numpyro_rad.diagnostics.signal import gradient_signal
from numpyro_rad.planning import Calibration
from numpyro_rad.training import RAD_SVIRunResult, fit_record
from numpyro_rad.transform import named_leaves

KEY = jax.random.key(5)


def prepared(problem, loss, **options):
    model, guide, args = problem
    svi = RAD_SVI(model, guide, optax.adam(1e-3), loss, tracking=None, **options)
    return svi, svi.init(KEY, *args), args


# Parameters that are trees


def two_layers(weights):
    """A network with the weights that the parameters hold, whatever these are called, and a guide."""

    def model(x, y):
        first, second = weights()
        shift = numpyro.sample("shift", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(jnp.tanh(x @ first) @ second + shift, 1.0).to_event(2), obs=y)

    def guide(x, y):
        numpyro.sample("shift", dist.Normal(numpyro.param("loc", jnp.zeros(())), 1.0))

    return model, guide, line(8)


@pytest.mark.slow
@pytest.mark.usefixtures("arrays_of_any_size_count", "few_codecs")
def test_a_tree_is_calibrated_as_its_leaves_are():
    """The slow twin has one parameter for each leaf; order and values are the same, and so are all numbers."""
    start = jnp.ones((3, 4)), jnp.full((4, 1), 0.5)

    def tree():
        theta = numpyro.param("theta", {"a": {"b": start[0]}, "a.b": (start[1],)})
        return theta["a"]["b"], theta["a.b"][0]

    def leaves():
        return numpyro.param("theta0", start[0]), numpyro.param("theta1", start[1])

    found = []
    for names in (tree, leaves):
        svi, state, args = prepared(two_layers(names), RAD_ELBO(codec=Keep()))
        found.append(svi.loss.calibrate(svi, state, *args, draws=2))
    assert found[0] == found[1]
    assert found[0].gradient_variance > 0 and len(found[0].reach) == 3


@pytest.mark.parametrize("name", few(["flax", "nnx", "random flax"], slow=3))
@pytest.mark.usefixtures("arrays_of_any_size_count", "few_codecs")
def test_a_budget_is_planned_for(name):
    """``RAD_SVI`` calibrates before the first step; the calibration can be saved and is one of this program."""
    model, guide, args = TREES[name]()
    svi = RAD_SVI(model, guide, optax.adam(1e-3), RAD_ELBO(memory_budget="2kB"), tracking=None)
    result = svi.run(KEY, 2, *args, progress_bar=False)
    found = svi.loss.planner.calibration
    assert Calibration.from_dict(found.to_dict()) == found
    assert found.program == svi.loss.plan_of_update(svi, result.state, *args)[0].graph.fingerprint()
    assert np.isfinite(result.losses).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain"])
@pytest.mark.usefixtures("arrays_of_any_size_count", "few_codecs")
def test_a_band_of_rho_plans_anew(name):
    model, guide, args = TREES[name]()
    tracking = Tracking(interval=1, replan=(0.9, 0.91), on_alarm="record")
    svi = RAD_SVI(model, guide, optax.adam(1e-3), tracking=tracking)
    result = svi.run(KEY, 24, *args, progress_bar=False)
    assert any(alarm.kind == "replan" and "new plan" in alarm.message for alarm in result.alarms)


@pytest.mark.in_one_go
def test_sites_are_those_of_the_parameters(encode_all):
    """The table, overrides and blocks of parameters say ``net``, not the names of its leaves."""
    model, guide, args = TREES["plain"]()
    svi, state, args = prepared((model, guide, args), RAD_ELBO())
    operands = KEY, svi.get_params(state), model, guide, *args
    plain = explain(RAD_ELBO(), *operands)
    assert {row.site for row in plain.rows} == {"theta", "scale"}
    kept = explain(RAD_ELBO(overrides={"theta": Keep()}), *operands)
    coded = [[r for r in table.rows if r.relative_variance and r.site == "theta"] for table in (plain, kept)]
    assert coded[0] and not coded[1]


@pytest.mark.slow
def test_blocks_are_sites():
    svi, state, args = prepared(TREES["plain"](), RAD_ELBO())
    found = gradient_variance(svi, state, *args, draws=2)
    assert [block.name for block in found.blocks] == ["scale", "theta"]


def test_leaves_have_names_of_their_own():
    tree = {"a": {"b": 1.0}, "a.b": 2.0, "c": {"d": 3.0}}
    assert [leaf for _, leaf in named_leaves(tree)] == [1.0, 2.0, 3.0]
    assert len({name for name, _ in named_leaves(tree)}) == 3
    assert named_leaves(tree)[2][0] == "c.d"
    watch = gradient_signal()
    params = jax.tree.map(jnp.asarray, tree)
    assert len(signal_to_noise(watch.init(params))) == 3


# Mutable state


@pytest.mark.parametrize("name", few(MUTABLE, "flax", slow=4))
def test_a_run_with_mutable_state_is_that_of_svi(name):
    model, guide, args = MUTABLE[name]()
    svi = RAD_SVI(model, guide, optax.adam(1e-3), Trace_ELBO(), tracking=None)
    expected = SVI(model, guide, optax.adam(1e-3), Trace_ELBO()).run(KEY, 4, *args, progress_bar=False)
    found = svi.run(KEY, 3, *args, progress_bar=False)
    np.testing.assert_allclose(found.losses, expected.losses[:3], rtol=1e-5)
    np.testing.assert_allclose(svi.evaluate(found.state, *args), expected.losses[3], rtol=1e-5)


@pytest.mark.in_one_go
def test_a_plan_needs_the_mutable_state():
    """It is taken from a result, a state or among the parameters, and is not differentiated."""
    model, guide, args = MUTABLE["flax"]()
    svi, state, _ = prepared((model, guide, args), RAD_ELBO())
    result = RAD_SVIRunResult(svi.get_params(state), state, None)
    both = {**result.params, **state.mutable_state}
    given = [(svi, result), (svi, state), (svi, both), (svi.loss, KEY, result, model, guide)]
    programs = {explain(*target, *args).program for target in given}
    assert len(programs) == 1 and svi.loss.plan_of_update(svi, state, *args)[0].graph.fingerprint() in programs
    for function in (explain, plan_figure):
        with pytest.raises(ValueError, match=r"keep mutable state in net\$state.*Pass the result of svi.run"):
            function(svi.loss, KEY, result.params, model, guide, *args)
    for measure in (fit_quality, to_arviz):
        with pytest.raises(ValueError, match=rf"{measure.__name__}: model or guide keep mutable state in net\$state"):
            measure(svi, result.params, *args, key=KEY)


@pytest.mark.exhaustive  # the matrix does the same
@pytest.mark.parametrize("name", ["flax"])
@pytest.mark.usefixtures("arrays_of_any_size_count", "few_codecs")
def test_everything_takes_mutable_state(name, tmp_path):
    model, guide, args = MUTABLE[name]()
    tracking = Tracking(interval=2, replan=(0.9, 0.91), on_alarm="record")
    optimizer = optax.chain(gradient_signal(), optax.adam(1e-3))
    svi = RAD_SVI(model, guide, optimizer, RAD_ELBO(memory_budget="1kB"), tracking=tracking)
    options = {"progress_bar": False, "checkpoint": Checkpoint(tmp_path / "fit", every=5)}
    svi.run(KEY, 6, *args, **options)
    result = svi.run(KEY, 8, *args, **options)  # goes on
    assert result.losses.shape == (8,)
    assert np.isfinite(svi.run(KEY, 2, *args, progress_bar=False, init_state=result).losses).all()
    result.assess(draws=2)
    assert result.record.quality is not None and result.record.gradient_variance is not None
    assert result.record.num_params and "ELBO" in result.report(format="markdown")
    record = fit_record(svi, result.state, result.losses, *args, assess=True, draws=2, pareto_k=False)
    assert record.quality is not None
    for fit in (result, result.state, {**result.params, **result.state.mutable_state}):
        data = to_arviz(svi, fit, *args, key=KEY, num_samples=2, chunk_size=2)
        assert np.isfinite(data["sample_stats"]["lp"].values).all()
        assert explain(svi, fit, *args).rows
    assert compare(explain(svi, result, *args), explain(RAD_ELBO(), KEY, result, model, guide, *args)).plans
    plan_figure(svi, result, *args, budgets=["1kB"])
    assert svi.loss.calibrate(svi, result, *args, draws=2).gradient_norm > 0
    assert np.isfinite(gradient_variance(svi, result, *args, draws=2).total.total.value)
    assert len(shadow(svi, KEY, 2, *args, num_seeds=2).steps) == 2
    assert signal_to_noise(result) == signal_to_noise(result.state)


# Whatever the user has


def local(x):
    """A model whose guide takes the parameters of its plate."""
    with numpyro.plate("points", x.shape[0]):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def local_guide(x):
    loc = numpyro.param("loc", jnp.zeros(x.shape[0]))
    scale = numpyro.param("scale", jnp.ones(x.shape[0]), constraint=dist.constraints.positive)
    with numpyro.plate("points", x.shape[0]) as points:
        numpyro.sample("z", dist.Normal(loc[points], scale[points]))


@pytest.mark.slow
def test_numpy_parameters_are_taken():
    """Restored from a file, they are arrays of NumPy; inside of a compiled function these cannot be indexed."""
    x = jnp.arange(5.0)
    svi, state, _ = prepared((local, local_guide, (x,)), RAD_ELBO())
    params, saved = (jax.tree.map(np.asarray, tree) for tree in (svi.get_params(state), state._replace(rng_key=None)))
    saved = saved._replace(rng_key=state.rng_key)
    data = to_arviz(svi, params, x, key=KEY, num_samples=2, chunk_size=1)
    assert data["posterior"]["z"].shape == (1, 2, 5)
    assert np.isfinite(fit_quality(svi, saved, x, key=KEY, pareto_k=False, max_particles=2).elbo.value)
    assert explain(svi, params, x).program == explain(svi, saved, x).program == explain(svi, state, x).program
    loss = jax.jit(lambda key: svi.loss.loss(key, params, local, local_guide, x))(KEY)
    np.testing.assert_allclose(loss, Trace_ELBO().loss(KEY, params, local, local_guide, x), rtol=1e-6)
    assert gradient_variance(svi, saved, x, draws=2).draws == 2
    assert svi.run(KEY, 1, x, progress_bar=False, init_state=saved).losses.shape == (1,)


def test_what_is_not_enough_is_told():
    svi, state, args = prepared((local, local_guide, (jnp.ones(3),)), RAD_ELBO())
    params = svi.get_params(state)
    for function in (gradient_variance, svi.loss.calibrate, lambda *a: fit_record(*a[:2], np.ones(1), *a[2:])):
        with pytest.raises(TypeError, match=r"got parameters alone.*init_params=params"):
            function(svi, params, *args)
        with pytest.raises(TypeError, match="svi_state is 3, not a state"):
            function(svi, 3, *args)
    with pytest.raises(TypeError, match=r"param_map=an SVIState.*explain and plan_figure also take \(svi, svi_state"):
        explain(svi.loss, KEY, state, local, local_guide, *args)
    with pytest.raises(TypeError, match="param_map=the function local"):
        explain(svi.loss, KEY, local, local, local_guide, *args)
    with pytest.raises(TypeError, match="explain needs a RAD_ELBO, an SVI that has one"):
        explain(SVI(local, local_guide, optax.adam(1e-3), Trace_ELBO()), state, *args)
    with pytest.raises(ValueError, match="gradient_variance: this SVI has not been initialised"):
        gradient_variance(SVI(local, local_guide, optax.adam(1e-3), RAD_ELBO()), state, *args)
    forgetful = pickle.loads(pickle.dumps(svi.run(KEY, 1, *args, progress_bar=False)))
    with pytest.raises(ValueError, match=r"copied or unpickled.*svi=svi"):
        forgetful.assess(*args)
