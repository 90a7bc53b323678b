"""What ``to_arviz`` stores is what the model and the guide say, on both generations of ArviZ, also after a file.

The slow twins are NumPyro's own ``log_density``, ``log_likelihood`` and closed forms, one draw at a time.
"""

import importlib.metadata
import json

import arviz as az
import fits
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import linen
from numpyro.contrib.module import flax_module, random_flax_module
from numpyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, log_likelihood
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from numpyro.primitives import mutable
from zscores import assert_unbiased

from numpyro_rad.report import archive
from numpyro_rad.report.archive import to_arviz

KEY = jax.random.key(3)
NEW = int(importlib.metadata.version("arviz").split(".")[0]) >= 1
X = np.linspace(-1, 1, 24).astype(np.float32)
Y = (0.5 + 2 * X + 0.3 * np.sin(40 * X)).astype(np.float32)


def line(x, y=None):
    a = numpyro.sample("a", dist.Normal(0, 2))
    b = numpyro.sample("b", dist.Normal(0, 2).expand([2]).to_event(1))
    with numpyro.plate("points", len(x)):
        mean = numpyro.deterministic("mean", a + b[0] * x)
        numpyro.sample("y", dist.Normal(mean, 0.4), obs=y)


def prepared(model, guide, *args, elbo=None):
    """An SVI and its initial parameters: enough where it does not matter how good they are."""
    svi = SVI(model, guide, optax.adam(0.03), elbo or Trace_ELBO())
    return svi, svi.get_params(svi.init(KEY, *args))


@pytest.fixture(scope="module")
def line_fit():
    svi = SVI(line, AutoMultivariateNormal(line), optax.adam(0.03), Trace_ELBO())
    return svi, svi.run(KEY, 1500, X, Y, progress_bar=False)


def draws(data, name):
    return {name: data["posterior"][name].values[0]}


def test_densities_are_those_of_numpyro(line_fit):
    svi, result = line_fit
    data = to_arviz(svi, result, X, Y, key=KEY, num_samples=13, batch_size=5)
    sample = {**draws(data, "a"), **draws(data, "b")}
    joint = dist.Normal(0, 2).log_prob(sample["a"]) + dist.Normal(0, 2).log_prob(sample["b"]).sum(-1)
    likelihood = log_likelihood(line, sample, X, Y)["y"]
    np.testing.assert_allclose(data["log_likelihood"]["y"].values[0], likelihood, rtol=1e-5)
    np.testing.assert_allclose(data["sample_stats"]["lp"].values[0], joint + likelihood.sum(-1), rtol=1e-5)
    guide = svi.guide.get_posterior(result.params)
    flat = np.column_stack([sample["a"], sample["b"]])
    np.testing.assert_allclose(data["sample_stats"]["log_q"].values[0], guide.log_prob(flat), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        data["posterior"]["mean"].values[0], sample["a"][:, None] + sample["b"][:, :1] * X, rtol=1e-5
    )


def test_layout(line_fit):
    svi, result = line_fit
    data = to_arviz(svi, result.params, X, Y, key=KEY, num_samples=7)
    assert data["posterior"]["a"].dims == ("chain", "draw")
    assert data["posterior"]["a"].shape == (1, 7)
    assert data["posterior"]["b"].dims == ("chain", "draw", "b_dim_0")
    for group, name in (("posterior", "mean"), ("log_likelihood", "y"), ("posterior_predictive", "y")):
        assert data[group][name].dims == ("chain", "draw", "points")
        assert isinstance(data[group][name].variable._data, np.ndarray)
    np.testing.assert_array_equal(data["observed_data"]["y"].values, Y)
    again = to_arviz(svi, result.params, X, Y, key=KEY, num_samples=7)
    np.testing.assert_array_equal(again["posterior"]["b"].values, data["posterior"]["b"].values)


def test_predictions_are_drawn_anew(line_fit):
    svi, result = line_fit
    data = to_arviz(svi, result, X, Y, key=KEY, num_samples=1000, batch_size=250)
    noise = data["posterior_predictive"]["y"].values[0] - data["posterior"]["mean"].values[0]
    assert_unbiased(noise, np.zeros(len(X)), "prediction")
    assert_unbiased(noise**2, np.full(len(X), 0.4**2), "variance of the prediction")


def test_groups_can_be_left_out(line_fit):
    svi, result = line_fit
    data = to_arviz(svi, result, X, key=KEY, num_samples=4, log_likelihood=False, posterior_predictive=False)
    names = set(data.children) if NEW else set(data.groups())
    assert names == {"posterior", "sample_stats"}  # without y nothing is observed


def test_arviz_understands_it(line_fit):
    svi, result = line_fit
    data = to_arviz(svi, result, X, Y, key=KEY, num_samples=400, batch_size=100)
    table = az.summary(data, var_names=["a", "b"])
    assert len(table) == 3
    loo = az.loo(data, var_name="y")
    assert np.isfinite(loo.elpd if NEW else loo.elpd_loo)
    if NEW:  # 0.23 does not have it
        stats = data["sample_stats"]
        corrected = az.loo_approximate_posterior(data, stats["lp"], stats["log_q"], var_name="y")
        assert abs(corrected.elpd - loo.elpd) < 1  # the guide is the exact posterior's family


def test_record_has_its_groups(line_fit):
    svi, result = line_fit
    record = fits.small_budget()
    data = to_arviz(svi, result, X, Y, key=KEY, num_samples=4, record=record)
    variance = data["gradient_variance"]
    assert variance["path"].dims == ("step", "site")
    np.testing.assert_array_equal(variance["path"].values, record.track.path)
    assert list(variance["site"].values) == list(record.track.names)
    np.testing.assert_array_equal(variance["step"].values, record.track.steps)
    path = variance["variance"].sel(block="dense0.kernel", source="path")
    assert float(path) == record.gradient_variance.blocks[0].path.value
    assert json.loads(variance.attrs["measured"])["rho"]["value"] == 3.2
    np.testing.assert_array_equal(data["fit"]["loss"].values, record.losses)
    assert [a["kind"] for a in json.loads(data["fit"].attrs["alarms"])] == ["rho"] * 3


@pytest.mark.parametrize("record", [fits.minimal, fits.good])
@pytest.mark.parametrize("kind", ["netcdf", "zarr"])
@pytest.mark.filterwarnings("ignore:Consolidated metadata")  # xarray's way to write zarr
def test_files(line_fit, tmp_path, record, kind):
    if kind == "zarr":
        zarr = pytest.importorskip("zarr", reason="zarr is not installed")
        if not NEW and not zarr.__version__.startswith("2."):
            pytest.skip("ArviZ 0.23 writes the files of zarr 2")
    svi, result = line_fit
    data = to_arviz(svi, result, X, Y, key=KEY, num_samples=4, record=record())
    path = str(tmp_path / f"fit.{kind}")
    getattr(data, f"to_{kind}")(path)
    again = getattr(az, f"from_{kind}")(path)
    names = list(data.children) if NEW else data.groups()
    assert set(names) == set(again.children if NEW else again.groups())
    for name in names:
        ours, theirs = (d[name].to_dataset() if NEW else d[name] for d in (data, again))
        assert ours.equals(theirs)
        assert {k: theirs.attrs[k] for k in ours.attrs if ours.attrs[k] == ours.attrs[k]} == {
            k: v for k, v in ours.attrs.items() if v == v
        }
    again.close()


def test_minibatches_of_plates_become_the_data():
    def model(x, y):
        a = numpyro.sample("a", dist.Normal(0, 2))
        with numpyro.plate("points", len(x), subsample_size=5) as index:
            local = numpyro.sample("local", dist.Normal(a, 1))
            numpyro.sample("y", dist.Normal(local, 0.4), obs=jnp.asarray(y)[index])

    svi, params = prepared(model, AutoNormal(model), X, Y)
    data = to_arviz(svi, params, X, Y, key=KEY, num_samples=6)
    np.testing.assert_array_equal(data["observed_data"]["y"].values, Y)
    a, local = (data["posterior"][n].values[0] for n in ("a", "local"))
    assert data["posterior"]["local"].dims == ("chain", "draw", "points")
    pointwise = dist.Normal(local, 0.4).log_prob(Y)
    np.testing.assert_allclose(data["log_likelihood"]["y"].values[0], pointwise, rtol=1e-4, atol=1e-4)
    prior = dist.Normal(0, 2).log_prob(a) + dist.Normal(a[:, None], 1).log_prob(local).sum(-1)
    np.testing.assert_allclose(data["sample_stats"]["lp"].values[0], prior + pointwise.sum(-1), rtol=1e-4)


def mixture(y):
    means = numpyro.sample("means", dist.Normal(0, 5).expand([2]).to_event(1))
    with numpyro.plate("points", len(y)):
        z = numpyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        numpyro.sample("y", dist.Normal(means[z], 1.0), obs=y)


def test_discrete_sites_of_the_model_are_drawn_given_the_rest():
    pytest.importorskip("funsor")
    y = np.concatenate([np.full(10, -3.0), np.full(4, 3.0), np.zeros(2)]).astype(np.float32)
    at = jnp.array([-3.0, 3.0])

    def guide(y):
        numpyro.sample("means", dist.Delta(numpyro.param("at", at), event_dim=1))

    svi, params = SVI(mixture, guide, optax.adam(0.1), TraceEnum_ELBO(max_plate_nesting=1)), {"at": at}
    data = to_arviz(svi, params, y, key=KEY, num_samples=600, batch_size=200)
    z, means = data["posterior"]["z"].values[0], data["posterior"]["means"].values[0]
    joint = np.stack([np.log(p) + dist.Normal(means[:1, [i]], 1).log_prob(y)[0] for i, p in enumerate((0.7, 0.3))])
    weights = np.exp(joint - np.logaddexp(*joint))
    assert_unbiased(z.astype(float), weights[1], "z given y")
    marginal = np.logaddexp(*joint).sum() + dist.Normal(0, 5).log_prob(means[0]).sum()
    np.testing.assert_allclose(data["sample_stats"]["lp"].values[0], marginal, rtol=1e-4)
    given = dist.Normal(np.take_along_axis(means, z, 1), 1).log_prob(y)
    np.testing.assert_allclose(data["log_likelihood"]["y"].values[0], given, rtol=1e-4, atol=1e-5)


def test_discrete_sites_of_the_guide():
    def model():
        z = numpyro.sample("z", dist.Bernoulli(0.5))
        numpyro.sample("y", dist.Normal(jnp.where(z, 1.0, -1.0), 1.0), obs=0.4)

    def guide():
        numpyro.sample("z", dist.Bernoulli(numpyro.param("p", 0.7)))

    data = to_arviz(SVI(model, guide, optax.adam(0.1), Trace_ELBO()), {"p": 0.7}, key=KEY, num_samples=50)
    z = data["posterior"]["z"].values[0]
    np.testing.assert_allclose(data["sample_stats"]["log_q"].values[0], np.log(np.where(z, 0.7, 0.3)), rtol=1e-5)
    assert data["observed_data"]["y"].shape == ()


class Network(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(1)(jnp.tanh(linen.Dense(3)(x)))


def test_modules_as_parameters_and_as_random_sites(tmp_path):
    def plain(x, y):
        net = flax_module("net", Network(), input_shape=(1,))
        scale = numpyro.sample("scale", dist.HalfNormal(1))
        numpyro.sample("y", dist.Normal(net(x), scale).to_event(1), obs=y)

    def random(x, y):
        net = random_flax_module("net", Network(), prior=dist.Normal(0, 1), input_shape=(1,))
        numpyro.sample("y", dist.Normal(net(x), 0.5), obs=y)

    for model in (plain, random):
        svi, params = prepared(model, AutoNormal(model), X[:, None], Y[:, None])
        data = to_arviz(svi, params, X[:, None], Y[:, None], key=KEY, num_samples=5)
        data.to_netcdf(str(tmp_path / f"{model.__name__}.nc"))
        assert np.isfinite(data["sample_stats"]["lp"].values).all()
    assert "net.Dense_1.kernel" in data["posterior"]
    assert data["posterior"]["net.Dense_1.kernel"].shape == (1, 5, 1, 3)


def test_mutable_state_is_taken_along():
    def model(y):
        state = mutable("count", {"value": 1.0})
        a = numpyro.sample("a", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(a + state["value"], 1), obs=y)
        state["value"] = state["value"] + 1.0

    svi = SVI(model, AutoNormal(model), optax.adam(0.03), Trace_ELBO())
    result = svi.run(KEY, 4, Y, progress_bar=False)
    data = to_arviz(svi, result, Y, key=KEY, num_samples=3)
    a = data["posterior"]["a"].values[0]
    count = float(result.state.mutable_state["count"]["value"])
    assert count > 1
    np.testing.assert_allclose(
        data["log_likelihood"]["y"].values[0], dist.Normal(a[:, None] + count, 1).log_prob(Y), rtol=1e-5
    )


def test_factors_are_no_data():
    def model(y):
        a = numpyro.sample("a", dist.Normal(0, 1))
        numpyro.factor("penalty", -(a**2))
        numpyro.sample("y", dist.Normal(a, 1), obs=y)

    svi, params = prepared(model, AutoNormal(model), Y)
    data = to_arviz(svi, params, Y, key=KEY, num_samples=3)
    assert list(data["log_likelihood"].data_vars) == list(data["observed_data"].data_vars) == ["y"]
    a = data["posterior"]["a"].values[0]
    expected = dist.Normal(0, 1).log_prob(a) - a**2 + dist.Normal(a[:, None], 1).log_prob(Y).sum(-1)
    np.testing.assert_allclose(data["sample_stats"]["lp"].values[0], expected, rtol=1e-5)


def test_wrong_arguments(line_fit, monkeypatch):
    svi, result = line_fit
    for option in ("num_samples", "batch_size"):
        with pytest.raises(ValueError, match=f"{option}=0"):
            to_arviz(svi, result, X, Y, key=KEY, **{option: 0})
    several = SVI(line, svi.guide, optax.adam(0.1), Trace_ELBO(multi_sample_guide=True))
    with pytest.raises(ValueError, match="multi_sample_guide"):
        to_arviz(several, result, X, Y, key=KEY)

    def twins(y):
        a = numpyro.sample("net/a", dist.Normal(0, 1))
        numpyro.sample("net.a", dist.Normal(a, 1))

    svi, params = prepared(twins, AutoNormal(twins), Y)
    with pytest.raises(ValueError, match=r"two sites would be called 'net\.a'"):
        to_arviz(svi, params, Y, key=KEY, num_samples=2)

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(archive.importlib.metadata, "version", absent)
    with pytest.raises(ImportError, match=r"pip install numpyro_rad\[arviz\]"):
        to_arviz(svi, params, Y, key=KEY)
