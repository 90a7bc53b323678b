"""Stochastic variational inference that fits in memory: randomized automatic differentiation for NumPyro.

One changed word, ``RAD_ELBO`` for ``Trace_ELBO``, makes SVI store a fraction of the residuals of reverse-mode AD.

The packages build on each other, from the bottom to the top: ``ad`` (randomized automatic differentiation of programs),
``planning`` (what is stored, under a budget), ``transform`` (both as a JAX transformation), ``elbo`` (both in NumPyro),
``diagnostics`` (how noisy the gradient is), ``report`` (the same for people) and ``training`` (``RAD_SVI``).
"""

from numpyro_rad.ad.codecs import BitMask, Codec, Keep, RandomProjection, SampleAxis, SampledRound, StochasticRound
from numpyro_rad.ad.plan import BudgetError, Plan
from numpyro_rad.diagnostics.convergence import IterateAverage, Iterates
from numpyro_rad.diagnostics.monitor import gradient_signal, nonfinite_gradients, signal_to_noise
from numpyro_rad.diagnostics.quality import Shadow, fit_quality, shadow
from numpyro_rad.diagnostics.tracking import Tracker, Tracking, TrackingWarning
from numpyro_rad.diagnostics.variance import gradient_variance
from numpyro_rad.elbo import RAD_ELBO, NoiseKeys
from numpyro_rad.planning.calibration import Calibration
from numpyro_rad.planning.explain import Comparison, Explanation, compare, explain
from numpyro_rad.planning.figures import plan_figure
from numpyro_rad.planning.planner import Planner, Residual, VarianceWarning
from numpyro_rad.report.archive import to_arviz
from numpyro_rad.training.advice import Advice, advise
from numpyro_rad.training.checkpoints import Checkpoint, CheckpointError
from numpyro_rad.training.loop import Look
from numpyro_rad.training.results import RAD_SVIRunResult, assessed, fit_record
from numpyro_rad.training.svi import RAD_SVI
from numpyro_rad.training.validation import Plateau
from numpyro_rad.transform import grad, rad, value_and_grad

__version__ = "0.1.0"

__all__ = [
    "RAD_ELBO",
    "RAD_SVI",
    "Advice",
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
    "Plateau",
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
    "advise",
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
