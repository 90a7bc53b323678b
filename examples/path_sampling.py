"""Which graphs can be sampled? The variance of sampled derivatives against the depth of a graph, measured and exact.

    python -m examples.path_sampling
    python -m examples.path_sampling --quick --output path_sampling.json
    python -m examples.benchmarks.figures docs/benchmarks/path_sampling.json --table-only

A derivative is the sum over all paths through a program's graph of the product of the local derivatives on each path.
To keep a part of the units of each layer, and to divide what is kept by its chance, samples these paths: the derivative
is right on average (Oktay et al., ICLR 2021, section 3). How much its variance grows with depth is decided by the
graph. Here are layered graphs ``y = tanh(W y)``, differentiated by ``rad`` with ``SampleAxis``, beside the closed form
of what it should measure: a recursion of the second moments of what the backward sweep carries.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from examples.benchmarks.record import circumstances, log, write
from numpyro_rad import StochasticRound, rad
from numpyro_rad.codecs import Codec, SampleAxis

DEFAULT_OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "path_sampling.json"
UNITS, STRATUM, ROWS = 64, 4, 128
# Deeper than MEASURED a few draws in a million make the mean.
DEPTHS, MEASURED = (1, 2, 3, 4, 6, 8, 12, 16), 6
DRAWS = 200_000
SEED = 0


def one_sign(rng: np.random.Generator, units: int) -> np.ndarray:
    """Each unit reads all, with positive weights."""
    return rng.uniform(0.0, 2.0, (units, units)) / units


def both_signs(rng: np.random.Generator, units: int) -> np.ndarray:
    """Each unit reads all, with weights of both signs."""
    return rng.standard_normal((units, units)) / units**0.5


def neighbours(rng: np.random.Generator, units: int) -> np.ndarray:
    """Each unit reads itself and its two neighbours, in a ring."""
    shifts = [np.roll(np.eye(units), shift, axis=1) for shift in (-1, 0, 1)]
    return sum(rng.uniform(0.5, 1.5, (units, 1)) * shift for shift in shifts) / 3


def alone(rng: np.random.Generator, units: int) -> np.ndarray:
    """Each unit reads itself."""
    return np.diag(rng.uniform(0.5, 1.5, units))


@dataclass(frozen=True)
class Graph:
    """Layers of units, an input, and weights of the output.

    :param weights: ``(depth, units, units)``, from the first layer to the last.
    :param start: the input, ``(units,)``.
    :param end: weights of the output, ``(units,)``.
    """

    weights: np.ndarray
    start: np.ndarray
    end: np.ndarray

    def slopes(self) -> np.ndarray:
        """The derivatives of the units, ``(depth, units)``."""
        y, found = self.start, []
        for weights in self.weights:
            y = np.tanh(weights @ y)
            found.append(1 - y**2)
        return np.array(found)


def layered(make: Callable[[np.random.Generator, int], np.ndarray], depth: int, units: int) -> Graph:
    """A graph with layers of one kind."""
    rng = np.random.default_rng([SEED, depth])
    weights = np.stack([make(rng, units) for _ in range(depth)])
    start = rng.uniform(0.2, 1.0, units)
    end = rng.standard_normal(units) if make is both_signs else np.full(units, 1 / units)
    return Graph(weights, start, end)


def output(start: jax.Array, weights: Sequence[jax.Array], end: jax.Array, unit: jax.Array) -> jax.Array:
    """The program of a graph: the sum over the rows of ``start``, ``(rows, units)``, which do not meet before.

    A product with the identity ``unit`` comes first: what is cheap to compute from the arguments would not be stored.
    """
    y = start @ unit
    for layer in weights:
        # a diagonal is written as what it is: steps that follow each other entry by entry
        y = jnp.tanh(y * layer if layer.ndim == 1 else y @ layer.T)
    return jnp.sum(y @ end)


def relu_network(weights: Sequence[jax.Array], start: jax.Array, end: jax.Array, unit: jax.Array) -> jax.Array:
    """The same with ReLUs, as a function of its weights.

    What its products store are values, which are sampled; the slopes of a ReLU are bits, which are kept.
    """
    y = start @ unit
    for layer in weights:
        y = jax.nn.relu(y @ layer.T)
    return jnp.sum(y @ end)


def closed_form(graph: Graph, stratum: int) -> float:
    """Variance of the sampled gradient with respect to the input / its squared length, as it should be.

    The backward sweep takes ``c`` to ``W' D c``, D with the slopes of the kept units times ``stratum`` on its diagonal.
    Of two units of one stratum never both are kept, of different ones independently: that takes the second moments
    ``E[c c']`` of one layer to those of the one before.
    """
    units = len(graph.start)
    of = np.arange(units) // stratum
    factor = np.where(of[:, None] == of[None, :], 0.0, 1.0) + stratum * np.eye(units)
    mean, second = graph.end, np.outer(graph.end, graph.end)
    for weights, slopes in zip(graph.weights[::-1], graph.slopes()[::-1], strict=True):
        mean = weights.T @ (slopes * mean)
        second = weights.T @ (factor * np.outer(slopes, slopes) * second) @ weights
    return float(np.trace(second) / (mean @ mean) - 1)


def of_the_input(graph: Graph, codec: Codec, draws: int, seed: int = SEED) -> np.ndarray:
    """Squared errors of independent gradients with respect to the input, in squared lengths of the exact one.

    Every row is one of them: the rows are equal, and each is coded by itself.
    """
    weights = [jnp.float32(np.diag(w) if not (w - np.diag(np.diag(w))).any() else w) for w in graph.weights]
    others = weights, jnp.float32(graph.end), jnp.eye(len(graph.start))
    rows = jnp.tile(jnp.float32(graph.start), (ROWS, 1))
    exact = np.asarray(jax.grad(output)(rows, *others), np.float64)
    gradient = jax.jit(jax.grad(rad(output, codec=codec, slices=1), argnums=1))
    keys = jax.random.split(jax.random.key(seed), draws // ROWS)
    found = np.concatenate([np.asarray(gradient(key, rows, *others), np.float64) - exact for key in keys])
    return np.sum(found**2, axis=1) / np.sum(exact[0] ** 2)


def of_the_weights(graph: Graph, codec: Codec, draws: int, seed: int = SEED) -> np.ndarray:
    """The same with respect to the weights of a ReLU network; errors of rows add up, so they are those of one row."""
    weights = [jnp.float32(2**0.5 * layer) for layer in graph.weights]
    others = jnp.tile(jnp.float32(graph.start), (ROWS, 1)), jnp.float32(graph.end), jnp.eye(len(graph.start))
    exact = flat(jax.grad(relu_network)(weights, *others))
    gradient = jax.jit(jax.grad(rad(relu_network, codec=codec, slices=1), argnums=1))
    keys = jax.random.split(jax.random.key(seed), draws // ROWS)
    errors = [np.sum((flat(gradient(key, weights, *others)) - exact) ** 2) for key in keys]
    return ROWS * np.array(errors) / np.sum(exact**2)


def flat(arrays: Sequence[jax.Array]) -> np.ndarray:
    return np.concatenate([np.asarray(array, np.float64).ravel() for array in arrays])


def curve(name: str, depths: Sequence[int], units: int, draws: int) -> list[dict[str, Any]]:
    """A row for each depth: the closed form, and what is measured of sampling and of rounding."""
    rows = []
    for depth in depths:
        graph = layered(GRAPHS.get(name, both_signs), depth, units)
        every_step = closed_form(graph, STRATUM)
        row: dict[str, Any] = {"depth": depth, "closed_form": every_step}
        if name in ONCE:
            row["closed_form"] = STRATUM - 1.0
        if name == "alone":
            row["every_step"] = every_step
        if depth <= MEASURED:
            measure = of_the_weights if name == "weights" else of_the_input
            for kind, codec in CODECS.items():
                squared = measure(graph, codec, draws)
                error = squared.std(ddof=1) / len(squared) ** 0.5
                row[kind] = {"mean": float(squared.mean()), "standard_error": float(error)}
        rows.append(row)
        log(f"{name}: {row}")
    return rows


CODECS: dict[str, Codec] = {"sampled": SampleAxis(keep=1 / STRATUM), "rounded": StochasticRound(bits=4)}
GRAPHS = {"both_signs": both_signs, "one_sign": one_sign, "neighbours": neighbours, "alone": alone}
# What is sampled lies on each path once: steps entry by entry have one derivative, values are not read by each other.
ONCE = ("alone", "weights")
TITLES = {
    "both_signs": "each unit reads all, both signs",
    "neighbours": "each unit reads three",
    "one_sign": "each unit reads all, one sign",
    "alone": "each unit reads itself",
    "weights": "weights of a ReLU network",
}


def kept_units(layers: int = 4, units: int = 8) -> list[list[bool]]:
    """Which units of some layers a draw keeps, for the picture."""
    codec, like = CODECS["sampled"], jax.ShapeDtypeStruct((layers, units), jnp.float32)
    words = jax.random.bits(jax.random.key(SEED), (2,))
    decoded = codec.decode(words, codec.encode(words, jnp.ones(like.shape)), like)
    return (np.asarray(decoded) > 0).tolist()


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure all graphs, and store what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n    python")[0])
    parser.add_argument("--quick", action="store_true", help="a few small graphs, to see that it runs")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, metavar="FILE.json", help="where the JSON goes")
    options = parser.parse_args(arguments)
    depths, units, draws = ((1, 2, 3), 16, 4096) if options.quick else (DEPTHS, UNITS, DRAWS)
    measured = partial(curve, depths=depths, units=units, draws=draws)
    report = {
        "workload": {"title": f"Layered graphs of {units} units, one of {STRATUM} kept in each layer"},
        **circumstances(),
        "units": units,
        "stratum": STRATUM,
        "draws": draws,
        "kept": kept_units(),
        "path_sampling": {name: {"title": title, "rows": measured(name)} for name, title in TITLES.items()},
    }
    write(report, options.output)
    return report


if __name__ == "__main__":
    main()
