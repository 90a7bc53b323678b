"""What ``to_arviz`` stores is what the model and the guide say, on both generations of ArviZ, also after a file.

The slow twins are NumPyro's own ``log_density``, ``log_likelihood`` and closed forms, one draw at a time.
"""

import dataclasses
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

from numpyro_rad.diagnostics.records import Validation
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


@pytest.mark.slow
def test_densities_are_those_of_numpyro(line_fit):
    svi, result = line_fit
    data = to_arviz(svi, result, X, Y, key=KEY, num_samples=13, chunk_size=5)
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
    data = to_arviz(svi, result, X, Y, key=KEY, num_samples=1000, chunk_size=250)
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
    data = to_arviz(svi, result, X, Y, key=KEY, num_samples=400, chunk_size=100)
    table = az.summary(data, var_names=["a", "b"])
    assert len(table) == 3
    note = data["posterior"].attrs["note"]  # one chain has no R-hat: what to do instead is said, and works
    assert "R-hat is NaN for one chain" in note and "arviz.summary(data, kind='stats')" in note
    assert "r_hat" in table.columns and not any(
        "r_hat" in c or "ess" in c for c in az.summary(data, kind="stats").columns
    )
    loo = az.loo(data, var_name="y")
    assert np.isfinite(loo.elpd if NEW else loo.elpd_loo)
    if NEW:  # 0.23 does not have it
        stats = data["sample_stats"]
        corrected = az.loo_approximate_posterior(data, stats["lp"], stats["log_q"], var_name="y")
        assert abs(corrected.elpd - loo.elpd) < 1  # the guide is the exact posterior's family


def test_record_has_its_groups(line_fit):
    svi, result = line_fit
    looks = Validation(np.array([100, 200]), np.array([[3.0, 4.0, 5.0], [2.0, 3.0, 3.5]]))
    record = dataclasses.replace(fits.small_budget(), validation=looks)
    data = to_arviz(svi, result, X, Y, key=KEY, num_samples=4, record=record)
    held_out = data["fit"]["validation_loss"]
    assert held_out.dims == ("validation_step", "guide_draw")
    np.testing.assert_array_equal(held_out.sel(validation_step=200), looks.losses[1])
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


def written(data, tmp_path, kind):
    """What comes back from a file, and that it is all that was written."""
    if kind == "zarr":
        zarr = pytest.importorskip("zarr", reason="zarr is not installed")
        if not NEW and not zarr.__version__.startswith("2."):
            pytest.skip("ArviZ 0.23 writes the files of zarr 2")
    path = str(tmp_path / f"fit.{kind}")
    getattr(data, f"to_{kind}")(path)
    again = getattr(az, f"from_{kind}")(path)
    names = list(data.children) if NEW else data.groups()
    assert set(names) == set(again.children if NEW else again.groups())
    for name in names:
        ours, theirs = (d[name].to_dataset() if NEW else d[name] for d in (data, again))
        assert ours.equals(theirs)
        pairs = [(ours, theirs), *((ours[n], theirs[n]) for n in ours.data_vars)]
        for old, new in pairs:
            known = {k: v for k, v in old.attrs.items() if v == v}
            assert {k: new.attrs[k] for k in known} == known
            assert old is ours or old.dtype == new.dtype
    again.close()


CONSOLIDATED = pytest.mark.filterwarnings("ignore:Consolidated metadata")  # xarray's way to write zarr
FILES = [pytest.param("netcdf", marks=pytest.mark.slow), pytest.param("zarr", marks=CONSOLIDATED)]


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        (fits.minimal, "netcdf"),
        pytest.param(fits.good, "zarr", marks=CONSOLIDATED),
        pytest.param(fits.minimal, "zarr", marks=[CONSOLIDATED, pytest.mark.exhaustive]),
        pytest.param(fits.good, "netcdf", marks=pytest.mark.exhaustive),
    ],
)
def test_files(line_fit, tmp_path, record, kind):
    svi, result = line_fit
    written(to_arviz(svi, result, X, Y, key=KEY, num_samples=4, record=record()), tmp_path, kind)


# Names that are special somewhere, in the order of the model, and what becomes of them.
NAMES = {
    "chain": "chain__",
    "chain_": "chain_",
    "draw": "draw_",
    "sample": "sample_",
    "": "_",
    ".": "._",
    "..": ".._",
    "net/a": "net.a_",
    "net.a": "net.a",
    "net/a_": "net.a__",
    "a": "a",
    "A": "A",
    " a\n'\"": " a\n'\"",
    "é": "é",
    "x": "x",
    "x_dim_0": "x_dim_0",
    "variable": "variable",
    "lp": "lp",
    "step": "step",
    "fit": "fit",
    "posterior": "posterior",
    **{name: name for name in ("site", "block", "source", "total", "__sample__")},
}


def specially_named(y):
    for number, name in enumerate(NAMES):
        numpyro.deterministic(name, jnp.full((2,) if name == "x" else (), float(number)))
    with numpyro.plate("a/b", 2):
        inner = numpyro.sample("inner", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(inner, 1), obs=y)
    with numpyro.plate("a.b", 3):
        numpyro.sample("other", dist.Normal(0, 1))


@pytest.fixture(scope="module")
def special():
    y = np.zeros(2, np.float32)
    svi, params = prepared(specially_named, AutoNormal(specially_named), y)
    return to_arviz(svi, params, y, key=KEY, num_samples=4)


@pytest.mark.slow
def test_no_site_is_lost_whatever_it_is_called(special):
    posterior = special["posterior"]
    assert set(posterior.data_vars) == {*NAMES.values(), "inner", "other"}
    for number, (name, stored) in enumerate(NAMES.items()):
        assert posterior[stored].dims[:2] == ("chain", "draw")
        assert (posterior[stored].values == number).all()
        assert posterior[stored].attrs == ({} if stored == name else {"site": name})
    assert posterior["x"].dims == ("chain", "draw", "x_dim_0_")
    assert posterior["inner"].dims == special["log_likelihood"]["y"].dims == ("chain", "draw", "a.b")
    assert posterior["other"].dims == ("chain", "draw", "a.b_")
    assert len(az.extract(special).data_vars) == len(NAMES) + 2
    assert set(special["sample_stats"].data_vars) == {"lp", "log_q"}


@pytest.mark.parametrize("kind", FILES)
def test_files_take_every_name(special, tmp_path, kind):
    written(special, tmp_path, kind)


def of_all_kinds(empty):
    a = numpyro.sample("a", dist.Normal(0, 1))
    numpyro.sample("nothing", dist.Normal(0, 1).expand([0]).to_event(1))
    numpyro.sample("no data", dist.Normal(a, 1).expand([0]).to_event(1), obs=empty)
    numpyro.sample("flag", dist.Bernoulli(0.5), obs=jnp.array(True))
    numpyro.sample("count", dist.Poisson(2.0), obs=jnp.array(3))
    with numpyro.plate("points", 2):
        numpyro.factor("penalty", -(a**2))
    with numpyro.plate("chain", 2), numpyro.plate("draw", 3), numpyro.plate("", 1), numpyro.plate("sample", 2):
        numpyro.sample("in plates", dist.Normal(0, 1))
    numpyro.deterministic("true", a == a)
    numpyro.deterministic("three", jnp.full((2,), 3, jnp.int8))
    numpyro.deterministic("narrow", jnp.full((2,), 3, jnp.int4))
    numpyro.deterministic("imaginary", 1j * (a == a))
    numpyro.deterministic("half", jnp.asarray(0.5, jnp.bfloat16))
    numpyro.deterministic("quarter", jnp.asarray(0.25, jnp.float8_e4m3fn))
    numpyro.deterministic("tree", {"one": jnp.ones(2), "two": (jnp.full((), 2.0), 3.0)})


@pytest.fixture(scope="module")
def all_kinds():
    svi, params = prepared(of_all_kinds, AutoNormal(of_all_kinds), np.zeros(0, np.float32))
    return to_arviz(svi, params, np.zeros(0, np.float32), key=KEY, num_samples=3)


@pytest.mark.parametrize("kind", FILES)
def test_files_take_sites_of_all_kinds(all_kinds, tmp_path, kind):
    written(all_kinds, tmp_path, kind)


def test_sites_of_all_kinds(all_kinds):
    data = all_kinds
    found = {n: v.values[0, -1] for n, v in data["posterior"].data_vars.items()}
    assert found["nothing"].shape == (0,)
    assert data["posterior"]["in plates"].dims == ("chain", "draw", "sample_", "_", "draw_", "chain_")
    assert (
        found["true"].dtype == bool and found["true"] and found["three"].tolist() == found["narrow"].tolist() == [3, 3]
    )
    assert found["imaginary"] == 1j and found["half"] == 0.5 and found["quarter"] == 0.25
    assert found["tree.one"].tolist() == [1, 1] and (found["tree.two.0"], found["tree.two.1"]) == (2, 3)
    for group in ("observed_data", "log_likelihood", "posterior_predictive"):
        assert set(data[group].data_vars) == {"no data", "flag", "count"}  # a factor has no data
    assert data["observed_data"]["flag"].values.item() is True


def test_labels_of_a_record_are_told_apart(line_fit):
    svi, result = line_fit
    names = ("total", "total_", "a", "site")
    record = dataclasses.replace(
        fits.good(parameters=("a", "a", "b")), gradient_variance=fits.gradient_variance(names, rho=0.1)
    )
    data = to_arviz(svi, result, X, Y, key=KEY, num_samples=2, record=record)
    blocks = data["gradient_variance"]["block"].values.tolist()
    assert blocks == ["total", "total_", "total__", "a", "site"]
    first = float(data["gradient_variance"]["variance"].sel(block="total_", source="path"))
    assert first == record.gradient_variance.blocks[0].path.value
    assert data["gradient_variance"]["site"].values.tolist() == ["a", "a_", "b"]


@pytest.mark.slow
def test_minibatches_of_plates_become_the_data():
    """The size of a minibatch is an argument of the model, as it is called in most of them."""

    def model(x, y, batch_size):
        a = numpyro.sample("a", dist.Normal(0, 2))
        with numpyro.plate("points", len(x), subsample_size=batch_size) as index:
            local = numpyro.sample("local", dist.Normal(a, 1))
            numpyro.sample("y", dist.Normal(local, 0.4), obs=jnp.asarray(y)[index])

    svi, params = prepared(model, AutoNormal(model), X, Y, 5)
    data = to_arviz(svi, params, X, Y, key=KEY, num_samples=6, batch_size=5)
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
    data = to_arviz(svi, params, y, key=KEY, num_samples=600, chunk_size=200)
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


@pytest.mark.slow
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
    for option in ("num_samples", "chunk_size"):
        with pytest.raises(ValueError, match=f"{option}=0"):
            to_arviz(svi, result, X, Y, key=KEY, **{option: 0})
    several = SVI(line, svi.guide, optax.adam(0.1), Trace_ELBO(multi_sample_guide=True))
    with pytest.raises(ValueError, match="multi_sample_guide"):
        to_arviz(several, result, X, Y, key=KEY)

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(archive.importlib.metadata, "version", absent)
    with pytest.raises(ImportError, match=r"pip install numpyro_rad\[arviz\]"):
        to_arviz(svi, result, X, Y, key=KEY)
