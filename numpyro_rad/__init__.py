"""Stochastic variational inference that fits in memory: randomized automatic differentiation for NumPyro.

One changed word, ``RAD_ELBO`` for ``Trace_ELBO``, makes SVI store a fraction of the residuals of reverse-mode AD.

To read the code start with ``graph`` and ``linearize`` (the linearized computational graph), then ``plan`` (what is
stored) and ``sweep`` (the two sweeps), ``decision`` and ``solver`` (how plans are chosen), ``planner`` (what users ask
for), ``transform`` (how it becomes a JAX transformation) and ``elbo``. ``codecs`` stands alone.
"""

from numpyro_rad.archive import to_arviz
from numpyro_rad.calibration import Calibration
from numpyro_rad.checkpoints import Checkpoint, CheckpointError
from numpyro_rad.codecs import BitMask, Codec, Keep, RandomProjection, SampleAxis, SampledRound, StochasticRound
from numpyro_rad.convergence import IterateAverage, Iterates
from numpyro_rad.diagnostics import gradient_variance
from numpyro_rad.elbo import RAD_ELBO, NoiseKeys
from numpyro_rad.explain import Comparison, Explanation, compare, explain
from numpyro_rad.figures import plan_figure
from numpyro_rad.loop import Look
from numpyro_rad.monitor import gradient_signal, nonfinite_gradients, signal_to_noise
from numpyro_rad.plan import BudgetError, Plan
from numpyro_rad.planner import Planner, Residual, VarianceWarning
from numpyro_rad.quality import Shadow, fit_quality, shadow
from numpyro_rad.results import RAD_SVIRunResult, assessed, fit_record
from numpyro_rad.svi import RAD_SVI
from numpyro_rad.tracking import Tracker, Tracking, TrackingWarning
from numpyro_rad.transform import grad, rad, value_and_grad

__version__ = "0.1.0"

__all__ = [
    "RAD_ELBO",
    "RAD_SVI",
    "BitMask",
    "BudgetError",
    "Calibration",
    "Checkpoint",
    "CheckpointError",
    "Codec",
    "Comparison",
    "Explanation",
    "IterateAverage",
    "Iterates",
    "Keep",
    "Look",
    "NoiseKeys",
    "Plan",
    "Planner",
    "RAD_SVIRunResult",
    "RandomProjection",
    "Residual",
    "SampleAxis",
    "SampledRound",
    "Shadow",
    "StochasticRound",
    "Tracker",
    "Tracking",
    "TrackingWarning",
    "VarianceWarning",
    "assessed",
    "compare",
    "explain",
    "fit_quality",
    "fit_record",
    "grad",
    "gradient_signal",
    "gradient_variance",
    "nonfinite_gradients",
    "plan_figure",
    "rad",
    "shadow",
    "signal_to_noise",
    "to_arviz",
    "value_and_grad",
]
