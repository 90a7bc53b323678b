"""Regressions and hierarchies: generalized linear models, partial pooling, Gaussian processes, shrinkage."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions.transforms import OrderedTransform
from numpyro.handlers import reparam
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.initialization import init_to_feasible, init_to_value
from numpyro.infer.reparam import LocScaleReparam

from examples.coverage.problem import Problem, adam, arrays, example, sigmoid


def normal(model: Any, scale: float = 0.1) -> AutoNormal:
    """The mean-field guide of most examples, started at a feasible point."""
    return AutoNormal(model, init_loc_fn=init_to_feasible, init_scale=scale)


@example("examples/baseball.py")
def baseball(small: bool = False) -> Problem:
    """Partially pooled success rates of 18 batters; tiny on purpose."""

    def model(at_bats, hits):
        mean = numpyro.sample("mean", dist.Uniform(0.0, 1.0))
        strength = numpyro.sample("strength", dist.Pareto(1.0, 1.5))
        with numpyro.plate("players", at_bats.shape[0]):
            rate = numpyro.sample("rate", dist.Beta(mean * strength, (1.0 - mean) * strength))
            numpyro.sample("hits", dist.Binomial(at_bats, probs=rate), obs=hits)

    rng = np.random.default_rng(0)
    at_bats = np.full(18, 45)
    hits = rng.binomial(at_bats, rng.beta(20, 55, 18))
    return Problem(model, AutoNormal(model), arrays(at_bats, hits), optimizer=adam())


@example("examples/proportion_test.py")
def proportion_test(small: bool = False) -> Problem:
    """Two groups of a mailing and a logistic effect of the group; tiny on purpose."""

    def model(design, purchases):
        effects = numpyro.sample("effects", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        intercept = numpyro.sample("intercept", dist.Normal(-2.0, 1.0))
        with numpyro.plate("customers", design.shape[0]):
            numpyro.sample("purchase", dist.Bernoulli(logits=intercept + design @ effects), obs=purchases)

    rng = np.random.default_rng(1)
    design = rng.integers(0, 2, (100 if small else 2000, 3)).astype(float)
    purchases = rng.random(len(design)) < sigmoid(-2.0 + design @ np.array([0.4, -0.2, 0.1]))
    return Problem(model, AutoNormal(model), arrays(design, purchases.astype(int)), optimizer=adam())


@example("examples/ucbadmit.py")
def ucbadmit(small: bool = False) -> Problem:
    """Binomial admissions with correlated intercepts and slopes of departments; tiny on purpose."""

    def model(department, male, applications, admitted):
        loc = numpyro.sample("loc", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        scale = numpyro.sample("scale", dist.HalfNormal(1.0).expand([2]).to_event(1))
        factor = numpyro.sample("factor", dist.LKJCholesky(2, concentration=2.0))
        with numpyro.plate("departments", 6):
            effect = numpyro.sample("effect", dist.MultivariateNormal(loc, scale_tril=scale[:, None] * factor))
        logits = effect[department, 0] + effect[department, 1] * male
        with numpyro.plate("cells", department.shape[0]):
            numpyro.sample("admitted", dist.Binomial(applications, logits=logits), obs=admitted)

    rng = np.random.default_rng(2)
    department, male = np.repeat(np.arange(6), 2), np.tile([0, 1], 6)
    applications = rng.integers(30, 800, 12)
    admitted = rng.binomial(applications, sigmoid(0.6 - 0.5 * department))
    return Problem(model, normal(model), arrays(department, male, applications, admitted), optimizer=adam())


@example("examples/covtype.py")
def covtype(small: bool = False) -> Problem:
    """Logistic regression on many rows at once."""

    def model(x, y):
        weights = numpyro.sample("weights", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
        with numpyro.plate("rows", x.shape[0]):
            numpyro.sample("y", dist.Bernoulli(logits=x @ weights), obs=y)

    rng = np.random.default_rng(3)
    x = rng.standard_normal((200 if small else 50_000, 54))
    y = rng.random(len(x)) < sigmoid(x @ rng.standard_normal(54) / 4)
    return Problem(model, AutoNormal(model), arrays(x, y.astype(int)), optimizer=adam())


@example("examples/hmcecs.py")
def logistic_subsampling(small: bool = False) -> Problem:
    """Logistic regression whose plate draws a minibatch inside of the model."""

    def model(x, y, batch_size):
        weights = numpyro.sample("weights", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
        with numpyro.plate("rows", x.shape[0], subsample_size=batch_size):
            batch = numpyro.subsample(x, event_dim=1)
            numpyro.sample("y", dist.Bernoulli(logits=batch @ weights), obs=numpyro.subsample(y, event_dim=0))

    rng = np.random.default_rng(4)
    x = rng.standard_normal((300 if small else 100_000, 28))
    y = rng.random(len(x)) < sigmoid(x @ rng.standard_normal(28) / 3)
    settings = {"batch_size": 100 if small else 10_000}
    return Problem(model, AutoNormal(model), arrays(x, y.astype(int)), settings, optimizer=adam())


@example("examples/gp.py")
def gaussian_process(small: bool = False) -> Problem:
    """Exact Gaussian process regression: a kernel matrix and its Cholesky factor."""

    def model(x, y):
        variance = numpyro.sample("variance", dist.LogNormal(0.0, 1.0))
        noise = numpyro.sample("noise", dist.LogNormal(-1.0, 1.0))
        length = numpyro.sample("length", dist.LogNormal(0.0, 1.0))
        squared = ((x[:, None] - x[None, :]) / length) ** 2
        kernel = variance * jnp.exp(-0.5 * squared) + (noise + 1e-4) * jnp.eye(x.shape[0])
        numpyro.sample("y", dist.MultivariateNormal(0.0, covariance_matrix=kernel), obs=y)

    rng = np.random.default_rng(5)
    x = np.sort(rng.uniform(-4.0, 4.0, 20 if small else 400))
    y = np.sin(2 * x) + 0.3 * rng.standard_normal(len(x))
    return Problem(model, normal(model), arrays(x, y), optimizer=adam())


@example("examples/hsgp.py")
def hilbert_space_gp(small: bool = False) -> Problem:
    """A Gaussian process in a sine basis, with a heteroscedastic noise level of the same kind."""

    def spectrum(name, frequencies):
        amplitude = numpyro.sample(f"{name}_amplitude", dist.HalfNormal(1.0))
        length = numpyro.sample(f"{name}_length", dist.InverseGamma(5.0, 1.0))
        density = amplitude * jnp.sqrt(length) * jnp.exp(-0.25 * (length * frequencies) ** 2)
        weights = numpyro.sample(f"{name}_weights", dist.Normal(0.0, 1.0).expand(frequencies.shape).to_event(1))
        return density * weights

    def model(x, y, n_basis):
        frequencies = jnp.arange(1, n_basis + 1) * jnp.pi / 3.0
        basis = jnp.sin((x[:, None] + 1.5) * frequencies) / jnp.sqrt(1.5)  # (points, basis)
        mean = basis @ spectrum("mean", frequencies)
        noise = jnp.exp(basis @ spectrum("noise", frequencies) - 1.0)
        with numpyro.plate("points", x.shape[0]):
            numpyro.sample("y", dist.Normal(mean, noise), obs=y)

    rng = np.random.default_rng(6)
    x = rng.uniform(-1.0, 1.0, 50 if small else 7_000)
    y = np.sin(6 * x) + 0.3 * (1 + x) * rng.standard_normal(len(x))
    settings = {"n_basis": 8 if small else 40}
    return Problem(model, normal(model), arrays(x, y), settings, optimizer=adam())


@example("examples/horseshoe_regression.py")
def horseshoe(small: bool = False) -> Problem:
    """Linear regression under a horseshoe prior with reparametrized local scales."""

    def model(x, y):
        features = x.shape[1]
        local = numpyro.sample("local", dist.HalfCauchy(1.0).expand([features]).to_event(1))
        shared = numpyro.sample("shared", dist.HalfCauchy(1.0))
        raw = numpyro.sample("raw", dist.Normal(0.0, 1.0).expand([features]).to_event(1))
        precision = numpyro.sample("precision", dist.Gamma(3.0, 1.0))
        mean = x @ (shared * local * raw)
        numpyro.sample("y", dist.Normal(mean, 1.0 / jnp.sqrt(precision)).to_event(1), obs=y)

    rng = np.random.default_rng(7)
    x = rng.standard_normal((60 if small else 20_000, 20 if small else 200))
    y = x[:, :3] @ np.array([1.0, -2.0, 1.5]) + 0.5 * rng.standard_normal(len(x))
    return Problem(model, normal(model), arrays(x, y), optimizer=adam())


@example("examples/sparse_regression.py")
def sparse_interactions(small: bool = False) -> Problem:
    """Pairwise interactions through a polynomial kernel, the coefficients integrated out."""

    def model(x, y):
        rows, features = x.shape
        local = numpyro.sample("local", dist.HalfCauchy(1.0).expand([features]).to_event(1))
        pairs = numpyro.sample("pairs", dist.InverseGamma(3.0, 1.0))
        slab = numpyro.sample("slab", dist.InverseGamma(3.0, 1.0))
        noise = numpyro.sample("noise", dist.HalfNormal(1.0))
        shrunk = slab * local**2 / (slab + local**2)  # (features,)
        scaled = x * jnp.sqrt(shrunk)
        product = scaled @ scaled.T  # (rows, rows)
        squares = (scaled**2) @ (scaled**2).T
        kernel = 0.5 * pairs**2 * ((1.0 + product) ** 2 - squares) + (1.0 - pairs**2) * product + 1.0
        kernel = kernel + (noise**2 + 1e-3) * jnp.eye(rows)
        numpyro.sample("y", dist.MultivariateNormal(0.0, covariance_matrix=kernel), obs=y)

    rng = np.random.default_rng(8)
    x = rng.standard_normal((24 if small else 300, 5 if small else 30))
    y = x[:, 0] - x[:, 1] * x[:, 2] + 0.2 * rng.standard_normal(len(x))
    guide = AutoNormal(
        model,
        init_loc_fn=init_to_value(values={"pairs": 0.3, "slab": 1.0, "noise": 0.5, "local": np.full(x.shape[1], 0.3)}),
        init_scale=0.02,
    )
    return Problem(model, guide, arrays(x, y), optimizer=adam(3e-3))


@example("tutorial: Bayesian hierarchical linear regression")
def hierarchical_lines(small: bool = False) -> Problem:
    """A line for each of many patients, drawn from a population of lines."""

    def model(patient, week, volume, n_patients):
        loc = numpyro.sample("loc", dist.Normal(0.0, 5.0).expand([2]).to_event(1))
        scale = numpyro.sample("scale", dist.HalfNormal(2.0).expand([2]).to_event(1))
        with numpyro.plate("patients", n_patients):
            line = numpyro.sample("line", dist.Normal(loc, scale).to_event(1))  # (patients, 2)
        noise = numpyro.sample("noise", dist.HalfNormal(2.0))
        with numpyro.plate("visits", patient.shape[0]):
            numpyro.sample("volume", dist.Normal(line[patient, 0] + line[patient, 1] * week, noise), obs=volume)

    rng = np.random.default_rng(9)
    n_patients, visits = (10, 60) if small else (1_500, 30_000)
    patient, week = rng.integers(0, n_patients, visits), rng.uniform(0.0, 2.0, visits)
    lines = np.array([2.0, -0.5]) + np.array([1.0, 0.3]) * rng.standard_normal((n_patients, 2))
    volume = lines[patient, 0] + lines[patient, 1] * week + 0.2 * rng.standard_normal(visits)
    settings = {"n_patients": n_patients}
    return Problem(model, normal(model), arrays(patient, week, volume), settings, optimizer=adam())


@example("tutorial: item response models (SVI of a large hierarchy)")
def item_response(small: bool = False) -> Problem:
    """Two-parameter item response: abilities of persons, difficulty and discrimination of items."""

    def model(answers):
        persons, items = answers.shape
        with numpyro.plate("items", items, dim=-1):
            difficulty = numpyro.sample("difficulty", dist.Normal(0.0, 1.5))
            discrimination = numpyro.sample("discrimination", dist.LogNormal(0.0, 0.5))
        with numpyro.plate("persons", persons, dim=-2):
            ability = numpyro.sample("ability", dist.Normal(0.0, 1.0))  # (persons, 1)
            logits = discrimination * (ability - difficulty)
            with numpyro.plate("items_answered", items, dim=-1):
                numpyro.sample("answer", dist.Bernoulli(logits=logits), obs=answers)

    rng = np.random.default_rng(10)
    persons, items = (30, 8) if small else (4_000, 100)
    logits = rng.standard_normal((persons, 1)) - rng.standard_normal(items)
    return Problem(
        model, normal(model), arrays((rng.random(logits.shape) < sigmoid(logits)).astype(int)), optimizer=adam()
    )


@example("examples/mortality.py")
def mortality(small: bool = False) -> Problem:
    """Deaths by area, age and year: a spatial field over areas, random walks over ages and years."""

    def walk(name, length):
        scale = numpyro.sample(f"{name}_scale", dist.HalfNormal(1.0))
        with reparam(config={name: LocScaleReparam(0.0)}), numpyro.plate(f"{name}_steps", length - 1):
            steps = numpyro.sample(name, dist.Normal(0.0, scale))
        return jnp.pad(jnp.cumsum(steps), (1, 0))

    def model(adjacency, population, deaths):
        areas, ages, years = deaths.shape
        base = numpyro.sample("base", dist.Normal(-3.0, 2.0))
        by_age, by_year = walk("age", ages), walk("year", years)
        correlation = numpyro.sample("correlation", dist.Beta(4.0, 2.0))
        precision = numpyro.sample("precision", dist.Gamma(2.0, 0.5))
        by_area = numpyro.sample("area", dist.CAR(jnp.zeros(areas), correlation, precision, adjacency))
        logits = base + by_area[:, None, None] + by_age[:, None] + by_year  # (areas, ages, years)
        with numpyro.plate_stack("cells", deaths.shape):
            numpyro.sample("deaths", dist.Binomial(population, logits=logits), obs=deaths)

    rng = np.random.default_rng(11)
    areas, ages, years = (6, 4, 3) if small else (100, 19, 20)
    adjacency = np.eye(areas, k=1) + np.eye(areas, k=-1) + np.eye(areas, k=5) + np.eye(areas, k=-5)
    population = rng.integers(100, 1000, (areas, ages, years))
    deaths = rng.binomial(population, sigmoid(-4.0 + 0.15 * np.arange(ages)[:, None] - 0.02 * np.arange(years)))
    return Problem(model, normal(model), arrays(adjacency, population, deaths), optimizer=adam())


@example("examples/zero_inflated_poisson.py")
def zero_inflated_poisson(small: bool = False) -> Problem:
    """Counts with an excess of zeros, both parts linear in the covariates."""

    def model(x, counts):
        rate = numpyro.sample("rate", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
        gate = numpyro.sample("gate", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
        with numpyro.plate("rows", x.shape[0]):
            site = dist.ZeroInflatedPoisson(gate=1.0 / (1.0 + jnp.exp(-(x @ gate))), rate=jnp.exp(x @ rate))
            numpyro.sample("counts", site, obs=counts)

    rng = np.random.default_rng(12)
    x = rng.standard_normal((100 if small else 40_000, 5)) / 2
    counts = rng.poisson(np.exp(x.sum(1) / 2)) * (rng.random(len(x)) < 0.6)
    return Problem(model, AutoNormal(model), arrays(x, counts), optimizer=adam())


@example("tutorial: ordinal regression")
def ordinal_regression(small: bool = False) -> Problem:
    """Ordered answers with cut points under a Dirichlet-like prior on ordered reals."""

    def model(x, y, classes):
        weights = numpyro.sample("weights", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
        base = dist.Normal(0.0, 2.0).expand([classes - 1]).to_event(1)
        cuts = numpyro.sample("cuts", dist.TransformedDistribution(base, OrderedTransform()))
        with numpyro.plate("rows", x.shape[0]):
            numpyro.sample("y", dist.OrderedLogistic(x @ weights, cuts), obs=y)

    rng = np.random.default_rng(13)
    x = rng.standard_normal((100 if small else 20_000, 6))
    latent = x @ np.linspace(-1.0, 1.0, 6) + rng.logistic(size=len(x))
    y = np.digitize(latent, [-2.0, -0.5, 0.5, 2.0])
    return Problem(model, normal(model), arrays(x, y), {"classes": 5}, optimizer=adam())


@example("tutorial: multivariate regression with LKJCholesky (robust to outliers)")
def multivariate_student(small: bool = False) -> Problem:
    """Several responses at once, heavy tails, a correlation matrix with an LKJ prior."""

    def model(x, y):
        features, responses = x.shape[1], y.shape[1]
        weights = numpyro.sample("weights", dist.Normal(0.0, 1.0).expand([features, responses]).to_event(2))
        scale = numpyro.sample("scale", dist.HalfNormal(1.0).expand([responses]).to_event(1))
        factor = numpyro.sample("factor", dist.LKJCholesky(responses, concentration=2.0))
        freedom = numpyro.sample("freedom", dist.Gamma(2.0, 0.1))
        with numpyro.plate("rows", x.shape[0]):
            site = dist.MultivariateStudentT(freedom, x @ weights, scale[:, None] * factor)
            numpyro.sample("y", site, obs=y)

    rng = np.random.default_rng(14)
    rows, features, responses = (60, 3, 3) if small else (20_000, 10, 6)
    x = rng.standard_normal((rows, features))
    y = x @ rng.standard_normal((features, responses)) + rng.standard_t(4, (rows, responses))
    return Problem(model, normal(model), arrays(x, y), optimizer=adam())


@example("tutorial: truncated and folded distributions; censored survival times")
def censored_weibull(small: bool = False) -> Problem:
    """Survival times under a Weibull law, some of them only known to exceed the end of the study."""

    def model(x, time, died):
        weights = numpyro.sample("weights", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
        shape = numpyro.sample("shape", dist.LogNormal(0.0, 0.5))
        scale = jnp.exp(x @ weights)
        hazard = (time / scale) ** shape
        log_density = jnp.log(shape / scale) + (shape - 1.0) * jnp.log(time / scale) - hazard
        with numpyro.plate("patients", x.shape[0]):
            numpyro.factor("survival", jnp.where(died == 1, log_density, -hazard))

    rng = np.random.default_rng(15)
    x = rng.standard_normal((100 if small else 30_000, 8)) / 3
    full = np.exp(x.sum(1) / 2) * rng.weibull(1.5, len(x))
    return Problem(model, normal(model), arrays(x, np.minimum(full, 1.0), (full < 1.0).astype(int)), optimizer=adam())
