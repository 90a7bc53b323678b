"""P5, second part: a convolutional variational autoencoder of images, whose weights are plain parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

from examples.benchmarks.layers import VARIANTS, Apply, Layer
from examples.benchmarks.workload import Arrays, Workload, average_pool, convolution, images


def parameters(name: str, shape: tuple[int, ...]) -> Arrays:
    """Weights of ``shape``, at first Normal(0, sqrt(2 / fan_in)), and a bias for the last axis, at first 0."""
    scale = (2.0 / prod(shape[:-1])) ** 0.5
    w = numpyro.param(f"{name}_w", lambda key: scale * jax.random.normal(key, shape))
    b = numpyro.param(f"{name}_b", jnp.zeros(shape[-1:]))
    assert w is not None and b is not None  # NumPyro returns None only without an initial value
    return w, b


def dense(name: str, h: jax.Array, outputs: int) -> jax.Array:
    """A linear layer, which no rival rewrites; in float32."""
    w, b = parameters(name, (h.shape[-1], outputs))
    return h.astype(w.dtype) @ w + b


def upsample(h: jax.Array) -> jax.Array:
    """Each pixel becomes 2 x 2 pixels."""
    n, rows, columns, channels = h.shape
    h = jnp.broadcast_to(h[:, :, None, :, None, :], (n, rows, 2, columns, 2, channels))
    return h.reshape(n, 2 * rows, 2 * columns, channels)


@dataclass(frozen=True, kw_only=True)
class ConvolutionalVAE(Workload):
    """P5, second part: ``z ~ Normal(0, 1)``, pixels ~ Bernoulli(logits = decoder(z)), guide ``Normal(encoder(x))``.

    The encoder has convolutions of 5 x 5 with a ReLU, each followed by 2 x 2 average pooling, and a linear layer; the
    decoder is its mirror image, and one more convolution computes the logits.

    :param side: images are ``side`` by ``side``, divisible by 2 to the power of the number of convolutions.
    :param channels: of each convolution of the encoder.
    :param latents: size of z.
    """

    side: int = 28
    channels: tuple[int, ...] = (32, 64)
    latents: int = 32
    learning_rate: float = 1e-3
    guide_name: str = "encoder"

    layer: ClassVar[Layer] = Layer(convolution, jax.nn.relu)
    # Every row has its own z, which accumulation would have to draw piece by piece: another noise, not the same step.
    without: ClassVar[tuple[str, ...]] = ("checkpoint_sqrt", "accumulate", "accumulate_unrolled")

    def dataset(self, seed: int, data_dir: Path | None) -> tuple[str, Arrays]:
        """MNIST from ``data_dir``, else the small digits of scikit-learn enlarged, in black and white.

        :return: the name, and the images ``(data_size, side, side, 1)`` twice, for the encoder and as the targets.
        """
        name = "mnist" if data_dir else "digits"
        grey, _ = images(name, data_dir, (self.side, self.side))
        x = (grey > (grey.min() + grey.max()) / 2.0).astype(grey.dtype)[..., None]
        return name, (x, x)

    def encode(self, x: jax.Array, apply: Apply) -> Arrays:
        """Location and scale of z, ``(batch, latents)`` each."""
        h = x
        for i, channels in enumerate(self.channels):
            h = average_pool(apply(h, *parameters(f"encoder{i}", (5, 5, h.shape[-1], channels))))
        loc, log_scale = jnp.split(dense("encoder_out", h.reshape(h.shape[0], -1), 2 * self.latents), 2, axis=-1)
        return loc, jnp.exp(0.5 * log_scale)

    def decode(self, z: jax.Array, apply: Apply) -> jax.Array:
        """Logits of the pixels, ``(batch, side, side, 1)``."""
        side, channels = self.side // 2 ** len(self.channels), self.channels[::-1]
        h = jax.nn.relu(dense("decoder_in", z, side * side * channels[0])).reshape(-1, side, side, channels[0])
        for i, outputs in enumerate((*channels[1:], channels[-1])):
            h = apply(upsample(h), *parameters(f"decoder{i}", (5, 5, h.shape[-1], outputs)))
        w, b = parameters("decoder_out", (5, 5, h.shape[-1], 1))
        return convolution(h.astype(w.dtype), w) + b

    @contextmanager
    def rows(self, batch: int) -> Iterator[None]:
        """The plate of a minibatch, scaled to the whole data set.

        Not a subsampling plate: that would draw indices, which nobody reads, in the guide, and ``NoiseKeys`` give those
        a key of their own. z would then come from another key than under ``Trace_ELBO``, and gradients of one key could
        not be compared.
        """
        with numpyro.handlers.scale(scale=self.data_size / batch), numpyro.plate("data", batch):
            yield

    def model(self, variant: str = "plain") -> Callable[..., None]:
        apply = VARIANTS[variant](self.layer)

        def model(x: jax.Array, y: jax.Array) -> None:
            with self.rows(x.shape[0]):
                z = numpyro.sample("z", dist.Normal(jnp.zeros(self.latents), 1.0).to_event(1))
                logits = self.decode(z, apply)
                numpyro.sample("y", dist.Bernoulli(logits=logits).to_event(3), obs=y)

        return model

    def guide(self, model: Callable[..., None], variant: str = "plain") -> Callable[..., None]:
        apply = VARIANTS[variant](self.layer)

        def guide(x: jax.Array, y: jax.Array) -> None:
            loc, scale = self.encode(x, apply)
            with self.rows(x.shape[0]):
                numpyro.sample("z", dist.Normal(loc, scale).to_event(1))

        return guide
