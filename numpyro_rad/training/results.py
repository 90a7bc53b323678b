"""What a run of ``RAD_SVI`` returns: NumPyro's result, and the record of the fit that reports are made from.

:func:`fit_record` makes such a record of a fit whose loop is the user's own.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import platform
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.typing import ArrayLike
from numpyro.infer import ELBO
from numpyro.infer.svi import SVI, SVIRunResult

from numpyro_rad import report
from numpyro_rad.ad import _jax
from numpyro_rad.ad.plan import Plan
from numpyro_rad.annotations import Key, Kwargs
from numpyro_rad.diagnostics.posterior import posterior_summary
from numpyro_rad.diagnostics.quality import Iterates, fit_quality
from numpyro_rad.diagnostics.records import Alarm, Convergence, FitRecord, PlanRecord, PlanRow, Track
from numpyro_rad.diagnostics.variance import gradient_variance
from numpyro_rad.elbo import RAD_ELBO
from numpyro_rad.fits import Fit, SVIState, on_device, state_of, with_loss
from numpyro_rad.mistakes import kwargs_checked
from numpyro_rad.planning.explain import explained
from numpyro_rad.planning.figures import exact_timeline, timeline
from numpyro_rad.report.sections import summary
from numpyro_rad.training.steps import Steps
from numpyro_rad.wording import call_text

_ASSESS_TAG = 0x52414425  # folded into the state's key: the draws of an assessment

_MOST_TIMES = 2000  # in the timeline of a plan


class RAD_SVIRunResult(SVIRunResult):
    """What ``RAD_SVI.run`` returns: unpacks as ``params, state, losses`` as under NumPyro, and knows more.

    Pickles and copies leave out ``svi``, ``args`` and ``kwargs``.

    :ivar params: the optimized parameters, constrained.
    :ivar state: the last state of SVI; ``run(..., init_state=result.state)`` goes on from it.
    :ivar losses: loss of every step that was taken.
    :ivar record: all that is known about the fit, see :class:`numpyro_rad.diagnostics.records.FitRecord`.
    :ivar interrupted: whether Ctrl-C ended the run.
    :ivar stopped_at: the step after which a rule, a callback or the end of the batches ended the run; None if all steps
        were taken.
    :ivar iterates: what is remembered of the iterates, for R-hat and MCSE; None if they were not recorded.
    :ivar svi: the ``RAD_SVI`` that ran.
    :ivar args: the last arguments of model and guide.
    :ivar kwargs: the last keyword arguments of them.
    """

    record: FitRecord
    interrupted: bool = False
    stopped_at: int | None = None
    iterates: Iterates | None = None
    svi: Any = None
    args: tuple = ()
    kwargs: Kwargs = {}  # noqa: RUF012 - replaced, never changed

    def __getattr__(self, name: str) -> Any:
        if name == "record":
            raise AttributeError(
                "this result has no record: the run was part of a transformation of JAX (jax.vmap, jax.jit, ...), "
                "where nothing is recorded. fit_record(svi, state, losses, *args) makes one for the state of one fit."
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _repr_html_(self) -> str | None:
        """Its report, for a notebook; None without a record."""
        return report.html(self.record)._repr_html_() if hasattr(self, "record") else None

    @property
    def track(self) -> Track | None:
        """Noise of the gradient during the run, None if it was not tracked."""
        return self.record.track

    @property
    def alarms(self) -> tuple[Alarm, ...]:
        """What was noticed during the run."""
        return self.record.alarms

    def report(
        self, path: str | os.PathLike | None = None, format: Literal["html", "markdown", "terminal"] = "html"
    ) -> str | Path:
        """The report of the fit.

        :param path: a file to write, in the format that its suffix names: ``.html``, ``.md``, ``.txt`` or ``.json``.
        :param format: of the text that is returned where there is no path.
        :return: the path if there is one, otherwise the text; a notebook shows that of a page as a page.
        :raises ValueError: for an unknown format.
        :raises OSError: if the file cannot be written.

        Example::

            result.report("fit.html")
        """
        if path is not None:
            return report.write(self.record, path)
        formats = {"html": report.html, "markdown": report.markdown, "terminal": report.terminal}
        if format not in formats:
            raise ValueError(f"format={format!r} is not one of {', '.join(formats)}.")
        return formats[format](self.record)

    @kwargs_checked
    def assess(
        self, *args: Any, svi: Any = None, key: Key | None = None, draws: int = 32, pareto_k: bool = True, **kwargs: Any
    ) -> RAD_SVIRunResult:
        """Measure what takes draws of its own, for the report: the gradient's noise, the fit's quality, its posterior.

        :param args: arguments of model and guide for the quality, those of the full data; without any, those of the
            last step, of which the noise is measured in any case, if they are known.
        :param svi: for a result that was copied or unpickled, which leaves its SVI and arguments out: the SVI of the
            fit, initialised.
        :param key: JAX PRNG key, by default derived from that of the state.
        :param draws: replicates of three or four gradients each, for the noise.
        :param pareto_k: whether to compute k-hat, from a thousand evaluations of the log densities.
        :param kwargs: keyword arguments of model and guide.
        :return: this result, whose record has ``gradient_variance``, ``quality`` and ``posterior`` now. What does not
            exist for this fit is left out, with a word in the alarms.

        Example::

            svi.run(key, 10_000, x, y).assess(x, y).report("fit.html")
        """
        given = args, kwargs
        if not (args or kwargs):
            args, kwargs = self.args, self.kwargs
        of = self.svi if svi is None else svi
        if of is None:
            raise ValueError(
                "assess: this result was copied or unpickled, which leaves its SVI out. Pass one that is initialised: "
                "result.assess(x, y, svi=svi)."
            )
        options = {"key": key, "draws": draws, "pareto_k": pareto_k, "iterates": self.iterates}
        # whose noise the record is of, whatever the quality is measured on
        steps = (self.args, self.kwargs) if self.svi is not None else given
        self.record = _assessed(self.record, of, self, args, kwargs, steps, **options)
        return self

    def save(self, path: str | os.PathLike) -> None:
        """Write the record of the fit as JSON, for ``python -m numpyro_rad report``; arrays of the fit are not in it.

        :param path: the file.
        :raises OSError: if it cannot be written.
        """
        report.save(self.record, path)

    def __repr__(self) -> str:
        """A summary; the fields hold the numbers themselves."""
        if "record" not in vars(self):
            return f"{type(self).__name__}({', '.join(self._fields)})"
        record = self.record
        rows = [(name, value) for name, value in summary(record) if name != "steps"]
        rows.append(("alarms", _alarms_text(record.alarms)))
        width = max(len(name) for name, _ in rows)
        steps = f"{record.num_steps:,} steps, {record.options.get('ending', 'ended')}"
        return "\n".join(
            [
                f"{type(self).__name__}: {record.title}, {steps}",
                *(f"  {name:{width}}  {value}" for name, value in rows),
                "  params, state, losses = result; result.assess(...) measures the fit, result.report(...) tells of it",
            ]
        )

    __str__ = __repr__

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("svi", "args", "kwargs")}


def _alarms_text(alarms: tuple[Alarm, ...]) -> str:
    if not alarms:
        return "none"
    kinds = ", ".join(dict.fromkeys(a.kind for a in alarms))
    return f"{len(alarms)} ({kinds}), the first at step {alarms[0].step:,}: {alarms[0].message}"


@kwargs_checked
def fit_record(
    svi: SVI,
    fit: Fit,
    losses: ArrayLike,
    *args: Any,
    seconds: float = math.nan,
    assess: bool = False,
    key: Key | None = None,
    draws: int = 32,
    pareto_k: bool = True,
    iterates: Iterates | None = None,
    **kwargs: Any,
) -> FitRecord:
    """The record of a fit whose loop is your own, for :mod:`numpyro_rad.report`.

    :param svi: an initialised ``SVI`` with any ELBO.
    :param fit: its last state, or the result of its run.
    :param losses: of all steps, shape (steps,).
    :param args: arguments of model and guide, as in ``svi.update``.
    :param seconds: wall time of the fit.
    :param assess: whether to measure what takes draws of its own: the gradient's noise by source, the quality of the
        fit and its posterior, as :meth:`RAD_SVIRunResult.assess` does. The arguments are then those of the full data.
    :param key: JAX PRNG key of these draws, by default derived from that of the state.
    :param draws: replicates of three or four gradients each, for the noise.
    :param pareto_k: whether to compute k-hat, from a thousand evaluations of the log densities.
    :param iterates: what is remembered of the iterates, for R-hat and MCSE.
    :param kwargs: keyword arguments of model and guide.
    :return: the record; what does not exist for this fit is left out, with a word in the alarms.

    Example::

        report.write(fit_record(svi, state, losses, x, y, assess=True), "fit.html")
    """
    svi_state = state_of(svi, fit, "fit_record")
    params = svi.optim.get_params(svi_state.optim_state)
    plan = svi.loss.plan_of_update(svi, svi_state, *args, **kwargs) if isinstance(svi.loss, RAD_ELBO) else None
    losses = np.asarray(losses)
    record = FitRecord(
        title=title(svi),
        created=now(),
        versions=versions(),
        options={"ELBO": described(svi.loss)},
        num_steps=len(losses),
        num_params=sum(x.size for x in jax.tree.leaves(params)),
        seconds=float(seconds),
        losses=losses,
        plan=None if plan is None else plan_record(*plan, None),
    )
    if not assess:
        return record
    options = {"key": key, "draws": draws, "pareto_k": pareto_k, "iterates": iterates}
    return _assessed(record, svi, fit, args, kwargs, (args, kwargs), **options)


def _assessed(
    record: FitRecord,
    svi: SVI,
    fit: Fit,
    args: tuple,
    kwargs: Kwargs,
    steps: tuple[tuple, Kwargs],
    *,
    key: Key,
    draws: int,
    pareto_k: bool,
    iterates: Iterates | None,
) -> FitRecord:
    """A record with the gradient's noise by source, the quality of the fit and its posterior, at the end of it.

    :param args: arguments of model and guide for the quality and the posterior, those of the full data.
    :param steps: arguments of the steps, whose noise is measured.
    """
    state = state_of(svi, fit, "assess")
    key = jax.random.fold_in(state.rng_key, _ASSESS_TAG) if key is None else key
    measures = {
        "gradient_variance": lambda: gradient_variance(svi, state, *steps[0], key=key, draws=draws, **steps[1]),
        "quality": lambda: fit_quality(svi, fit, *args, key=key, pareto_k=pareto_k, iterates=iterates, **kwargs),
        "posterior": lambda: posterior_summary(svi, fit, *args, key=jax.random.fold_in(key, 1), **kwargs),
    }
    found: dict[str, Any] = {}
    record = _with_exact_step(record, svi, state, *steps)
    alarms = list(record.alarms)
    for name, measure in measures.items():
        try:
            found[name] = measure()
        except Exception as error:
            if _jax.is_out_of_memory(error):
                why = "memory is too short for it. Pass fewer rows, or assess on a machine with more memory."
            elif isinstance(error, ValueError):  # of a gradient or loss that is not finite, above all
                why = str(error)
            else:
                raise
            alarms.append(Alarm(record.num_steps, "assessment", "", f"{name} was not measured: {why}"))
    return dataclasses.replace(record, alarms=tuple(alarms), **found)


def _with_exact_step(record: FitRecord, svi: SVI, state: SVIState, args: tuple, kwargs: Kwargs) -> FitRecord:
    """A record with the memory of the exact step beside its own, if the arguments are of the size of the run's.

    Nothing else depends on it, so whatever goes wrong here costs that number alone.
    """
    plan = record.plan
    if plan is None or plan.exact_temporary_bytes is not None or not isinstance(svi.loss, RAD_ELBO):
        return record
    try:
        state = on_device(state)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            now, _ = svi.loss.plan_of_update(svi, state, *args, **kwargs)
            if explained(now, {}).exact_bytes != plan.exact_bytes:
                return record
            exact = _temporary_bytes(svi, svi.loss.base, state, args, kwargs)
            own = plan.temporary_bytes
            own = _temporary_bytes(svi, svi.loss, state, args, kwargs) if own is None else own
    except Exception:
        return record
    found = {"temporary_bytes": own, "exact_temporary_bytes": exact, "exact_loss": described(svi.loss.base)}
    return dataclasses.replace(record, plan=dataclasses.replace(plan, **found))


def _temporary_bytes(svi: SVI, loss: ELBO, state: SVIState, args: tuple, kwargs: Kwargs) -> int | None:
    """Temporary memory of a step as ``run`` compiles it, with another loss."""
    steps = Steps(with_loss(svi, loss), lambda svi, state, args, kwargs: svi.update(state, *args, **kwargs), True, {})
    steps.compile(state, args, kwargs)
    return steps.temporary_bytes


# -- parts of a record -------------------------------------------------------------------------------------------------


def plan_record(plan: Plan, sites: list[str], temporary_bytes: int | None) -> PlanRecord:
    """A plan as reports show it.

    :param sites: of the differentiated arrays, in order.
    :param temporary_bytes: of the compiled step.
    """
    table = explained(plan, dict(zip(plan.graph.tangent_inputs, sites, strict=True)))
    rows = tuple(
        PlanRow(r.line, r.site, r.operation, r.shape, r.decision, r.exact_bytes, r.stored_bytes, r.relative_variance)
        for r in table.rows
    )
    predicted = plan.predicted
    return PlanRecord(
        rows,
        table.stored_bytes,
        table.exact_bytes,
        temporary_bytes,
        predicted.added_seconds if predicted is not None else None,
        predicted.added_variance if predicted is not None else None,
        _both_timelines(plan),
        untouched=plan.untouched,
    )


def _both_timelines(plan: Plan) -> tuple[tuple[float, float, float], ...]:
    """Bytes of a plan and of exact residuals at common times; a time stands twice where bytes jump."""
    curves = timeline(plan), exact_timeline(plan.graph)
    times = np.unique(np.concatenate([t for t, _ in curves]))
    times = times[np.unique(np.linspace(0, len(times) - 1, min(len(times), _MOST_TIMES // 2)).round().astype(int))]
    sides = np.stack([times - 1e-9, times + 1e-9], 1).ravel()
    held, exact = (np.interp(sides, t, size) for t, size in curves)
    return tuple(zip(np.repeat(times, 2).tolist(), held.tolist(), exact.tolist(), strict=True))


def convergence_record(iterates: Iterates) -> Convergence:
    """What is known of the convergence of a run."""
    return Convergence(None if iterates.r_hat() is None else iterates.converged(), iterates.describe())


def versions() -> dict[str, str]:
    """Versions of what a fit depends on, and the device."""
    found = {}
    for name in ("numpyro_rad", "jax", "jaxlib", "numpyro", "optax", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    device = jax.devices()[0]
    return {**found, "python": platform.python_version(), "device": f"{jax.device_count()} x {device.device_kind}"}


def now() -> str:
    """Date and time, ISO 8601."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def title(svi: SVI) -> str:
    """What is fitted: the names of model and guide."""
    return f"{_name(svi.model)} with {_name(svi.guide)}"


def _name(fn: Callable) -> str:
    return getattr(fn, "__name__", type(fn).__name__)


def described(loss: ELBO) -> str:
    """An ELBO with its options, as text; measured variances are left out."""
    return repr(loss) if isinstance(loss, RAD_ELBO) else call_text(loss)
