"""What the guide says of the latent variables, and whether the data look like what it predicts, in a few numbers.

Draws are made one by one and reduced at once to a bounded number of entries (:data:`ENTRIES` in all), so that memory is
that of one draw, whatever the size of the model and of the data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.infer import SVI

from numpyro_rad.ad import _jax
from numpyro_rad.annotations import Key
from numpyro_rad.diagnostics.draws import Draws, collected
from numpyro_rad.diagnostics.records import Posterior, PredictiveCheck, SiteSummary
from numpyro_rad.fits import Fit, values_of, watched_state

DRAWS = 300
"""Of the guide: they know a mean to 6 % of the standard deviation."""

ENTRIES = 2**15
"""Of all sites together, at which large ones are looked at; they are spread evenly."""

FEW = 8
"""Entries of a site up to which each has a row of its own."""

_CATEGORIES = (dist.CategoricalProbs, dist.CategoricalLogits, dist.MultinomialProbs, dist.MultinomialLogits)


def posterior_summary(svi: SVI, fit: Fit, *args: Any, key: Key, **kwargs: Any) -> Posterior:
    """Mean, standard deviation and quantiles of the sites, and a posterior predictive check where there are data.

    :param svi: what fitted; its model and guide are used, its loss is not.
    :param fit: its result, its state or its parameters.
    :param args: arguments of model and guide, with the full data.
    :param key: a JAX PRNG key.
    :param kwargs: keyword arguments of model and guide.
    :return: the numbers; what could not be computed is left out and ``notes`` says why.
    """
    if getattr(svi.loss, "multi_sample_guide", False):
        return Posterior((), (), 0, ("No posterior summary: the guide proposes several samples at once.",))
    values = values_of(svi, fit, "posterior_summary")
    notes: list[str] = []
    for wanted, missing in ((["posterior_predictive"], "predictive check"), ([], "posterior summary")):
        try:
            with watched_state(values, "posterior_summary"):
                draws = Draws(svi, values, args, {**kwargs, **svi.static_kwargs})
            sites, checks, remarks = _measured(draws, key, wanted)
        except Exception as error:  # what model and guide cannot do must not lose the other numbers
            if _jax.is_out_of_memory(error):
                raise
            notes.append(f"No {missing}: model and guide do not work for it ({error!r}).")
        else:
            return Posterior(sites, checks, DRAWS, (*notes, *remarks))
    return Posterior((), (), 0, tuple(notes))


def _measured(
    draws: Draws, key: Key, wanted: list[str]
) -> tuple[tuple[SiteSummary, ...], tuple[PredictiveCheck, ...], list[str]]:
    """Summaries, checks, and why some of the latter are not there."""
    observed = {n: s for n, s in draws.observed.items() if wanted and _has_order(s)}
    most = max(1, ENTRIES // max(1, len(draws.posterior) + len(observed)))
    shapes: dict[str, tuple[int, ...]] = {}  # of the sites, known when a draw is traced
    known = {n: _Observed(s, most) for n, s in observed.items()}

    def entries(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        kept = {n: jnp.asarray(x) for n, x in found["posterior"].items() if _is_number(x)}
        shapes.update({n: x.shape for n, x in kept.items()})
        again = found.get("posterior_predictive", {})
        return {
            "sites": {n: jnp.ravel(x)[_spread(x.size, most)].astype(float) for n, x in kept.items() if x.size},
            "predicted": {
                n: jnp.ravel(again[n])[at.index].astype(float) for n, at in known.items() if at.is_predicted(again[n])
            },
        }

    found = collected(draws, key, DRAWS, None, wanted, entries)
    drawn, predicted = found["sites"], found["predicted"]  # in the alphabet's order; shapes have the model's
    sites = tuple(s for n in shapes if n in drawn for s in _summaries(n, shapes[n], drawn[n][0].astype(float)))
    there = [n for n in known if n in predicted and len(known[n].index)]
    remarks = [
        f"No predictive check of {n}: the model draws one value for several data. Put the site in a plate."
        for n in known
        if n not in predicted
    ]
    return sites, tuple(_check(n, known[n].values, predicted[n][0].astype(float)) for n in there), remarks


class _Observed:
    """Entries of the data of a site that are looked at: those that are not masked, spread evenly."""

    def __init__(self, site: dict[str, Any], most: int) -> None:
        value, mask = np.asarray(site["value"]), np.asarray(True)
        for fn in _layers(site["fn"]):
            if isinstance(fn, dist.MaskedDistribution):
                mask = mask & np.asarray(fn._mask)
        mask = np.reshape(mask, np.shape(mask) + (1,) * (np.ndim(mask) and site["fn"].event_dim))
        self.shape = value.shape
        there = np.flatnonzero(np.broadcast_to(mask, value.shape).ravel() & np.isfinite(value.ravel()))
        self.index = there[_spread(len(there), most)]
        self.values = value.ravel()[self.index].astype(float)

    def is_predicted(self, again: dict[str, Any]) -> bool:
        return np.shape(again) == self.shape


def _spread(size: int, most: int) -> np.ndarray:
    """Indices of at most so many entries."""
    return np.unique(np.linspace(0, max(size - 1, 0), min(size, most)).round().astype(int))


def _is_number(x: object) -> bool:
    dtype = jnp.result_type(x)
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))


def _has_order(site: dict[str, Any]) -> bool:
    """Whether the values of a site are numbers of which one is larger than another; labels are not."""
    *_, fn = _layers(site["fn"])
    return not isinstance(fn, _CATEGORIES) and not isinstance(site["value"], dict) and _is_number(site["value"])


def _layers(fn: Any) -> Iterator[Any]:
    """A distribution and what is inside of it: plates, masks and transforms wrap the one that was named."""
    while True:
        yield fn
        if not hasattr(fn, "base_dist"):
            return
        fn = fn.base_dist


def _summaries(name: str, shape: tuple[int, ...], drawn: np.ndarray) -> Iterator[SiteSummary]:
    """Of draws of the entries of a site, shape (draws, entries): one for each entry of a small site, one of a large."""
    size = math.prod(shape)
    if not 1 < size <= FEW or drawn.shape[1] < size:
        yield _summary(name, size, drawn)
        return
    for i, index in enumerate(np.ndindex(shape)):
        yield _summary(f"{name}[{', '.join(map(str, index))}]", 1, drawn[:, i : i + 1])


def _summary(name: str, size: int, drawn: np.ndarray) -> SiteSummary:
    low, high = np.quantile(drawn, [0.05, 0.95], axis=0)
    ranges = ((float(x.min()), float(x.max())) for x in (drawn.mean(0), drawn.std(0, ddof=1), low, high))
    return SiteSummary(name, size, *ranges)


def _check(name: str, observed: np.ndarray, drawn: np.ndarray) -> PredictiveCheck:
    """Data, shape (observations,), beside draws of them, shape (draws, observations)."""
    low, high = np.quantile(drawn, [0.05, 0.95], axis=0)
    inside = float(np.mean((low <= observed) & (observed <= high)))
    mean, sd = (_interval(x) for x in (drawn.mean(1), drawn.std(1)))
    return PredictiveCheck(name, len(observed), inside, float(observed.mean()), mean, float(observed.std()), sd)


def _interval(drawn: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(drawn, [0.05, 0.95])
    return float(low), float(high)
