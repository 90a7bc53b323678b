"""Train a Bayesian neural network twice, with Trace_ELBO and with RAD_ELBO, and compare what they cost and reach.

    python -m examples.bnn
    python -m examples.bnn --dataset fashion_mnist --data-dir data --codec 4
    python -m examples.bnn --dataset uci:concrete --data-dir data --split 3

Both runs have the same model, guide, initial values, keys, minibatches and number of steps, and take their steps in
turn in one process. The only difference is one word: ``Trace_ELBO`` or ``RAD_ELBO``. It ends with one table, one
picture and the report of the randomized fit: how noisy its gradient is, where the noise comes from, and how good the
fit is.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import SVI, Predictive, Trace_ELBO, init_to_sample
from numpyro.infer.autoguide import AutoNormal
from tqdm import tqdm

from examples import data
from numpyro_rad import RAD_ELBO, BudgetError, Keep, StochasticRound, explain, report
from numpyro_rad.training import fit_record

matplotlib.use("Agg")  # the picture goes to a file: no display is needed
from matplotlib import pyplot as plt

MIB = 2**20
EXACT, RAD = "Trace_ELBO", "RAD_ELBO"
N_SLICES, TIMED_STEPS = 16, 10
COLOURS = {EXACT: "#0072B2", RAD: "#D55E00"}  # blue and vermilion of Okabe and Ito: told apart by every eye
CALIBRATION_BINS = 15
ELBO_PARTICLES = 32
POSTERIOR_DRAWS = 100


@dataclass(frozen=True)
class Defaults:
    """What an option is worth when it is not given; it depends on the kind of data."""

    hidden: int
    layers: int
    batch_size: int
    steps: int
    learning_rate: float
    prior_scale: float


DIGITS = Defaults(hidden=256, layers=6, batch_size=1437, steps=400, learning_rate=0.003, prior_scale=2.0)
IMAGES = Defaults(hidden=256, layers=4, batch_size=1024, steps=1000, learning_rate=0.003, prior_scale=2.0)
REGRESSION = Defaults(hidden=50, layers=1, batch_size=1024, steps=3000, learning_rate=0.01, prior_scale=1.0)


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Run the comparison and return the numbers of its table, by ELBO and by name."""
    options, dataset = parse_arguments(arguments)
    try:
        runs = train(dataset, options)
    except BudgetError as error:
        raise SystemExit(f"bnn.py: --memory-budget {options.memory_budget}: {error}") from None
    evaluate(runs, dataset, options)
    print(format_table(runs, dataset))
    print(slices_line(runs[EXACT], dataset, options))
    draw_figure(runs, dataset, options.figure)
    print(f"\nPicture: {options.figure}")
    write_report(runs[RAD], dataset, options)
    print(f"Report:  {options.report}")
    return {name: run.numbers for name, run in runs.items()}


def parse_arguments(arguments: list[str] | None) -> tuple[argparse.Namespace, data.Data]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    option = parser.add_argument

    def by_dataset(name: str) -> str:
        values = (getattr(defaults, name) for defaults in (DIGITS, IMAGES, REGRESSION))
        return "(default: {} for digits, {} for the other images, {} for uci)".format(*values)

    option(
        "--dataset",
        default="digits",
        help="digits, mnist, fashion_mnist, or uci:NAME such as uci:concrete (default: %(default)s)",
    )
    option(
        "--data-dir",
        metavar="DIR",
        default=os.environ.get("NUMPYRO_RAD_DATA"),
        help="folder that holds mnist/, fashion_mnist/ and uci/; digits needs none "
        "(default: the environment variable NUMPYRO_RAD_DATA)",
    )
    option(
        "--split",
        type=int,
        default=0,
        help="which stored train/test split, counted from 0; uci only (default: %(default)s)",
    )
    option("--hidden", type=positive_int, help=f"units of each hidden layer {by_dataset('hidden')}")
    option("--layers", type=positive_int, help=f"number of hidden layers {by_dataset('layers')}")
    option("--batch-size", type=positive_int, help=f"points of a minibatch, at most all {by_dataset('batch_size')}")
    option("--steps", type=positive_int, help=f"optimizer steps of each run {by_dataset('steps')}")
    option(
        "--learning-rate",
        type=positive_float,
        help=f"first learning rate of Adam; a cosine takes it to 0 {by_dataset('learning_rate')}",
    )
    option(
        "--prior-scale",
        type=positive_float,
        help="prior standard deviation of a weight, times the square root of the inputs of its layer "
        + by_dataset("prior_scale"),
    )
    option(
        "--num-particles",
        type=positive_int,
        default=1,
        help="posterior draws of each gradient estimate (default: %(default)s)",
    )
    option(
        "--seed",
        type=int,
        default=0,
        help="seed of initial values, minibatches and noise, the same for both runs (default: %(default)s)",
    )
    memory = parser.add_mutually_exclusive_group()
    memory.add_argument(
        "--codec",
        choices=("default", "keep", "8", "4", "2", "1"),
        default="default",
        help="how RAD_ELBO stores residuals: the library's default, keep (exact), or bits for each number "
        "(default: %(default)s)",
    )
    memory.add_argument(
        "--memory-budget",
        metavar="BYTES",
        help="the most that RAD_ELBO may store between its two sweeps: bytes, or text such as 4MiB (default: no bound)",
    )
    option(
        "--figure",
        metavar="FILE",
        help="where to save the picture; the ending sets the format (default: bnn_DATASET.png in this folder)",
    )
    option(
        "--report",
        metavar="FILE",
        help="where to save the report of the fit with RAD_ELBO: .html, .md, .txt or .json (default: bnn_DATASET.html)",
    )
    options = parser.parse_args(arguments)

    try:
        dataset = data.load(options.dataset, options.data_dir, options.split)
    except (data.DataNotFound, ValueError) as error:
        parser.exit(2, f"bnn.py: {error}\n")
    defaults = DIGITS if options.dataset == "digits" else IMAGES if dataset.num_classes else REGRESSION
    for name, value in vars(defaults).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.batch_size = min(options.batch_size, len(dataset.x_train))
    options.figure = options.figure or f"bnn_{options.dataset.replace(':', '_')}.png"
    options.report = options.report or f"bnn_{options.dataset.replace(':', '_')}.html"
    return options, dataset


def positive_int(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return int(text)


def positive_float(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return float(text)


def make_model(
    dataset: data.Data, options: argparse.Namespace, activation: Callable[[jax.Array], jax.Array] = jax.nn.gelu
) -> Callable[..., None]:
    """A fully connected residual network, of GELU layers as a rule, with a normal prior on every weight and bias."""
    num_data, num_features = dataset.x_train.shape
    widths = [num_features, *[options.hidden] * options.layers, dataset.num_classes or 1]

    def model(x: jax.Array, y: jax.Array | None = None) -> None:
        layers = []
        for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
            prior = dist.Normal(0.0, options.prior_scale / math.sqrt(fan_in + 1))
            weights = numpyro.sample(f"weights{i}", prior.expand([fan_in, fan_out]).to_event(2))
            bias = numpyro.sample(f"bias{i}", prior.expand([fan_out]).to_event(1))
            layers.append((weights, bias))
        if not dataset.num_classes:
            precision = numpyro.sample("precision", dist.Gamma(6.0, 6.0))  # of the noise, as in PBP

        with numpyro.plate("data", num_data, subsample_size=len(x)):  # x is the minibatch: the plate scales it up
            h = x
            for i, (weights, bias) in enumerate(layers):
                out = (activation(h) if i else h) @ weights + bias  # (batch, fan_out)
                h = h + out if 0 < i < options.layers else out  # a deep network trains through the skip connections
            if dataset.num_classes:
                logits = numpyro.deterministic("logits", h)
                numpyro.sample("y", dist.Categorical(logits=logits), obs=y)
            else:
                mean = numpyro.deterministic("mean", h[:, 0])
                numpyro.sample("y", dist.Normal(mean, 1.0 / jnp.sqrt(precision)), obs=y)

    return model


@dataclass
class Run:
    """One of the two trainings: what it needs to go on, and what was measured."""

    svi: SVI
    state: Any
    losses: list = field(default_factory=list)
    seconds: list = field(default_factory=list)
    numbers: dict = field(default_factory=dict)
    reliability: Any = None

    @property
    def params(self) -> dict[str, jax.Array]:
        return self.svi.get_params(self.state)


def make_elbos(options: argparse.Namespace) -> dict[str, Trace_ELBO]:
    choice = {}
    if options.memory_budget is not None:
        text = options.memory_budget
        choice = {"memory_budget": int(text) if text.isdecimal() else text}
    elif options.codec != "default":
        choice = {"codec": Keep() if options.codec == "keep" else StochasticRound(bits=int(options.codec))}
    return {EXACT: Trace_ELBO(options.num_particles), RAD: RAD_ELBO(options.num_particles, **choice)}


def train(dataset: data.Data, options: argparse.Namespace) -> dict[str, Run]:
    """Take every step with both ELBOs in turn, on the same minibatch, and time each of them."""
    init_key, batch_key, plan_key = jax.random.split(jax.random.key(options.seed), 3)
    x_train, y_train = jnp.asarray(dataset.x_train), jnp.asarray(dataset.y_train)
    full_batch = options.batch_size == len(x_train)

    @jax.jit
    def draw_minibatch(step: int, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = jax.random.choice(jax.random.fold_in(batch_key, step), len(x), (options.batch_size,), replace=False)
        return x[rows], y[rows]

    model = make_model(dataset, options)
    batch = (x_train, y_train) if full_batch else draw_minibatch(0, x_train, y_train)
    runs, updates = {}, {}
    for name, elbo in make_elbos(options).items():
        print(f"compiling {name} ...", file=sys.stderr)
        guide = AutoNormal(model, init_loc_fn=init_to_sample, init_scale=0.03)
        optimizer = optax.adam(optax.cosine_decay_schedule(options.learning_rate, options.steps))
        svi = SVI(model, guide, optimizer, elbo)
        run = runs[name] = Run(svi, svi.init(init_key, *batch))
        start = time.perf_counter()
        updates[name] = jax.jit(svi.update).lower(run.state, *batch).compile()
        run.numbers["compile_seconds"] = time.perf_counter() - start
        memory = updates[name].memory_analysis()  # None where the backend does not say
        run.numbers["temp_bytes"] = memory.temp_size_in_bytes if memory else math.nan
    rad = runs[RAD]
    plan = explain(rad.svi.loss, plan_key, rad.params, model, rad.svi.guide, *batch)
    runs[EXACT].numbers["residual_bytes"] = plan.exact_bytes
    rad.numbers["residual_bytes"] = plan.stored_bytes

    for step in tqdm(range(options.steps), desc=f"training on {dataset.name}", unit="step", mininterval=0.5):
        if not full_batch:
            batch = jax.block_until_ready(draw_minibatch(step, x_train, y_train))
        for name in (EXACT, RAD) if step % 2 else (RAD, EXACT):
            run = runs[name]
            start = time.perf_counter()
            run.state, loss = jax.block_until_ready(updates[name](run.state, *batch))
            run.seconds.append(time.perf_counter() - start)
            run.losses.append(float(loss))
    for run in runs.values():
        run.numbers["step_seconds"] = float(np.median(run.seconds))
    return runs


def slices_line(exact: Run, dataset: data.Data, options: argparse.Namespace) -> str:
    """What the same step takes slice by slice, with an exact gradient."""
    rows = options.batch_size
    batch = jnp.asarray(dataset.x_train[:rows]), jnp.asarray(dataset.y_train[:rows])
    elbo = RAD_ELBO(options.num_particles, exact=True, slices=N_SLICES)
    svi = SVI(exact.svi.model, exact.svi.guide, exact.svi.optim, elbo)
    state = svi.init(jax.random.key(options.seed), *batch)
    update = jax.jit(svi.update).lower(state, *batch).compile()
    memory, seconds = update.memory_analysis(), []
    for _ in range(TIMED_STEPS):
        start = time.perf_counter()
        jax.block_until_ready(update(state, *batch))
        seconds.append(time.perf_counter() - start)
    size = f"{memory.temp_size_in_bytes / MIB:.3f} MiB" if memory else "unknown"
    took = 1e3 * float(np.median(seconds))
    return f"\nIn {N_SLICES} slices of rows, with an exact gradient: temporary memory {size}, {took:.2f} ms a step."


def evaluate(runs: dict[str, Run], dataset: data.Data, options: argparse.Namespace) -> None:
    """Add the quality of each fit, with the same draws for both and NumPyro's own ELBO."""
    elbo_key, test_key = jax.random.split(jax.random.key(options.seed + 1))
    svi, num_data = runs[EXACT].svi, len(dataset.x_train)
    sites = ["logits"] if dataset.num_classes else ["mean", "precision"]

    @jax.jit
    def elbo_draws(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
        keys = jax.random.split(elbo_key, ELBO_PARTICLES)
        return jax.lax.map(lambda key: -Trace_ELBO().loss(key, params, svi.model, svi.guide, x, y), keys)

    @jax.jit
    def predict(params: dict[str, jax.Array], x: jax.Array) -> dict[str, jax.Array]:
        posterior = {"guide": svi.guide, "params": params, "num_samples": POSTERIOR_DRAWS}
        return Predictive(svi.model, return_sites=sites, **posterior)(test_key, x)

    for run in runs.values():
        elbos = np.asarray(elbo_draws(run.params, dataset.x_train, dataset.y_train)) / num_data
        run.numbers["elbo"] = float(elbos.mean())
        run.numbers["elbo_error"] = float(elbos.std(ddof=1)) / math.sqrt(ELBO_PARTICLES)
        draws = {site: np.asarray(value, np.float64) for site, value in predict(run.params, dataset.x_test).items()}
        if dataset.num_classes:
            scores, run.reliability = classification_scores(draws["logits"], dataset.y_test)
        else:
            scores = regression_scores(draws["mean"], draws["precision"], dataset.y_test, dataset.target_std)
        run.numbers.update(scores)


def write_report(run: Run, dataset: data.Data, options: argparse.Namespace) -> None:
    """The report of a fit, from its losses and from draws at its end, taken on as many rows as a minibatch has.

    k-hat is left out: for the weights of a neural network it is above 0.7 nearly always.
    """
    batch = jnp.asarray(dataset.x_train[: options.batch_size]), jnp.asarray(dataset.y_train[: options.batch_size])
    told = {"seconds": sum(run.seconds), "assess": True, "draws": 16, "pareto_k": False}
    report.write(fit_record(run.svi, run.state, run.losses, *batch, **told), options.report)


def log_mean_exp(x: np.ndarray) -> np.ndarray:
    """log of the mean of exp(x) over the first axis, without overflow."""
    return np.logaddexp.reduce(x, axis=0) - math.log(len(x))


def classification_scores(logits: np.ndarray, labels: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
    """Accuracy, mean log-likelihood and expected calibration error of the posterior predictive.

    :param logits: ``(posterior draws, points, classes)``.
    :param labels: ``(points,)``.
    :return: the scores, and for each occupied bin of confidence its mean confidence, accuracy and share of the points.
    """
    log_probabilities = log_mean_exp(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))  # (points, classes)
    correct = log_probabilities.argmax(-1) == labels
    confidence = np.exp(log_probabilities.max(-1))
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    rows = [(confidence[bins == b].mean(), correct[bins == b].mean(), (bins == b).mean()) for b in np.unique(bins)]
    reliability = np.array(rows)
    scores = {
        "accuracy": float(correct.mean()),
        "log_likelihood": float(log_probabilities[np.arange(len(labels)), labels].mean()),
        "calibration_error": float(np.sum(reliability[:, 2] * np.abs(reliability[:, 0] - reliability[:, 1]))),
    }
    return scores, reliability


def regression_scores(
    means: np.ndarray, precisions: np.ndarray, targets: np.ndarray, target_std: float
) -> dict[str, float]:
    """RMSE of the mean prediction and mean log-likelihood, both in the target's own unit (the PBP protocol).

    :param means: ``(posterior draws, points)``, standardised.
    :param precisions: of the noise, ``(posterior draws,)``, standardised.
    :param targets: ``(points,)``, standardised.
    :param target_std: standard deviation of the training targets in their own unit.
    """
    precisions = precisions.reshape(-1, 1)
    log_densities = 0.5 * (np.log(precisions / (2 * math.pi)) - precisions * (targets - means) ** 2)
    return {
        "rmse": float(target_std * np.sqrt(np.mean((means.mean(0) - targets) ** 2))),
        "log_likelihood": float(log_mean_exp(log_densities).mean() - math.log(target_std)),
    }


def format_table(runs: dict[str, Run], dataset: data.Data) -> str:
    """The one table: a line for each number, exact, randomized, and how they differ."""
    exact, rad = runs[EXACT].numbers, runs[RAD].numbers
    rows = [("", EXACT, RAD, "")]

    def difference(label: str, name: str, digits: int, factor: float = 1.0, error: str = "") -> None:
        texts = [f"{factor * numbers[name]:.{digits}f}" for numbers in (exact, rad)]
        if error:
            texts = [f"{t} ± {numbers[error]:.{digits}f}" for t, numbers in zip(texts, (exact, rad), strict=True)]
        rows.append((label, *texts, f"{factor * (rad[name] - exact[name]):+.{digits}f}"))

    def ratio(label: str, name: str, digits: int, factor: float) -> None:
        texts = [f"{factor * numbers[name]:.{digits}f}" for numbers in (exact, rad)]
        rows.append((label, *texts, f"{rad[name] / exact[name]:.2f}x" if exact[name] else "n/a"))

    difference(f"ELBO on training data, {ELBO_PARTICLES} particles (nats/point)", "elbo", 3, error="elbo_error")
    if dataset.num_classes:
        difference("test accuracy (%)", "accuracy", 2, 100.0)
        difference("test log-likelihood (nats/point)", "log_likelihood", 4)
        difference("expected calibration error (%)", "calibration_error", 2, 100.0)
    else:
        difference("test RMSE (unit of the target)", "rmse", 4)
        difference("test log-likelihood (nats/point)", "log_likelihood", 4)
    ratio("residuals stored between the sweeps (MiB)", "residual_bytes", 3, 1 / MIB)
    ratio("temporary memory of the compiled step (MiB)", "temp_bytes", 3, 1 / MIB)
    ratio("median time of a step (ms)", "step_seconds", 2, 1e3)
    ratio("compile time, once (s)", "compile_seconds", 1, 1.0)

    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return "\n".join(["", lines[0].rstrip(), "-" * len(lines[0]), *lines[1:]])


def draw_figure(runs: dict[str, Run], dataset: data.Data, path: str) -> None:
    """ELBO over steps, memory and, for classification, a reliability diagram, side by side in one file."""
    panels = 3 if dataset.num_classes else 2
    figure, axes = plt.subplots(1, panels, figsize=(4.6 * panels, 4.0), layout="constrained")
    draw_elbo(axes[0], runs, len(dataset.x_train))
    draw_memory(axes[1], runs)
    if dataset.num_classes:
        draw_reliability(axes[2], runs)
    figure.suptitle(f"Bayesian neural network on {dataset.name}: exact and randomized gradients")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_elbo(axis: Any, runs: dict[str, Run], num_data: int) -> None:
    for (name, run), style in zip(runs.items(), ({"linewidth": 3, "alpha": 0.5}, {"linewidth": 1}), strict=True):
        elbo = -np.array(run.losses) / num_data
        axis.plot(np.arange(1, len(elbo) + 1), elbo, color=COLOURS[name], label=name, **style)
    axis.set(xlabel="step", ylabel="ELBO estimate (nats per training point)", title="Training")
    axis.legend(loc="lower right")


def draw_memory(axis: Any, runs: dict[str, Run]) -> None:
    groups = {
        "residual_bytes": "residuals stored\nbetween the sweeps",
        "temp_bytes": "temporary memory of\nthe compiled step",
    }
    for offset, (name, run) in zip((-0.2, 0.2), runs.items(), strict=True):
        heights = [run.numbers[group] / MIB for group in groups]
        bars = axis.bar(np.arange(len(groups)) + offset, heights, 0.38, color=COLOURS[name], label=name)
        axis.bar_label(bars, fmt="%.3g")
    axis.set_xticks(range(len(groups)), groups.values())
    axis.margins(y=0.12)
    axis.set(ylabel="memory (MiB)", title="Memory of one step")
    axis.legend()


def draw_reliability(axis: Any, runs: dict[str, Run]) -> None:
    axis.plot([0, 1], [0, 1], color="0.6", linestyle=":", label="calibrated")
    for (name, run), marker in zip(runs.items(), ("o", "s"), strict=True):
        confidence, accuracy, share = run.reliability.T
        axis.plot(confidence, accuracy, color=COLOURS[name], linewidth=1, alpha=0.6)
        axis.scatter(confidence, accuracy, 20 + 200 * share, COLOURS[name], marker=marker, alpha=0.7, label=name)
    axis.set(xlabel="mean confidence of a bin (probability)", ylabel="accuracy of a bin (fraction)")
    axis.set_title("Reliability (area: share of test points)")
    axis.legend(loc="upper left")


if __name__ == "__main__":
    main()
