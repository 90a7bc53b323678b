"""Stochastic variational inference that fits in memory: randomized automatic differentiation for NumPyro.

One changed word, ``RAD_ELBO`` for ``Trace_ELBO``, makes SVI store a fraction of the residuals of reverse-mode AD.

To read the code start with ``graph`` and ``linearize`` (the linearized computational graph), then ``plan`` (what is
stored) and ``sweep`` (the two sweeps), ``decision`` and ``solver`` (how plans are chosen), ``planner`` (what users ask
for), ``transform`` (how it becomes a JAX transformation) and ``elbo``. ``codecs`` stands alone.
"""

from numpyro_rad.calibration import Calibration
from numpyro_rad.codecs import BitMask, Codec, Keep, RandomProjection, SampleAxis, SampledRound, StochasticRound
from numpyro_rad.elbo import RAD_ELBO, NoiseKeys
from numpyro_rad.explain import Comparison, Explanation, compare, explain
from numpyro_rad.figures import plan_figure
from numpyro_rad.plan import BudgetError, Plan
from numpyro_rad.planner import Planner, Residual, VarianceWarning
from numpyro_rad.transform import grad, rad, value_and_grad

__version__ = "0.1.0"

__all__ = [
    "RAD_ELBO",
    "BitMask",
    "BudgetError",
    "Calibration",
    "Codec",
    "Comparison",
    "Explanation",
    "Keep",
    "NoiseKeys",
    "Plan",
    "Planner",
    "RandomProjection",
    "Residual",
    "SampleAxis",
    "SampledRound",
    "StochasticRound",
    "VarianceWarning",
    "compare",
    "explain",
    "grad",
    "plan_figure",
    "rad",
    "value_and_grad",
]
