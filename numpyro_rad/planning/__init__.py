"""Choosing plans: which residuals are kept, recomputed or compressed so that the rest fits a memory budget.

``planner`` is what users ask for, ``decision`` poses it as a problem for ``solver``, ``calibration`` measures the
variance that it weighs. ``explain`` and ``figures`` show what was chosen.
"""
