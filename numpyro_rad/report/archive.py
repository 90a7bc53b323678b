"""``to_arviz``: what a fit found and what is known about it, as ArviZ's container, for its plots and for files.

Draws from the guide stand in for a posterior sample, laid out as one chain. For each of them the log density of the
model, ``lp``, and of the guide, ``log_q``, are kept, so that ``arviz.loo_approximate_posterior`` can correct for the
difference by importance weights exp(lp - log_q) (Magnusson et al. 2019). ArviZ 1.x has ``xarray.DataTree`` for a
container, 0.x has ``InferenceData``.
"""

from __future__ import annotations

import importlib.metadata
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpyro.infer import SVI

from numpyro_rad.annotations import Key
from numpyro_rad.diagnostics.draws import Draws, collected
from numpyro_rad.diagnostics.records import FitRecord, GradientVariance, Track, Validation, to_dict
from numpyro_rad.fits import values_of, watched_state
from numpyro_rad.mistakes import kwargs_checked

SAMPLE = ("chain", "draw")

_NOTE = (
    "Independent draws from the guide, as one chain: R-hat is NaN for one chain and, like the effective sample size, "
    "would say nothing about the fit. arviz.summary(data, kind='stats') leaves both out. The report judges the fit."
)

_RESERVED = (*SAMPLE, "sample")  # the last is what ArviZ calls chain and draw when it stacks them


@kwargs_checked
def to_arviz(
    svi: SVI,
    result: Any,
    *args: Any,
    key: Key,
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
        draws = Draws(svi, values, args, {**kwargs, **svi.static_kwargs})
    wanted = [*["log_likelihood"] * log_likelihood, *["posterior_predictive"] * posterior_predictive]
    found = collected(draws, key, num_samples, chunk_size, ["posterior", "sample_stats", *wanted])
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


# -- containers --------------------------------------------------------------------------------------------------------


class _Names:
    """Names that containers and files take: of sites, and of dimensions, which make room for them.

    The same name is given the same one in all groups.

    :param sites: names of the sites, in order; those that can be kept are.
    """

    def __init__(self, sites: Iterable[str]) -> None:
        self._taken: set[str] = set(_RESERVED)
        self._given: dict[object, str] = {}
        for site in sorted(sites, key=lambda name: _free(name, _RESERVED) != name):  # stable: otherwise in order
            self._new(site, site)

    def of(self, site: str) -> str:
        return self._new(site, site)

    def of_plate(self, plate: str, size: int) -> str:
        return self._new((plate, size), plate)

    def of_axis(self, site: str, axis: int, size: int) -> str:
        return self._new((site, axis, size), f"{self.of(site)}_dim_{axis}")

    def _new(self, key: object, name: str) -> str:
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
