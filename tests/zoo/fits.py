"""Records of fits that look like real ones, for the tests of reports and of the export: good, bad and hardly any."""

import dataclasses

import numpy as np

from numpyro_rad.diagnostics.records import (
    Alarm,
    BlockVariance,
    Estimate,
    FitQuality,
    FitRecord,
    GradientVariance,
    PlanRecord,
    PlanRow,
    Posterior,
    PredictiveCheck,
    SiteSummary,
    Track,
)

LAYERS = ("dense0.kernel", "dense0.bias", "dense1.kernel", "dense1.bias", "out.kernel", "out.bias", "prec_obs")


def good(steps=5000, looks=200, parameters=(), rows=24):
    """A converged fit whose codes do no harm."""
    rng = np.random.default_rng(1)
    names = tuple(parameters) or tuple(f"{layer}_{part}" for layer in LAYERS for part in ("auto_loc", "auto_scale"))
    step = np.arange(1, steps + 1)
    losses = 21400 + 52000 * np.exp(-step / (0.06 * steps)) + rng.normal(0, 180, steps)
    return FitRecord(
        title="bayesian_network with AutoNormal",
        created="2026-11-21T09:30:00.123",
        versions={"numpyro_rad": "0.1.0", "jax": "0.12.0", "numpyro": "0.22.0", "device": "cpu"},
        options={"elbo": "RAD_ELBO(memory_budget='2MiB')", "batch size": "1024"},
        num_steps=steps,
        num_params=137218,
        seconds=412.7,
        losses=losses,
        plan=plan(rows, relative_variance=0.004),
        track=track(names, steps, looks, rho=0.05),
        gradient_variance=gradient_variance(LAYERS, rho=0.06),
        quality=FitQuality(Estimate(-21398.0, 4.2), 0.55, 1.02, 0.04, True),
        posterior=posterior(LAYERS),
    )


def small_budget():
    """A fit whose codes add three times the variance of everything else, and which is not done."""
    record = good()
    step = np.arange(1, 5001)
    losses = 30000 + 40000 * np.exp(-step / 3000) + np.random.default_rng(2).normal(0, 400, 5000)
    alarms = [
        Alarm(s, "rho", "dense1.kernel_auto_loc", "codes add 3.1 times the other noise; raise memory_budget")
        for s in (500, 1500, 2500)
    ]
    return dataclasses.replace(
        record,
        losses=losses,
        alarms=tuple(alarms),
        plan=plan(24, relative_variance=0.9),
        track=track(record.track.names, 5000, 200, rho=3.1),
        gradient_variance=gradient_variance(LAYERS, rho=3.2),
        quality=FitQuality(Estimate(-36900.0, 30.0), 0.94, 1.6, 0.4, False),
    )


def diverged():
    """A fit that ended in NaN."""
    losses = np.random.default_rng(3).normal(900.0, 20.0, 600)
    losses[412:] = np.nan
    alarm = Alarm(413, "nonfinite", "dense1.kernel_auto_scale", "the gradient is NaN; lower the learning rate")
    return dataclasses.replace(minimal(), num_steps=600, losses=losses, alarms=(alarm,))


def minimal():
    """Nothing but the fields that must be there."""
    return FitRecord("", "", {}, {}, 0, 0, float("nan"), np.zeros(0))


def huge():
    """Of a long fit of a large model."""
    record = good(100_000, 5000, [f"layer{i}/kernel_auto_loc" for i in range(300)], rows=5000)
    blocks = gradient_variance([f"layer{i}/kernel" for i in range(300)], rho=0.06)
    timeline = [(t, 1e6 * np.sin(t * 1.5) ** 2, 1e7 * np.sin(t * 1.5) ** 2) for t in np.linspace(0, 2, 20_000)]
    return dataclasses.replace(
        record,
        gradient_variance=blocks,
        plan=dataclasses.replace(record.plan, timeline=tuple(timeline)),
        alarms=tuple(Alarm(i, "signal", f"layer{i % 300}", "the gradient is lost in its noise") for i in range(2000)),
    )


def posterior(names, inside=0.91):
    many = [
        SiteSummary(n, 1000 * (i + 1), (-1.2, 0.8 + i), (0.021, 0.4), (-1.9, 0.7), (-1.1, 1.5))
        for i, n in enumerate(names[:-1])
    ]
    one = SiteSummary(names[-1], 1, (12.3456, 12.3456), (0.5, 0.5), (11.5, 11.5), (13.2, 13.2))
    check = PredictiveCheck("y", 2000, inside, 0.512, (0.49, 0.53), 1.2, (1.15, 1.31))
    return Posterior((*many, one), (check,), 300)


def block(name, minibatch, guide, path, squared_norm=40.0, size=1000, error=0.04):
    def about(x):
        return Estimate(x, abs(error * x))

    total = minibatch + guide + path
    return BlockVariance(name, size, about(minibatch), about(guide), about(path), about(total), about(squared_norm))


def gradient_variance(names, rho, signal=0.02):
    weights = 1 / np.arange(1, len(names) + 1) ** 1.3
    blocks = tuple(
        block(n, 700 * w, 260 * w, 960 * rho * w, 20 * w) for n, w in zip(names, weights / weights.sum(), strict=True)
    )
    total = block("total", 700.0, 260.0, 960.0 * rho, 960 * (1 + rho) * signal, 137218)
    return GradientVariance(
        total,
        blocks,
        Estimate(rho, 0.05 * rho),
        (0.9 * rho, 1.1 * rho),
        rho / 1.2,
        Estimate(signal, 0.05 * signal),
        Estimate(1 / signal, 0.05 / signal),
        512,
        {"exact": 0.081, "randomized": 0.085},
        {"exact": 97_400_000, "randomized": 12_100_000},
        {"exact": 1.0, "randomized": 0.95 / (1 + rho)},
        {"exact": 1.0, "randomized": 8.05 / (1 + rho)},
    )


def track(names, steps, looks, rho):
    rng = np.random.default_rng(4)
    when = np.linspace(steps / looks, steps, looks).astype(int)
    scale = (1 / np.arange(1, len(names) + 1)) * (1 + 20 * np.exp(-when / (0.1 * steps)))[:, None]
    rest = 900 * scale * rng.gamma(4, 1 / 4, scale.shape)
    path = 900 * scale * rho * (1 + 0.8 * rng.standard_normal(scale.shape))
    norm = 40 * scale**2 * (1 + 1.5 * rng.standard_normal(scale.shape))
    running = np.cumsum(path.sum(1)) / np.cumsum(rest.sum(1))
    return Track(tuple(names), when, path, rest + path, norm, running, np.linspace(2, 412, looks))


def plan(rows, relative_variance):
    made = []
    for i in range(rows):
        decision, share = (("keep", 1), ("StochasticRound(bits=4)", 7), ("recompute", 0))[i % 3]
        exact = 2**20 // (1 + i % 5)
        stored = exact // share if share else 0
        variance = relative_variance * (1 + i % 4) if share == 7 else 0.0
        made.append(
            PlanRow(f"model.py:{20 + i}", LAYERS[i % 7], "dot_general", (1024, 256), decision, exact, stored, variance)
        )
    stored, exact = (sum(getattr(r, f) for r in made) for f in ("stored_bytes", "exact_bytes"))
    steps = np.linspace(0, 1, 13)
    up = [(t, b * stored, b * exact) for a in steps[:-1] for t, b in ((a, a), (a, a + 1 / 12))]
    timeline = [*up, (1.0, 1.0 * stored, 1.0 * exact), *((2 - t, p, e) for t, p, e in up[::-1])]
    timeline = tuple(tuple(map(float, row)) for row in timeline)
    return PlanRecord(tuple(made), stored, exact, 12_100_000, 0.05, relative_variance, timeline)
