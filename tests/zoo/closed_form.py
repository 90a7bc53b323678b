"""A linear model, of whose gradient mean and variance are known in closed form, by source."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import SVI
from programs import normal

POINTS, BATCH, SIZE = 60, 12, 24
SPREAD = 0.3
START = 0.1
A = normal(POINTS, SIZE, seed=3, scale=SIZE**-0.5)
B = A @ jnp.ones(SIZE) + normal(POINTS, seed=4)


def linear_model(a, b, size=None):
    """Linear regression, optionally on minibatches."""
    z = numpyro.sample("z", dist.Normal(jnp.zeros(SIZE), 1.0).to_event(1))
    with numpyro.plate("points", len(b), subsample_size=size):
        rows, targets = numpyro.subsample(a, event_dim=1), numpyro.subsample(b, event_dim=0)
        numpyro.sample("b", dist.Normal(rows @ z, 1.0), obs=targets)


def linear_guide(a, b, size=None):
    loc = numpyro.param("loc", START * jnp.ones(SIZE))
    numpyro.sample("z", dist.Normal(loc, SPREAD).to_event(1))


def initialised(elbo, model=linear_model, guide=linear_guide, args=(A, B), **kwargs):
    svi = SVI(model, guide, optax.adam(1e-2), elbo)
    return svi, svi.init(jax.random.key(1), *args, **kwargs)


def linear_parts(size=None, codec=None):
    """Closed forms for the gradient z + (n / size) A_m' (A_m z - b_m), z = loc + SPREAD eps.

    Minibatches are drawn without replacement, n points and `size` of them: the chance of one is size / n, of a pair
    size (size - 1) / (n (n - 1)). What is coded is the misfit A_m z - b_m, and z in the
    prior; only their variance is averaged by draws.
    """
    a, b, loc = np.asarray(A, np.float64), np.asarray(B, np.float64), np.full(SIZE, START)
    size = size or POINTS
    scale = POINTS / size
    gram = a @ a.T
    squares = np.diag(gram)
    one, two = size / POINTS, size * (size - 1) / (POINTS * (POINTS - 1))
    pairs = one * (squares**2).sum() + two * ((gram**2).sum() - (squares**2).sum())
    each = a * (a @ loc - b)[:, None]
    path = 0.0
    if codec is not None:
        rng = np.random.default_rng(7)
        rows = np.stack([rng.permutation(POINTS)[:size] for _ in range(2000)])
        z = loc + SPREAD * rng.standard_normal((2000, SIZE))

        def added(rows, z):
            along = jax.vmap(codec.variance_along, (None, 0))
            of_misfit = along(A[rows] @ z - B[rows], scale * A[rows].T)  # errors of a codec may be correlated
            return of_misfit.sum() + along(z, jnp.eye(SIZE)).sum()

        path = float(jnp.mean(jax.jit(jax.vmap(added))(rows, z)))
    return {
        "minibatch": POINTS * scale * (1 - size / POINTS) * np.cov(each.T).trace(),
        "guide": SPREAD**2 * (SIZE + 2 * squares.sum() + scale**2 * pairs),
        "path": path,
        "squared_norm": float(((loc + each.sum(0)) ** 2).sum()),
    }
