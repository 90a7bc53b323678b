"""What a user has of a fit, as what a function needs: the result of a run, its state, or parameters alone.

All public functions that look at a fit take it through here. Parameters may come from a file, so NumPy arrays become
JAX arrays: models and guides index them by what is traced.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import ELBO, SVI
from numpyro.infer.svi import SVIRunResult, SVIState
from numpyro.primitives import Messenger

from numpyro_rad.annotations import Params, PyTree
from numpyro_rad.mistakes import check_fit

Fit = SVIRunResult | SVIState | Mapping[str, PyTree]
"""What a user has of a fit: the result of a run, its state, or the parameters alone."""


def values_of(svi: SVI, fit: Fit, where: str) -> dict[str, PyTree]:
    """Constrained parameters and mutable state, by name.

    :param svi: the ``SVI`` of the fit.
    :param fit: its result, its state or the dictionary of constrained parameters; the latter may hold the mutable
        state too.
    :param where: the function that asks, for messages.
    :raises TypeError: if ``fit`` is none of these.
    :raises ValueError: for a state, if ``svi`` does not know its constraints.
    """
    if isinstance(fit, Mapping) or is_result(fit):
        params, mutable = params_of(fit)
    else:
        state = state_of(svi, fit, where)
        params, mutable = svi.get_params(state), state.mutable_state
    return {**params, **(mutable or {})}


def params_of(fit: Mapping[str, PyTree] | SVIRunResult) -> tuple[dict[str, PyTree], PyTree]:
    """Constrained parameters and mutable state (None if there is none of its own) of parameters or a result."""
    if isinstance(fit, Mapping):
        return on_device(dict(fit)), None
    return on_device((fit.params, getattr(fit.state, "mutable_state", None)))  # a result may hold averaged parameters


def state_of(svi: SVI, fit: Fit, where: str) -> SVIState:
    """The ``SVIState`` of a result, or a state as it is.

    :raises TypeError: for parameters alone, which have no key and no optimizer, and for what is no fit.
    :raises ValueError: if ``svi`` does not know the constraints of its parameters.
    """
    if isinstance(fit, Mapping):
        raise TypeError(
            f"{where} needs a state, with its key and the unconstrained parameters, and got parameters alone. Pass the "
            "result of svi.run or its state, or make a state of them: svi.init(key, x, y, init_params=params)."
        )
    state = fit.state if is_result(fit) else fit
    check_fit(where, svi, state)
    return on_device(state)


@contextlib.contextmanager
def watched_state(values: Params, where: str) -> Iterator[set[str]]:
    """The names of the mutable sites that model and guide ask for meanwhile.

    :param values: parameters and mutable state that they are given.
    :raises ValueError: if they fail and lack mutable state.
    """
    watch = _MutableSites()
    try:
        with watch:
            yield watch.names
    except Exception as error:
        missing = sorted(watch.names - values.keys())
        if not missing:
            raise
        raise ValueError(
            f"{where}: model or guide keep mutable state in {', '.join(missing)}, and parameters alone do not have it. "
            "Pass the result of svi.run, its state, or both: {**svi.get_params(state), **state.mutable_state}."
        ) from error


class _MutableSites(Messenger):
    """Notices the names of mutable sites."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "mutable":
            self.names.add(msg["name"])


def with_loss(svi: SVI, loss: ELBO) -> SVI:
    """A copy of an ``SVI`` with another loss; the state of the one is a state of the other."""
    other = copy.copy(svi)
    other.loss = loss
    return other


def is_result(fit: object) -> TypeGuard[SVIRunResult]:
    """Whether it is what ``SVI.run`` returned."""
    return hasattr(fit, "params") and hasattr(fit, "state")


def on_device(tree: PyTree) -> PyTree:
    """A pytree whose NumPy arrays are JAX arrays; those that JAX has no dtype for stay."""

    def placed(x: PyTree) -> PyTree:
        return jnp.asarray(x) if isinstance(x, (np.ndarray, np.generic)) and x.dtype.kind in "biufcV" else x

    return jax.tree.map(placed, tree)
