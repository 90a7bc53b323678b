"""The posterior summary and the predictive check, beside numbers that are known without any draw."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, Trace_ELBO
from scipy import stats

from numpyro_rad.diagnostics import posterior as module
from numpyro_rad.diagnostics.posterior import DRAWS, ENTRIES, posterior_summary

LARGE = ENTRIES  # entries of a site: more than are looked at, as there are others
N = 3000

_rng = np.random.default_rng(0)
Y = _rng.normal(2.0, 1.5, N)
MASKED = np.where(np.arange(N) % 3 == 0, 1e6, Y)  # what is masked is no number of the model
COUNTS, LABELS = _rng.poisson(3.0, N), _rng.integers(0, 3, N)


def model(y, masked, counts, labels):
    mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
    numpyro.sample("many", dist.Normal(jnp.zeros(LARGE), 1.0).to_event(1))
    numpyro.deterministic("twice", 2 * mu)
    numpyro.deterministic("few", jnp.array([[1.0, -1.0]]) * mu)
    numpyro.sample("half", dist.Normal(mu * jnp.ones(N), 0.5), obs=y)  # half of the spread that the data have
    with numpyro.handlers.mask(mask=jnp.arange(N) % 3 != 0):
        numpyro.sample("masked", dist.Normal(mu * jnp.ones(N), 1.5), obs=masked)
    numpyro.sample("alone", dist.Normal(mu, 1.0), obs=y)
    with numpyro.plate("data", N, subsample_size=10):
        numpyro.sample("counts", dist.Poisson(3.0), obs=counts)
        numpyro.sample("labels", dist.Categorical(jnp.ones(3) / 3), obs=labels)


def guide(*data):
    numpyro.sample("mu", dist.Normal(numpyro.param("loc", 0.0), 0.03))
    numpyro.sample("many", dist.Normal(jnp.linspace(-1.0, 1.0, LARGE), 0.1).to_event(1))


@pytest.fixture(scope="module")
def found():
    svi = SVI(model, guide, optax.adam(1e-3), Trace_ELBO())
    return posterior_summary(svi, {"loc": np.float32(2.0)}, Y, MASKED, COUNTS, LABELS, key=jax.random.key(0))


@pytest.mark.slow
def test_sites_have_their_moments(found):
    assert [s.name for s in found.sites] == ["mu", "many", "twice", "few[0, 0]", "few[0, 1]"]
    mu, many, twice, *few = found.sites
    for site, loc, scale in ((mu, 2.0, 0.03), (twice, 4.0, 0.06), (few[0], 2.0, 0.03), (few[1], -2.0, 0.03)):
        error = scale / np.sqrt(DRAWS)
        z = [(site.mean[0] - loc) / error, (site.sd[0] - scale) / (error / np.sqrt(2))]
        z += [(site.low[0] - loc + 1.645 * scale) / (2.1 * error), (site.high[0] - loc - 1.645 * scale) / (2.1 * error)]
        assert site.size == 1 and site.mean[0] == site.mean[1] and np.abs(z).max() < 4
    assert many.size == LARGE  # ranges over entries, whose extremes are beyond those of one by some standard errors
    for ends, low, high in ((many.mean, -1.0, 1.0), (many.sd, 0.1, 0.1), (many.high, -0.835, 1.165)):
        assert low - 0.06 < ends[0] < low + 0.02 and high - 0.02 < ends[1] < high + 0.06


def test_data_are_beside_their_predictions(found):
    assert [c.name for c in found.checks] == ["half", "masked", "counts"]  # labels have no order
    assert [note[:34] for note in found.notes] == ["No predictive check of alone: the m"[:34]]
    half, masked, counts = found.checks
    assert half.size == N and masked.size == N - N // 3 and counts.size == N
    expected = 1 - 2 * stats.norm.sf(1.645 * 0.5 / 1.5)  # of data with three times the spread that is predicted
    assert abs(half.inside - expected) < 0.04 < 0.9 - half.inside
    assert abs(masked.inside - 0.9) < 0.03
    assert counts.inside >= 0.9  # an interval of whole numbers holds no less
    for check, of in ((half, Y), (masked, MASKED[np.arange(N) % 3 != 0]), (counts, COUNTS)):
        assert (check.mean, check.sd) == pytest.approx((of.mean(), of.std()))
    assert half.predicted_sd[1] < 0.6 < half.sd and masked.predicted_sd[0] < 1.5 < masked.predicted_sd[1]
    width = 3.29 * np.hypot(0.03, 1.5 / masked.size**0.5)
    assert masked.predicted_mean[1] - masked.predicted_mean[0] == pytest.approx(width, rel=0.2)


def test_memory_is_bounded(monkeypatch):
    """What comes to the host is a few entries of each draw, however large the sites are."""
    seen = []

    def collected(draws, key, n, chunk_size, wanted, reduce):
        shapes = jax.eval_shape(lambda k: reduce(draws.draw(k, wanted)), key)
        seen.append(sum(x.size for x in jax.tree.leaves(shapes)))
        raise ValueError("enough")

    monkeypatch.setattr(module, "collected", collected)
    svi = SVI(model, guide, optax.adam(1e-3), Trace_ELBO())
    found = posterior_summary(svi, {"loc": 2.0}, Y, MASKED, COUNTS, LABELS, key=jax.random.key(0))
    assert len(seen) == 2 and max(seen) <= ENTRIES and found.sites == ()
    assert [note[:22] for note in found.notes] == ["No predictive check: m", "No posterior summary: "]


def test_what_cannot_be_predicted_costs_that_alone():
    class Unsampled(dist.Normal):
        def sample(self, key, sample_shape=()):
            raise NotImplementedError("no sampler")

    def stubborn(y):
        numpyro.sample("y", Unsampled(numpyro.sample("mu", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    def of_mu(y):
        numpyro.sample("mu", dist.Normal(numpyro.param("loc", 0.0), 1.0))

    svi = SVI(stubborn, of_mu, optax.adam(1e-3), Trace_ELBO())
    found = posterior_summary(svi, {"loc": 1.0}, jnp.zeros(()), key=jax.random.PRNGKey(0))
    assert [s.name for s in found.sites] == ["mu"] and found.checks == ()
    (note,) = found.notes
    assert note.startswith("No predictive check") and "no sampler" in note
