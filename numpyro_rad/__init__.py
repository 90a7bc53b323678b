"""Stochastic variational inference that fits in memory: randomized automatic differentiation for NumPyro.

One changed word, ``RAD_ELBO`` for ``Trace_ELBO``, makes SVI store a fraction of the residuals of reverse-mode AD.

Here is what a fit needs. The rest is in packages: ``codecs`` (how residuals are stored), ``planning`` (planners, plans,
calibrations), ``diagnostics`` (how noisy the gradient is and how good the fit), ``report`` (the same for people),
``training`` (``RAD_SVI`` and what a run returns) and ``errors``. They build on each other, from the bottom to the top:
``ad`` (randomized automatic differentiation of programs), ``planning`` (what is stored, under a budget), ``transform``
(both as a JAX transformation), ``elbo`` (both in NumPyro), ``diagnostics``, ``report`` and ``training``.
"""

from numpyro_rad.ad.codecs import Keep
from numpyro_rad.ad.plan import BudgetError
from numpyro_rad.ad.rounding import StochasticRound
from numpyro_rad.diagnostics.tracking import Tracking
from numpyro_rad.diagnostics.variance import gradient_variance
from numpyro_rad.elbo import RAD_ELBO
from numpyro_rad.planning.explain import compare, explain
from numpyro_rad.planning.figures import plan_figure
from numpyro_rad.report.archive import to_arviz
from numpyro_rad.subsampling import NoiseKeys
from numpyro_rad.training.advice import advise
from numpyro_rad.training.checkpoints import Checkpoint
from numpyro_rad.training.svi import RAD_SVI
from numpyro_rad.training.validation import Plateau
from numpyro_rad.transform import grad, rad, value_and_grad

__version__ = "0.1.0"

__all__ = [
    "RAD_ELBO",
    "RAD_SVI",
    "BudgetError",
    "Checkpoint",
    "Keep",
    "NoiseKeys",
    "Plateau",
    "StochasticRound",
    "Tracking",
    "advise",
    "compare",
    "explain",
    "grad",
    "gradient_variance",
    "plan_figure",
    "rad",
    "to_arviz",
    "value_and_grad",
]
