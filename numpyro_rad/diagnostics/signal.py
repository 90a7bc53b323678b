"""``gradient_signal``: an optax transformation that watches the gradients pass and changes nothing.

For each parameter (a leaf of the pytree, in NumPyro a ``param`` site) it keeps exponential moving averages of the
gradient, m, and of its squared norm, v. For gradients that are independent and have mean μ and covariance Σ,

    E ‖m‖² = ‖μ‖² + c tr Σ,   E v = ‖μ‖² + tr Σ,   c = (1 - β) (1 + βᵗ) / ((1 + β) (1 - βᵗ)) after t gradients,

where c is the sum of the squared weights of the average; solved for the two unknowns,

    ‖μ‖² / tr Σ  =  (‖m‖² - c v) / (v - ‖m‖²),

the signal-to-noise ratio of one gradient. Numerator and denominator are unbiased up to the factor 1 - c; their ratio is
consistent. It costs one copy of the parameters and one pass over the gradients.

Unlike ``optax.monitor`` its state keeps its structure from the first step on, so it works inside ``lax.scan``, that is
in ``SVI.run(progress_bar=False)``. The reciprocal of the ratio is the gradient noise scale of McCandlish, Kaplan,
Amodei, *An Empirical Model of Large-Batch Training* (2018).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from numpyro_rad.annotations import PyTree
from numpyro_rad.transform import named_leaves


class GradientSignalState(NamedTuple):
    """State of :func:`gradient_signal`; each field but the first is a pytree like the parameters.

    :ivar decay: β of the moving averages.
    :ivar count: finite gradients seen, one int32 for each parameter.
    :ivar mean: moving average of the gradient, not yet corrected for its start at zero; at least single precision.
    :ivar square: moving average of the gradient's squared norm, likewise, one number for each parameter.
    :ivar nonfinite: gradients that were not finite, one int32 for each parameter.
    """

    decay: jax.Array
    count: PyTree
    mean: PyTree
    square: PyTree
    nonfinite: PyTree


def gradient_signal(decay: float = 0.99) -> optax.GradientTransformation:
    """Running signal-to-noise ratio of the gradient in each parameter; an optax transformation that changes nothing.

    Put it first in ``optax.chain``: it sees what the transformations before it leave of the gradient.

    **What the numbers confound.** Averages over about ``1 / (1 - decay)`` steps cannot tell a mean that moves from
    noise: while the mean gradient changes within that many steps (early in a fit, or along steep directions), part of
    its movement counts as noise, and the ratio is too small. Correlated gradients (a batch used twice in a row,
    momentum before this transformation) make it too large. At one fixed point, and split by source, the noise is
    measured by ``numpyro_rad.gradient_variance``; this is the cheap watch between two such looks.

    :param decay: β of the moving averages, in (0, 1).
    :return: an ``optax.GradientTransformation``; updates pass unchanged. A gradient with a NaN, an infinity or a
        squared norm that overflows is counted and left out of the averages of its parameter (``SVI.stable_update``
        drops such a step before it gets here).
    :raises ValueError: if ``decay`` is not in (0, 1).

    Example::

        svi = SVI(model, guide, optax.chain(gradient_signal(), optax.adam(1e-3)), RAD_ELBO())
        result = svi.run(key, 1000, x, y, progress_bar=False)
        signal_to_noise(result.state)  # {"auto_loc": 0.02, "auto_scale": 0.004}
    """
    if not 0 < decay < 1:
        raise ValueError(f"decay={decay!r}: a moving average over 1 / (1 - decay) steps needs it in (0, 1). Try 0.99.")

    def init(params: PyTree) -> GradientSignalState:
        def each(make: Callable[[ArrayLike], jax.Array]) -> PyTree:
            return jax.tree.map(make, params)

        return GradientSignalState(
            decay=jnp.asarray(decay, jnp.float32),
            count=each(lambda x: jnp.zeros((), jnp.int32)),
            mean=each(lambda x: jnp.zeros(jnp.shape(x), _wide(x))),
            square=each(lambda x: jnp.zeros((), _wide(x))),
            nonfinite=each(lambda x: jnp.zeros((), jnp.int32)),
        )

    def update(
        updates: optax.Updates, state: PyTree, params: optax.Params | None = None
    ) -> tuple[optax.Updates, GradientSignalState]:
        wide = jax.tree.map(lambda g, m: g.astype(m.dtype), updates, state.mean)
        norms = jax.tree.map(lambda g: jnp.sum(jnp.square(g)), wide)
        good = jax.tree.map(jnp.isfinite, norms)

        def average(old: jax.Array, new: jax.Array, ok: jax.Array) -> jax.Array:
            return jnp.where(ok, decay * old + (1 - decay) * new, old)

        return updates, GradientSignalState(
            decay=state.decay,
            count=jax.tree.map(lambda n, ok: n + ok, state.count, good),
            mean=jax.tree.map(average, state.mean, wide, good),
            square=jax.tree.map(average, state.square, norms, good),
            nonfinite=jax.tree.map(lambda n, ok: n + ~ok, state.nonfinite, good),
        )

    return optax.GradientTransformation(init, update)


def signal_to_noise(state: PyTree) -> dict[str, float]:
    """Signal-to-noise ratio ‖μ‖² / tr Σ of the gradient in each parameter.

    :param state: whatever holds the state of :func:`gradient_signal`: an ``SVIState`` or the result of ``SVI.run``,
        NumPyro's or optax's optimizer state, with ``optax.chain``, ``masked`` and ``multi_transform`` in between.
    :return: from the name of each parameter (parts of nested names joined by dots) to the ratio: NaN with less than two
        gradients. Where there is little signal the estimate varies around zero, so it may be negative.
    :raises ValueError: if there is no such state, or if two of them watch the same parameter.
    """
    return {name: _ratio(*numbers) for name, numbers in _watched(state).items()}


def nonfinite_gradients(state: PyTree) -> dict[str, int]:
    """How many gradients of each parameter were not finite; takes and raises what :func:`signal_to_noise` does."""
    return {name: int(bad) for name, (*_, bad) in _watched(state).items()}


def _wide(x: ArrayLike) -> DTypeLike:
    return jnp.promote_types(jnp.result_type(x), jnp.float32)


def _ratio(decay: np.ndarray, count: np.ndarray, mean: np.ndarray, square: np.ndarray, _nonfinite: np.ndarray) -> float:
    """The formula of this module, from β, t, ‖m‖² and v, the averages not yet corrected for their start at zero."""
    if count < 2:
        return float("nan")
    beta, started = float(decay), 1 - float(decay) ** int(count)
    squared_mean, mean_square = float(mean) / started**2, float(square) / started
    c = (1 - beta) / (1 + beta) * (2 - started) / started
    signal, noise = squared_mean - c * mean_square, mean_square - squared_mean
    return signal / noise if noise > 0 else float("inf") if signal > 0 else float("nan")


def _watched(state: PyTree) -> dict[str, tuple]:
    """By name of a parameter, on the host: what :func:`_ratio` takes."""

    def is_ours(node: object) -> bool:
        return isinstance(node, GradientSignalState)

    found: dict[str, tuple] = {}
    states = [node for node in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(node)]
    for one in states:
        names = [name for name, _ in named_leaves(one.count)]
        norms = [jnp.vdot(m, m) for m in jax.tree.leaves(one.mean)]
        columns = [jax.tree.leaves(x) for x in (one.count, norms, one.square, one.nonfinite)]
        twice = sorted(found.keys() & set(names))
        if twice:
            raise ValueError(
                f"gradient_signal is in this optimizer more than once for {', '.join(twice)}, and which one is meant "
                "is unknown. Pass the part of the state that holds the one to read."
            )
        rows = jax.device_get((one.decay, list(zip(*columns, strict=True))))
        found.update({name: (rows[0], *row) for name, row in zip(names, rows[1], strict=True)})
    if not states:
        raise ValueError(
            f"there is no state of gradient_signal in this {type(state).__name__}: the optimizer does not contain it, "
            "or parameters were passed in place of the state. Use optax.chain(gradient_signal(), optax.adam(1e-3)) and "
            "pass the SVIState."
        )
    return found
