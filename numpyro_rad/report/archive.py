"""``to_arviz``: what a fit found and what is known about it, as ArviZ's container, for its plots and for files.

Draws from the guide stand in for a posterior sample, laid out as one chain. For each of them the log density of the
model, ``lp``, and of the guide, ``log_q``, are kept, so that ``arviz.loo_approximate_posterior`` can correct for the
difference by importance weights exp(lp - log_q) (Magnusson et al. 2019). ArviZ 1.x has ``xarray.DataTree`` for a
container, 0.x has ``InferenceData``.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions.distribution import Unit
from numpyro.handlers import replay, seed, substitute, trace, uncondition
from numpyro.infer import SVI
from numpyro.infer.util import log_density

from numpyro_rad.diagnostics.plates import FullPlates
from numpyro_rad.diagnostics.records import FitRecord, GradientVariance, Track, Validation, to_dict
from numpyro_rad.fits import values_of, watched_state
from numpyro_rad.transform import with_arguments

SAMPLE = ("chain", "draw")

_WAITING_BYTES = 2**23  # of draws on the device

_NOTE = (
    "Independent draws from the guide, as one chain: R-hat is NaN for one chain and, like the effective sample size, "
    "would say nothing about the fit. arviz.summary(data, kind='stats') leaves both out. The report judges the fit."
)

_RESERVED = (*SAMPLE, "sample")  # the last is what ArviZ calls chain and draw when it stacks them


def to_arviz(
    svi: SVI,
    result: Any,
    *args: Any,
    key: Any,
    num_samples: int = 1000,
    record: FitRecord | None = None,
    log_likelihood: bool = True,
    posterior_predictive: bool = True,
    chunk_size: int | None = None,
    **kwargs: Any,
) -> Any:
    """Draws from the guide and all that goes with them, for ArviZ.

    The groups are ``posterior`` (latent and deterministic sites), ``posterior_predictive``, ``log_likelihood``,
    ``observed_data``, ``sample_stats`` (``lp`` and ``log_q``, the log densities of model and guide) and, with a record,
    ``fit`` (the losses, those on held-out data for each draw of the guide) and ``gradient_variance`` (by site, step,
    block and source; see :class:`~numpyro_rad.diagnostics.records.Track`). Dimensions of plates bear their names.
    Plates that draw minibatches take all data here. Discrete sites of the model that the guide leaves out are drawn
    given the rest; that takes ``funsor``.

    Sites keep their names except where ArviZ or a file could not tell them apart. A slash becomes a dot, since netCDF
    and zarr take it for a group. The names ``chain``, ``draw`` and ``sample``, the empty one, those of dots alone and
    those that another site has already get as many underscores at the end as it takes (``chain_``). The name in the
    model is then the attribute ``site`` of the variable. Plates are renamed in the same way, also where a site has
    their name. A deterministic site that is a tree of arrays becomes one variable for each of them, ``site.entry``.

    R-hat and effective sample size of these draws say nothing about the fit: they are independent by construction. Of
    one chain R-hat is NaN; ``arviz.summary(data, kind="stats")`` leaves both out, as the note of the group
    ``posterior`` says so.

    :param svi: what fitted; its model and guide are used, its loss is not.
    :param result: what ``svi.run`` returned, a state of it, or the parameters alone (``svi.get_params(state)``).
    :param args: arguments of model and guide, with the full data: a likelihood of a minibatch is none of the data.
    :param key: a JAX PRNG key; the same one gives the same draws.
    :param num_samples: number of draws.
    :param record: what is known about the fit.
    :param log_likelihood: whether to compute it: one number for each draw and observation.
    :param posterior_predictive: whether to draw the observed sites anew for each draw.
    :param chunk_size: draws whose results wait on the device until they go to the host; by default as many as take
        8 MiB, at least one. They are made one after the other, in the memory of one.
    :param kwargs: keyword arguments of model and guide.
    :return: a ``DataTree`` (ArviZ 1.x) or ``InferenceData`` (0.x), arrays on the host.
    :raises ImportError: without ArviZ.
    :raises ValueError: for ``num_samples`` or ``chunk_size`` below 1, or a guide of several samples at once.

    Example::

        data = to_arviz(svi, result, x, y, key=jax.random.key(1))
        arviz.loo_approximate_posterior(data, data["sample_stats"]["lp"], data["sample_stats"]["log_q"])
        data.to_netcdf("fit.nc")
    """
    generation = _arviz_generation()
    for name, value in (("num_samples", num_samples), ("chunk_size", chunk_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: it takes at least 1.")
    if getattr(svi.loss, "multi_sample_guide", False):
        raise ValueError(
            "to_arviz takes guides that propose one sample at a time; those of a multi_sample_guide belong together. "
            "Write a guide that draws one of them."
        )
    values = values_of(svi, result, "to_arviz")
    with watched_state(values, "to_arviz"):
        draws = _Draws(svi, values, args, {**kwargs, **svi.static_kwargs})
    wanted = [*["log_likelihood"] * log_likelihood, *["posterior_predictive"] * posterior_predictive]
    found = _collected(draws, key, num_samples, chunk_size, ["posterior", "sample_stats", *wanted])
    stats = {"sample_stats": _dataset(found.pop("sample_stats"), {}, SAMPLE, _Names(()))}
    observed = {name: np.asarray(site["value"]) for name, site in draws.observed.items()}
    names = _Names([*found["posterior"], *observed])
    groups = {group: _dataset(sites, draws.dims(group), SAMPLE, names) for group, sites in found.items() if sites}
    if "posterior" in groups:
        groups["posterior"].attrs["note"] = _NOTE
    groups |= stats
    if observed:
        groups["observed_data"] = _dataset(observed, draws.dims("observed_data"), (), names)
    groups.update(_of_record(record) if record is not None else ())
    return _container(groups, generation)


def _arviz_generation() -> int:
    try:
        return int(importlib.metadata.version("arviz").split(".")[0])
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError("to_arviz needs ArviZ: pip install numpyro_rad[arviz]") from error


# -- draws -------------------------------------------------------------------------------------------------------------


class _Draws:
    """One draw at a time from a guide, with what the model says of it."""

    def __init__(self, svi: SVI, values: dict[str, Any], args: tuple, kwargs: dict[str, Any]) -> None:
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

    def _density(self, fn: Callable, values: dict[str, Any]) -> tuple[Any, Any]:
        return log_density(fn, self.args, self.kwargs, values)

    def _values(self, guide_trace: Any) -> dict[str, Any]:
        """Parameters and mutable state, the latter as the guide leaves it."""
        changed = {n: s["value"] for n, s in guide_trace.items() if s["type"] == "mutable"}
        return {**self.values, **changed}

    def draw(self, key: Any, wanted: list[str]) -> dict[str, dict[str, Any]]:
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

    def _of_model(self, guide_trace: Any, values: dict[str, Any], key: Any) -> tuple[Any, Any]:
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


def _arrays(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A site's value; if it is a tree, its arrays with names of their own."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(value)[0]:
        yield name + "." * bool(path) + jax.tree_util.keystr(path, simple=True, separator="."), leaf


def _plate_dims(site: Any, group: str) -> Iterator[str | None]:
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


def _collected(
    draws: _Draws, key: Any, n: int, chunk_size: int | None, wanted: list[str]
) -> dict[str, dict[str, np.ndarray]]:
    """All draws on the host, shape (1, draws, ...), made in batches of one size so that they compile once."""

    def one_by_one(keys: Any, values: dict[str, Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        given = copy.copy(draws)
        given.values, given.args, given.kwargs = values, args, kwargs
        return jax.lax.map(lambda k: given.draw(k, wanted), keys)

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


# -- containers --------------------------------------------------------------------------------------------------------


class _Names:
    """Names that containers and files take: of sites, and of dimensions, which make room for them.

    The same name is given the same one in all groups.

    :param sites: names of the sites, in order; those that can be kept are.
    """

    def __init__(self, sites: Iterable[str]) -> None:
        self._taken: set[str] = set(_RESERVED)
        self._given: dict[Any, str] = {}
        for site in sorted(sites, key=lambda name: _free(name, _RESERVED) != name):  # stable: otherwise in order
            self._new(site, site)

    def of(self, site: str) -> str:
        return self._new(site, site)

    def of_plate(self, plate: str, size: int) -> str:
        return self._new((plate, size), plate)

    def of_axis(self, site: str, axis: int, size: int) -> str:
        return self._new((site, axis, size), f"{self.of(site)}_dim_{axis}")

    def _new(self, key: Any, name: str) -> str:
        if key not in self._given:
            self._given[key] = _free(name, self._taken)
            self._taken.add(self._given[key])
        return self._given[key]


def _free(name: str, taken: Iterable[str]) -> str:
    """The name, made safe and with as many underscores as it takes to be another one than those that are taken."""
    name = name.replace("/", ".")
    while name in taken or not name.strip("."):  # dots alone are a folder, to files and to DataTree
        name += "_"
    return name


def _unique(names: Iterable[str]) -> list[str]:
    """Labels of a coordinate, each once."""
    found: list[str] = []
    for name in names:
        while name in found:
            name += "_"
        found.append(name)
    return found


def _dataset(
    sites: Mapping[str, Any], dims: Mapping[str, list[str | None]], leading: tuple[str, ...], names: _Names
) -> Any:
    import xarray

    variables, coords = {}, {}
    for site, value in sites.items():
        name, own = names.of(site), value.shape[len(leading) :]
        named = dims.get(site, [])
        named = named if len(named) == len(own) else [None] * len(own)
        tail = [
            names.of_axis(site, i, size) if plate is None else names.of_plate(plate, size)
            for i, (plate, size) in enumerate(zip(named, own, strict=True))
        ]
        variables[name] = ((*leading, *tail), _storable(value), {} if name == site else {"site": site})
        coords.update({d: np.arange(s) for d, s in zip((*leading, *tail), value.shape, strict=True)})
    return xarray.Dataset(variables, coords, {"inference_library": "numpyro", "created_by": "numpyro_rad"})


def _storable(value: np.ndarray) -> np.ndarray:
    """Numbers of fewer bits than files know (half precision, ``int4``, ...) in the next kind that they do."""
    if jnp.issubdtype(value.dtype, jnp.floating) and value.dtype.itemsize < 4:
        return value.astype(np.float32)
    return value if value.dtype.kind in "biufc" else value.astype(np.int16)


def _of_record(record: FitRecord) -> Iterator[tuple[str, Any]]:
    """The groups of what is known about a fit."""
    import xarray

    told = {f: getattr(record, f) for f in ("title", "created", "num_steps", "num_params", "seconds")}
    nested = {f: json.dumps(to_dict(getattr(record, f))) for f in ("versions", "options", "alarms", "quality")}
    losses = ("step", np.asarray(record.losses, float))
    steps = {"step": np.arange(1, len(record.losses) + 1)}
    looks = {} if record.validation is None else _held_out(record.validation)
    yield "fit", xarray.Dataset({"loss": losses, **looks}, steps, {**told, **nested})
    parts = [] if record.track is None else [_tracked(record.track)]
    parts += [] if record.gradient_variance is None else [_by_source(record.gradient_variance)]
    if parts:
        yield "gradient_variance", xarray.merge(parts, combine_attrs="drop_conflicts")


def _held_out(validation: Validation) -> dict[str, Any]:
    dims = ("validation_step", "guide_draw")
    return {"validation_step": (dims[:1], validation.steps), "validation_loss": (dims, validation.losses)}


def _tracked(track: Track) -> Any:
    import xarray

    by_site = {f: (("step", "site"), getattr(track, f)) for f in ("path", "total", "squared_norm")}
    by_step = {f: ("step", getattr(track, f)) for f in ("rho", "seconds")}
    return xarray.Dataset({**by_site, **by_step}, {"step": track.steps, "site": _unique(track.names)})


def _by_source(measured: GradientVariance) -> Any:
    import xarray

    blocks = (measured.total, *measured.blocks)
    sources = ["minibatch", "guide", "path", "total"]
    variables = {}
    for name, field in (("variance", "value"), ("variance_error", "standard_error")):
        table = [[getattr(getattr(b, s), field) for s in sources] for b in blocks]
        variables[name] = (("block", "source"), np.array(table))
    variables["squared_mean"] = ("block", np.array([b.squared_norm.value for b in blocks]))
    variables["size"] = ("block", np.array([b.size for b in blocks]))
    rest = {k: v for k, v in to_dict(measured).items() if k not in ("total", "blocks")}
    attributes = {"measured": json.dumps(rest)}
    return xarray.Dataset(variables, {"block": _unique(b.name for b in blocks), "source": sources}, attributes)


def _container(groups: dict[str, Any], generation: int) -> Any:
    if generation >= 1:
        import xarray

        return xarray.DataTree.from_dict({f"/{name}": dataset for name, dataset in groups.items()})
    from arviz import InferenceData  # type: ignore[attr-defined]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*not defined in the InferenceData scheme", UserWarning)
        return InferenceData(**groups)
