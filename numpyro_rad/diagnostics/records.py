"""What is known about a fit, as plain data: numbers, names and arrays that :func:`to_dict` turns into JSON.

``diagnostics`` and ``tracking`` measure, ``quality`` judges, ``svi`` collects, ``report`` and ``archive`` show. All of
them speak in the records of this module, and none of these needs JAX.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any, TypeVar

import numpy as np

from numpyro_rad.tables import TextTable
from numpyro_rad.wording import estimate_text, is_told_from_zero, number, positive_text, seconds_text, size_text

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number that was estimated from random draws.

    :ivar value: the estimate; an unbiased estimate of a variance may be negative.
    :ivar standard_error: its standard error; NaN if there are too few draws for one.
    """

    value: float
    standard_error: float

    def __str__(self) -> str:
        return estimate_text(self.value, self.standard_error)


@dataclasses.dataclass(frozen=True)
class BlockVariance:
    """Noise of the gradient in one block of parameters; variances are traces of covariances, tr Cov(g).

    The parts add up to the total by the law of total variance.

    :ivar name: of the block: a site, a parameter, a layer, or "total".
    :ivar size: number of parameters.
    :ivar minibatch: variance, over minibatches, of the gradient's mean given the minibatch.
    :ivar guide: mean, over minibatches, of the variance that the guide's samples (and dropout, ...) add.
    :ivar path: what the codes of the residuals add.
    :ivar total: the sum of the three.
    :ivar squared_norm: squared norm of the mean gradient.
    """

    name: str
    size: int
    minibatch: Estimate
    guide: Estimate
    path: Estimate
    total: Estimate
    squared_norm: Estimate


@dataclasses.dataclass(frozen=True)
class GradientVariance:
    """How noisy a gradient of SVI is, and where the noise comes from; ``print`` it.

    :ivar total: all parameters together.
    :ivar blocks: the same by block.
    :ivar rho: path variance / (minibatch + guide variance).
    :ivar rho_interval: confidence interval of it (95 %).
    :ivar predicted_rho: what the plan predicted for it; None where nothing is predicted.
    :ivar signal_to_noise: squared norm of the mean gradient / total variance.
    :ivar noise_scale: total variance / squared norm (McCandlish et al. 2018), in gradients of this size.
    :ivar draws: independent replicates, of up to four gradients each.
    :ivar seconds: for "exact" and "randomized", seconds of one gradient; empty if not measured.
    :ivar temporary_bytes: for the same, temporary memory of one compiled gradient, if the compiler says it.
    :ivar efficiency: for the same, 1 / (variance x seconds) relative to "exact"; empty if not measured.
    :ivar memory_efficiency: the same with bytes in the place of seconds.
    """

    total: BlockVariance
    blocks: tuple[BlockVariance, ...]
    rho: Estimate
    rho_interval: tuple[float, float]
    predicted_rho: float | None
    signal_to_noise: Estimate
    noise_scale: Estimate
    draws: int
    seconds: dict[str, float]
    temporary_bytes: dict[str, int]
    efficiency: dict[str, float]
    memory_efficiency: dict[str, float]

    @property
    def rho_text(self) -> str:
        """ρ with its interval and its prediction, as far as they say something."""
        low, high = (number(x) for x in self.rho_interval)
        text = "ρ = path / (minibatch + guide)"
        if self._hides_the_exact:
            text += " is not known: what codes add hides what the exact gradient varies"
        else:
            text += f" = {positive_text(self.rho.value, self.rho.standard_error)}"
            text += f", 95 % interval {low} to {high}" if self.rho.standard_error > 0 else ""
        return text + ("" if self.predicted_rho is None else f"; the plan predicted {number(self.predicted_rho)}")

    @property
    def _hides_the_exact(self) -> bool:
        """Whether codes add variance for certain, beside which that of the exact gradient may be anything."""
        path, parts = self.total.path, (self.total.minibatch, self.total.guide)
        exact, error = sum(p.value for p in parts), math.hypot(*(p.standard_error for p in parts))
        adds = path.value > 0 and path.standard_error > 0 and is_told_from_zero(path.value, path.standard_error)
        return adds and not (exact > 0 and is_told_from_zero(exact, error))

    @property
    def signal_text(self) -> str:
        """Signal-to-noise ratio and noise scale, as far as they say something."""
        norm, total = self.total.squared_norm, self.total.total
        if not is_told_from_zero(total.value, total.standard_error) or total.value <= 0:
            if self._hides_the_exact:
                return "Nothing can be said of the signal: more draws, or codes that add less, would tell"
            return "The gradient has no noise that could be measured"
        if not is_told_from_zero(norm.value, norm.standard_error) or norm.value <= 0:
            return (
                "The mean gradient is not distinguishable from 0 in its noise, so neither a signal-to-noise ratio nor "
                "a gradient noise scale is known"
            )
        return (
            f"Signal-to-noise ratio {self.signal_to_noise}; gradient noise scale {self.noise_scale} gradients of this "
            "size"
        )

    def __str__(self) -> str:
        """A table: one row for each block, variances with their standard errors, and what follows from them."""
        return str(self._table())

    def _repr_html_(self) -> str:
        return self._table().html()

    def _table(self) -> TextTable:
        columns = ("minibatch", "guide", "path", "total", "squared_norm")
        *rows, last = (
            [b.name, str(b.size), *(str(getattr(b, column)) for column in columns)] for b in (*self.blocks, self.total)
        )
        header = ("block", "size", *columns)
        lines = [f"{self.rho_text}.", f"{self.signal_text}. {self.draws} draws."]
        for name, seconds in self.seconds.items():
            size = f" and {size_text(self.temporary_bytes[name])}" if name in self.temporary_bytes else ""
            line = f"{name}: {seconds_text(seconds)}{size} for one gradient"
            if name in self.efficiency:
                line += f"; relative to exact, 1 / (variance x seconds) is {self.efficiency[name]:.3g}"
            if name in self.memory_efficiency:
                line += f" and 1 / (variance x bytes) {self.memory_efficiency[name]:.3g}"
            lines.append(line)
        return TextTable(header, rows, frozenset(range(1, len(header))), lines, last)


@dataclasses.dataclass(frozen=True)
class Alarm:
    """Something that the user of a fit should know.

    :ivar step: when it was seen, in steps of the optimizer.
    :ivar kind: "rho" (codes add too much variance), "nonfinite" (a NaN or infinite loss or gradient), "signal" (a
        gradient lost in its noise), "replan" (a new plan was made), ...
    :ivar site: where, empty for the whole fit.
    :ivar message: in words, and what to try.
    """

    step: int
    kind: str
    site: str
    message: str


@dataclasses.dataclass(frozen=True, eq=False)
class Track:
    """Noise of the gradient during a fit: one row for each time that it was looked at, one column for each parameter.

    Single looks are noisy; average over a few of them before dividing.

    :ivar names: names of the parameters, in order.
    :ivar steps: when, shape (looks,).
    :ivar path: unbiased estimates of the path variance, shape (looks, names).
    :ivar total: unbiased estimates of the total variance, shape (looks, names).
    :ivar squared_norm: unbiased estimates of the squared norm of the mean gradient, shape (looks, names).
    :ivar rho: running average of path / (total - path), shape (looks,).
    :ivar seconds: wall time of the fit until then, shape (looks,).
    :ivar rho_max: the ρ above which there is an alarm.
    """

    names: tuple[str, ...]
    steps: np.ndarray
    path: np.ndarray
    total: np.ndarray
    squared_norm: np.ndarray
    rho: np.ndarray
    seconds: np.ndarray
    rho_max: float = 0.5


@dataclasses.dataclass(frozen=True, eq=False)
class Validation:
    """Loss on held-out data during a fit: one row for each time that it was looked at, one column for each draw.

    The loss is the negative ELBO with the held-out data in the place of the training data: the divergence of the guide
    from the prior counts once, and the likelihood as the model scales it. So its level depends on the number of rows,
    unlike that of the training loss; what has a meaning are differences along the fit. All rows are of the same draws.

    :ivar steps: when, shape (looks,).
    :ivar losses: shape (looks, draws).
    """

    steps: np.ndarray
    losses: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """The loss of each look, shape (looks,)."""
        with np.errstate(invalid="ignore"):  # infinities of both signs
            return np.asarray(self.losses, float).mean(1)


@dataclasses.dataclass(frozen=True)
class FitQuality:
    """How good a fit is.

    :ivar elbo: the ELBO on the data, evaluated exactly.
    :ivar pareto_k: the shape of the tail of the importance weights; above 0.7 expectations under the guide cannot be
        trusted to be those under the posterior. Infinite if one draw outweighs all others. None if it was not computed.
    :ivar r_hat: the largest split R-hat of the iterates; None if no iterates were recorded.
    :ivar mcse: the largest Monte Carlo standard error of the mean iterate, relative to the spread of the iterates.
    :ivar converged: whether the iterates have converged by the rule of Dhaka et al. 2020; None if unknown.
    :ivar notes: what could not be computed and why, in words.
    """

    elbo: Estimate
    pareto_k: float | None
    r_hat: float | None
    mcse: float | None
    converged: bool | None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class SiteSummary:
    """A site under the guide, or an entry of a small one. Of each number the smallest and the largest over its entries.

    :ivar name: of the site, with the index of an entry.
    :ivar size: number of its entries; of a large site some thousand are looked at.
    :ivar mean: range of the means.
    :ivar sd: range of the standard deviations.
    :ivar low: range of the 5 % quantiles.
    :ivar high: range of the 95 % quantiles.
    """

    name: str
    size: int
    mean: tuple[float, float]
    sd: tuple[float, float]
    low: tuple[float, float]
    high: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class PredictiveCheck:
    """Data beside what the fit predicts for them; intervals hold 90 %, from the 5 % to the 95 % quantile.

    :ivar name: of the observed site.
    :ivar size: number of observations that were looked at.
    :ivar inside: share of the observations that lie in their own predictive interval; 0.9 is expected of the
        distribution that made them.
    :ivar mean: mean of the observations.
    :ivar predicted_mean: interval for the mean of as many new ones.
    :ivar sd: standard deviation of the observations.
    :ivar predicted_sd: interval for that of new ones.
    """

    name: str
    size: int
    inside: float
    mean: float
    predicted_mean: tuple[float, float]
    sd: float
    predicted_sd: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Posterior:
    """What the guide says of the latent variables and of the data.

    :ivar sites: latent and deterministic sites.
    :ivar checks: observed sites whose values are numbers.
    :ivar draws: of the guide, from which all this is.
    :ivar notes: what could not be computed and why, in words.
    """

    sites: tuple[SiteSummary, ...]
    checks: tuple[PredictiveCheck, ...]
    draws: int
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Convergence:
    """Whether the iterates of a run have converged, see :class:`numpyro_rad.diagnostics.Iterates`.

    :ivar converged: None if too few iterates were recorded.
    :ivar told: the numbers that it goes by and their limits, in words.
    """

    converged: bool | None
    told: str


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """One residual of a plan, see ``numpyro_rad.Explanation``."""

    line: str
    site: str
    operation: str
    shape: tuple[int, ...]
    decision: str
    exact_bytes: int
    stored_bytes: int
    relative_variance: float


@dataclasses.dataclass(frozen=True)
class PlanRecord:
    """A plan, as a report shows it.

    :ivar rows: its residuals.
    :ivar stored_bytes: bytes held between the sweeps.
    :ivar exact_bytes: bytes of the same residuals stored exactly.
    :ivar temporary_bytes: temporary memory of the compiled step; None if unknown.
    :ivar added_seconds: predicted added time, relative to that of the exact step; None where nothing is predicted.
    :ivar added_variance: predicted added variance, relative to that of the exact gradient.
    :ivar timeline: bytes held at times from 0 to 1 (forward sweep) and 1 to 2 (backward sweep): times, bytes of this
        plan, bytes if all were stored exactly.
    :ivar exact_temporary_bytes: temporary memory of the compiled step with exact gradients; None if unknown.
    :ivar exact_loss: the loss whose gradients these are, as it is written in a program.
    :ivar untouched: whether the program is left to JAX's own reverse mode.
    """

    rows: tuple[PlanRow, ...]
    stored_bytes: int
    exact_bytes: int
    temporary_bytes: int | None
    added_seconds: float | None
    added_variance: float | None
    timeline: tuple[tuple[float, float, float], ...]
    exact_temporary_bytes: int | None = None
    exact_loss: str = "Trace_ELBO()"
    untouched: bool = False

    @property
    def saves(self) -> bool | None:
        """Whether the whole step takes less memory than the exact one, beyond what a compiler's mood may do (5 %)."""
        if self.temporary_bytes is None or self.exact_temporary_bytes is None:
            return None
        return self.exact_temporary_bytes > 1.05 * self.temporary_bytes


@dataclasses.dataclass(frozen=True, eq=False)
class FitRecord:
    """All that is known about a fit: what a report shows.

    :ivar title: what was fitted, for example the names of model and guide.
    :ivar created: date and time, ISO 8601.
    :ivar versions: of the packages that matter, and the device.
    :ivar options: of the ELBO and of the run, as text.
    :ivar num_steps: steps taken.
    :ivar num_params: number of parameters.
    :ivar seconds: wall time of the run, compilation included.
    :ivar losses: loss of every step, shape (num_steps,).
    :ivar alarms: what was noticed.
    :ivar plan: how residuals are stored; None for an ELBO that stores them exactly.
    :ivar track: noise of the gradient during the fit.
    :ivar gradient_variance: noise of the gradient at the end, split by source.
    :ivar quality: how good the fit is.
    :ivar validation: loss on held-out data during the fit.
    :ivar convergence: whether its iterates have converged; None if they were not recorded.
    :ivar posterior: what the guide says of the latent variables and of the data.
    :ivar activities: seconds of each part of the run, which add up to ``seconds``; empty if they were not measured.
    """

    title: str
    created: str
    versions: dict[str, str]
    options: dict[str, str]
    num_steps: int
    num_params: int
    seconds: float
    losses: np.ndarray
    alarms: tuple[Alarm, ...] = ()
    plan: PlanRecord | None = None
    track: Track | None = None
    gradient_variance: GradientVariance | None = None
    quality: FitQuality | None = None
    validation: Validation | None = None
    convergence: Convergence | None = None
    posterior: Posterior | None = None
    activities: dict[str, float] = dataclasses.field(default_factory=dict)


def to_dict(record: Any) -> Any:
    """A record as what ``json.dumps`` takes; NaN and infinities are strings, which JSON has no numbers for."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        return {f.name: to_dict(getattr(record, f.name)) for f in dataclasses.fields(record)}
    if isinstance(record, np.ndarray):
        return to_dict(record.tolist())
    if isinstance(record, (tuple, list)):
        return [to_dict(x) for x in record]
    if isinstance(record, dict):
        return {str(k): to_dict(v) for k, v in record.items()}
    if isinstance(record, (np.generic, np.bool_)):
        return to_dict(record.item())
    if isinstance(record, float) and not np.isfinite(record):
        return str(record)
    return record


def from_dict(kind: type[T], data: Any) -> T:
    """The record of a class that :func:`to_dict` took apart.

    :raises ValueError: if ``data`` is not that of such a record.
    """
    try:
        return _built(kind, data)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"this is not the data of a {kind.__name__}, or one of another version: {error!r}. Save it again with this "
            "version of numpyro_rad."
        ) from error


def _built(kind: Any, data: Any) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        (inner,) = (a for a in args if a is not type(None))
        return None if data is None else _built(inner, data)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        missing = dataclasses.MISSING
        fields = [f for f in dataclasses.fields(kind) if f.name in data or f.default is f.default_factory is missing]
        found = {f.name: _built(hints[f.name], data[f.name]) for f in fields}  # older data lack newer fields
        return kind(**found)  # type: ignore
    if origin is tuple:
        inner = [args[0]] * len(data) if args[-1] is Ellipsis else args
        return tuple(_built(a, x) for a, x in zip(inner, data, strict=True))
    if origin is dict:
        return {k: _built(args[1], v) for k, v in data.items()}
    if kind is np.ndarray:
        return np.asarray(data, None if _all_integers(data) else float)
    if kind is float:
        return float(data)
    if not isinstance(data, kind):
        raise TypeError(f"{data!r} is not a {kind.__name__}")
    return data


def _all_integers(data: Any) -> bool:
    return all(map(_all_integers, data)) if isinstance(data, list) else isinstance(data, int)
