"""What an SVI shows before it trains: how much variance codes would add, and the budget with which a step fits.

``RAD_ELBO.calibrate`` and ``RAD_ELBO.fit_step`` ask here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from numpyro.infer import SVI
from numpyro.infer.svi import SVIState

from numpyro_rad.ad import _jax
from numpyro_rad.ad.plan import BudgetError
from numpyro_rad.annotations import Key, Kwargs, PyTree
from numpyro_rad.planning import strategies
from numpyro_rad.planning.calibration import Calibration, Calibrator
from numpyro_rad.planning.planner import parse_bytes
from numpyro_rad.tracing import taking_arrays
from numpyro_rad.transform import Closure, named_leaves

_TAG = 0x52414422  # folded into the state's key: the draws of a calibration

_TRIES = 8  # steps that are compiled to fit one, at most


def calibrated(
    taken: Closure,
    svi: SVI,
    svi_state: SVIState,
    batches: Sequence[tuple],
    kwargs: Kwargs,
    draws: int,
    most: int | None,
) -> Calibration:
    """Variances of gradients in the unconstrained parameters, with every codec that a plan may choose.

    :param taken: the program of the loss at the parameters, key, mutable state, arguments and keyword arguments.
    :param batches: arguments of model and guide, one tuple for each draw, from the start again where there are fewer.
    :param most: bytes of temporary memory that one draw may take; None for any.
    :raises ValueError: if a gradient is not finite.
    :raises BudgetError: if a draw takes more than it may.
    """
    constrain: Callable = svi.constrain_fn  # type: ignore[assignment]  # the state was initialized
    free = svi.optim.get_params(svi_state.optim_state)
    constrained, pull = jax.vjp(constrain, free)
    leaves, treedef = jax.tree.flatten(constrained)
    names = [name for name, _ in named_leaves(constrained)]

    def unconstrained(gradient: list[jax.Array]) -> PyTree:
        found = dict(zip(taken.leaves, gradient, strict=True))
        every = [found[i] if i in found else jnp.zeros_like(x) for i, x in enumerate(leaves)]
        return pull(treedef.unflatten(every))

    calibrator = Calibrator(taken.graph, (*strategies.LADDER, *strategies.MEASURED), most)
    for i, key in enumerate(jax.random.split(jax.random.fold_in(svi_state.rng_key, _TAG), draws)):
        sign_key, loss_key, row_key = jax.random.split(key, 3)
        _, signs = jax.jvp(constrain, (free,), (_signs(sign_key, free),))
        signs = jax.tree.leaves(signs)
        operands = taken.operands_at(constrained, loss_key, svi_state.mutable_state, batches[i % len(batches)], kwargs)
        gradient = calibrator.add(row_key, operands, [signs[i] for i in taken.leaves], unconstrained)
        bad = [names[i] for i, g in zip(taken.leaves, gradient, strict=True) if not bool(jnp.isfinite(g).all())]
        if bad:
            raise ValueError(
                f"calibrate: the gradient in {', '.join(bad)} is not finite in draw {i + 1} of {draws}: there is "
                "no variance to measure. Look at the loss (svi.evaluate), the data and the initial values."
            )
    return calibrator.result()


def fitting_budget(
    total: int | str, with_budget: Callable[[int], SVI], svi_state: SVIState, args: tuple, kwargs: Kwargs
) -> int:
    """The memory budget with which one whole ``svi.update`` takes no more than ``total``.

    :param total: bytes, as a user writes them.
    :param with_budget: from a budget to an ``SVI`` whose loss is a ``RAD_ELBO`` that plans by it.
    :raises BudgetError: if there is none.
    :raises NotImplementedError: where the compiler does not say what a step takes.
    """
    limit = parse_bytes(total, "total")
    budget, smallest = limit, math.inf
    for _ in range(_TRIES):
        svi = with_budget(budget)
        try:
            step = _step_bytes(svi, svi_state, args, kwargs)
        except BudgetError:
            break
        if step <= limit:
            return budget
        smallest = min(smallest, step)
        plan, _ = svi.loss.plan_of_update(svi, svi_state, *args, **kwargs)
        less = max(step - limit, plan.peak_bytes // 20)  # not all of what is too much need be residuals
        budget = max(plan.peak_bytes - less, plan.peak_bytes // 4)
    raise BudgetError(
        f"total={total!r}: no plan makes one svi.update fit; the smallest that was found takes {smallest} bytes in "
        "all. Parameters, optimizer state and data alone may take most of it: try a smaller minibatch or fewer "
        "particles.",
        int(min(smallest, 2**62)),
    )


def _step_bytes(svi: SVI, svi_state: SVIState, args: tuple, kwargs: Kwargs) -> int:
    """Bytes that a whole compiled ``svi.update`` takes, its arguments and results included."""

    def update(svi_state: SVIState, args: tuple, kwargs: Kwargs) -> PyTree:  # a new function, for a new plan
        return svi.update(svi_state, *args, **kwargs)

    run, arrays = taking_arrays(update, args, kwargs, svi_state)
    sizes = _jax.compiled_bytes(run.lower(arrays, svi_state).compile())
    if sizes is None:
        raise NotImplementedError(
            f"fit_step: the compiler of the backend '{jax.default_backend()}' does not say what memory a step takes. "
            "Choose memory_budget yourself."
        )
    held = sizes.arguments + sizes.results - sizes.shared
    if not arrays:  # what the model looks at is a constant of the program
        held += sum(x.nbytes for x in jax.tree.leaves((args, kwargs)) if hasattr(x, "nbytes"))
    return held + sizes.temporary


def _signs(key: Key, tree: PyTree) -> PyTree:
    """Independent random signs in the shape of a pytree."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten([jax.random.rademacher(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)])
