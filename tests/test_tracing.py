"""What of a model's arguments is traced, what is remembered of programs, what is done where a compiler says nothing."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import linear
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoNormal

from numpyro_rad import RAD_ELBO, gradient_variance
from numpyro_rad.ad import _jax
from numpyro_rad.planning import strategies
from numpyro_rad.tracing import Compiled, Parts, looks_at_numbers, taking_arrays, traced_or_constant
from numpyro_rad.transform import Recent

X = np.arange(6.0, dtype=np.float32)


def test_parts_put_arguments_together_and_keep_no_array():
    x = np.zeros(3)
    alive = weakref.ref(x)
    parts = Parts(((x, 2, "mean"), {"size": 3}))
    (found,) = parts.arrays(((x, 2, "mean"), {"size": 3}))
    assert found is x and parts.merge(["other"]) == (("other", 2, "mean"), {"size": 3})
    del x, found
    gc.collect()
    assert alive() is None and parts.has_arrays and not Parts(((X,), {}), traced=False).has_arrays


def plain(scale, args, kwargs):
    return scale * args[0].sum() * kwargs.get("power", 1)


def looking(scale, args, kwargs):
    return scale * jnp.arange(int(args[0].max())).sum()


@pytest.mark.parametrize(("f", "programs"), [(plain, 1), (looking, 2)])
def test_one_function_for_arguments_of_one_signature(f, programs):
    """Where numbers are looked at there is one for each of them, and the numbers are right."""
    compiled, traces = Compiled(lambda *given: traces.append(1) or f(*given)), []
    for x in (X, 2 * X, X, 2 * X):
        run, parts = compiled.of((x,), {}, 3.0)
        assert run(parts.arrays(((x,), {})), 3.0) == f(3.0, (x,), {})
        assert parts.has_arrays == (f is plain)
    first = len(traces)
    compiled.of((X,), {}, 3.0)
    assert len(traces) == first  # nothing is traced again
    assert first <= 2 * programs + (f is looking)  # once to see whether it can be, which a failure adds to
    assert compiled.knows((X,), {}, 3.0) == (f is plain) and not compiled.knows((X[:2],), {}, 3.0)
    for power in (2, 3):
        run, parts = compiled.of((X,), {"power": power}, 3.0)
        assert run(parts.arrays(((X,), {"power": power})), 3.0) == f(3.0, (X,), {"power": power})


def test_numbers_that_are_looked_at():
    assert looks_at_numbers(lambda x: jnp.zeros(int(x.max())), (X,), {})
    assert not looks_at_numbers(lambda x: jnp.zeros(x.shape), (X,), {})
    run, arrays = taking_arrays(looking, (X,), {}, 1.0)
    assert arrays == [] and run([], 1.0) == 10
    with pytest.raises(TypeError):
        traced_or_constant(lambda parts: jax.eval_shape(lambda a: float(a[0]), parts.arrays(X)), X, False)
    attempts = []
    with pytest.raises(TypeError, match="a mistake"):  # of which constants do not make another try
        traced_or_constant(lambda parts: attempts.append(parts) or fails(), (1, "two"))
    assert len(attempts) == 1


def fails():
    raise TypeError("a mistake")


def test_so_much_is_remembered_of_what_was_asked_last():
    asked, recent = [], Recent(2)

    def of(key):
        return recent.of(key, lambda: asked.append(key) or key.upper())

    assert [of(key) for key in "abacab"] == list("ABACAB")
    assert asked == list("abcb")


def test_where_the_compiler_says_nothing(monkeypatch):
    monkeypatch.setattr(_jax, "compiled_bytes", lambda compiled: None)
    monkeypatch.setattr(strategies, "LADDER", strategies.LADDER[:1])
    monkeypatch.setattr(strategies, "MEASURED", ())
    x = X.reshape(2, 3)
    svi = SVI(linear, AutoNormal(linear), optax.adam(0.05), RAD_ELBO(added_variance=0.1))
    state = svi.init(jax.random.PRNGKey(0), x, x[:, 0])
    with pytest.raises(NotImplementedError, match="does not say what memory a step takes"):
        svi.loss.fit_step(svi, state, "1GiB", x, x[:, 0])
    assert svi.loss.calibrate(svi, state, x, x[:, 0], draws=2, most_bytes=1).n_draws == 2
    found = gradient_variance(svi, state, x, x[:, 0], draws=2, costs=True)
    assert found.seconds and not found.temporary_bytes and "total" in str(found)
