"""What the default codes where nothing can be sliced adds no more than a few percent, in networks of every kind.

Nobody calibrates it, and it is the same at NumPyro's initial values (uniform on ±2 for each weight, where networks are
far from anything that they are after training), at the median of the prior, and later.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax.flatten_util import ravel_pytree
from numpyro.infer import SVI, Trace_ELBO, init_to_median, init_to_uniform
from numpyro.infer.autoguide import AutoBNAFNormal, AutoIAFNormal, AutoNormal
from programs import normal

from numpyro_rad import RAD_ELBO, explain
from numpyro_rad.planning import costs

pytestmark = [pytest.mark.slow, pytest.mark.in_one_go]

MOST_ADDED = 0.03  # of the squared gradient
DRAWS, STEPS = 4, 40


def weights(name, *shape):
    """A site with as many axes, of a variance that keeps the size of what it multiplies."""
    scale = float(np.prod(shape[:-1])) ** -0.5
    return numpyro.sample(name, dist.Normal(0.0, scale).expand(shape).to_event(len(shape)))


def regression(outputs, y, noise=0.3):
    numpyro.sample("y", dist.Normal(outputs, noise).to_event(1), obs=y)


def dense(x, y, depth, activation):
    h = x
    for i in range(depth):
        h = activation(h @ weights(f"w{i}", h.shape[-1], 64))
    regression((h @ weights("v", 64, 1))[:, 0], y)


def convolutional(x, y):
    h = x
    for i in range(3):
        kernel = weights(f"k{i}", 5, 5, h.shape[-1], 16)
        h = jax.nn.relu(
            jax.lax.conv_general_dilated(h, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        )
    regression(h.mean((1, 2)) @ weights("v", 16, 1)[:, 0], y)


def recurrent(x, y, gated):
    size = 32
    w, u, v = weights("w", size, size), weights("u", x.shape[-1], size), weights("v", size, 1)
    gate_w, gate_u = weights("gate_w", size, size), weights("gate_u", x.shape[-1], size)

    def step(h, seen):
        new = jnp.tanh(h @ w + seen @ u)
        if gated:
            gate = jax.nn.sigmoid(h @ gate_w + seen @ gate_u)
            new = gate * h + (1 - gate) * new
        return new, None

    h, _ = jax.lax.scan(step, jnp.zeros((len(x), size)), x.transpose(1, 0, 2))
    regression((h @ v)[:, 0], y)


def attention(x, y, depth, norms):
    h = x
    for i in range(depth):
        normed = jax.nn.standardize(h, -1) if norms else h
        query, key, value = (normed @ weights(f"{part}{i}", h.shape[-1], h.shape[-1]) for part in "qkv")
        scores = jax.nn.softmax(query @ key.transpose(0, 2, 1) / h.shape[-1] ** 0.5, -1)
        h = h + scores @ value
        inner = jax.nn.standardize(h, -1) if norms else h
        h = h + jax.nn.gelu(inner @ weights(f"in{i}", h.shape[-1], 64)) @ weights(f"out{i}", 64, h.shape[-1])
    regression(h.mean(1) @ weights("v", h.shape[-1], 1)[:, 0], y)


def mixture_density(x, y):
    h = x
    for i in range(4):
        h = jax.nn.gelu(h @ weights(f"w{i}", h.shape[-1], 64))
    shares, means, scales = (h @ weights(name, 64, 8) for name in ("shares", "means", "scales"))
    terms = jax.nn.log_softmax(shares) + dist.Normal(means, jax.nn.softplus(scales) + 1e-3).log_prob(y[:, None])
    numpyro.factor("y", jax.nn.logsumexp(terms, -1).sum())


def hierarchical(x, y, groups):
    mean = weights("mean", 16)
    spread = numpyro.sample("spread", dist.HalfNormal(1.0).expand([16]).to_event(1))
    with numpyro.plate("groups", 200):
        effects = numpyro.sample("effects", dist.Normal(mean, spread).to_event(1))
    h = jax.nn.gelu(jnp.tanh(x * effects[groups]) @ weights("w", 16, 64))
    regression((h @ weights("v", 64, 1))[:, 0], y)


def products(x, y):
    """Products of many factors, with exponentials among them."""
    h = x
    for i in range(5):
        h = h * jnp.exp(0.3 * jnp.tanh(h @ weights(f"w{i}", h.shape[-1], h.shape[-1]))) / (1 + h**2)
    regression(h.mean(-1), y)


def of_a_flow(x, y):
    """A network whose weights have a flow for a guide."""
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([32]).to_event(1))
    regression(jnp.tanh(x @ w.reshape(x.shape[-1], -1)).sum(-1), y)


ROWS, SERIES, IMAGES = normal(1024, 16), normal(64, 20, 8), normal(32, 12, 12, 3)
TARGETS = normal(1024, seed=1)
TABLE = ROWS, TARGETS
OF_SERIES = SERIES, TARGETS[:64]
SIXTEEN = normal(64, 20, 32), TARGETS[:64]
# name -> (model, its arguments, guide, whether the default codes something)
NETWORKS = {
    "dense 3 gelu": (partial(dense, depth=3, activation=jax.nn.gelu), TABLE, AutoNormal, True),
    "dense 8 tanh": (partial(dense, depth=8, activation=jnp.tanh), TABLE, AutoNormal, None),
    "dense 16 relu": (partial(dense, depth=16, activation=jax.nn.relu), TABLE, AutoNormal, True),
    "convolutional": (convolutional, (IMAGES, TARGETS[:32]), AutoNormal, True),
    "recurrent": (partial(recurrent, gated=False), OF_SERIES, AutoNormal, False),
    "gated recurrent": (partial(recurrent, gated=True), OF_SERIES, AutoNormal, False),
    "attention 3": (partial(attention, depth=3, norms=False), SIXTEEN, AutoNormal, False),
    "attention 3 with norms": (partial(attention, depth=3, norms=True), SIXTEEN, AutoNormal, False),
    "attention 8 with norms": (partial(attention, depth=8, norms=True), SIXTEEN, AutoNormal, False),
    "mixture density": (mixture_density, TABLE, AutoNormal, True),
    "hierarchical": (hierarchical, (*TABLE, np.arange(1024) % 200), AutoNormal, True),
    "products": (products, TABLE, AutoNormal, None),
    "autoregressive flow": (of_a_flow, TABLE, AutoIAFNormal, None),
    "neural flow": (of_a_flow, TABLE, AutoBNAFNormal, None),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_default_adds_little(name):
    model, args, make_guide, coded = NETWORKS[name]
    # of programs of every size the default that those have which are worth it
    prices = dataclasses.replace(costs.default(), untouched_bytes=0, least_encoded_bytes=1024)
    guide = make_guide(model)
    ours, exact = (SVI(model, guide, optax.adam(1e-2), e) for e in (RAD_ELBO(slices=1, costs=prices), Trace_ELBO()))
    state = [svi.init(jax.random.key(0), *args) for svi in (exact, ours)][-1]
    rows = explain(ours, state, *args).rows
    if coded is not None:
        assert any(row.relative_variance for row in rows) == coded
    gradients = [
        jax.jit(jax.grad(lambda params, key, svi=svi: svi.loss.loss(key, params, model, guide, *args)))
        for svi in (ours, exact)
    ]
    update = jax.jit(lambda state: exact.update(state, *args)[0])
    later = begin(model, make_guide, init_to_median, args)
    for _ in range(STEPS):
        later = update(later)
    states = {
        "uniform": begin(model, make_guide, init_to_uniform, args),
        "median": begin(model, make_guide, init_to_median, args),
        "later": later,
    }
    for when, state in states.items():
        params, errors, squares = ours.get_params(state), [], []
        for i in range(DRAWS):
            mine, right = (np.float64(ravel_pytree(g(params, jax.random.key(i)))[0]) for g in gradients)
            errors.append(np.sum((mine - right) ** 2))
            squares.append(np.sum(right**2))
        added = np.sum(errors) / np.sum(squares)
        print(f"{name}, {when}: {added:.1e}")
        assert added < MOST_ADDED, when


def begin(model, make_guide, init_loc_fn, args):
    """The state in which a fit begins."""
    return SVI(model, make_guide(model, init_loc_fn=init_loc_fn()), optax.adam(1e-2), Trace_ELBO()).init(
        jax.random.key(1), *args
    )
