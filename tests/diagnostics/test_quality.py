"""Quality of a fit on models whose ELBO and importance weights are known, and the shadow run against its definition."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoMultivariateNormal
from numpyro.primitives import mutable
from programs import small_network
from scipy import stats
from zscores import bound

from numpyro_rad import RAD_ELBO, Keep, StochasticRound
from numpyro_rad.diagnostics import records
from numpyro_rad.diagnostics.quality import Iterates, fit_quality, shadow

DATA = np.asarray([0.3, -0.5, 1.2, 0.7])
POSTERIOR = DATA.sum() / 5, 1 / np.sqrt(5)  # of z ~ N(0, 1), x | z ~ N(z, 1)
EVIDENCE = stats.multivariate_normal(np.zeros(4), np.eye(4) + 1).logpdf(DATA)


def conjugate(x, size=None):
    z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x), subsample_size=size):
        numpyro.sample("x", dist.Normal(z, 1.0), obs=numpyro.subsample(x, 0))


def normal_guide(x, size=None):
    loc = numpyro.param("loc", POSTERIOR[0])
    scale = numpyro.param("scale", POSTERIOR[1], constraint=dist.constraints.positive)
    numpyro.sample("z", dist.Normal(loc, scale))


def svi_of(loss, model=conjugate, guide=normal_guide, optimizer=None):
    return SVI(model, guide, optimizer or optax.adam(0.01), loss)


def quality(loc=POSTERIOR[0], scale=POSTERIOR[1], loss=None, **options):
    options = {"pareto_k": False, "key": jax.random.key(0), **options}
    params = {"loc": jnp.float32(loc), "scale": jnp.float32(scale)}
    return fit_quality(svi_of(loss or Trace_ELBO()), params, jnp.asarray(DATA), **options)


def elbo(loc, scale):
    """log evidence - KL(guide ‖ posterior)."""
    mean, sd = POSTERIOR
    return EVIDENCE - (np.log(sd / scale) + (scale**2 + (loc - mean) ** 2) / (2 * sd**2) - 0.5)


# -- the ELBO ----------------------------------------------------------------------------------------------------------

LOSSES = {
    "Trace": lambda: Trace_ELBO(),
    "RAD": lambda: RAD_ELBO(codec=StochasticRound(2)),
    "RAD mean field": lambda: RAD_ELBO(base=TraceMeanField_ELBO()),
    "particles": lambda: Trace_ELBO(num_particles=7),
    "by site": lambda: Trace_ELBO(sum_sites=False),
    "graph": lambda: TraceGraph_ELBO(),
    "enumerating": lambda: TraceEnum_ELBO(),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_elbo_is_that_of_the_closed_form_within_its_error(loss):
    found = quality(0.2, 0.9, LOSSES[loss](), standard_error=0.05, max_particles=2000)
    assert abs(found.elbo.value - elbo(0.2, 0.9)) < bound(len(LOSSES)) * found.elbo.standard_error
    assert 0 < found.elbo.standard_error < 0.07
    assert found.pareto_k is found.r_hat is found.mcse is found.converged is None


def test_planted_bias_is_caught():
    found = quality(0.2, 0.9, standard_error=0.02, max_particles=10_000)
    assert abs(found.elbo.value - elbo(0.2, 0.85)) > bound(1) * found.elbo.standard_error


def test_posterior_as_guide_gives_the_evidence_without_error():
    found = quality()
    np.testing.assert_allclose(found.elbo.value, EVIDENCE, rtol=1e-6)
    assert found.elbo.standard_error < 1e-6


def test_particles_are_as_many_as_the_error_needs():
    """The spread of one particle is about 2 nats: 100 draws have an error of about 0.2."""
    errors = [quality(0.2, 0.9, standard_error=e, max_particles=5000).elbo.standard_error for e in (10.0, 0.1, 1e-9)]
    assert errors[0] > 0.1 > 0.8 * errors[1] > 0.8 * errors[2]
    assert errors[2] * np.sqrt(50) == pytest.approx(errors[0], rel=0.5)
    few = quality(0.2, 0.9, max_particles=2)
    assert few.elbo.standard_error > 0


def test_value_depends_on_the_key_alone():
    assert quality(0.2, 0.9).elbo == quality(0.2, 0.9).elbo != quality(0.2, 0.9, key=jax.random.PRNGKey(1)).elbo


def test_renyi_bound_keeps_its_particles():
    """With 16 particles the importance-weighted bound lies between the ELBO and the evidence."""
    value = quality(0.2, 0.9, RenyiELBO(num_particles=16), standard_error=0.01).elbo.value
    assert elbo(0.2, 0.9) + 0.3 < value < EVIDENCE + 0.01


# -- k-hat -------------------------------------------------------------------------------------------------------------


def test_k_hat_tells_a_good_guide_from_a_bad_one():
    """Of a guide with s times the posterior's scale it is 1 - s² for s < 1 (tail of p / q), and negative for s > 1."""
    good = quality(scale=1.3 * POSTERIOR[1], pareto_k=True)
    bad = quality(scale=0.2 * POSTERIOR[1], pareto_k=True)
    assert good.pareto_k < 0.5 and bad.pareto_k > 0.7
    assert quality(scale=1.3 * POSTERIOR[1], pareto_k=True, key=jax.random.PRNGKey(0)).pareto_k == good.pareto_k
    assert good.notes == bad.notes == ()


@pytest.mark.parametrize(
    "loss",
    (
        Trace_ELBO(),
        pytest.param(Trace_ELBO(num_particles=3), marks=pytest.mark.exhaustive),
        pytest.param(RAD_ELBO(), marks=pytest.mark.exhaustive),
    ),
)
def test_plates_that_draw_minibatches_take_all_data(loss):
    svi, data = svi_of(loss), jnp.asarray(DATA)
    params = {"loc": jnp.float32(POSTERIOR[0]), "scale": jnp.float32(1.3 * POSTERIOR[1])}
    options = {"key": jax.random.key(0), "max_particles": 100}
    whole, drawn = (fit_quality(svi, params, data, size=size, **options) for size in (None, 2))
    assert (drawn.elbo, drawn.pareto_k) == (whole.elbo, whole.pareto_k) and whole.notes == ()
    assert drawn.notes == ("Here the plate data, which draw minibatches in training, took all data.",)


def test_minibatches_that_cannot_be_filled_up_give_no_k_hat():
    """The rows of a minibatch alone, scaled up to all data: nothing follows from them but a noisy ELBO."""

    def model(x):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        with numpyro.plate("rows", 1000, subsample_size=len(x)):
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    svi = svi_of(Trace_ELBO(), model, lambda x: normal_guide(x))
    params = {"loc": jnp.float32(0.0), "scale": jnp.float32(1.0)}
    found = fit_quality(svi, params, jnp.asarray(DATA), key=jax.random.key(0), max_particles=2)
    assert found.pareto_k is None and np.isfinite(found.elbo.value)
    assert "the arguments hold fewer rows than the plate rows has" in found.notes[0]
    assert found.notes[1:] == ("No Pareto k-hat: with minibatches there are no importance weights.",)


def reason(model, guide, *args, loss=None, **kwargs):
    svi = svi_of(loss or Trace_ELBO(), model, guide)
    state = svi.init(jax.random.key(0), *args, **kwargs)
    found = fit_quality(svi, state, *args, key=jax.random.key(1), max_particles=2, **kwargs)
    assert found.pareto_k is None and np.isfinite(found.elbo.value)
    (note,) = found.notes
    assert note.startswith("No Pareto k-hat: ")
    return note


def mixture(x):
    which = numpyro.sample("which", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
    numpyro.sample("x", dist.Normal(2.0 * which[..., None] * jnp.ones(4), 1.0).to_event(1), obs=x)


def test_k_hat_that_does_not_exist_is_explained():
    pytest.importorskip("funsor")
    assert "is a point" in reason(conjugate, AutoDelta(conjugate), DATA)
    assert "does not sample which" in reason(mixture, lambda x: None, DATA, loss=TraceEnum_ELBO())


def test_k_hat_of_equal_weights_is_explained():
    """One draw of the guide, one weight: there is no tail."""

    def model():
        numpyro.sample("z", dist.Uniform(0.0, 1.0))

    assert "no tail to fit" in reason(model, model)


def test_k_hat_that_numpyro_has_not_does_not_lose_the_elbo(monkeypatch):
    def broken(*args, **kwargs):
        raise NotImplementedError("no such thing")

    monkeypatch.setattr("numpyro_rad.diagnostics.quality.psis_diagnostic", broken)
    assert "NotImplementedError('no such thing')" in reason(conjugate, normal_guide, DATA)


@pytest.mark.slow
def test_guides_that_transform_one_latent_vector_have_a_k_hat():
    guide = AutoMultivariateNormal(conjugate)
    svi = svi_of(RAD_ELBO(), guide=guide, optimizer=optax.adam(0.05))
    result = svi.run(jax.random.key(0), 300, DATA, progress_bar=False)
    found = fit_quality(svi, result, DATA, key=jax.random.key(1))
    assert abs(found.elbo.value - EVIDENCE) < 0.2
    assert found.pareto_k < 0.7 or found.notes


# -- what a fit is -----------------------------------------------------------------------------------------------------


def test_result_state_and_parameters_say_the_same():
    svi = svi_of(RAD_ELBO())
    result = svi.run(jax.random.key(0), 3, DATA, progress_bar=False)
    options = {"key": jax.random.key(0), "pareto_k": False}
    values = [fit_quality(svi, fit, DATA, **options).elbo for fit in (result, result.state, result.params)]
    assert values[0] == values[1] == values[2]


def test_mutable_state_is_used():
    def shifted(x):
        holder = mutable("shift", {"value": jnp.float32(0.0)})
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z + holder["value"], 1.0).expand([4]).to_event(1), obs=x)

    svi = svi_of(Trace_ELBO(), shifted)
    state = svi.init(jax.random.key(0), DATA)
    moved = state._replace(mutable_state={"shift": {"value": jnp.float32(5.0)}})
    ours, theirs = (fit_quality(svi, s, DATA, key=jax.random.key(0), pareto_k=False).elbo.value for s in (state, moved))
    assert ours > theirs + 10


def test_iterates_are_judged_beside():
    rng = np.random.default_rng(0)
    iterates, few = Iterates(), Iterates()
    iterates.record(np.arange(1000), rng.standard_normal((1000, 64)), rng.standard_normal(1000))
    found = quality(iterates=iterates)
    assert (found.r_hat, found.mcse, found.converged) == (iterates.r_hat(), iterates.mcse(), True)
    found = quality(iterates=few)
    assert found.r_hat is found.mcse is found.converged is None
    assert "0 iterates were recorded" in found.notes[0]
    data = json.loads(json.dumps(records.to_dict(found)))
    assert records.from_dict(records.FitQuality, data) == found


def test_elbo_that_is_not_finite_is_reported():
    found = quality(loc=np.nan)
    assert np.isnan(found.elbo.value) and "not finite" in found.notes[0]


def test_what_is_wrong_is_said():
    svi = svi_of(Trace_ELBO())
    state = svi.init(jax.random.key(0), DATA)
    options = {"key": jax.random.key(0)}
    with pytest.raises(TypeError, match="fit_quality: svi_state is 3"):
        fit_quality(svi, 3, DATA, **options)
    with pytest.raises(ValueError, match="not been initialised"):
        fit_quality(svi_of(Trace_ELBO()), state, DATA, **options)
    for wrong in ({"standard_error": 0.0}, {"max_particles": 1}, {"standard_error": float("nan")}):
        with pytest.raises(ValueError, match="standard_error="):
            fit_quality(svi, state, DATA, **options, **wrong)


# -- beside exact gradients --------------------------------------------------------------------------------------------


def test_shadow_of_an_exact_plan_differs_by_rounding_alone():
    problem = small_network()
    svi = problem.svi(RAD_ELBO(codec=Keep()))
    found = shadow(svi, jax.random.key(0), 30, *problem.args, num_seeds=2, **problem.kwargs)
    np.testing.assert_allclose(found.randomized_losses, found.exact_losses, rtol=1e-4)
    assert np.all(found.distance < 1e-3 * found.travelled)
    assert found.steps[-1] == 30 and len(found.steps) == len(found.difference) == len(found.standard_error) == 20


@pytest.mark.slow
def test_shadow_is_two_runs_of_svi(encode_all):
    """The slow twin: NumPyro's own ``run`` with either loss, by hand."""
    problem = small_network()
    loss = RAD_ELBO(codec=StochasticRound(1))
    svi = problem.svi(loss)
    found = shadow(svi, jax.random.key(3), 25, *problem.args, num_seeds=3, **problem.kwargs)
    keys, options = jax.random.split(jax.random.key(3), 3), {"progress_bar": False, **problem.kwargs}
    rows = []
    for key in keys:
        twins = [problem.svi(one) for one in (loss, loss.base)]
        rows.append([np.asarray(t.run(key, 25, *problem.args, **options).losses, float) for t in twins])
    randomized, exact = np.stack(rows, 1)
    np.testing.assert_allclose(found.randomized_losses, randomized, rtol=1e-4)
    np.testing.assert_allclose(found.exact_losses, exact, rtol=1e-4)
    last = (exact - randomized)[:, 24:].mean(1)
    assert found.final.value == pytest.approx(last.mean(), rel=1e-2, abs=1e-2)
    assert found.final.standard_error == pytest.approx(last.std(ddof=1) / np.sqrt(3), rel=1e-2, abs=1e-2)
    assert np.any(found.randomized_losses != found.exact_losses)  # the codes did something
    assert np.all(found.randomized_losses[:, 0] == found.exact_losses[:, 0])  # the same start and noise
    assert "25 steps" in str(found) and "3 seeds" in str(found)


@pytest.mark.slow
def test_shadow_compares_the_plan_that_trains(encode_all):
    """Calibrated and under a budget: not a word about another program, and the losses of the run itself."""
    problem = small_network()
    svi = problem.svi(RAD_ELBO(memory_budget="3kB"))
    state = svi.init(jax.random.key(5), *problem.args, **problem.kwargs)
    svi.loss = svi.loss.replace(calibration=svi.loss.calibrate(svi, state, *problem.args, **problem.kwargs))
    plan, _ = svi.loss.plan_of_update(svi, state, *problem.args, **problem.kwargs)
    assert plan.stored_bytes <= 3000 and any(p.encoded for p in plan.walk())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = shadow(svi, jax.random.key(0), 5, *problem.args, num_seeds=2, **problem.kwargs)
    pinned = problem.svi(svi.loss.with_plan(plan))
    key = jax.random.split(jax.random.key(0), 2)[0]
    expected = pinned.run(key, 5, *problem.args, progress_bar=False, **problem.kwargs).losses
    np.testing.assert_allclose(found.randomized_losses[0], expected, rtol=1e-5)


@pytest.mark.slow
def test_shadow_sees_gradients_that_do_harm(encode_all):
    """Planted: an optimizer cannot be led astray here by a little, so the gradient of the twin is turned around."""

    class Wrong(RAD_ELBO):
        def loss(self, *operands, **options):
            value = super().loss(*operands, **options)
            return 2 * jax.lax.stop_gradient(value) - value

    problem = small_network()
    found = shadow(problem.svi(Wrong()), jax.random.key(0), 30, *problem.args, num_seeds=2, **problem.kwargs)
    assert found.final.value < -5 * found.final.standard_error < 0


def test_shadow_refuses_what_it_cannot_compare():
    problem = small_network()
    with pytest.raises(TypeError, match="the loss is a Trace_ELBO"):
        shadow(problem.svi(Trace_ELBO()), jax.random.key(0), 3, *problem.args)
    for wrong in ({"num_seeds": 1}, {"num_steps": 0}):
        with pytest.raises(ValueError, match="num_seeds="):
            shadow(problem.svi(RAD_ELBO()), jax.random.key(0), **{"num_steps": 3, **wrong})


def test_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quality(pareto_k=True)


def test_weights_that_one_draw_outweighs():
    """Far too wide a guide for a thousand coordinates: what double precision leaves of the tail must not count."""

    def model():
        numpyro.sample("z", dist.Normal(0.0, 1.0).expand([1000]).to_event(1))

    def guide():
        numpyro.sample("z", dist.Normal(0.0, numpyro.param("scale", 8.0)).expand([1000]).to_event(1))

    svi = SVI(model, guide, optax.sgd(0.1), Trace_ELBO())
    found = fit_quality(svi, svi.init(jax.random.key(0)), key=jax.random.key(1))
    assert found.pareto_k == np.inf and "out of reach" in found.notes[0]
