"""``Draws``: one draw after the other from a guide, with what the model says of it, in the memory of one.

``to_arviz`` keeps them all, the posterior summary of a report a few numbers of each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from numpyro.distributions.distribution import Unit
from numpyro.handlers import replay, seed, substitute, trace, uncondition
from numpyro.infer import SVI
from numpyro.infer.util import log_density

from numpyro_rad.annotations import Key, Kwargs, Params, PyTree
from numpyro_rad.diagnostics.plates import FullPlates
from numpyro_rad.tracing import with_arguments

_WAITING_BYTES = 2**23  # of draws on the device


class Draws:
    """One draw at a time from a guide, with what the model says of it."""

    def __init__(self, svi: SVI, values: Params, args: tuple, kwargs: Kwargs) -> None:
        self.model: Callable = svi.model
        self.guide: Callable = svi.guide
        self.values, self.args, self.kwargs = values, args, kwargs
        self.enumerated: set[str] = set()
        # once outside of any compiled function: for the names and shapes, and because guides set themselves up
        with FullPlates():
            key = jax.random.key(0)
            _, guide_trace = self._density(seed(self.guide, key), self.values)
            model = replay(substitute(seed(self.model, key), self._values(guide_trace)), guide_trace)
            self.sites = trace(model).get_trace(*args, **kwargs)
        sampled = {n: s for n, s in self.sites.items() if s["type"] == "sample"}
        self.observed = {n: s for n, s in sampled.items() if s["is_observed"] and not _is_factor(s["fn"])}
        latent = {n: s for n, s in sampled.items() if not s["is_observed"]}
        self.enumerated = {
            n for n, s in latent.items() if n not in guide_trace and getattr(s["fn"], "has_enumerate_support", False)
        }
        self.posterior = [*latent, *(n for n, s in self.sites.items() if s["type"] == "deterministic")]

    def _density(self, fn: Callable, values: Params) -> tuple[Any, Any]:
        return log_density(fn, self.args, self.kwargs, values)

    def _values(self, guide_trace: Any) -> dict[str, Any]:
        """Parameters and mutable state, the latter as the guide leaves it."""
        changed = {n: s["value"] for n, s in guide_trace.items() if s["type"] == "mutable"}
        return {**self.values, **changed}

    def draw(self, key: Key, wanted: list[str]) -> dict[str, dict[str, Any]]:
        """Sites by group."""
        guide_key, model_key, predictive_key = jax.random.split(key, 3)
        with FullPlates():
            log_q, guide_trace = self._density(seed(self.guide, guide_key), self.values)
            values = self._values(guide_trace)
            lp, sites = self._of_model(guide_trace, values, model_key)
            found = {
                "posterior": dict(x for n in self.posterior for x in _arrays(n, sites[n]["value"])),
                "sample_stats": {"lp": lp, "log_q": log_q},
            }
            if "log_likelihood" in wanted:
                found["log_likelihood"] = {n: sites[n]["fn"].log_prob(sites[n]["value"]) for n in self.observed}
            if "posterior_predictive" in wanted:
                fixed = {n: s["value"] for n, s in sites.items() if s["type"] == "sample" and not s["is_observed"]}
                model = uncondition(seed(substitute(self.model, {**values, **fixed}), predictive_key))
                again = trace(model).get_trace(*self.args, **self.kwargs)
                found["posterior_predictive"] = {n: again[n]["value"] for n in self.observed}
        return found

    def _of_model(self, guide_trace: Any, values: Params, key: Key) -> tuple[Any, Any]:
        """Log density of the model at the guide's draw, and its trace; what is enumerated is summed out of the former
        and drawn for the latter."""
        model = replay(seed(self.model, key), guide_trace)
        if not self.enumerated:
            return self._density(model, values)
        from numpyro.contrib.funsor import config_enumerate, enum, infer_discrete
        from numpyro.contrib.funsor import log_density as log_density_summed

        nesting = max((-f.dim for s in self.sites.values() for f in s.get("cond_indep_stack", ())), default=0)
        summed = enum(config_enumerate(model), -nesting - 1)
        lp, _ = log_density_summed(summed, self.args, self.kwargs, values)
        given = config_enumerate(substitute(model, values))
        drawn = infer_discrete(given, first_available_dim=-nesting - 1, rng_key=key)
        discrete = trace(drawn).get_trace(*self.args, **self.kwargs)
        fixed = {n: discrete[n]["value"] for n in self.enumerated}
        return lp, trace(substitute(substitute(model, values), fixed)).get_trace(*self.args, **self.kwargs)

    def dims(self, group: str) -> dict[str, list[str | None]]:
        """Names of the dimensions of each site, None where it has none of its own: those of plates."""
        return {name: list(_plate_dims(site, group)) for name, site in self.sites.items()}


def _is_factor(fn: Any) -> bool:
    """Whether this is the distribution of ``numpyro.factor``, which has no data; plates and masks wrap it."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, Unit)


def _arrays(name: str, value: PyTree) -> Iterator[tuple[str, jax.Array]]:
    """A site's value; if it is a tree, its arrays with names of their own."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(value)[0]:
        yield name + "." * bool(path) + jax.tree_util.keystr(path, simple=True, separator="."), leaf


def _plate_dims(site: dict[str, Any], group: str) -> Iterator[str | None]:
    """Names of the plates along the dimensions of a site's value, or of its log density."""
    if site["type"] not in ("sample", "deterministic"):
        return
    stack = site["cond_indep_stack"]
    if not isinstance(site["value"], (jax.Array, np.ndarray)):  # a number or a tree
        return
    shape = site["value"].shape
    batch = max((-f.dim for f in stack), default=0)
    if site["type"] == "sample":
        batch = len(shape) - len(site["fn"].event_shape)
    at = {batch + f.dim: f for f in stack}
    for axis in range(batch if group == "log_likelihood" else len(shape)):
        frame = at.get(axis)
        fits = frame is not None and shape[axis] == frame.size
        yield frame.name if frame is not None and fits else None


def collected(
    draws: Draws,
    key: Key,
    n: int,
    chunk_size: int | None,
    wanted: list[str],
    reduce: Callable[[Any], Any] = lambda draw: draw,
) -> dict[str, dict[str, np.ndarray]]:
    """All draws on the host, shape (1, draws, ...), made in batches of one size so that they compile once.

    :param chunk_size: draws that wait on the device; None for as many as take 8 MiB.
    :param wanted: groups besides the posterior and the log densities.
    :param reduce: what is kept of the groups of a draw.
    """

    def one_by_one(keys: Key, values: Params, args: tuple, kwargs: Kwargs) -> PyTree:
        given = copy.copy(draws)
        given.values, given.args, given.kwargs = values, args, kwargs
        return jax.lax.map(lambda k: reduce(given.draw(k, wanted)), keys)

    draw = with_arguments(one_by_one, draws.args, draws.kwargs, jax.random.split(key, 1), draws.values)
    shapes = jax.eval_shape(draw, jax.random.split(key, 1), draws.values)
    one_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    size = min(n, chunk_size or max(1, _WAITING_BYTES // max(one_bytes, 1)))
    keys = jax.random.split(key, -(-n // size) * size)
    found = jax.tree.map(lambda x: np.empty((1, n, *x.shape[1:]), x.dtype), shapes)
    for start in range(0, n, size):
        part = draw(keys[start : start + size], draws.values)
        for whole, new in zip(jax.tree.leaves(found), jax.tree.leaves(part), strict=True):
            whole[0, start : start + size] = np.asarray(new)[: n - start]
    return found
