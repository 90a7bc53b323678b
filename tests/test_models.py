"""Five kinds of NumPyro models train with one word changed, on the same keys and to the same loss.

Every run is the plain ``SVI.run``, for four seeds at once. With the exact plan the losses are those of ``Trace_ELBO``
up to rounding, which training amplifies; with the default they end where ``Trace_ELBO`` ends, give or take less than
what another seed changes.
"""

import jax
import numpy as np
import pytest
from models import PROBLEMS
from numpyro.infer import SVI, Trace_ELBO
from programs import few

from numpyro_rad import RAD_ELBO, Keep, StochasticRound, explain

SEEDS = 4
LAST = 100  # steps over which the final loss is averaged: its noise from guide and minibatch falls tenfold


@pytest.fixture(autouse=True)
def encode_small_residuals(priced):
    """These models stand for larger ones, so their residuals are treated as if they were large."""
    priced(least_encoded_bytes=512)


def losses(name, elbo):
    """Losses (seeds, steps) of one problem from its start."""
    problem = PROBLEMS[name]()
    svi = SVI(problem.model, problem.guide, problem.optimizer, elbo)

    def run(key):
        return svi.run(key, problem.steps, *problem.args, progress_bar=False, **problem.kwargs).losses

    return np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), SEEDS)))


def final(losses):
    return losses[:, -LAST:].mean(1)


def assert_same_end(found, expected):
    """The final losses differ, on average over the seeds, by less than half the deviation between seeds.

    The pairs share their keys, so nearly all of the deviation between seeds (start, noise of the guide, minibatches) is
    common to both and drops out of the difference. What is left is the effect of the gradient.
    """
    difference = np.mean(final(found) - final(expected))
    assert abs(difference) < 0.5 * np.std(final(expected), ddof=1), f"final losses differ by {difference:.3g}"


@pytest.mark.parametrize("name", few(PROBLEMS, slow=6))
def test_trains_with_one_word_changed(name):
    expected = losses(name, Trace_ELBO())
    assert np.all(final(expected) < 0.9 * expected[:, :10].mean(1)), "nothing is learned, nothing is compared"

    exact = losses(name, RAD_ELBO(codec=Keep()))
    np.testing.assert_allclose(exact[:, :50], expected[:, :50], rtol=1e-4)
    np.testing.assert_allclose(final(exact), final(expected), rtol=2e-3)

    default = losses(name, RAD_ELBO())
    np.testing.assert_allclose(default[:, 0], expected[:, 0], rtol=1e-5)  # the value is exact, only the steps differ
    assert_same_end(default, expected)

    if name == "autoencoder":  # the band is narrow enough to tell: gradients at 1 bit lag behind
        with pytest.raises(AssertionError, match="final losses differ"):
            assert_same_end(losses(name, RAD_ELBO(codec=StochasticRound(bits=1))), expected)


@pytest.mark.parametrize("name", few(PROBLEMS, slow=3))
def test_default_stores_less(name):
    """All store less than their residuals, and all but the one that is elementwise throughout hold random codes."""
    problem = PROBLEMS[name]()
    svi = SVI(problem.model, problem.guide, problem.optimizer, RAD_ELBO())
    params = svi.get_params(svi.init(jax.random.key(0), *problem.args, **problem.kwargs))
    rest = (jax.random.key(0), params, problem.model, problem.guide, *problem.args)
    default = explain(RAD_ELBO(), *rest, **problem.kwargs)
    keep = explain(RAD_ELBO(codec=Keep()), *rest, **problem.kwargs)
    coded = explain(RAD_ELBO(codec=StochasticRound(bits=4)), *rest, **problem.kwargs)
    assert coded.stored_bytes <= keep.stored_bytes < keep.exact_bytes
    assert coded.stored_bytes <= default.stored_bytes < default.exact_bytes
    if name != "hierarchy":  # all of it is elementwise in parameters and data, hence recomputed
        assert any(row.relative_variance > 0 for row in default.rows)
