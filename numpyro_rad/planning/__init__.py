"""Choosing plans: which residuals are kept, recomputed or compressed so that the rest fits a memory budget.

``planner`` is what users ask for and ``plans`` finds it: ``decision`` poses it as a problem for ``solver``, with the
variances that ``calibration`` measured. ``explain`` and ``figures`` show what was chosen.
"""
