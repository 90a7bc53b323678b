"""Neural networks: Bayesian ones, and autoencoders whose networks are learned as points."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.example_libraries import stax
from numpyro.infer.autoguide import AutoNormal

from examples.coverage.problem import Problem, adam, arrays, example


def strokes(images: int, side: int, seed: int = 0) -> np.ndarray:
    """Black images with a few white bars and some noise: (images, side, side) of zeros and ones."""
    rng = np.random.default_rng(seed)
    bars = np.broadcast_to((rng.random((images, side)) < 0.2)[:, :, None], (images, side, side))
    upright = (rng.random(images) < 0.5)[:, None, None]
    pixels = np.where(upright, bars.transpose(0, 2, 1), bars)
    return (pixels ^ (rng.random(pixels.shape) < 0.02)).astype(float)


@example("examples/bnn.py")
def bayesian_network(small: bool = False) -> Problem:
    """Two hidden tanh layers with normal weights and an unknown noise precision."""

    def model(x, y, width):
        features = x.shape[1]
        h = x
        for i, (fan_in, fan_out) in enumerate([(features, width), (width, width), (width, 1)]):
            w = numpyro.sample(f"w{i}", dist.Normal(0.0, 1.0).expand([fan_in, fan_out]).to_event(2))
            h = h @ w / np.sqrt(fan_in)  # (rows, fan_out)
            h = jnp.tanh(h) if i < 2 else h
        precision = numpyro.sample("precision", dist.Gamma(3.0, 1.0))
        with numpyro.plate("rows", x.shape[0]):
            numpyro.sample("y", dist.Normal(h[:, 0], 1.0 / jnp.sqrt(precision)), obs=y)

    rng = np.random.default_rng(0)
    rows, features, width = (40, 3, 6) if small else (4_000, 13, 100)
    x = rng.standard_normal((rows, features))
    y = np.sin(x.sum(1)) + 0.1 * rng.standard_normal(rows)
    return Problem(model, AutoNormal(model, init_scale=0.05), arrays(x, y), {"width": width}, optimizer=adam())


@example("contrib.module.random_flax_module, in its documentation's example", needs=("flax",))
def random_flax_network(small: bool = False) -> Problem:
    """A Flax network whose kernels and biases are given priors, for classification."""
    from flax import linen as nn
    from numpyro.contrib.module import random_flax_module

    width, classes = (6, 3) if small else (256, 10)

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.relu(nn.Dense(width)(x))
            h = nn.relu(nn.Dense(width)(h))
            return nn.Dense(classes)(h)

    def model(x, y):
        net = random_flax_module(
            "net", Network(), prior=lambda name, shape: dist.Normal(0.0, 0.1), input_shape=(1, x.shape[1])
        )
        with numpyro.plate("rows", x.shape[0]):
            numpyro.sample("y", dist.Categorical(logits=net(x)), obs=y)

    rng = np.random.default_rng(1)
    x = rng.standard_normal((30 if small else 2_000, 8 if small else 64))
    y = np.argmax(x @ rng.standard_normal((x.shape[1], classes)), 1)
    guide = AutoNormal(model, init_loc_fn=numpyro.infer.init_to_sample, init_scale=0.02)
    return Problem(model, guide, arrays(x, y), optimizer=adam(3e-3))


@example("contrib.module.random_nnx_module, in its documentation's example", needs=("flax",))
def random_nnx_network(small: bool = False) -> Problem:
    """A network of Flax's newer interface with priors on its parameters, for heteroscedastic regression."""
    from flax import nnx
    from numpyro.contrib.module import random_nnx_module

    width = 6 if small else 128

    class Network(nnx.Module):
        def __init__(self, features, *, rngs):
            self.first = nnx.Linear(features, width, rngs=rngs)
            self.second = nnx.Linear(width, width, rngs=rngs)
            self.last = nnx.Linear(width, 2, rngs=rngs)

        def __call__(self, x):
            return self.last(jax.nn.silu(self.second(jax.nn.silu(self.first(x)))))

    def model(x, y):
        network = Network(x.shape[1], rngs=nnx.Rngs(0))
        net = random_nnx_module("net", network, prior=lambda name, shape: dist.Normal(0.0, 0.2))
        out = net(x)
        with numpyro.plate("rows", x.shape[0]):
            numpyro.sample("y", dist.Normal(out[:, 0], jax.nn.softplus(out[:, 1]) + 0.1), obs=y)

    rng = np.random.default_rng(2)
    x = rng.standard_normal((30 if small else 3_000, 4))
    y = np.sin(x.sum(1)) + 0.1 * np.abs(x[:, 0]) * rng.standard_normal(len(x))
    guide = AutoNormal(model, init_loc_fn=numpyro.infer.init_to_sample, init_scale=0.02)
    return Problem(model, guide, arrays(x, y), optimizer=adam(3e-3))


def _encoder(hidden: int, latent: int) -> Any:
    heads = stax.parallel(stax.Dense(latent), stax.serial(stax.Dense(latent), stax.Softplus))
    return stax.serial(stax.Dense(hidden), stax.Softplus, stax.FanOut(2), heads)


@example("examples/vae.py")
def vae(small: bool = False) -> Problem:
    """A variational autoencoder of binary images with stax networks."""

    def model(images, hidden, latent):
        batch, pixels = images.shape
        layers = stax.serial(stax.Dense(hidden), stax.Softplus, stax.Dense(pixels))
        decode = numpyro.module("decoder", layers, (batch, latent))
        with numpyro.plate("batch", batch):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([latent]).to_event(1))
            numpyro.sample("images", dist.Bernoulli(logits=decode(z)).to_event(1), obs=images)

    def guide(images, hidden, latent):
        batch, pixels = images.shape
        encode = numpyro.module("encoder", _encoder(hidden, latent), (batch, pixels))
        loc, scale = encode(images)  # (batch, latent) each
        with numpyro.plate("batch", batch):
            numpyro.sample("z", dist.Normal(loc, scale + 1e-3).to_event(1))

    images = strokes(8 if small else 256, 5 if small else 28)
    settings = {"hidden": 6, "latent": 2} if small else {"hidden": 400, "latent": 50}
    return Problem(model, guide, arrays(images.reshape(len(images), -1)), settings, optimizer=adam(1e-3))


@example("examples/cvae-flax")
def conditional_vae(small: bool = False) -> Problem:
    """The hidden part of an image given one quarter of it: prior, recognition and generation networks."""

    def normal_site(name, layers, shape, *inputs):
        net = numpyro.module(name, layers, shape)
        loc, scale = net(jnp.concatenate(inputs, -1))
        return dist.Normal(loc, scale + 1e-3).to_event(1)

    def model(seen, hidden_part, units, latent):
        batch, pixels = hidden_part.shape
        prior = normal_site("prior", _encoder(units, latent), (batch, seen.shape[1]), seen)
        layers = stax.serial(stax.Dense(units), stax.Relu, stax.Dense(units), stax.Relu, stax.Dense(pixels))
        generate = numpyro.module("generator", layers, (batch, latent + seen.shape[1]))
        with numpyro.plate("batch", batch):
            z = numpyro.sample("z", prior)
            logits = generate(jnp.concatenate([z, seen], -1))
            numpyro.sample("pixels", dist.Bernoulli(logits=logits).to_event(1), obs=hidden_part)

    def guide(seen, hidden_part, units, latent):
        batch, pixels = hidden_part.shape
        shape = (batch, pixels + seen.shape[1])
        posterior = normal_site("recognition", _encoder(units, latent), shape, seen, hidden_part)
        with numpyro.plate("batch", batch):
            numpyro.sample("z", posterior)

    images = strokes(8 if small else 128, 6 if small else 28)
    half = images.shape[1] // 2
    seen = images[:, :half, :half].reshape(len(images), -1)
    rest = images.reshape(len(images), -1)[:, images.shape[1] * half :]
    settings = {"units": 6, "latent": 2} if small else {"units": 500, "latent": 64}
    return Problem(model, guide, arrays(seen, rest), settings, optimizer=adam(1e-3))


@example("examples/vae.py, convolutional, in Flax's newer interface (contrib.module.nnx_module)", needs=("flax",))
def conv_vae(small: bool = False) -> Problem:
    """An autoencoder with strided convolutions down and transposed ones up."""
    from flax import nnx
    from numpyro.contrib.module import nnx_module

    batch, side, channels, latent = (4, 8, 2, 2) if small else (64, 28, 16, 16)
    inner = side // 4

    class Encoder(nnx.Module):
        def __init__(self, *, rngs):
            self.first = nnx.Conv(1, channels, (3, 3), strides=2, rngs=rngs)
            self.second = nnx.Conv(channels, 2 * channels, (3, 3), strides=2, rngs=rngs)
            self.loc = nnx.Linear(inner * inner * 2 * channels, latent, rngs=rngs)
            self.scale = nnx.Linear(inner * inner * 2 * channels, latent, rngs=rngs)

        def __call__(self, x):
            h = jax.nn.relu(self.second(jax.nn.relu(self.first(x))))  # (batch, inner, inner, 2 * channels)
            h = h.reshape(h.shape[0], -1)
            return self.loc(h), jax.nn.softplus(self.scale(h)) + 1e-3

    class Decoder(nnx.Module):
        def __init__(self, *, rngs):
            self.first = nnx.Linear(latent, inner * inner * 2 * channels, rngs=rngs)
            self.second = nnx.ConvTranspose(2 * channels, channels, (3, 3), strides=2, rngs=rngs)
            self.last = nnx.ConvTranspose(channels, 1, (3, 3), strides=2, rngs=rngs)

        def __call__(self, z):
            h = jax.nn.relu(self.first(z)).reshape(z.shape[0], inner, inner, 2 * channels)
            return self.last(jax.nn.relu(self.second(h)))  # (batch, side, side, 1)

    def model(images):
        decode = nnx_module("decoder", Decoder(rngs=nnx.Rngs(0)))
        with numpyro.plate("batch", images.shape[0]):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([latent]).to_event(1))
            numpyro.sample("images", dist.Bernoulli(logits=decode(z)).to_event(3), obs=images)

    def guide(images):
        encode = nnx_module("encoder", Encoder(rngs=nnx.Rngs(1)))
        loc, scale = encode(images)
        with numpyro.plate("batch", images.shape[0]):
            numpyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return Problem(model, guide, arrays(strokes(batch, side)[..., None]), optimizer=adam(1e-3))


@example("tutorial: semi-supervised VAE (classes observed for a part, summed out for the rest)")
def semi_supervised_vae(small: bool = False) -> Problem:
    """Images with and without labels; the decoder runs once for every class where the label is unknown."""

    def model(labelled, labels, unlabelled, units, latent, classes):
        pixels = labelled.shape[1]
        layers = stax.serial(stax.Dense(units), stax.Softplus, stax.Dense(pixels))
        decode = numpyro.module("decoder", layers, (1, latent + classes))

        def log_likelihood(z, given, images):
            logits = decode(jnp.concatenate([z, given], -1))
            return dist.Bernoulli(logits=logits).to_event(1).log_prob(images)

        with numpyro.plate("labelled", labelled.shape[0]):
            z = numpyro.sample("z_labelled", dist.Normal(0.0, 1.0).expand([latent]).to_event(1))
            numpyro.factor("labelled_images", log_likelihood(z, jax.nn.one_hot(labels, classes), labelled))
        with numpyro.plate("unlabelled", unlabelled.shape[0]):
            z = numpyro.sample("z_unlabelled", dist.Normal(0.0, 1.0).expand([latent]).to_event(1))
            each = jnp.broadcast_to(jnp.eye(classes)[:, None], (classes, *z.shape[:1], classes))
            by_class = log_likelihood(jnp.broadcast_to(z, (classes, *z.shape)), each, unlabelled)  # (classes, images)
            numpyro.factor("unlabelled_images", jax.scipy.special.logsumexp(by_class, 0) - np.log(classes))

    def guide(labelled, labels, unlabelled, units, latent, classes):
        encode = numpyro.module("encoder", _encoder(units, latent), (1, labelled.shape[1]))
        for name, images in (("labelled", labelled), ("unlabelled", unlabelled)):
            loc, scale = encode(images)
            with numpyro.plate(name, images.shape[0]):
                numpyro.sample(f"z_{name}", dist.Normal(loc, scale + 1e-3).to_event(1))

    images = strokes(8 if small else 128, 5 if small else 28).reshape(8 if small else 128, -1)
    half = len(images) // 2
    labels = np.arange(half) % (3 if small else 10)
    settings = {"units": 6, "latent": 2, "classes": 3} if small else {"units": 256, "latent": 32, "classes": 10}
    return Problem(model, guide, arrays(images[:half], labels, images[half:]), settings, optimizer=adam(1e-3))


@example("examples/prodlda.py")
def prodlda(small: bool = False) -> Problem:
    """Topics of documents by a product of experts: a softmax after a linear map of topic weights."""

    def model(counts, topics, units):
        documents, words = counts.shape
        layers = stax.serial(stax.Dense(words), stax.LogSoftmax)
        decode = numpyro.module("decoder", layers, (documents, topics))
        with numpyro.plate("documents", documents):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([topics]).to_event(1))
            log_words = decode(jax.nn.softmax(z, -1))  # (documents, words)
            numpyro.factor("words", (counts * log_words).sum(-1))

    def guide(counts, topics, units):
        documents, words = counts.shape
        heads = stax.parallel(stax.Dense(topics), stax.serial(stax.Dense(topics), stax.Softplus))
        layers = stax.serial(stax.Dense(units), stax.Softplus, stax.Dense(units), stax.Softplus, stax.FanOut(2), heads)
        encode = numpyro.module("encoder", layers, (documents, words))
        loc, scale = encode(counts)
        with numpyro.plate("documents", documents):
            numpyro.sample("z", dist.Normal(loc, scale + 1e-3).to_event(1))

    rng = np.random.default_rng(3)
    documents, words = (8, 10) if small else (128, 2_000)
    counts = rng.poisson(rng.gamma(0.2, 1.0, (documents, words))).astype(float)
    settings = {"topics": 2, "units": 6} if small else {"topics": 20, "units": 200}
    return Problem(model, guide, arrays(counts), settings, optimizer=adam(1e-3))
