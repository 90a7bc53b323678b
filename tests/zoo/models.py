"""Models of the kinds that NumPyro's own examples show, small and with data drawn from fixed keys.

Nothing in this file knows about the library: what trains here with ``Trace_ELBO`` has to train with one word changed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax.example_libraries import stax
from numpyro.contrib.control_flow import scan
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.initialization import init_to_median
from numpyro.infer.reparam import LocScaleReparam


@dataclasses.dataclass(frozen=True)
class Problem:
    """What SVI needs: the arguments of model and guide, an optimizer and how many steps are worth comparing."""

    model: Callable
    guide: Callable
    args: tuple
    optimizer: Any
    steps: int
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)


# -- a Bayesian neural network -----------------------------------------------------------------------------------------


def network_regression(x, y=None, hidden=(16, 16), scale=None, activation=jnp.tanh):
    """A fully connected network with standard normal weights, fan-in scaling outside of the prior, unknown noise.

    :param x: inputs, (points, features).
    :param y: targets, (points,).
    :param hidden: units of each hidden layer.
    :param scale: the standard deviation of the noise, None to infer it.
    """
    h = x
    for i, width in enumerate((*hidden, 1)):
        fan_in = h.shape[-1]
        w = numpyro.sample(f"w{i}", dist.Normal(0.0, 1.0).expand([fan_in, width]).to_event(2))
        b = numpyro.sample(f"b{i}", dist.Normal(0.0, 1.0).expand([width]).to_event(1))
        h = h @ (w / np.sqrt(fan_in)) + b  # (points, width)
        h = activation(h) if i < len(hidden) else h
    if scale is None:
        scale = numpyro.sample("noise", dist.HalfNormal(1.0))
    with numpyro.plate("points", x.shape[0]):
        return numpyro.sample("y", dist.Normal(h[:, 0], scale), obs=y)


def wave(points=128, features=2, seed=0):
    """Inputs in a cube and a sine of their sum with noise: (points, features) and (points,)."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-2.0, 2.0, (points, features))
    y = np.sin(1.5 * x.sum(1)) + 0.1 * rng.standard_normal(points)
    return jnp.asarray(x), jnp.asarray(y)


def bayesian_network(points=128):
    guide = AutoNormal(network_regression, init_scale=0.05)
    return Problem(network_regression, guide, wave(points), optax.adam(1e-2), 300)


# -- a variational autoencoder -----------------------------------------------------------------------------------------


def decoder(hidden, pixels):
    return stax.serial(stax.Dense(hidden), stax.Softplus, stax.Dense(pixels))


def encoder(hidden, latent):
    last = stax.parallel(stax.Dense(latent), stax.serial(stax.Dense(latent), stax.Exp))
    return stax.serial(stax.Dense(hidden), stax.Softplus, stax.FanOut(2), last)


def vae_model(images, hidden=16, latent=2):
    """Binary images (batch, pixels) from a latent code; the decoder is a parameter, learned as a point."""
    batch, pixels = images.shape
    decode = numpyro.module("decoder", decoder(hidden, pixels), (batch, latent))
    with numpyro.plate("batch", batch):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([latent]).to_event(1))
        numpyro.sample("image", dist.Bernoulli(logits=decode(z)).to_event(1), obs=images)


def vae_guide(images, hidden=16, latent=2):
    batch, pixels = images.shape
    encode = numpyro.module("encoder", encoder(hidden, latent), (batch, pixels))
    loc, scale = encode(images)  # (batch, latent) each
    with numpyro.plate("batch", batch):
        numpyro.sample("z", dist.Normal(loc, scale).to_event(1))


def bars(images=64, side=5, seed=0):
    """Black images with a few white rows or columns, flattened: (images, side * side)."""
    rng = np.random.default_rng(seed)
    lines = rng.random((images, side)) < 0.3
    upright = rng.random(images) < 0.5
    stripes = np.broadcast_to(lines[:, :, None], (images, side, side))
    pixels = np.where(upright[:, None, None], stripes.transpose(0, 2, 1), stripes)
    return jnp.asarray(pixels.reshape(images, -1), jnp.float32)


def autoencoder():
    return Problem(vae_model, vae_guide, (bars(),), numpyro.optim.Adam(1e-2), 400)


# -- partial pooling ---------------------------------------------------------------------------------------------------


def partial_pooling(trials, hits=None):
    """Success rates of groups that share a population; the groups are written centred and turned non-centred.

    :param trials: attempts in each group and season, (seasons, groups).
    :param hits: successes, of the same shape.
    """
    loc = numpyro.sample("loc", dist.Normal(-1.0, 1.0))
    spread = numpyro.sample("spread", dist.HalfNormal(1.0))
    with (
        numpyro.plate("groups", trials.shape[-1], dim=-1),
        numpyro.handlers.reparam(config={"logit": LocScaleReparam(0.0)}),
    ):
        logit = numpyro.sample("logit", dist.Normal(loc, spread))
        with numpyro.plate("seasons", trials.shape[0], dim=-2):
            numpyro.sample("hits", dist.Binomial(trials, logits=logit), obs=hits)


def seasons(groups=150, years=4, seed=0):
    rng = np.random.default_rng(seed)
    trials = rng.integers(20, 60, (years, groups))
    rate = 1 / (1 + np.exp(1.0 - 0.5 * rng.standard_normal(groups)))
    return jnp.asarray(trials), jnp.asarray(rng.binomial(trials, rate))


def hierarchy():
    return Problem(partial_pooling, AutoNormal(partial_pooling), seasons(), numpyro.optim.ClippedAdam(2e-2), 300)


# -- a time series -----------------------------------------------------------------------------------------------------


def stochastic_volatility(returns):
    """Returns (steps, series) whose log-volatilities revert to their mean; NumPyro's ``scan`` draws the states."""
    persistence = numpyro.sample("persistence", dist.Beta(20.0, 1.5))
    volatility = numpyro.sample("volatility", dist.HalfNormal(0.5))
    mean = numpyro.sample("mean", dist.Normal(0.0, 2.0))

    def step(h, observed):
        with numpyro.handlers.reparam(config={"h": LocScaleReparam(0.0)}):
            h = numpyro.sample("h", dist.Normal(mean + persistence * (h - mean), volatility).to_event(1))
        numpyro.sample("return", dist.StudentT(10.0, 0.0, jnp.exp(h / 2)).to_event(1), obs=observed)
        return h, h

    scan(step, jnp.broadcast_to(mean, returns.shape[1:]), returns)


def market(steps=40, series=20, seed=0):
    rng = np.random.default_rng(seed)
    h = np.full((steps, series), -1.0)
    for t in range(1, steps):
        h[t] = -1.0 + 0.95 * (h[t - 1] + 1.0) + 0.25 * rng.standard_normal(series)
    return jnp.asarray(np.exp(h / 2) * rng.standard_normal((steps, series)))


def time_series():
    guide = AutoNormal(stochastic_volatility, init_loc_fn=init_to_median(num_samples=5))
    return Problem(stochastic_volatility, guide, (market(),), optax.adam(1e-2), 300)


# -- a generalized linear model with minibatches -----------------------------------------------------------------------


def logistic(x, y=None, batch_size=None):
    """Logistic regression; the plate draws ``batch_size`` of the points (None: all) and rescales their likelihood."""
    bias = numpyro.sample("bias", dist.Normal(0.0, 2.0))
    weights = numpyro.sample("weights", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
    with numpyro.plate("points", x.shape[0], subsample_size=batch_size):
        batch = numpyro.subsample(x, event_dim=1)
        labels = None if y is None else numpyro.subsample(y, event_dim=0)
        numpyro.sample("y", dist.Bernoulli(logits=batch @ weights + bias), obs=labels)


def classes(points=1000, features=6, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((points, features))
    logits = x @ np.linspace(-1.5, 1.5, features) + 0.5
    y = rng.random(points) < 1 / (1 + np.exp(-logits))
    return jnp.asarray(x), jnp.asarray(y, jnp.int32)


def linear_model():
    kwargs = {"batch_size": 250}
    return Problem(logistic, AutoNormal(logistic), classes(), optax.adam(2e-2), 300, kwargs)


# -- by themselves -----------------------------------------------------------------------------------------------------


def linear(x, y=None):
    """Linear regression with noise of known scale."""
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
    with numpyro.plate("points", x.shape[0]):
        numpyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def looks_at_data(labels, y):
    """A model with as many levels as there are different labels: it needs numbers, not arrays that are traced."""
    levels = numpyro.sample("levels", dist.Normal(0.0, 1.0).expand([len(np.unique(labels))]).to_event(1))
    numpyro.sample("y", dist.Normal(levels[labels], 1.0).to_event(1), obs=y)


PROBLEMS = {
    "Bayesian network": bayesian_network,
    "autoencoder": autoencoder,
    "hierarchy": hierarchy,
    "time series": time_series,
    "linear model": linear_model,
}
"""Functions rather than problems: importing this file makes no array."""
