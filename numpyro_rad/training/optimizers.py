"""Which optimizers a step of SVI can use: it is tried on shapes alone, before anything is compiled.

A step has one random gradient, the parameters and one random value of the loss. Optimizers that evaluate the loss again
(line searches, sharpness-aware minimization) ask for functions that there are none of; those that do it themselves
(``numpyro.optim.Minimize``) compare values with gradients, which only exact gradients are made for.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from numpyro_rad.annotations import PyTree


def evaluations(optim: Any, optim_state: PyTree, given: object = None) -> int:
    """How often one step of an optimizer evaluates the loss.

    :param optim: NumPyro's optimizer.
    :param optim_state: its state.
    :param given: what the user passed as the optimizer.
    :raises TypeError: if it cannot take the step of ``svi.update``.
    """
    calls = 0

    def objective(params: PyTree) -> tuple[ArrayLike, None]:
        nonlocal calls
        calls += 1
        return sum(jnp.sum(jnp.square(jnp.abs(x))) for x in jax.tree.leaves(params)), None

    try:
        jax.eval_shape(lambda state: optim.eval_and_update(objective, state), optim_state)
    except jax.errors.JAXTypeError:  # it looks at numbers, and works where nothing is compiled
        return calls
    except Exception as error:  # whatever optax raises of arguments that it misses
        raise TypeError(_complaint(optim, optim_state, given, error)) from error
    return calls


def _complaint(optim: Any, optim_state: PyTree, given: object, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0].rstrip(".")
    told = f"The optimizer cannot take a step of SVI: {reason}. "
    if _works_without_the_loss(optim, optim_state, given):
        return told + (
            "NumPyro hands the value of the loss to it, which it does not take. Leave that out: "
            "optim=optax.GradientTransformation(optimizer.init, optimizer.update)."
        )
    return told + (
        "SVI has one random gradient for it, the parameters and one random value of the loss. Line searches "
        "(optax.lbfgs, scale_by_backtracking_linesearch), sam in opaque mode and all that evaluate the loss again need "
        "functions besides, and a loss that is not random. Use for example optax.adam(1e-3); for a guide that draws "
        "nothing, numpyro.optim.Minimize() with RAD_ELBO(exact=True)."
    )


def _works_without_the_loss(optim: Any, optim_state: PyTree, given: object) -> bool:
    """Whether the gradient and the parameters are enough for an optimizer of optax."""
    if not isinstance(given, optax.GradientTransformation):
        return False
    params = optim.get_params(optim_state)
    try:
        jax.eval_shape(lambda p: given.update(p, given.init(p), p), params)
    except Exception:  # it needs more, whatever it says
        return False
    return True
