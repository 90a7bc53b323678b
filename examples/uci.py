"""Bayesian neural networks on the UCI regression sets: is a fit with randomized gradients as good as an exact one?

    python -m examples.uci --data-dir DIR
    python -m examples.uci --data-dir DIR --quick --sets yacht wine --output uci.json
    python -m examples.benchmarks.figures docs/benchmarks/uci.json --table-only

The protocol is that of Hernandez-Lobato and Adams (2015, arXiv:1502.05336) and of Gal and Ghahramani (2016,
arXiv:1506.02142): one hidden layer of 50 ReLU units (100 for protein), 20 random splits (5 for protein) of which a
tenth is held out, inputs and targets standardised by the training points, and two scores in the target's own unit: the
root mean square error of the mean prediction, and the log likelihood of a held-out point under the posterior predictive
distribution. All weights, biases and the precision of the noise are latent, with a mean-field guide, and minibatches
are drawn with replacement.

A split is fitted with each estimator of the gradient from the same start with the same minibatches and keys; the
splits of a set train side by side. These nets are so small that ``RAD_ELBO()`` leaves them to JAX, so that codes are
asked for. The published scores of MC dropout stand beside them if the data folder has ``uci/mc_dropout_summary.csv``.
A set that is in the stored JSON already is not fitted again.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from numpyro.infer import SVI, Predictive, Trace_ELBO, init_to_sample
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.svi import SVIState

from examples import bnn, data
from examples.benchmarks.record import circumstances, log, write
from numpyro_rad import RAD_ELBO, StochasticRound, explain

DEFAULT_OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "uci.json"
SETS = ("concrete", "energy", "kin8nm", "naval", "power", "protein", "wine", "yacht")
ESTIMATORS: dict[str, Trace_ELBO] = {
    "Trace_ELBO": Trace_ELBO(),
    "RAD_ELBO, 4 bits": RAD_ELBO(codec=StochasticRound(bits=4)),
    "RAD_ELBO, 2 bits": RAD_ELBO(codec=StochasticRound(bits=2)),
}
EXACT = "Trace_ELBO"
BATCH, LEARNING_RATE, POSTERIOR_DRAWS, SEED = 128, 0.01, 100, 0
PUBLISHED = {
    "paper_2016": "MC dropout (Gal and Ghahramani 2016)",
    "grid_search_2018": "MC dropout, tuned again by its authors in 2018",
}
SCORES = ("rmse", "log_likelihood")


def splits(name: str, data_dir: str | os.PathLike | None, most: int | None) -> list[data.Data]:
    """The stored splits of a set, or the first few of them."""
    found: list[data.Data] = []
    while most is None or len(found) < most:
        try:
            found.append(data.load(f"uci:{name}", data_dir, len(found)))
        except ValueError:
            if not found:
                raise
            break
    return found


class Fits:
    """The fits of all splits of a set, side by side. They start from the same draw of the prior.

    :param name: of the set.
    :param found: its splits, which have equal sizes.
    :param steps: of each fit.
    """

    def __init__(self, name: str, found: Sequence[data.Data], steps: int) -> None:
        self.steps, self.rows = steps, min(BATCH, len(found[0].x_train))
        size = argparse.Namespace(hidden=100 if name == "protein" else 50, layers=1, prior_scale=1.0)
        self.model = bnn.make_model(found[0], size, jax.nn.relu)  # reads its sizes, which all splits share
        self.guide = AutoNormal(self.model, init_loc_fn=init_to_sample, init_scale=0.03)
        self.x, self.y, self.x_test = (
            jnp.stack([getattr(d, field) for d in found]) for field in ("x_train", "y_train", "x_test")
        )
        self.keys = jax.random.split(jax.random.key(SEED), len(found))
        self.batch = self.x[0, : self.rows], self.y[0, : self.rows]
        self.exact = self.svi(Trace_ELBO())
        self.start = self.exact.init(jax.random.key(SEED), *self.batch)
        self.predict = jax.jit(jax.vmap(self._predict))

    def svi(self, elbo: Trace_ELBO) -> SVI:
        rate = optax.cosine_decay_schedule(LEARNING_RATE, self.steps)
        return SVI(self.model, self.guide, optax.adam(rate), elbo)

    def predictions(self, elbo: Trace_ELBO) -> dict[str, np.ndarray]:
        """Fit and draw from the posteriors.

        :return: draws of the predicted means of the test points, ``(splits, draws, points)``, and of the precision of
            the noise, ``(splits, draws)``, both standardised.
        """
        svi = self.svi(elbo)
        svi.constrain_fn = self.exact.constrain_fn  # all that init would add

        def fit(key: jax.Array, x: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
            def step(state: SVIState, key: jax.Array) -> tuple[SVIState, jax.Array]:
                rows = jax.random.randint(key, (self.rows,), 0, len(x))
                return svi.update(state, x[rows], y[rows])

            noise_key, batch_key = jax.random.split(key)
            start = self.start._replace(rng_key=noise_key)
            return svi.get_params(lax.scan(step, start, jax.random.split(batch_key, self.steps))[0])

        drawn = self.predict(self.keys, jax.jit(jax.vmap(fit))(self.keys, self.x, self.y), self.x_test)
        return {site: np.asarray(value, np.float64) for site, value in drawn.items()}

    def _predict(self, key: jax.Array, params: dict[str, jax.Array], x: jax.Array) -> dict[str, jax.Array]:
        posterior = {"guide": self.guide, "params": params, "num_samples": POSTERIOR_DRAWS}
        return Predictive(self.model, return_sites=["mean", "precision"], **posterior)(jax.random.fold_in(key, 2), x)

    def coded_share(self, elbo: RAD_ELBO) -> float:
        """The share of a step's residual bytes that is stored in codes."""
        plan = explain(elbo, self.keys[0], self.exact.get_params(self.start), self.model, self.guide, *self.batch)
        return sum(r.exact_bytes for r in plan.rows if r.decision.endswith("-bit")) / plan.exact_bytes


def measured(name: str, found: Sequence[data.Data], steps: int) -> dict[str, Any]:
    """The scores of each estimator on each split, and how the randomized ones compare with the exact one."""
    result: dict[str, Any] = {
        "points": len(found[0].x_train) + len(found[0].x_test),
        "features": found[0].x_train.shape[1],
        "splits": len(found),
        "estimators": {},
    }
    fits = Fits(name, found, steps)
    for estimator, elbo in ESTIMATORS.items():
        started = time.perf_counter()
        drawn = fits.predictions(elbo)
        each = [
            bnn.regression_scores(means, precisions, d.y_test, d.target_std)
            for means, precisions, d in zip(drawn["mean"], drawn["precision"], found, strict=True)
        ]
        row: dict[str, Any] = {"seconds": time.perf_counter() - started}
        row |= {score: summary([one[score] for one in each]) for score in SCORES}
        if isinstance(elbo, RAD_ELBO):
            row["coded_share"] = fits.coded_share(elbo)
            exact = result["estimators"][EXACT]
            row |= {f"{score}_difference": difference(row[score], exact[score]) for score in SCORES}
        result["estimators"][estimator] = row
        log(f"{name}, {estimator}: { ({k: v for k, v in row.items() if k not in SCORES}) }")
    return result


def summary(values: Sequence[float]) -> dict[str, Any]:
    """The mean over the splits, its standard error, and the values."""
    return {"mean": float(np.mean(values)), "standard_error": standard_error(values), "splits": list(values)}


def difference(ours: dict[str, Any], exact: dict[str, Any]) -> dict[str, Any]:
    """Ours less exact, split by split, and whether the means are within one standard error of the exact one."""
    each = np.subtract(ours["splits"], exact["splits"])
    mean = float(each.mean())
    within = abs(mean) <= exact["standard_error"]
    return {"mean": mean, "standard_error": standard_error(each), "within_one_standard_error": bool(within)}


def standard_error(values: Any) -> float:
    return float(np.std(values, ddof=1) / len(values) ** 0.5)


def published(name: str, data_dir: str | os.PathLike | None) -> dict[str, Any]:
    """Published means and standard errors of MC dropout by setup, if the folder has them."""
    path = Path(data_dir or "", "uci", "mc_dropout_summary.csv")
    if data_dir is None or not path.is_file():
        return {}
    metrics = {"test_rmse": "rmse", "test_ll": "log_likelihood"}
    found: dict[str, Any] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["dataset"] == name and row["setup"] in PUBLISHED:
                score = {"mean": float(row["mean"]), "standard_error": float(row["std_error"])}
                found.setdefault(row["setup"], {})[metrics[row["metric"]]] = score
    return found


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Fit the sets that are not in the JSON yet; it is written after each of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        default=os.environ.get("NUMPYRO_RAD_DATA"),
        help="folder that holds uci/ (default: the environment variable NUMPYRO_RAD_DATA)",
    )
    parser.add_argument("--sets", nargs="+", metavar="NAME", default=list(SETS), help=f"of {', '.join(SETS)}")
    parser.add_argument("--quick", action="store_true", help="two splits and few steps")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="where the JSON goes")
    options = parser.parse_args(arguments)
    report: dict[str, Any] = {
        "workload": {"name": "uci", "title": "One hidden layer of 50 units (protein: 100) on the UCI regression sets"},
        **circumstances(),
        "steps": 500 if options.quick else 40_000,
        "quick": options.quick,
        "batch": BATCH,
        "posterior_draws": POSTERIOR_DRAWS,
        "sources": PUBLISHED,
        "uci": {},
    }
    if options.output.exists():
        earlier = json.loads(options.output.read_text())
        different = [key for key in report if key not in ("date", "uci") and earlier.get(key) != report[key]]
        if different:
            raise SystemExit(f"{options.output} has another {' and '.join(different)}: remove it, or set --output.")
        report["uci"] = earlier["uci"]
    for name in options.sets:
        if name in report["uci"]:
            continue
        try:
            found = splits(name, options.data_dir, 2 if options.quick else None)
        except data.DataNotFound as error:
            raise SystemExit(f"uci.py: {error}") from None
        report["uci"][name] = measured(name, found, report["steps"]) | {"published": published(name, options.data_dir)}
        write(report, options.output)
        log(f"wrote {options.output}")
    return report


if __name__ == "__main__":
    main()
