"""Stochastic variational inference that fits in memory: randomized automatic differentiation for NumPyro.

One changed word, ``RAD_ELBO`` for ``Trace_ELBO``, makes SVI store a fraction of the residuals of reverse-mode AD.

To read the code start with ``graph`` and ``linearize`` (the linearized computational graph), then ``plan`` (what to
store), ``sweep`` (the two sweeps), ``transform`` (how they become a JAX transformation) and ``elbo``. ``codecs`` stands
alone.
"""

from numpyro_rad.codecs import BitMask, Codec, Keep, RandomProjection, SampleAxis, StochasticRound
from numpyro_rad.elbo import RAD_ELBO, NoiseKeys
from numpyro_rad.explain import Explanation, explain
from numpyro_rad.plan import BudgetError
from numpyro_rad.transform import grad, rad, value_and_grad

__version__ = "0.1.0"

__all__ = [
    "RAD_ELBO",
    "BitMask",
    "BudgetError",
    "Codec",
    "Explanation",
    "Keep",
    "NoiseKeys",
    "RandomProjection",
    "SampleAxis",
    "StochasticRound",
    "explain",
    "grad",
    "rad",
    "value_and_grad",
]
