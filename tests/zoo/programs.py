"""Programs that tests of the ELBOs share: a model, a guide, their arguments and parameters, and ways to compare."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from models import wave
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from numpyro_rad import explain, rad

KEY = 5


def numbers(*shape, seed=0, scale=1.0, shift=0.0):
    """Normal numbers in double precision, others for each shape and seed; NumPy's, so that a module may hold them."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape) * scale + shift


def normal(*shape, seed=0, scale=1.0):
    """The same numbers in float32."""
    return jnp.asarray(numbers(*shape, seed=seed, scale=scale), jnp.float32)


def few(names, *usual, slow=1):
    """Parameters of a test that takes seconds for each: ``usual`` run always; of the others, one in ``slow`` is a slow
    test, or none with 0, and the rest are exhaustive ones."""
    assert set(usual) <= set(names)
    others = [n for n in names if n not in usual]
    marks = {n: pytest.mark.slow if slow and i % slow == 0 else pytest.mark.exhaustive for i, n in enumerate(others)}
    return [pytest.param(n, marks=marks.get(n, ())) for n in names]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """Model, guide and their arguments, with parameters to look at."""

    model: object
    guide: object
    args: tuple
    kwargs: dict
    params: dict

    def loss(self, elbo, key, params, *args):
        return elbo.loss(key, params, self.model, self.guide, *(args or self.args), **self.kwargs)

    def value_and_grad(self, elbo, key=None):
        key = jax.random.key(KEY) if key is None else key
        return jax.jit(jax.value_and_grad(partial(self.loss, elbo, key)))(self.params)

    def svi(self, elbo, optimizer=None):
        return SVI(self.model, self.guide, optimizer or optax.adam(1e-2), elbo)

    def explain(self, elbo):
        return explain(elbo, jax.random.key(KEY), self.params, self.model, self.guide, *self.args, **self.kwargs)


def program(model, guide, *args, elbo=None, **kwargs):
    svi = SVI(model, guide, optax.adam(1e-2), elbo or Trace_ELBO())
    params = svi.get_params(svi.init(jax.random.key(1), *args, **kwargs))
    return Program(model, guide, args, kwargs, params)


def network(x, y, batch_size=None, activation=jnp.tanh):
    """One hidden layer, few sites: what compiles fast. Optionally on a minibatch."""
    w = numpyro.sample("w", dist.Normal(jnp.zeros((x.shape[1], 16)), 1.0).to_event(2))
    v = numpyro.sample("v", dist.Normal(jnp.zeros(16), 1.0).to_event(1))
    with numpyro.plate("points", x.shape[0], subsample_size=batch_size):
        batch, targets = numpyro.subsample(x, event_dim=1), numpyro.subsample(y, event_dim=0)
        numpyro.sample("y", dist.Normal(activation(batch @ w) @ v, 0.5), obs=targets)


def small_network(points=64):
    return _small_network(points, bool(jax.config.jax_enable_x64))


@cache
def _small_network(points, double):
    return program(network, AutoNormal(network, init_scale=0.1), *wave(points))


@cache
def exact(problem):
    """Value and gradient of ``Trace_ELBO`` under the usual key."""
    return problem.value_and_grad(Trace_ELBO())


def assert_close(actual, expected, rtol):
    """Each array within ``rtol`` of the largest entry of the expected one."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
        scale = np.abs(b).max(initial=0.0)
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * scale, err_msg=jax.tree_util.keystr(path))


def assert_equal_trees(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def flat(tree):
    return jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])


def is_random(explanation):
    return any(row.relative_variance > 0 for row in explanation.rows)


def words(tree):
    """Leaves as NumPy arrays, typed keys as their words."""
    leaves = jax.tree.leaves(tree)
    typed = [isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves]
    return [np.asarray(jax.random.key_data(x) if on else x) for x, on in zip(leaves, typed, strict=True)]


def same(a, b, equal_nan=False):
    """Whether all leaves are the same to the bit, keys included."""
    a, b = words(a), words(b)
    return len(a) == len(b) and all(
        x.dtype == y.dtype and np.array_equal(x, y, equal_nan=equal_nan and x.dtype.kind == "f")
        for x, y in zip(a, b, strict=True)
    )


def same_run(a, b):
    """Whether two runs end with the same parameters and state after the same losses."""
    return same((a.params, a.state, a.losses), (b.params, b.state, b.losses))


def positions(args, start=0):
    """Positions of all arguments; 1 is where they start after a key."""
    return tuple(range(start, start + len(args)))


def planned(f, args, **options):
    """The plan of a function that is differentiated with respect to all of its arguments."""
    return rad(f, **options).planned(args, {}, positions(args))[0]


def temp_bytes(f, *args):
    """Temporary bytes of the compiled function, as the compiler says."""
    return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes
