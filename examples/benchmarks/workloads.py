"""The models that the benchmarks train, each with fixed-seed synthetic data.

A workload is a plain object that the runner asks for a data set, for a minibatch, and for a NumPyro model and guide.
The model takes a *layer variant*, because some rivals are not another loss but another way to write the same layer
(in bfloat16, or under ``jax.checkpoint``). ``WORKLOADS`` lists each workload in its full and in its quick size.

P1 is a deep Bayesian neural network: every weight matrix and every bias vector is a latent variable,

    w ~ Normal(0, 1 / sqrt(fan_in)),   h' = gelu(h w + b),   y ~ Normal(h w + b, noise_scale),

with an AutoNormal guide and a minibatch whose log likelihood is scaled by ``data_size / batch``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from jax.ad_checkpoint import checkpoint_name
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.initialization import init_to_sample

Layer = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

# The name that `named_matmul_layer` gives to its matrix products, for checkpoint policies that go by name.
MATMUL_NAME = "hidden_matmul"


def plain_layer(h: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
    """One hidden layer, gelu(h w + b), with JAX's default (tanh) GELU."""
    return jax.nn.gelu(h @ w + b)


def named_matmul_layer(h: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
    """The plain layer with its matrix product named, so that a checkpoint policy can save it by name."""
    return jax.nn.gelu(checkpoint_name(h @ w, MATMUL_NAME) + b)


@jax.custom_vjp
def bfloat16_residual_layer(h: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
    """The plain layer computed in float32, with what the way back reads stored in bfloat16.

    Written by hand: two arrays per layer, the input h and the derivative of the GELU. The cotangents stay float32, so
    the gradient is rounded (deterministic, slightly wrong) but no sum is taken in low precision. The barriers keep XLA
    from storing the float32 arrays and converting them late. JAX 0.12 then stores two bytes per entry; the CPU compiler
    of JAX 0.10.2 still fuses the rounding into its reader on the way back, so there this layer saves nothing.
    """
    return plain_layer(h, w, b)


def _bfloat16_residual_forward(h: jax.Array, w: jax.Array, b: jax.Array) -> tuple[jax.Array, Any]:
    z = h @ w + b
    y, slope = jax.jvp(jax.nn.gelu, (z,), (jnp.ones_like(z),))
    y, stored = jax.lax.optimization_barrier((y, (h.astype(jnp.bfloat16), slope.astype(jnp.bfloat16))))
    return y, (stored, w)


def _bfloat16_residual_backward(residuals: Any, ct: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    stored, w = residuals
    stored, ct = jax.lax.optimization_barrier((stored, ct))
    h, slope = (array.astype(ct.dtype) for array in stored)
    ct_z = ct * slope  # (batch, width)
    return ct_z @ w.T, h.T @ ct_z, ct_z.sum(0)


bfloat16_residual_layer.defvjp(_bfloat16_residual_forward, _bfloat16_residual_backward)


def bfloat16_layer(h: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
    """The plain layer computed in bfloat16, so that its residuals are bfloat16 where the hardware's compiler agrees.

    The sampled float32 weights are cast on entry and the hidden state stays bfloat16 from layer to layer; latent
    variables, their densities, the output layer and the optimizer stay float32. This is usual mixed precision: the
    gradient is rounded, hence slightly wrong, and not random. XLA's CPU backend widens bfloat16 arithmetic to float32,
    residuals included, so it saves nothing there.
    """
    low = jnp.bfloat16
    return jax.nn.gelu(h.astype(low) @ w.astype(low) + b.astype(low))


LAYERS: dict[str, Layer] = {
    "plain": plain_layer,
    "named_matmul": named_matmul_layer,
    "bfloat16_residuals": bfloat16_residual_layer,
    "bfloat16": bfloat16_layer,
    "checkpoint": jax.checkpoint(plain_layer),
}


@dataclass(frozen=True)
class BayesianMLP:
    """A Bayesian multilayer perceptron for regression, and how much work to spend on measuring it.

    :param depth: number of hidden layers, each ``width`` wide.
    :param inputs: number of input features.
    :param outputs: number of real-valued targets per row.
    :param batch: rows per step.
    :param data_size: rows of the whole data set, from which minibatches are drawn.
    :param noise_scale: standard deviation of the likelihood.
    :param initial_gain: initial guide locations are prior draws times this, which keeps a signal alive through many
        GELU layers; with 1 the gradients of the early layers would vanish and every variance would look small.
    :param initial_scale: initial standard deviation of every guide factor.
    :param micro_batches: pieces into which gradient accumulation cuts the batch.
    :param training_steps: exact steps taken before gradients and their variances are measured.
    :param draws: default number of draws per variance.
    :param repeats: default number of timed rounds.
    """

    name: str
    title: str
    depth: int
    width: int
    inputs: int
    outputs: int
    batch: int
    data_size: int
    micro_batches: int
    training_steps: int
    draws: int
    repeats: int
    noise_scale: float = 0.1
    initial_gain: float = 1.5
    initial_scale: float = 0.005
    learning_rate: float = 1e-3
    activation: str = "gelu (tanh approximation)"
    guide_name: str = field(default="AutoNormal", init=False)
    optimizer_name: str = field(default="optax.adam", init=False)

    def parameters(self) -> dict[str, Any]:
        """Everything that defines the workload, for the stored JSON."""
        return asdict(self)

    def dataset(self, seed: int) -> tuple[jax.Array, jax.Array]:
        """Standard normal inputs and the outputs of a fixed two-layer tanh teacher, with noise.

        :return: arrays of shape ``(data_size, inputs)`` and ``(data_size, outputs)``.
        """
        key_x, key_1, key_2, key_noise = jax.random.split(jax.random.key(seed), 4)
        x = jax.random.normal(key_x, (self.data_size, self.inputs))
        hidden = jnp.tanh(x @ jax.random.normal(key_1, (self.inputs, 64)) / self.inputs**0.5)
        y = hidden @ jax.random.normal(key_2, (64, self.outputs)) / 8.0
        return x, y + self.noise_scale * jax.random.normal(key_noise, y.shape)

    def minibatch(self, key: jax.Array, data: tuple[jax.Array, jax.Array], size: int) -> tuple[jax.Array, jax.Array]:
        """``size`` rows of the data, drawn without replacement."""
        rows = jax.random.permutation(key, self.data_size)[:size]
        return data[0][rows], data[1][rows]

    def model(self, layer: str = "plain") -> Callable[..., None]:
        """The NumPyro model, called as ``model(x, y)`` with the rows of one minibatch."""
        apply = LAYERS[layer]

        def bayesian_mlp(x: jax.Array, y: jax.Array) -> None:
            h = x  # (batch, inputs)
            for i in range(self.depth):
                h = apply(h, *self._weights(f"{i}", h.shape[-1], self.width))  # (batch, width)
            w, b = self._weights("out", self.width, self.outputs)
            mean = h.astype(w.dtype) @ w + b  # (batch, outputs)
            # The caller hands over the minibatch; the plate only scales its log likelihood up to the whole data set.
            with numpyro.plate("data", self.data_size, subsample_size=x.shape[0]):
                numpyro.sample("y", dist.Normal(mean, self.noise_scale).to_event(1), obs=y)

        return bayesian_mlp

    def guide(self, model: Callable[..., None]) -> AutoNormal:
        """A mean-field normal guide that starts near scaled prior draws, with small standard deviations."""

        def scaled_prior_draw(site: dict[str, Any]) -> jax.Array | None:
            value = cast(jax.Array | None, init_to_sample(site))
            return None if value is None else self.initial_gain * value

        # NumPyro calls an initialization strategy to get one, unless it is a partial.
        return AutoNormal(model, init_loc_fn=partial(scaled_prior_draw), init_scale=self.initial_scale)

    def optimizer(self) -> optax.GradientTransformation:
        return optax.adam(self.learning_rate)

    def _weights(self, name: str, fan_in: int, fan_out: int) -> tuple[jax.Array, jax.Array]:
        prior = dist.Normal(0.0, 1.0 / fan_in**0.5)
        w = numpyro.sample(f"w{name}", prior.expand([fan_in, fan_out]).to_event(2))
        b = numpyro.sample(f"b{name}", prior.expand([fan_out]).to_event(1))
        return cast(jax.Array, w), cast(jax.Array, b)


# name on the command line -> (full size, quick size)
WORKLOADS: dict[str, tuple[BayesianMLP, BayesianMLP]] = {
    "p1": (
        BayesianMLP(
            name="p1",
            title="24 x 512 GELU Bayesian neural network, batch 4096",
            depth=24,
            width=512,
            inputs=512,
            outputs=10,
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
            outputs=10,
            batch=256,
            data_size=1024,
            micro_batches=4,
            training_steps=100,
            draws=256,
            repeats=30,
        ),
    ),
}
