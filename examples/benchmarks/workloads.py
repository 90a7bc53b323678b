"""The models that the benchmarks train: a NumPyro model with an AutoNormal guide, and data.

A workload is a plain object that the runner asks for a data set, for a minibatch, and for a NumPyro model and guide.
What a new one has to say is its ``layer`` and the four methods of ``Workload`` that raise. The layer is given in three
parts, because some rivals are not another loss but another way to write the same layer (in bfloat16, or under
``jax.checkpoint``): each entry of ``VARIANTS`` makes one from any ``Layer``. ``WORKLOADS`` lists each workload in its
full and in its quick size.

In all of them every weight and every bias is a latent variable, and the log likelihood of a minibatch is scaled by
``data_size / batch``.
"""

from __future__ import annotations

import sys
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
from jax.ad_checkpoint import checkpoint_name
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.initialization import init_to_sample

sys.path.append(str(Path(__file__).resolve().parents[1]))
import data as datasets

Arrays = tuple[jax.Array, jax.Array]
Apply = Callable[..., jax.Array]

# The name that the variant "named_product" gives to the products, for checkpoint policies that go by name.
PRODUCT_NAME = "layer_product"


@dataclass(frozen=True)
class Layer:
    """``activation(product(h, w) + shift(*rest))``: what a workload repeats, and what its rivals rewrite.

    :param product: linear in ``h`` and in ``w``.
    :param activation: elementwise.
    :param shift: of the other arguments, an array that broadcasts against the product.
    :param looped: whether the layer is the body of a loop, where ``jax.checkpoint`` needs no barriers of its own.
    """

    product: Callable[[jax.Array, jax.Array], jax.Array]
    activation: Callable[[jax.Array], jax.Array]
    shift: Apply = lambda b: b
    looped: bool = False

    def __call__(self, h: jax.Array, w: jax.Array, *rest: jax.Array) -> jax.Array:
        return self.activation(self.product(h, w) + self.shift(*rest))


def checkpoint(layer: Layer) -> Apply:
    """The layer under ``jax.checkpoint``: only its arguments are stored."""
    return jax.checkpoint(layer, prevent_cse=not layer.looped)


def named_product(layer: Layer) -> Apply:
    """The layer with its product named, so that a checkpoint policy can save it by name."""
    return replace(layer, product=lambda h, w: checkpoint_name(layer.product(h, w), PRODUCT_NAME))


def bfloat16_residuals(layer: Layer) -> Apply:
    """The layer computed in float32, with what the way back reads stored in bfloat16.

    Written by hand: two arrays per layer, the input h and the derivative of the activation. The cotangents stay
    float32, so the gradient is rounded (deterministic, slightly wrong) but no sum is taken in low precision. The
    barriers keep XLA from storing the float32 arrays and converting them late. JAX 0.12 then stores two bytes per
    entry; the CPU compiler of JAX 0.10.2 still fuses the rounding into its reader on the way back, so there this layer
    saves nothing.
    """

    @jax.custom_vjp
    def apply(h: jax.Array, w: jax.Array, *rest: jax.Array) -> jax.Array:
        return layer(h, w, *rest)

    def forward(h: jax.Array, w: jax.Array, *rest: jax.Array) -> tuple[jax.Array, Any]:
        z = layer.product(h, w) + layer.shift(*rest)
        y, slope = jax.jvp(layer.activation, (z,), (jnp.ones_like(z),))
        y, stored = lax.optimization_barrier((y, (h.astype(jnp.bfloat16), slope.astype(jnp.bfloat16))))
        return y, (stored, w, rest)

    def backward(residuals: Any, ct: jax.Array) -> tuple[jax.Array, ...]:
        stored, w, rest = residuals
        stored, ct = lax.optimization_barrier((stored, ct))
        h, slope = (array.astype(ct.dtype) for array in stored)
        ct_z = ct * slope
        _, pull_product = jax.vjp(layer.product, h, w)  # bilinear: its value is not needed and not computed
        _, pull_shift = jax.vjp(lambda *rest: jnp.broadcast_to(layer.shift(*rest), ct_z.shape), *rest)
        return *pull_product(ct_z), *pull_shift(ct_z)

    apply.defvjp(forward, backward)
    return apply


def bfloat16(layer: Layer) -> Apply:
    """The layer computed in bfloat16, so that its residuals are bfloat16 where the hardware's compiler agrees.

    The sampled float32 weights are cast on entry and the hidden state stays bfloat16 from layer to layer; latent
    variables, their densities, the output layer and the optimizer stay float32. This is usual mixed precision: the
    gradient is rounded, hence slightly wrong, and not random. XLA's CPU backend widens bfloat16 arithmetic to float32,
    residuals included, so it saves nothing there.
    """
    return lambda *args: layer(*(a.astype(jnp.bfloat16) for a in args))


VARIANTS: dict[str, Callable[[Layer], Apply]] = {
    "plain": lambda layer: layer,
    "named_product": named_product,
    "bfloat16_residuals": bfloat16_residuals,
    "bfloat16": bfloat16,
    "checkpoint": checkpoint,
}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model with its data, and how much work to spend on measuring it.

    :param batch: rows per step.
    :param data_size: rows of the whole data set, from which minibatches are drawn; ``load`` sets it for stored data.
    :param micro_batches: pieces into which gradient accumulation cuts the batch.
    :param training_steps: exact steps taken before gradients and their variances are measured.
    :param draws: default number of draws per variance.
    :param repeats: default number of timed rounds.
    :param initial_gain: initial guide locations are prior draws, their distance from the prior mean times this.
    :param initial_scale: initial standard deviation of every guide factor.
    :param data: the name of the data, set by ``load``.
    """

    name: str
    title: str
    batch: int
    data_size: int = 0
    micro_batches: int
    training_steps: int
    draws: int
    repeats: int
    initial_gain: float
    initial_scale: float
    learning_rate: float
    guide_name: str = "AutoNormal"
    optimizer_name: str = "optax.adam"
    data: str = "synthetic"

    layer: ClassVar[Layer]

    def dataset(self, seed: int, data_dir: Path | None) -> tuple[str, Arrays]:
        """The name of the data, and inputs and targets of all rows."""
        raise NotImplementedError

    def outputs(self, x: jax.Array, apply: Apply) -> jax.Array:
        """Sample the weights and compute ``(batch, outputs)`` with one variant of the layer."""
        raise NotImplementedError

    def likelihood(self, outputs: jax.Array) -> dist.Distribution:
        """The distribution of the targets of a batch."""
        raise NotImplementedError

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

    def model(self, variant: str = "plain") -> Callable[..., None]:
        """The NumPyro model, called as ``model(x, y)`` with the rows of one minibatch."""
        apply = VARIANTS[variant](self.layer)

        def model(x: jax.Array, y: jax.Array) -> None:
            outputs = self.outputs(x, apply)
            # The caller hands over the minibatch; the plate only scales its log likelihood up to the whole data set.
            with numpyro.plate("data", self.data_size, subsample_size=x.shape[0]):
                numpyro.sample("y", self.likelihood(outputs), obs=y)

        return model

    def guide(self, model: Callable[..., None]) -> AutoNormal:
        """A mean-field normal guide that starts near scaled prior draws, with small standard deviations."""

        def scaled_prior_draw(site: dict[str, Any]) -> jax.Array | None:
            value = cast(jax.Array | None, init_to_sample(site))
            if value is None:
                return None
            mean = site["fn"].mean
            return mean + self.initial_gain * (value - mean)

        # NumPyro calls an initialization strategy to get one, unless it is a partial.
        return AutoNormal(model, init_loc_fn=partial(scaled_prior_draw), init_scale=self.initial_scale)

    def optimizer(self) -> optax.GradientTransformation:
        return optax.adam(self.learning_rate)


def weight(name: str, shape: tuple[int, ...], scale: float, loc: jax.Array | float = 0.0) -> jax.Array:
    """A latent array with independent normal entries."""
    prior = dist.Normal(loc, scale).expand(list(shape)).to_event(len(shape))
    return cast(jax.Array, numpyro.sample(name, prior))


def affine(name: str, shape: tuple[int, ...]) -> Arrays:
    """Latent weights of ``shape`` and a bias for the last axis, w, b ~ Normal(0, 1 / sqrt(fan_in))."""
    scale = 1.0 / float(np.prod(shape[:-1])) ** 0.5
    return weight(f"w{name}", shape, scale), weight(f"b{name}", shape[-1:], scale)


def linear_output(h: jax.Array, outputs: int) -> jax.Array:
    """The last layer, which no rival rewrites; in float32."""
    w, b = affine("out", (h.shape[-1], outputs))
    return h.astype(w.dtype) @ w + b  # (batch, outputs)


def images(name: str, data_dir: Path | None, shape: tuple[int, ...]) -> Arrays:
    """Training images of a stored data set, resized to ``shape`` (rows, columns, then channels if any), and labels."""
    found = datasets.load(name, data_dir)
    side = int((found.x_train.shape[1] / np.prod(shape[2:])) ** 0.5)
    x = jnp.asarray(found.x_train).reshape(-1, side, side, *shape[2:])
    return jax.image.resize(x, (len(x), *shape), "linear"), jnp.asarray(found.y_train)


@dataclass(frozen=True, kw_only=True)
class BayesianMLP(Workload):
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


@dataclass(frozen=True, kw_only=True)
class Classifier(Workload):
    """Images of ten classes."""

    classes: int = 10

    def likelihood(self, outputs: jax.Array) -> dist.Distribution:
        return dist.Categorical(logits=outputs)


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

    def dataset(self, seed: int, data_dir: Path | None) -> tuple[str, Arrays]:
        """MNIST from ``data_dir``, else the small digits of scikit-learn enlarged; ``(rows, side * side)`` and labels.

        :return: the name, and arrays of shape ``(data_size, side * side)`` and ``(data_size,)``.
        """
        name = "mnist" if data_dir else "digits"
        x, y = images(name, data_dir, (self.side, self.side))
        return name, (x.reshape(len(x), -1), y)

    def outputs(self, x: jax.Array, apply: Apply) -> jax.Array:
        w = weight("w", (self.units, self.units), 1e-3, jnp.eye(self.units))
        rest = weight("w_in", (self.units,), 0.1), weight("b", (self.units,), 0.01)
        h = jnp.zeros((x.shape[0], self.units))  # (batch, units)
        h = h.astype(jax.eval_shape(apply, h, w, x[:, 0], *rest).dtype)
        h, _ = lax.scan(lambda h, pixel: (apply(h, w, pixel, *rest), None), h, x.T)
        return linear_output(h, self.classes)


def convolution(h: jax.Array, w: jax.Array) -> jax.Array:
    """``(batch, rows, columns, channels)`` with ``(rows, columns, in, out)``, same size."""
    return lax.conv_general_dilated(h, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def average_pool(h: jax.Array) -> jax.Array:
    """Means of 2 x 2 pixels."""
    n, rows, columns, channels = h.shape
    return h.reshape(n, rows // 2, 2, columns // 2, 2, channels).mean((2, 4))


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
        shape = (self.side, self.side, 3)
        if data_dir:
            return "cifar10", images("cifar10", data_dir, shape)
        key_class, key_label, key_noise = jax.random.split(jax.random.key(seed), 3)
        labels = jax.random.randint(key_label, (self.data_size,), 0, self.classes)
        centres = jax.image.resize(
            jax.random.normal(key_class, (self.classes, 4, 4, 3)), (self.classes, *shape), "cubic"
        )
        return "synthetic", (centres[labels] + jax.random.normal(key_noise, (self.data_size, *shape)), labels)

    def outputs(self, x: jax.Array, apply: Apply) -> jax.Array:
        h = x  # (batch, side, side, 3)
        for i, channels in enumerate(self.channels):
            h = apply(h, *affine(f"{i}", (5, 5, h.shape[-1], channels)))
            if i % 2:
                h = average_pool(h)
        return linear_output(h.reshape(h.shape[0], -1), self.classes)


# name on the command line -> (full size, quick size)
WORKLOADS: dict[str, tuple[Workload, Workload]] = {
    "p1": (
        BayesianMLP(
            name="p1",
            title="24 x 512 GELU Bayesian neural network, batch 4096",
            depth=24,
            width=512,
            inputs=512,
            batch=4096,
            data_size=16384,
            micro_batches=16,
            training_steps=30,
            draws=32,
            repeats=10,
        ),
        BayesianMLP(
            name="p1-quick",
            title="4 x 64 GELU Bayesian neural network, batch 256",
            depth=4,
            width=64,
            inputs=64,
            batch=256,
            data_size=1024,
            micro_batches=4,
            training_steps=100,
            draws=256,
            repeats=30,
        ),
    ),
    "p2": (
        BayesianIRNN(
            name="p2",
            title="Bayesian IRNN, 784 steps, 100 units, batch 150",
            batch=150,
            micro_batches=15,
            training_steps=30,
            draws=32,
            repeats=10,
        ),
        BayesianIRNN(
            name="p2-quick",
            title="Bayesian IRNN, 64 steps, 16 units, batch 32",
            side=8,
            units=16,
            batch=32,
            micro_batches=4,
            training_steps=100,
            draws=256,
            repeats=30,
        ),
    ),
    "p3": (
        BayesianConvNet(
            name="p3",
            title="Bayesian ConvNet 3-16-32-32-32, 5 x 5, batch 150",
            batch=150,
            micro_batches=15,
            training_steps=30,
            draws=32,
            repeats=10,
        ),
        BayesianConvNet(
            name="p3-quick",
            title="Bayesian ConvNet 3-4-8, 5 x 5, on 8 x 8 images, batch 32",
            side=8,
            channels=(4, 8),
            data_size=1024,
            batch=32,
            micro_batches=4,
            training_steps=100,
            draws=256,
            repeats=30,
        ),
    ),
}
