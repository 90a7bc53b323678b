"""Models with networks from Flax, NNX and Equinox: parameters that are pytrees, and mutable state."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from modules import TREES, line

from numpyro_rad import RAD_ELBO, RAD_SVI, Calibration, Keep, Tracking, explain, gradient_variance, signal_to_noise
from numpyro_rad.diagnostics.monitor import gradient_signal
from numpyro_rad.planning import plans
from numpyro_rad.transform import named_leaves

KEY = jax.random.key(5)


def prepared(problem, loss, **options):
    model, guide, args = problem
    svi = RAD_SVI(model, guide, optax.adam(1e-3), loss, tracking=None, **options)
    return svi, svi.init(KEY, *args), args


# Parameters that are trees


@pytest.fixture
def few_codecs(monkeypatch, arrays_of_any_size_count):
    """Calibrations compile in a fraction of the time."""
    monkeypatch.setattr(plans, "LADDER", plans.LADDER[:2])


def two_layers(weights):
    """A network with the weights that the parameters hold, whatever these are called, and a guide."""

    def model(x, y):
        first, second = weights()
        shift = numpyro.sample("shift", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(jnp.tanh(x @ first) @ second + shift, 1.0).to_event(2), obs=y)

    def guide(x, y):
        numpyro.sample("shift", dist.Normal(numpyro.param("loc", jnp.zeros(())), 1.0))

    return model, guide, line(8)


def test_a_tree_is_calibrated_as_its_leaves_are(few_codecs):
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


@pytest.mark.parametrize("name", ["flax", *(pytest.param(n, marks=pytest.mark.slow) for n in TREES if n != "flax")])
def test_a_budget_is_planned_for(name, few_codecs):
    """``RAD_SVI`` calibrates before the first step; the calibration can be saved and is one of this program."""
    model, guide, args = TREES[name]()
    svi = RAD_SVI(model, guide, optax.adam(1e-3), RAD_ELBO(memory_budget="2kB"), tracking=None)
    result = svi.run(KEY, 2, *args, progress_bar=False)
    found = svi.loss.planner.calibration
    assert Calibration.from_dict(found.to_dict()) == found
    assert found.program == svi.loss.plan_of_update(svi, result.state, *args)[0].graph.fingerprint()
    assert np.isfinite(result.losses).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "random equinox"])
def test_a_band_of_rho_plans_anew(name, few_codecs):
    model, guide, args = TREES[name]()
    tracking = Tracking(interval=1, replan=(0.9, 0.91), on_alarm="record")
    svi = RAD_SVI(model, guide, optax.adam(1e-3), tracking=tracking)
    result = svi.run(KEY, 8, *args, progress_bar=False)
    assert any(alarm.kind == "replan" and "new plan" in alarm.message for alarm in result.alarms)


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
