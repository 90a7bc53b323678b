"""Does randomized SVI end at the posterior? Three models whose posterior is known, fitted exactly and with codes.

    python -m examples.posteriors
    python -m examples.posteriors --quick --output posteriors.json
    python -m examples.benchmarks.figures docs/benchmarks/posteriors.json --table-only

Each model is linear and normal, so its posterior is normal with mean ``mu`` and precision ``Lambda``, and what SVI
should find is known in closed form: a guide with a full covariance contains the posterior, and of the mean-field guides
the nearest one has the means ``mu`` and the variances ``1 / diag(Lambda)``.

Every estimator of the gradient is trained from the same start with the same keys, for five seeds. Differences from
``Trace_ELBO``, seed by seed, are therefore what codes do, and nothing else. Three questions are answered:

- **means and standard deviations**: is the mean difference over the seeds, from ``Trace_ELBO`` and from the closed
  form, within its Monte Carlo error? Each parameter has a t-score, and the largest is compared with a bound that all of
  them together exceed with a probability of one in a thousand.
- **bias ratio**: squared length of the mean difference / what chance makes of it. It is 1 on average without a bias.
- **steps**: after how many is the guide so near to the best one that ``KL(guide, posterior)`` is above its minimum by
  no more than ``NEAR`` nats, on average over the last hundred steps?
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import lax
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoGuide, AutoMultivariateNormal, AutoNormal
from numpyro.infer.util import log_density
from scipy import special

from examples.benchmarks.record import circumstances, log, write
from numpyro_rad import RAD_ELBO, StochasticRound, explain

DEFAULT_OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "posteriors.json"
ESTIMATORS: dict[str, Trace_ELBO] = {
    "Trace_ELBO": Trace_ELBO(8),
    "RAD_ELBO": RAD_ELBO(8),
    "RAD_ELBO, 4 bits": RAD_ELBO(8, codec=StochasticRound(bits=4)),
    "RAD_ELBO, 2 bits": RAD_ELBO(8, codec=StochasticRound(bits=2)),
}
EXACT = "Trace_ELBO"
EVERY, SMOOTHED = 5, 20  # steps between two looks at the guide, and looks that are averaged
NEAR = 0.2
FALSE_ALARM = 1e-3
FLOAT32 = 1e-4  # differences of so many standard deviations are rounding


@dataclass(frozen=True)
class Known:
    """A model with a normal posterior, and its data.

    :param title: what tables call it.
    :param model: called with ``args``; its log density is quadratic in the latent variables.
    :param args: arrays of double precision.
    :param latents: shapes of the latent variables by name, in alphabetical order.
    :param full: whether the guide has a full covariance; else it is mean-field.
    """

    title: str
    model: Callable[..., None]
    args: tuple[np.ndarray, ...]
    latents: dict[str, tuple[int, ...]]
    full: bool

    @property
    def dimensions(self) -> int:
        return sum(int(np.prod(shape)) for shape in self.latents.values())

    def split(self, flat: jax.Array) -> dict[str, jax.Array]:
        """The latent variables by name, from one vector of all of them."""
        values, start = {}, 0
        for name, shape in self.latents.items():
            end = start + int(np.prod(shape))
            values[name], start = flat[start:end].reshape(shape), end
        return values

    def guide(self) -> AutoGuide:
        return (AutoMultivariateNormal if self.full else AutoNormal)(self.model, init_scale=0.3)

    def found(self, params: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Mean and lower triangular factor of the covariance of a fitted guide."""
        if self.full:
            return params["auto_loc"], params["auto_scale_tril"]
        loc, scale = (
            jnp.concatenate([params[f"{n}_auto_{part}"].ravel() for n in self.latents]) for part in ("loc", "scale")
        )
        return loc, jnp.diag(scale)


def regression(rows: int, features: int = 24) -> Known:
    """Conjugate Bayesian linear regression: ``w ~ N(0, 1)``, ``y ~ N(x w, noise)`` with correlated features."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, features)) + 0.5 * rng.standard_normal((rows, 1))
    noise = rows**0.5 / 10
    y = x @ rng.standard_normal(features) + noise * rng.standard_normal(rows)

    def model(x: jax.Array, y: jax.Array) -> None:
        w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([features]).to_event(1))
        with numpyro.plate("rows", rows):
            numpyro.sample("y", dist.Normal(x @ w, noise), obs=y)

    return Known("conjugate regression", model, (x, y), {"w": (features,)}, full=True)


def hierarchy(rows: int, groups: int = 40) -> Known:
    """Groups that share a mean, all variances known: ``theta ~ N(mu, 1/2)``, ``y ~ N(theta of its group, noise)``.

    The group of a row is a row of the identity, and its effect a product with it, as in the mixed models of the
    textbooks (``y = Z theta + noise``).
    """
    rng = np.random.default_rng(1)
    membership = np.eye(groups)[np.sort(rng.integers(0, groups, rows))]
    noise = (rows / groups) ** 0.5 / 4
    y = membership @ rng.normal(1.0, 0.5, groups) + noise * rng.standard_normal(rows)

    def model(membership: jax.Array, y: jax.Array) -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
        with numpyro.plate("groups", groups):
            theta = numpyro.sample("theta", dist.Normal(mu, 0.5))
        with numpyro.plate("rows", rows):
            numpyro.sample("y", dist.Normal(membership @ theta, noise), obs=y)

    return Known("hierarchical normal", model, (membership, y), {"mu": (), "theta": (groups,)}, full=False)


TRANSITION = np.array([[0.9, 0.2], [-0.2, 0.9]])
STATE_NOISE, OUTPUT_NOISE = 0.5, 2.0


def state_space(steps: int, outputs: int = 64) -> Known:
    """A damped rotation seen through many noisy outputs: ``x_t ~ N(A x_{t-1}, q)``, ``y_t ~ N(C x_t, r)``, x_0 = 0."""
    rng = np.random.default_rng(2)
    seen = rng.standard_normal((outputs, 2)) / outputs**0.5
    x, path = np.zeros(2), []
    for _ in range(steps):
        x = TRANSITION @ x + STATE_NOISE * rng.standard_normal(2)
        path.append(x)
    y = np.array(path) @ seen.T + OUTPUT_NOISE * rng.standard_normal((steps, outputs))

    def model(seen: jax.Array, y: jax.Array) -> None:
        flat = dist.ImproperUniform(dist.constraints.real_matrix, (), (steps, 2))
        x = cast(jax.Array, numpyro.sample("x", flat))
        before = jnp.concatenate([jnp.zeros((1, 2)), x[:-1]])  # (steps, 2)
        numpyro.factor("dynamics", dist.Normal(before @ TRANSITION.T, STATE_NOISE).log_prob(x).sum())
        numpyro.sample("y", dist.Normal(x @ seen.T, OUTPUT_NOISE).to_event(2), obs=y)

    return Known("Gaussian state space", model, (seen, y), {"x": (steps, 2)}, full=True)


def models(quick: bool) -> dict[str, Known]:
    """The three of them. In the quick size as well each estimate has 8192 bytes to code, which is what it takes."""
    return {
        "regression": regression(512 if quick else 4096, features=8 if quick else 24),
        "hierarchy": hierarchy(512 if quick else 4096, groups=8 if quick else 40),
        "state_space": state_space(8 if quick else 32),
    }


def posterior(known: Known) -> tuple[np.ndarray, np.ndarray]:
    """Mean and precision of the posterior: the log density is quadratic, so a Newton step from anywhere ends there."""
    with jax.enable_x64(True):
        args = tuple(jnp.asarray(x) for x in known.args)

        def log_joint(flat: jax.Array) -> jax.Array:
            return jnp.asarray(log_density(known.model, args, {}, known.split(flat))[0])

        gradient = jax.grad(log_joint)
        slope, curvature = jax.jit(lambda z: (gradient(z), jax.jacfwd(gradient)(z)))(jnp.zeros(known.dimensions))
        return np.linalg.solve(-curvature, slope), -np.asarray(curvature)


def best(known: Known, precision: np.ndarray) -> np.ndarray:
    """Standard deviations of the guide that is nearest to the posterior."""
    return np.sqrt(np.diag(np.linalg.inv(precision)) if known.full else 1 / np.diag(precision))


def distance(known: Known, mean: np.ndarray, precision: np.ndarray) -> Callable[[dict[str, jax.Array]], jax.Array]:
    """``KL(guide, posterior)`` of fitted parameters, less the least that the family of the guide reaches."""
    root = np.linalg.cholesky(precision)  # precision = root root'
    least = 0.0 if known.full else 0.5 * np.log(np.diag(precision)).sum() - np.log(np.diag(root)).sum()
    constant = 0.5 * known.dimensions + np.log(np.diag(root)).sum() + least

    def kl(params: dict[str, jax.Array]) -> jax.Array:
        loc, factor = known.found(params)
        spread, shift = root.T.astype(loc.dtype) @ factor, root.T.astype(loc.dtype) @ (loc - mean.astype(loc.dtype))
        return 0.5 * (jnp.sum(spread**2) + jnp.sum(shift**2)) - jnp.sum(jnp.log(jnp.diag(factor))) - constant

    return kl


def fitted(known: Known, elbo: Trace_ELBO, steps: int, seeds: int) -> dict[str, Any]:
    """Means, standard deviations and distances of the guide after training, for each seed; and what a plan stores."""
    args = tuple(jnp.asarray(x, jnp.float32) for x in known.args)
    rate = optax.cosine_decay_schedule(0.03, steps)
    svi = SVI(known.model, known.guide(), optax.adam(rate), elbo)
    far = distance(known, *posterior(known))

    @jax.jit
    def run(state: Any, *args: jax.Array) -> Any:
        def look(state: Any, _: None) -> Any:
            state, _ = lax.scan(lambda state, _: svi.update(state, *args), state, length=EVERY)
            return state, far(svi.get_params(state))

        return lax.scan(look, state, length=steps // EVERY)

    means, deviations, distances = [], [], []
    for seed in range(seeds):
        state = svi.init(jax.random.key(seed), *args)
        if seed == 0:
            plan = explain(svi, state, *args) if isinstance(elbo, RAD_ELBO) else None
        state, curve = run(state, *args)
        mean, factor = (np.asarray(x, np.float64) for x in known.found(svi.get_params(state)))
        means.append(mean)
        deviations.append(np.linalg.norm(factor, axis=1))
        distances.append(np.asarray(curve, np.float64))
    return {
        "means": np.array(means),  # (seeds, latents)
        "deviations": np.array(deviations),
        "distances": np.array(distances),  # (seeds, looks)
        "plan": plan,
    }


def scores(differences: np.ndarray) -> dict[str, float]:
    """How far the mean of some differences over the seeds is from 0.

    :param differences: ``(seeds, parameters)``, in standard deviations of the best guide.
    :return: the root mean square of the mean differences, the largest t-score, what it exceeds with probability
        ``FALSE_ALARM`` if all means are 0, and the bias ratio.
    """
    seeds, parameters = differences.shape
    mean, error = differences.mean(0), differences.std(0, ddof=1) / seeds**0.5
    error = np.sqrt(error**2 + FLOAT32**2)
    return {
        "difference": float(np.sqrt(np.mean(mean**2))),
        "largest_t": float(np.max(np.abs(mean) / error)),
        "bound": float(-special.stdtrit(seeds - 1, FALSE_ALARM / (2 * parameters))),
        "bias_ratio": float(np.sum(mean**2) / np.sum(error**2)),
    }


def compared(found: dict[str, Any], means: np.ndarray, deviations: np.ndarray, unit: np.ndarray) -> dict[str, Any]:
    """Scores of the means and standard deviations of a fit, against those of another or the closed form.

    :param unit: standard deviations of the best guide.
    """
    ratios = np.log(found["deviations"] / deviations)
    return {"means": scores((found["means"] - means) / unit), "deviations": scores(ratios)}


def steps_needed(distances: np.ndarray) -> list[int | None]:
    """For each seed the first step at which the smoothed distance is at most ``NEAR``; None if there is none."""
    needed = []
    for curve in distances:
        smooth = np.convolve(curve, np.full(SMOOTHED, 1 / SMOOTHED), "valid")
        near = np.flatnonzero(smooth <= NEAR)
        needed.append(int(near[0] + SMOOTHED) * EVERY if len(near) else None)
    return needed


def measured(known: Known, estimators: dict[str, Trace_ELBO], steps: int, seeds: int) -> dict[str, Any]:
    """All estimators on one model; the first of them is what the others are compared with."""
    mean, precision = posterior(known)
    unit = best(known, precision)
    rows: list[dict[str, Any]] = []
    exact: dict[str, Any] = {}
    for name, elbo in estimators.items():
        found = fitted(known, elbo, steps, seeds)
        exact = exact or found
        needed = steps_needed(found["distances"])
        row = {
            "estimator": name,
            "closed_form": compared(found, mean, unit, unit),
            "exact": compared(found, exact["means"], exact["deviations"], unit),
            "steps": needed,
            "last_distance": float(found["distances"][:, -SMOOTHED:].mean()),
        }
        both = [(n, m) for n, m in zip(needed, steps_needed(exact["distances"]), strict=True) if n and m]
        ratios = np.array([n / m for n, m in both])
        if len(ratios) == seeds:
            row["steps_ratio"] = float(ratios.mean())
            row["steps_ratio_error"] = float(ratios.std(ddof=1) / seeds**0.5)
        plan = found["plan"]
        if plan is not None:
            coded = sum(r.exact_bytes for r in plan.rows if r.decision.endswith("-bit"))
            row["plan"] = {
                "untouched": plan.untouched,
                "stored_bytes": int(plan.stored_bytes),
                "exact_bytes": int(plan.exact_bytes),
                "coded_bytes": int(coded),
            }
        rows.append(row)
        log(f"{known.title}, {name}: {row}")
    family = "full covariance" if known.full else "mean field"
    return {"title": known.title, "latents": known.dimensions, "guide": family, "rows": rows}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Fit the three models and store what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="few rows, steps and latent variables")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="where the JSON goes")
    options = parser.parse_args(arguments)
    steps, seeds = (1000 if options.quick else 6000), 5
    report = {
        "workload": {"name": "posteriors", "title": "Three models with known posteriors"},
        **circumstances(),
        "steps": steps,
        "seeds": seeds,
        "near": NEAR,
        "posteriors": {n: measured(known, ESTIMATORS, steps, seeds) for n, known in models(options.quick).items()},
    }
    write(report, options.output)
    log(f"wrote {options.output}")
    return report


if __name__ == "__main__":
    main()
