"""P1 to P3 and the MNIST network of the RAD paper: feed-forward, recurrent and convolutional layers, latent weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from examples.benchmarks.layers import Apply, Layer, loop
from examples.benchmarks.workload import (
    Arrays,
    Classifier,
    MeanFieldWorkload,
    affine,
    average_pool,
    convolution,
    images,
    linear_output,
    weight,
)


@dataclass(frozen=True, kw_only=True)
class BayesianMLP(MeanFieldWorkload):
    """P1: a deep Bayesian neural network for regression.

        w ~ Normal(0, 1 / sqrt(fan_in)),   h' = gelu(h w + b),   y ~ Normal(h w + b, noise_scale)

    An ``initial_gain`` above 1 keeps a signal alive through many GELU layers; with 1 the gradients of the early layers
    would vanish and every variance would look small.

    :param depth: number of hidden layers, each ``width`` wide.
    :param inputs: number of input features.
    :param targets: number of real-valued targets per row.
    :param noise_scale: standard deviation of the likelihood.
    """

    depth: int
    width: int
    inputs: int
    targets: int = 10
    noise_scale: float = 0.1
    initial_gain: float = 1.5
    initial_scale: float = 0.005
    learning_rate: float = 1e-3
    activation: str = "gelu (tanh approximation)"

    layer: ClassVar[Layer] = Layer(jnp.matmul, jax.nn.gelu)

    def dataset(self, seed: int, data_dir: Path | None) -> tuple[str, Arrays]:
        """Standard normal inputs and the outputs of a fixed two-layer tanh teacher, with noise; no files.

        :return: arrays of shape ``(data_size, inputs)`` and ``(data_size, targets)``.
        """
        key_x, key_1, key_2, key_noise = jax.random.split(jax.random.key(seed), 4)
        x = jax.random.normal(key_x, (self.data_size, self.inputs))
        hidden = jnp.tanh(x @ jax.random.normal(key_1, (self.inputs, 64)) / self.inputs**0.5)
        y = hidden @ jax.random.normal(key_2, (64, self.targets)) / 8.0
        return "synthetic", (x, y + self.noise_scale * jax.random.normal(key_noise, y.shape))

    def outputs(self, x: jax.Array, apply: Apply) -> jax.Array:
        h = x  # (batch, inputs)
        for i in range(self.depth):
            h = apply(h, *affine(f"{i}", (h.shape[-1], self.width)))  # (batch, width)
        return linear_output(h, self.targets)

    def likelihood(self, outputs: jax.Array) -> dist.Distribution:
        return dist.Normal(outputs, self.noise_scale).to_event(1)


def handwritten(side: int, data_dir: Path | None, test: bool = False) -> tuple[str, Arrays]:
    """MNIST from ``data_dir``, else scikit-learn's small digits, at the size asked for.

    :return: the name, and arrays of shape ``(images, side * side)`` and ``(images,)``.
    """
    name = "mnist" if data_dir else "digits"
    x, y = images(name, data_dir, (side, side), test)
    return name, (x.reshape(len(x), -1), y)


@dataclass(frozen=True, kw_only=True)
class BayesianDenseNet(Classifier):
    """The fully connected network of the RAD paper (Oktay et al. 2021), with latent weights.

        w ~ Normal(0, 1 / sqrt(fan_in)),   h' = relu(h w + b),   y ~ Categorical(logits = h w_out + b_out)

    :param side: images have ``side * side`` pixels.
    :param widths: units of each hidden layer.
    """

    side: int = 28
    widths: tuple[int, ...] = (300, 300, 300)
    initial_gain: float = 1.5
    initial_scale: float = 0.005
    learning_rate: float = 1e-3

    layer: ClassVar[Layer] = Layer(jnp.matmul, jax.nn.relu)

    def dataset(self, seed: int, data_dir: Path | None) -> tuple[str, Arrays]:
        return handwritten(self.side, data_dir)

    def held_out(self, seed: int, data_dir: Path | None) -> Arrays:
        return handwritten(self.side, data_dir, test=True)[1]

    def outputs(self, x: jax.Array, apply: Apply) -> jax.Array:
        h = x  # (batch, pixels)
        for i, width in enumerate(self.widths):
            h = apply(h, *affine(f"{i}", (h.shape[-1], width)))  # (batch, width)
        return linear_output(h, self.classes)


@dataclass(frozen=True, kw_only=True)
class BayesianIRNN(Classifier):
    """P2: a recurrent network that reads an image pixel by pixel (Le, Jaitly and Hinton 2015), with latent weights.

        w ~ Normal(identity, 0.001),   h' = relu(h w + x_t w_in + b),   y ~ Categorical(logits = h w_out + b_out)

    The prior is centred at IRNN's identity initialization. It and the guide are narrow, because one part in a thousand,
    to the power of 784 steps, is a factor of two.

    :param side: images have ``side * side`` pixels, one step each.
    :param units: size of the hidden state.
    """

    side: int = 28
    units: int = 100
    initial_gain: float = 0.1
    initial_scale: float = 1e-4
    learning_rate: float = 1e-5

    layer: ClassVar[Layer] = Layer(jnp.matmul, jax.nn.relu, lambda x, w_in, b: x[:, None] * w_in + b, looped=True)
    without: ClassVar[tuple[str, ...]] = ()

    def dataset(self, seed: int, data_dir: Path | None) -> tuple[str, Arrays]:
        return handwritten(self.side, data_dir)

    def held_out(self, seed: int, data_dir: Path | None) -> Arrays:
        return handwritten(self.side, data_dir, test=True)[1]

    def outputs(self, x: jax.Array, apply: Apply) -> jax.Array:
        w = weight("w", (self.units, self.units), 1e-3, jnp.eye(self.units))
        rest = weight("w_in", (self.units,), 0.1), weight("b", (self.units,), 0.01)
        h = jnp.zeros((x.shape[0], self.units))  # (batch, units)
        h = h.astype(jax.eval_shape(apply, h, w, x[:, 0], *rest).dtype)
        h, _ = loop(apply, lambda h, pixel: (apply(h, w, pixel, *rest), None), h, x.T)
        return linear_output(h, self.classes)


@dataclass(frozen=True, kw_only=True)
class BayesianConvNet(Classifier):
    """P3: the convolutional network of the RAD paper (Oktay et al. 2021), with latent weights.

    Convolutions of 5 x 5 with a ReLU, 2 x 2 average pooling after every second one, and a linear layer at the end.

    :param side: images are ``side`` by ``side`` with 3 channels.
    :param channels: of each convolution's output.
    """

    side: int = 32
    channels: tuple[int, ...] = (16, 32, 32, 32)
    data_size: int = 10000
    initial_gain: float = 1.5
    initial_scale: float = 0.005
    learning_rate: float = 1e-3

    layer: ClassVar[Layer] = Layer(convolution, jax.nn.relu)

    def dataset(self, seed: int, data_dir: Path | None) -> tuple[str, Arrays]:
        """CIFAR-10 from ``data_dir``, else a smooth random image for each class, with as much noise.

        :return: the name, and arrays of shape ``(data_size, side, side, 3)`` and ``(data_size,)``.
        """
        if data_dir:
            return "cifar10", images("cifar10", data_dir, (self.side, self.side, 3))
        return "synthetic", self.noisy_images(*jax.random.split(jax.random.key(seed), 3))

    def held_out(self, seed: int, data_dir: Path | None) -> Arrays:
        """The official test images, else others of the same classes, with other noise."""
        if data_dir:
            return images("cifar10", data_dir, (self.side, self.side, 3), test=True)
        key_class, *others = jax.random.split(jax.random.key(seed), 3)
        return self.noisy_images(key_class, *(jax.random.fold_in(key, 1) for key in others))

    def noisy_images(self, key_class: jax.Array, key_label: jax.Array, key_noise: jax.Array) -> Arrays:
        """A smooth random image for each class, with noise."""
        shape = (self.side, self.side, 3)
        labels = jax.random.randint(key_label, (self.data_size,), 0, self.classes)
        centres = jax.image.resize(
            jax.random.normal(key_class, (self.classes, 4, 4, 3)), (self.classes, *shape), "cubic"
        )
        return centres[labels] + jax.random.normal(key_noise, (self.data_size, *shape)), labels

    def outputs(self, x: jax.Array, apply: Apply) -> jax.Array:
        h = x  # (batch, side, side, 3)
        for i, channels in enumerate(self.channels):
            h = apply(h, *affine(f"{i}", (5, 5, h.shape[-1], channels)))
            if i % 2:
                h = average_pool(h)
        return linear_output(h.reshape(h.shape[0], -1), self.classes)
