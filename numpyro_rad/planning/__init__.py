"""Choosing plans: which residuals are kept, recomputed or compressed so that the rest fits a memory budget.

``planner`` takes what users ask for, ``ways`` the way through a program, and ``strategies`` finds a plan: ``problem``
poses it for ``solver``, at the prices of ``costs`` and with the variances of ``noise``, which ``calibration`` measures,
and ``assembly`` reads the solution. ``explain`` and ``figures`` show what was chosen.
"""

from numpyro_rad.ad.plan import Plan
from numpyro_rad.planning.calibration import Calibration
from numpyro_rad.planning.costs import CostModel
from numpyro_rad.planning.explain import Comparison, Explanation
from numpyro_rad.planning.planner import Planner, Residual

__all__ = ["Calibration", "Comparison", "CostModel", "Explanation", "Plan", "Planner", "Residual"]
