"""Models whose parameters are pytrees, and models that keep mutable state: with Flax, NNX, Equinox and plain NumPyro.

Each is a function that returns model, guide and arguments; importing this file makes no array.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.module import (
    eqx_module,
    flax_module,
    nnx_module,
    random_eqx_module,
    random_flax_module,
    random_nnx_module,
)
from numpyro.infer.autoguide import AutoBNAFNormal, AutoIAFNormal, AutoNormal


def line(points=24, features=3):
    """Inputs (points, features) and targets (points, 1)."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((points, features))
    return jnp.asarray(x, jnp.float32), jnp.asarray(x.sum(1, keepdims=True), jnp.float32)


def regression(network):
    """A model with noise of unknown scale around ``network()(x)``, and its guide."""

    def model(x, y=None):
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        numpyro.sample("y", dist.Normal(network()(x), scale).to_event(2), obs=y)

    return model, AutoNormal(model), line()


# -- parameters that are trees -----------------------------------------------------------------------------------------


def flax_dense():
    from flax import linen

    return regression(lambda: flax_module("net", linen.Dense(1), input_shape=(3,)))


def nnx_linear():
    from flax import nnx

    module = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    return regression(lambda: nnx_module("net", module))


def eqx_linear():
    import equinox as eqx

    module = eqx.nn.Linear(3, 1, key=jax.random.key(0))
    return regression(lambda: jax.vmap(eqx_module("net", module)))


PRIOR = {"bias": dist.Normal(0.0, 1.0)}  # the kernel has none: it stays a parameter


def random_flax_dense():
    from flax import linen

    return regression(lambda: random_flax_module("net", linen.Dense(1), PRIOR, input_shape=(3,)))


def random_nnx_linear():
    from flax import nnx

    module = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    return regression(lambda: random_nnx_module("net", module, PRIOR))


def random_eqx_linear():
    import equinox as eqx

    module = eqx.nn.Linear(3, 1, key=jax.random.key(0))
    return regression(lambda: jax.vmap(random_eqx_module("net", module, PRIOR)))


def plain_tree():
    """Names of leaves that look alike: ``a.b`` is a name, and ``b`` in ``a``."""

    def network():
        start = {"a": {"b": jnp.ones((3, 4))}, "a.b": (jnp.ones((4, 1)), jnp.zeros(1))}
        theta = numpyro.param("theta", start)
        second, bias = theta["a.b"]
        return lambda x: jnp.tanh(x @ theta["a"]["b"]) @ second + bias

    return regression(network)


def flow(guide):
    def model(x, y=None):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 1]).to_event(2))
        numpyro.sample("y", dist.Normal(x @ w, 0.5).to_event(2), obs=y)

    return model, guide(model), line()


TREES = {
    "flax": flax_dense,
    "nnx": nnx_linear,
    "equinox": eqx_linear,
    "random flax": random_flax_dense,
    "random nnx": random_nnx_linear,
    "random equinox": random_eqx_linear,
    "plain": plain_tree,
    "inverse autoregressive flow": lambda: flow(lambda model: AutoIAFNormal(model, num_flows=1, hidden_dims=[3])),
    "block neural flow": lambda: flow(lambda model: AutoBNAFNormal(model, num_flows=1, hidden_factors=[2])),
}

# -- mutable state -----------------------------------------------------------------------------------------------------


def flax_batch_norm(random=False):
    """A network that keeps batch statistics, and one that drops units besides."""
    from flax import linen

    class Network(linen.Module):
        @linen.compact
        def __call__(self, x):
            h = linen.BatchNorm(use_running_average=False)(linen.Dense(4)(x))
            return linen.Dense(1)(linen.Dropout(0.2, deterministic=False)(jnp.tanh(h)))

    def network():
        options = {"input_shape": (1, 3), "apply_rng": ["dropout"], "mutable": ["batch_stats"]}
        if random:
            net = random_flax_module("net", Network(), dist.Normal(0.0, 1.0), **options)
        else:
            net = flax_module("net", Network(), **options)
        return lambda x: net(x, rngs={"dropout": numpyro.prng_key()})

    return regression(network)


def nnx_batch_norm():
    from flax import nnx

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.first, self.norm = nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
            self.drop, self.last = nnx.Dropout(0.2, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)

        def __call__(self, x):
            return self.last(self.drop(jnp.tanh(self.norm(self.first(x)))))

    module = Network(nnx.Rngs(0))
    return regression(lambda: nnx_module("net", module))


def eqx_batch_norm():
    import equinox as eqx

    class Network(eqx.Module):
        first: eqx.nn.Linear
        norm: eqx.nn.BatchNorm
        last: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key)
            self.first, self.last = eqx.nn.Linear(3, 4, key=keys[0]), eqx.nn.Linear(4, 1, key=keys[1])
            self.norm = eqx.nn.BatchNorm(4, axis_name="batch", mode="batch")

        def __call__(self, x, state):
            h, state = self.norm(self.first(x), state)
            return self.last(jnp.tanh(h)), state

    module, start = eqx.nn.make_with_state(Network)(jax.random.key(0))

    def network():
        net = eqx_module("net", module)
        holder = numpyro.primitives.mutable("net$state", {"state": start})

        def run(x):
            batched = jax.vmap(net, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
            y, holder["state"] = batched(x, holder["state"])
            return y

        return run

    return regression(network)


def running_mean():
    """Plain ``numpyro.primitives.mutable`` in model and guide."""

    def model(x, y=None):
        seen = numpyro.primitives.mutable("seen", {"mean": jnp.zeros(3), "steps": jnp.zeros((), jnp.int32)})
        seen["mean"] = 0.9 * seen["mean"] + 0.1 * x.mean(0)
        seen["steps"] = seen["steps"] + 1
        w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 1]).to_event(2))
        numpyro.sample("y", dist.Normal((x - seen["mean"]) @ w, 0.5).to_event(2), obs=y)

    def guide(x, y=None):
        calls = numpyro.primitives.mutable("calls", {"number": jnp.zeros(())})
        calls["number"] = calls["number"] + 1
        loc = numpyro.param("loc", jnp.zeros((3, 1)))
        numpyro.sample("w", dist.Normal(loc, 0.1).to_event(2))

    return model, guide, line()


MUTABLE = {
    "flax": flax_batch_norm,
    "random flax": lambda: flax_batch_norm(random=True),
    "nnx": nnx_batch_norm,
    "equinox": eqx_batch_norm,
    "plain": running_mean,
}
