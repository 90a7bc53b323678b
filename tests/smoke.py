"""What an installed package has to do at least; run by ``make package``, without the sources."""

import importlib.metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoNormal

import numpyro_rad
from numpyro_rad import RAD_ELBO, RAD_SVI, explain


def model(x, y):
    w = numpyro.sample("w", dist.Normal(0, 1).expand([8, 64]).to_event(2))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Normal(jnp.tanh(x @ w).sum(-1), 1.0), obs=y)


here = Path(numpyro_rad.__file__)
assert "site-packages" in here.parts, here
assert (here.parent / "py.typed").exists()
assert importlib.metadata.version("numpyro_rad") == numpyro_rad.__version__

x = jax.random.normal(jax.random.key(0), (256, 8))
data = x, x.sum(-1)
svi = SVI(model, AutoNormal(model), optax.adam(1e-2), RAD_ELBO(memory_budget="16KiB"))
state = svi.init(jax.random.key(1), *data)
print(explain(svi, state, *data))
losses = svi.run(jax.random.key(1), 50, *data, progress_bar=False).losses
assert losses[-1] < losses[0]
watched = RAD_SVI(model, AutoNormal(model), optax.adam(1e-2), RAD_ELBO())
result = watched.run(jax.random.key(1), 50, *data, progress_bar=False)
assert "A fit by numpyro_rad" in result.report()
print(f"numpyro_rad {numpyro_rad.__version__} from {here.parent.parent.name}: works")
