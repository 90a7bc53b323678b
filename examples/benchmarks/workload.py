"""The base class of the workloads, and the pieces that several of them share.

A workload is a plain object that the runner asks for a data set, for a minibatch, and for a NumPyro model and guide.
What a new one has to say is its ``layer`` (see ``layers.py``), the methods of ``Workload`` that raise, and which rivals
it is ``without``. Most are a ``MeanFieldWorkload``: every weight and every bias is a latent variable with an AutoNormal
guide, and the log likelihood of a minibatch is scaled by ``data_size / batch``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import lax
from numpyro.infer.autoguide import AutoDelta, AutoGuide, AutoNormal
from numpyro.infer.initialization import init_to_sample

from examples import data as datasets
from examples.benchmarks.layers import VARIANTS, Apply, Block, Layer

Arrays = tuple[jax.Array, jax.Array]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model with its data, and how much work to spend on measuring it.

    :param batch: rows per step.
    :param data_size: rows of the whole data set, from which minibatches are drawn; ``load`` sets it for stored data.
    :param micro_batches: pieces into which gradient accumulation cuts the batch.
    :param training_steps: exact steps taken before gradients and their variances are measured.
    :param draws: default number of draws per variance.
    :param repeats: default number of timed rounds.
    :param data: the name of the data, set by ``load``.
    :cvar layer: what the workload repeats and the rivals rewrite.
    :cvar without: names of the rivals that make no sense for the workload.
    """

    name: str
    title: str
    batch: int
    data_size: int = 0
    micro_batches: int
    training_steps: int
    draws: int
    repeats: int
    learning_rate: float
    guide_name: str
    optimizer_name: str = "optax.adam"
    data: str = "synthetic"

    layer: ClassVar[Layer | Block]
    # Segments are of a loop: a workload that has one says so.
    without: ClassVar[tuple[str, ...]] = ("checkpoint_sqrt",)

    def dataset(self, seed: int, data_dir: Path | None) -> tuple[str, Arrays]:
        """The name of the data, and inputs and targets of all rows."""
        raise NotImplementedError

    def model(self, variant: str = "plain") -> Callable[..., None]:
        """The NumPyro model with one variant of the layer, called as ``model(x, y)`` with the rows of one minibatch."""
        raise NotImplementedError

    def guide(self, model: Callable[..., None], variant: str = "plain") -> Callable[..., Any]:
        """The guide of such a model, called with the same arguments."""
        raise NotImplementedError

    def held_out(self, seed: int, data_dir: Path | None) -> Arrays | None:
        """Inputs and targets of the rows to test on, ``dataset`` gives the others; None if there are none."""
        return None

    def load(self, seed: int, data_dir: Path | None) -> tuple[Workload, Arrays]:
        """The workload on its data, and the data: from ``data_dir`` where it is given and the workload reads files."""
        name, arrays = self.dataset(seed, data_dir)
        return replace(self, data=name, data_size=arrays[0].shape[0]), arrays

    def parameters(self) -> dict[str, Any]:
        """Everything that defines the workload, for the stored JSON."""
        return asdict(self)

    def minibatch(self, key: jax.Array, data: Arrays, size: int) -> Arrays:
        """``size`` rows of the data, drawn without replacement."""
        rows = jax.random.permutation(key, self.data_size)[:size]
        return data[0][rows], data[1][rows]

    def optimizer(self) -> optax.GradientTransformation:
        return optax.adam(self.learning_rate)


@dataclass(frozen=True, kw_only=True)
class MeanFieldWorkload(Workload):
    """All weights are latent, with an AutoNormal guide; the rows are independent given the weights.

    :param initial_gain: initial guide locations are prior draws, their distance from the prior mean times this.
    :param initial_scale: initial standard deviation of every guide factor.
    :param guide_name: ``AutoNormal``, or ``AutoDelta`` for weights that are points: the mode of the posterior.
    """

    initial_gain: float
    initial_scale: float
    guide_name: str = "AutoNormal"

    def outputs(self, x: jax.Array, apply: Apply) -> jax.Array:
        """Sample the weights and compute ``(batch, outputs)`` with one variant of the layer."""
        raise NotImplementedError

    def likelihood(self, outputs: jax.Array) -> dist.Distribution:
        """The distribution of the targets of a batch."""
        raise NotImplementedError

    def model(self, variant: str = "plain") -> Callable[..., None]:
        """The NumPyro model, called as ``model(x, y)`` with the rows of one minibatch."""
        apply = VARIANTS[variant](self.layer)

        def model(x: jax.Array, y: jax.Array) -> None:
            outputs = self.outputs(x, apply)
            # The caller hands over the minibatch; the plate only scales its log likelihood up to the whole data set.
            with numpyro.plate("data", self.data_size, subsample_size=x.shape[0]):
                numpyro.sample("y", self.likelihood(outputs), obs=y)

        return model

    def guide(self, model: Callable[..., None], variant: str = "plain") -> AutoGuide:
        """A guide that starts at scaled prior draws: mean-field normal with small standard deviations, or points."""

        def scaled_prior_draw(site: dict[str, Any]) -> jax.Array | None:
            value = cast(jax.Array | None, init_to_sample(site))
            if value is None:
                return None
            mean = site["fn"].mean
            return mean + self.initial_gain * (value - mean)

        # NumPyro calls an initialization strategy to get one, unless it is a partial.
        start = partial(scaled_prior_draw)
        if self.guide_name == "AutoDelta":
            return AutoDelta(model, init_loc_fn=start)
        return AutoNormal(model, init_loc_fn=start, init_scale=self.initial_scale)


def weight(name: str, shape: tuple[int, ...], scale: float, loc: jax.Array | float = 0.0) -> jax.Array:
    """A latent array with independent normal entries."""
    prior = dist.Normal(loc, scale).expand(list(shape)).to_event(len(shape))
    return cast(jax.Array, numpyro.sample(name, prior))


def affine(name: str, shape: tuple[int, ...]) -> Arrays:
    """Latent weights of ``shape`` and a bias for the last axis, w, b ~ Normal(0, 1 / sqrt(fan_in))."""
    scale = 1.0 / float(np.prod(shape[:-1])) ** 0.5
    return weight(f"w{name}", shape, scale), weight(f"b{name}", shape[-1:], scale)


@dataclass(frozen=True, kw_only=True)
class Classifier(MeanFieldWorkload):
    """Rows of ten classes."""

    classes: int = 10

    def likelihood(self, outputs: jax.Array) -> dist.Distribution:
        return dist.Categorical(logits=outputs)


def linear_output(h: jax.Array, outputs: int) -> jax.Array:
    """The last layer, which no rival rewrites; in float32."""
    w, b = affine("out", (h.shape[-1], outputs))
    return h.astype(w.dtype) @ w + b  # (batch, outputs)


def images(name: str, data_dir: Path | None, shape: tuple[int, ...], test: bool = False) -> Arrays:
    """Images of a stored data set, resized to ``shape`` (rows, columns, then channels if any), and their labels.

    :param test: the images to test on, instead of those to train on.
    """
    found = datasets.load(name, data_dir)
    stored, labels = (found.x_test, found.y_test) if test else (found.x_train, found.y_train)
    side = int((stored.shape[1] / np.prod(shape[2:])) ** 0.5)
    x = jnp.asarray(stored).reshape(-1, side, side, *shape[2:])
    return jax.image.resize(x, (len(x), *shape), "linear"), jnp.asarray(labels)


def convolution(h: jax.Array, w: jax.Array) -> jax.Array:
    """``(batch, rows, columns, channels)`` with ``(rows, columns, in, out)``, same size."""
    return lax.conv_general_dilated(h, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def average_pool(h: jax.Array) -> jax.Array:
    """Means of 2 x 2 pixels."""
    n, rows, columns, channels = h.shape
    return h.reshape(n, rows // 2, 2, columns // 2, 2, channels).mean((2, 4))
