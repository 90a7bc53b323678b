"""Plates that draw minibatches, for what is to look at all data: the ELBO, importance weights, a posterior sample."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.handlers import replay, seed, substitute, trace
from numpyro.infer.autoguide import AutoGuide
from numpyro.primitives import Messenger

from numpyro_rad.annotations import Key, Kwargs, Params
from numpyro_rad.fits import SVI


class FullPlates(Messenger):
    """Plates that would draw a minibatch take everything, in order."""

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "plate" and msg["args"][1] not in (None, msg["args"][0]):
            size = msg["args"][0]
            msg["args"], msg["value"] = (size, size), jnp.arange(size)


def on_all_data(svi: SVI, params: Params, args: tuple, kwargs: Kwargs) -> tuple[SVI, str, bool]:
    """``svi`` with the plates of its model and guide taking all data, where some of them draw minibatches.

    :param params: constrained parameters and mutable state.
    :return: ``svi`` or a copy of it with another model and guide; the names of the plates that draw minibatches, in
        words; and whether they do so still, since the arguments hold fewer rows than the plates are long.
    """
    if isinstance(svi.guide, AutoGuide) and svi.guide.prototype_trace is None:  # it sets itself up, with arrays
        seed(svi.guide, jax.random.key(0))(*args, **kwargs)
    sites = _shapes(svi.model, svi.guide, params, args, kwargs)
    plates = {name for name, size, taken in sites if taken < size}
    names = f"the plate{'s' if len(plates) > 1 else ''} {', '.join(sorted(plates))}" if plates else ""
    if not plates:
        return svi, names, False
    whole = copy.copy(svi)
    whole.model, whole.guide = _with_full_plates(svi.model), _with_full_plates(svi.guide)
    try:
        _shapes(whole.model, whole.guide, params, args, kwargs)
    except Exception:  # whatever a model raises whose rows do not fit
        return svi, names, True
    return whole, names, False


def _with_full_plates(fn: Callable) -> Callable:
    def on_everything(*args: Any, **kwargs: Any) -> Any:
        with FullPlates():
            return fn(*args, **kwargs)

    return on_everything


def _shapes(
    model: Callable, guide: Callable, params: Params, args: tuple, kwargs: Kwargs
) -> list[tuple[str, int, int]]:
    """Name, size and rows taken of each plate, without a computation where the model allows that."""
    found: list[tuple[str, int, int]] = []

    def run(key: Key, params: Params) -> None:
        guide_trace = trace(substitute(seed(guide, key), data=params)).get_trace(*args, **kwargs)
        model_trace = trace(substitute(replay(seed(model, key), guide_trace), data=params)).get_trace(*args, **kwargs)
        both = (*guide_trace.values(), *model_trace.values())
        for site in both:  # rows that do not fit are seen by the densities
            if site["type"] == "sample":
                steps = site["intermediates"]  # without which some flows have no density
                site["fn"].log_prob(site["value"], *([steps] if steps else ()))
        found.extend((s["name"], s["args"][0], s["args"][1] or s["args"][0]) for s in both if s["type"] == "plate")

    jax.eval_shape(run, jax.random.key(0), params)
    return found
