"""Errors and warnings of this library, besides ``TypeError`` and ``ValueError`` for what cannot be meant."""

from numpyro_rad.ad.plan import BudgetError
from numpyro_rad.diagnostics.tracking import TrackingWarning
from numpyro_rad.planning.planner import VarianceWarning
from numpyro_rad.training.checkpoints import CheckpointError

__all__ = ["BudgetError", "CheckpointError", "TrackingWarning", "VarianceWarning"]
