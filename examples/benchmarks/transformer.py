"""P5: a Bayesian Transformer encoder that classifies sequences of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp

from examples.benchmarks.layers import Apply, Block, Layer
from examples.benchmarks.workload import Arrays, Classifier, linear_output, weight


def attention_scores(query: jax.Array, key: jax.Array) -> jax.Array:
    """``(batch, tokens, heads, features)`` twice to ``(batch, heads, queries, keys)``, over sqrt(features)."""
    return jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5


def attend(probabilities: jax.Array, value: jax.Array) -> jax.Array:
    """Mean values, ``(batch, tokens, heads, features)``."""
    return jnp.einsum("bhqk,bkhd->bqhd", probabilities, value)


def layer_norm(h: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """Each token with mean 0 and variance 1 over its features, then scaled and shifted."""
    h = h - h.mean(-1, keepdims=True)
    return h * jax.lax.rsqrt((h * h).mean(-1, keepdims=True) + 1e-6) * scale + shift


def encoder_block(layers: tuple[Apply, ...], h: jax.Array, weights: dict[str, Arrays]) -> jax.Array:
    """Self-attention, then a feed-forward network, each behind a layer norm and added to its input.

    :param h: ``(batch, tokens, width)``.
    :param weights: two arrays by name, such as weights and bias; see ``block_weights`` for their shapes.
    """
    project, scores, mean_value, join, gelu, linear = layers
    normed = layer_norm(h, *weights["norm_attention"])
    query, key, value = jnp.moveaxis(project(normed, *weights["project"]), 2, 0)
    probabilities = jax.nn.softmax(scores(query, key))
    h = h + join(mean_value(probabilities, value), *weights["join"])
    normed = layer_norm(h, *weights["norm_hidden"])
    return h + linear(gelu(normed, *weights["hidden"]), *weights["output"])


def project_heads(h: jax.Array, w: jax.Array) -> jax.Array:
    """``(batch, tokens, width)`` with ``(width, 3, heads, features)``: queries, keys and values of all heads."""
    return jnp.einsum("btw,wchd->btchd", h, w)


def join_heads(h: jax.Array, w: jax.Array) -> jax.Array:
    """``(batch, tokens, heads, features)`` with ``(heads, features, width)``."""
    return jnp.einsum("bthd,hdw->btw", h, w)


@dataclass(frozen=True, kw_only=True)
class BayesianTransformer(Classifier):
    """P5: pre-norm encoder blocks with latent weights; the mean over the tokens is classified.

    Weights and biases ~ Normal(0, 1 / sqrt(fan_in)), scales of the layer norms ~ Normal(1, 0.1) and their shifts
    ~ Normal(0, 0.1), embeddings ~ Normal(0, 1).

    :param depth: number of blocks.
    :param width: features per token; ``4 width`` in the hidden layer.
    :param tokens: length of the sequences.
    :param vocabulary: number of different tokens.
    """

    depth: int = 4
    width: int = 128
    heads: int = 4
    tokens: int = 128
    vocabulary: int = 64
    data_size: int = 4096
    initial_gain: float = 1.0
    initial_scale: float = 0.005
    learning_rate: float = 1e-3

    layer: ClassVar[Block] = Block(
        (
            Layer(project_heads),
            Layer(attention_scores),
            Layer(attend),
            Layer(join_heads),
            Layer(jnp.matmul, jax.nn.gelu),
            Layer(jnp.matmul),
        ),
        encoder_block,
    )

    def dataset(self, seed: int, data_dir: Path | None) -> tuple[str, Arrays]:
        """Markov chains, one random transition matrix for each class; no files.

        :return: tokens ``(data_size, tokens)`` and labels ``(data_size,)``.
        """
        key_chain, key_label, key_first, key_walk = jax.random.split(jax.random.key(seed), 4)
        logits = 2.0 * jax.random.normal(key_chain, (self.classes, self.vocabulary, self.vocabulary))
        labels = jax.random.randint(key_label, (self.data_size,), 0, self.classes)
        first = jax.random.randint(key_first, (self.data_size,), 0, self.vocabulary)

        def walk(token: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jax.random.categorical(key, logits[labels, token]), token

        _, tokens = jax.lax.scan(walk, first, jax.random.split(key_walk, self.tokens))
        return "synthetic", (tokens.T, labels)

    def block_weights(self) -> dict[str, Arrays]:
        """The latent arrays of all blocks, by the name of their layer; the first axis is the block.

        One site for a layer of all blocks: each site costs compile time, seconds for its random numbers.
        """
        features, width = self.width // self.heads, self.width
        shapes = {  # of the weights, and how many of the first axes are summed over
            "project": ((width, 3, self.heads, features), 1),
            "join": ((self.heads, features, width), 2),
            "hidden": ((width, 4 * width), 1),
            "output": ((4 * width, width), 1),
        }
        weights = {}
        for name, (shape, summed) in shapes.items():
            scale = prod(shape[:summed]) ** -0.5
            w = weight(f"w_{name}", (self.depth, *shape), scale)
            weights[name] = w, weight(f"b_{name}", (self.depth, *shape[summed:]), scale)
        scales, shifts = weight("scale", (self.depth, 2, width), 0.1, 1.0), weight("shift", (self.depth, 2, width), 0.1)
        for i, name in enumerate(("norm_attention", "norm_hidden")):
            weights[name] = scales[:, i], shifts[:, i]
        return weights

    def outputs(self, x: jax.Array, apply: Apply) -> jax.Array:
        embedding = weight("embedding", (self.vocabulary, self.width), 1.0)
        h = embedding[x] + weight("position", (self.tokens, self.width), 1.0)  # (batch, tokens, width)
        weights = self.block_weights()
        for i in range(self.depth):
            h = apply(h, {name: (w[i], b[i]) for name, (w, b) in weights.items()})
        return linear_output(self.tokens**0.5 * h.mean(1), self.classes)
