"""Time series: state space models, seasonal forecasts, differential equations, recurrent neural networks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.experimental.ode import odeint
from numpyro.contrib.control_flow import scan
from numpyro.handlers import reparam
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.initialization import init_to_feasible, init_to_sample, init_to_value
from numpyro.infer.reparam import LocScaleReparam

from examples.coverage.problem import Problem, adam, arrays, example


def normal(model: Any, scale: float = 0.05) -> AutoNormal:
    """A mean-field guide started at a feasible point, narrow because long series multiply errors."""
    return AutoNormal(model, init_loc_fn=init_to_feasible, init_scale=scale)


@example("examples/stochastic_volatility.py")
def stochastic_volatility(small: bool = False) -> Problem:
    """Daily returns whose log-volatility walks at random; heavy tails."""

    def model(returns):
        step_size = numpyro.sample("step_size", dist.Exponential(50.0))
        steps = returns.shape[0]
        volatility = numpyro.sample("volatility", dist.GaussianRandomWalk(scale=step_size, num_steps=steps))
        freedom = numpyro.sample("freedom", dist.Exponential(0.1))
        with numpyro.plate("days", steps):
            numpyro.sample("returns", dist.StudentT(freedom, 0.0, jnp.exp(volatility)), obs=returns)

    rng = np.random.default_rng(0)
    steps = 60 if small else 20_000
    level = -4.0 + np.cumsum(0.02 * rng.standard_normal(steps))
    guide = AutoNormal(model, init_loc_fn=init_to_value(values={"step_size": 0.02, "freedom": 10.0}), init_scale=0.02)
    return Problem(model, guide, arrays(np.exp(level) * rng.standard_normal(steps)), optimizer=adam(3e-3))


def _lotka_volterra(z, t, rates):
    prey, predator = z[..., 0], z[..., 1]
    birth, eaten, death, fed = (rates[..., i] for i in range(4))
    return jnp.stack([(birth - eaten * predator) * prey, (-death + fed * prey) * predator], -1)


def _hares_and_lynxes(solve: Any, small: bool, sites: tuple[int, ...]) -> Problem:
    """Populations observed yearly with log-normal noise; ``solve(z0, times, rates)`` gives (*sites, years, 2)."""

    def model(counts):
        years = counts.shape[-2]
        start = numpyro.sample("start", dist.LogNormal(jnp.log(10.0), 0.5).expand([*sites, 2]).to_event())
        centres = jnp.broadcast_to(jnp.log(jnp.array([0.5, 0.05, 0.8, 0.02])), (*sites, 4))
        rates = numpyro.sample("rates", dist.LogNormal(centres, 0.2).to_event())
        noise = numpyro.sample("noise", dist.LogNormal(-1.0, 1.0).expand([2]).to_event(1))
        path = solve(start, jnp.arange(float(years)), rates)
        numpyro.sample("counts", dist.LogNormal(jnp.log(jnp.maximum(path, 1e-3)), noise).to_event(), obs=counts)

    rng = np.random.default_rng(1)
    years = 6 if small else 21
    path = 20.0 + 15.0 * np.sin(0.6 * np.arange(years)[:, None] + np.array([0.0, 1.5]))
    counts = path * np.exp(0.2 * rng.standard_normal((*sites, years, 2)))
    guide = AutoNormal(model, init_loc_fn=init_to_sample, init_scale=0.02)
    return Problem(model, guide, arrays(counts), optimizer=adam(3e-3))


@example("examples/ode.py")
def predator_prey_odeint(small: bool = False) -> Problem:
    """Predator and prey with JAX's adaptive solver, whose gradient is an adjoint equation; tiny on purpose."""

    def solve(start, times, rates):
        return odeint(_lotka_volterra, start, times, rates, rtol=1e-5, atol=1e-4, mxstep=500)

    return _hares_and_lynxes(solve, small, ())


@example("examples/ode.py, with a fixed-step solver")
def predator_prey_rk4(small: bool = False) -> Problem:
    """Predator and prey at many sites at once, by a Runge-Kutta method with fixed steps in a scan."""
    substeps = 4 if small else 20

    def solve(start, times, rates):
        dt = 1.0 / substeps

        def step(z, _):
            k1 = _lotka_volterra(z, 0.0, rates)
            k2 = _lotka_volterra(z + dt / 2 * k1, 0.0, rates)
            k3 = _lotka_volterra(z + dt / 2 * k2, 0.0, rates)
            k4 = _lotka_volterra(z + dt * k3, 0.0, rates)
            z = z + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            return z, z

        _, path = jax.lax.scan(step, start, None, length=substeps * (times.shape[0] - 1))
        path = jnp.concatenate([start[None], path[substeps - 1 :: substeps]])  # (years, *sites, 2)
        return jnp.moveaxis(path, 0, -2)

    return _hares_and_lynxes(solve, small, (3,) if small else (200,))


@example("examples/holt_winters.py")
def holt_winters(small: bool = False) -> Problem:
    """Triple exponential smoothing of many series: level, trend and season in a scan."""

    def model(y, season):
        series = y.shape[1]
        with numpyro.plate("series", series):
            level_rate = numpyro.sample("level_rate", dist.Beta(2.0, 4.0))
            trend_rate = numpyro.sample("trend_rate", dist.Beta(1.0, 8.0))
            season_rate = numpyro.sample("season_rate", dist.Beta(2.0, 4.0))
            noise = numpyro.sample("noise", dist.HalfNormal(1.0))
            level = numpyro.sample("level", dist.Normal(0.0, 2.0))
            with numpyro.plate("seasons", season):
                seasonal = numpyro.sample("seasonal", dist.Normal(0.0, 1.0))  # (season, series)

        def step(carry, observed):
            level, trend, seasonal = carry
            mean = level + trend + seasonal[0]
            new_level = level_rate * (observed - seasonal[0]) + (1.0 - level_rate) * (level + trend)
            new_trend = trend_rate * (new_level - level) + (1.0 - trend_rate) * trend
            new_season = season_rate * (observed - new_level) + (1.0 - season_rate) * seasonal[0]
            numpyro.sample("y", dist.Normal(mean, noise).to_event(1), obs=observed)
            return (new_level, new_trend, jnp.concatenate([seasonal[1:], new_season[None]])), None

        scan(step, (level, jnp.zeros(series), seasonal), y)

    rng = np.random.default_rng(2)
    steps, series, season = (20, 3, 4) if small else (240, 100, 12)
    t = np.arange(steps)[:, None]
    y = (
        0.01 * t
        + np.sin(2 * np.pi * t / season + rng.uniform(0, 6, series))
        + 0.2 * rng.standard_normal((steps, series))
    )
    return Problem(model, normal(model), arrays(y), {"season": season}, optimizer=adam())


@example("examples/ar2.py")
def autoregression(small: bool = False) -> Problem:
    """A second-order autoregression of one series, one number per step of a scan; naturally small."""

    def model(y):
        first = numpyro.sample("first", dist.Normal(0.0, 1.0))
        second = numpyro.sample("second", dist.Normal(0.0, 1.0))
        constant = numpyro.sample("constant", dist.Normal(0.0, 1.0))
        noise = numpyro.sample("noise", dist.HalfNormal(1.0))

        def step(carry, observed):
            before, last = carry
            mean = constant + first * last + second * before
            numpyro.sample("y", dist.Normal(mean, noise), obs=observed)
            return (last, observed), mean

        scan(step, (y[0], y[1]), y[2:])

    rng = np.random.default_rng(3)
    y = np.zeros(40 if small else 5_000)
    for t in range(2, len(y)):
        y[t] = 0.2 + 0.5 * y[t - 1] - 0.3 * y[t - 2] + 0.3 * rng.standard_normal()
    return Problem(model, normal(model), arrays(y), optimizer=adam())


@example("tutorial: time series forecasting")
def seasonal_global_trend(small: bool = False) -> Problem:
    """A level with global trend and a multiplicative season of one series, in a scan; naturally small."""

    def model(y, season):
        slope = numpyro.sample("slope", dist.Normal(0.0, 0.05))
        power = numpyro.sample("power", dist.Uniform(0.0, 0.9))
        level_rate = numpyro.sample("level_rate", dist.Beta(2.0, 8.0))
        season_rate = numpyro.sample("season_rate", dist.Uniform(0.0, 1.0))
        noise = numpyro.sample("noise", dist.HalfNormal(0.5))
        freedom = numpyro.sample("freedom", dist.Uniform(2.0, 20.0))
        shares = numpyro.sample("shares", dist.Dirichlet(jnp.full(season, 20.0)))

        def step(carry, observed):
            level, seasonal = carry
            trend = level + slope * level**power
            numpyro.sample("y", dist.StudentT(freedom, trend * seasonal[0], noise), obs=observed)
            new = jnp.maximum(level_rate * observed / seasonal[0] + (1.0 - level_rate) * level, 1e-2)
            updated = season_rate * observed / new + (1.0 - season_rate) * seasonal[0]
            return (new, jnp.concatenate([seasonal[1:], updated[None]])), trend

        scan(step, (jnp.mean(y[:season]), season * shares), y)

    rng = np.random.default_rng(4)
    steps, season = (24, 4) if small else (480, 12)
    t = np.arange(steps)
    y = (5.0 + 0.01 * t) * (1.0 + 0.2 * np.sin(2 * np.pi * t / season)) + 0.2 * rng.standard_normal(steps)
    return Problem(model, normal(model), arrays(y), {"season": season}, optimizer=adam(3e-3))


@example("tutorial: hierarchical forecasting")
def many_station_forecast(small: bool = False) -> Problem:
    """Hourly counts between stations: a random walk with learned seasonal effects, states drawn in a scan."""

    def model(counts, hours):
        steps, stations = counts.shape
        drift = numpyro.sample("drift", dist.HalfNormal(0.1).expand([stations]).to_event(1))
        noise = numpyro.sample("noise", dist.HalfNormal(1.0).expand([stations]).to_event(1))
        seasonal = numpyro.sample("seasonal", dist.Normal(0.0, 1.0).expand([hours, stations]).to_event(2))

        def step(level, inputs):
            hour, observed = inputs
            with reparam(config={"level": LocScaleReparam(0.0)}):
                level = numpyro.sample("level", dist.Normal(level, drift).to_event(1))
            numpyro.sample("counts", dist.Normal(level + seasonal[hour], noise).to_event(1), obs=observed)
            return level, None

        scan(step, jnp.zeros(stations), (jnp.arange(steps) % hours, counts))

    rng = np.random.default_rng(5)
    steps, stations, hours = (20, 3, 4) if small else (300, 100, 24)
    t = np.arange(steps)[:, None]
    counts = np.cos(2 * np.pi * t / hours) * rng.standard_normal(stations) + 0.3 * rng.standard_normal(
        (steps, stations)
    )
    return Problem(model, normal(model), arrays(counts), {"hours": hours}, optimizer=adam())


@example("examples/stein_dmm.py")
def deep_markov_model(small: bool = False) -> Problem:
    """Binary sequences from a latent Markov chain with gated transitions; a GRU reads them for the guide."""
    batch, steps, notes, latent, hidden, rnn = (3, 4, 5, 2, 4, 4) if small else (32, 40, 88, 32, 64, 100)
    rng = np.random.default_rng(6)

    def dense(name, fan_in, fan_out, gain=1.0):
        start = gain * rng_of(name).standard_normal((fan_in, fan_out)) / np.sqrt(fan_in)
        w = numpyro.param(f"{name}_w", jnp.asarray(start, jnp.float32))
        b = numpyro.param(f"{name}_b", jnp.zeros(fan_out))
        return lambda x: x @ w + b

    def rng_of(name):
        return np.random.default_rng(list(name.encode()))

    def model(x):
        emit1, emit2 = dense("emit1", latent, hidden), dense("emit2", hidden, notes)
        gate1, gate2 = dense("gate1", latent, hidden), dense("gate2", hidden, latent)
        move1, move2 = dense("move1", latent, hidden), dense("move2", hidden, latent)
        linear, spread = dense("linear", latent, latent), dense("spread", latent, latent)

        def step(z, observed):
            gate = jax.nn.sigmoid(gate2(jax.nn.relu(gate1(z))))
            proposed = move2(jax.nn.relu(move1(z)))
            scale = jax.nn.softplus(spread(jax.nn.relu(proposed))) + 1e-3
            with numpyro.plate("sequences", batch):
                z = numpyro.sample("z", dist.Normal((1.0 - gate) * linear(z) + gate * proposed, scale).to_event(1))
                logits = emit2(jax.nn.relu(emit1(z)))
                numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=observed)
            return z, None

        scan(step, jnp.zeros((batch, latent)), x)

    def guide(x):
        gates_x, gates_h = dense("gru_x", notes, 3 * rnn), dense("gru_h", rnn, 3 * rnn)
        combine, loc, spread = dense("combine", latent, rnn), dense("loc", rnn, latent), dense("scale", rnn, latent)

        def gru(h, observed):
            from_x, from_h = jnp.split(gates_x(observed), 3, -1), jnp.split(gates_h(h), 3, -1)
            reset = jax.nn.sigmoid(from_x[0] + from_h[0])
            update = jax.nn.sigmoid(from_x[1] + from_h[1])
            new = jnp.tanh(from_x[2] + reset * from_h[2])
            h = (1.0 - update) * new + update * h
            return h, h

        _, summary = jax.lax.scan(gru, jnp.zeros((batch, rnn)), x, reverse=True)  # (steps, batch, rnn)

        def step(z, h):
            mixed = 0.5 * (jnp.tanh(combine(z)) + h)
            with numpyro.plate("sequences", batch):
                site = dist.Normal(loc(mixed), jax.nn.softplus(spread(mixed)) + 1e-3).to_event(1)
                z = numpyro.sample("z", site)
            return z, None

        scan(step, jnp.zeros((batch, latent)), summary)

    x = (rng.random((steps, batch, notes)) < 0.1).astype(float)
    return Problem(model, guide, arrays(x), optimizer=adam(1e-3))
