"""What a run of ``RAD_SVI`` returns: NumPyro's result, and the record of the fit that reports are made from."""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from numpyro.infer.svi import SVI, SVIRunResult

from numpyro_rad import report
from numpyro_rad.elbo import RAD_ELBO
from numpyro_rad.explain import explained
from numpyro_rad.figures import exact_timeline, timeline
from numpyro_rad.graph import site_name
from numpyro_rad.plan import Plan
from numpyro_rad.quality import Iterates
from numpyro_rad.records import Alarm, FitRecord, PlanRecord, PlanRow, Track

_MOST_TIMES = 2000  # in the timeline of a plan


class RAD_SVIRunResult(SVIRunResult):
    """What ``RAD_SVI.run`` returns: unpacks as ``params, state, losses`` as under NumPyro, and knows more.

    Pickles and copies leave out ``svi``, ``args`` and ``kwargs``.

    :ivar params: the optimized parameters, constrained.
    :ivar state: the last state of SVI; ``run(..., init_state=result.state)`` goes on from it.
    :ivar losses: loss of every step that was taken.
    :ivar record: all that is known about the fit, see :class:`numpyro_rad.records.FitRecord`.
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
    kwargs: dict[str, Any] = {}  # noqa: RUF012 - replaced, never changed

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
        :return: the path if there is one, otherwise the text.
        :raises ValueError: for an unknown format.
        :raises OSError: if the file cannot be written.

        Example::

            result.report("fit.html")
        """
        if path is not None:
            return report.write(self.record, path)
        formats = {"html": report.html, "markdown": report.markdown, "terminal": report.terminal}
        if format not in formats:
            raise ValueError(f"format={format!r} is none of {', '.join(formats)}.")
        return formats[format](self.record)

    def save(self, path: str | os.PathLike) -> None:
        """Write the record of the fit as JSON, for ``python -m numpyro_rad report``; arrays of the fit are not in it.

        :param path: the file.
        :raises OSError: if it cannot be written.
        """
        report.save(self.record, path)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("svi", "args", "kwargs")}


# -- parts of a record -------------------------------------------------------------------------------------------------


def plan_record(plan: Plan, names: list[str], temporary_bytes: int | None) -> PlanRecord:
    """A plan as reports show it.

    :param names: of the differentiated arrays, in order.
    :param temporary_bytes: of the compiled step.
    """
    table = explained(plan, dict(zip(plan.graph.tangent_inputs, map(site_name, names), strict=True)))
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
    )


def _both_timelines(plan: Plan) -> tuple[tuple[float, float, float], ...]:
    """Bytes of a plan and of exact residuals at common times; a time stands twice where bytes jump."""
    curves = timeline(plan), exact_timeline(plan.graph)
    times = np.unique(np.concatenate([t for t, _ in curves]))
    times = times[np.unique(np.linspace(0, len(times) - 1, min(len(times), _MOST_TIMES // 2)).round().astype(int))]
    sides = np.stack([times - 1e-9, times + 1e-9], 1).ravel()
    held, exact = (np.interp(sides, t, size) for t, size in curves)
    return tuple(zip(np.repeat(times, 2).tolist(), held.tolist(), exact.tolist(), strict=True))


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


def _name(fn: Any) -> str:
    return getattr(fn, "__name__", type(fn).__name__)


def described(loss: Any) -> str:
    """An ELBO with its options, as text; measured variances are left out."""
    particles = getattr(loss, "num_particles", 1)
    inner = [f"num_particles={particles}"] if particles != 1 else []
    if not isinstance(loss, RAD_ELBO):
        return f"{type(loss).__name__}({', '.join(inner)})"
    base = type(loss.base).__name__
    inner += [f"base={base}"] if base != "Trace_ELBO" else []
    for field in dataclasses.fields(loss.planner):
        value = getattr(loss.planner, field.name)
        if field.name == "calibration" or value == type(loss.planner)().__getattribute__(field.name):
            continue
        if field.name == "overrides":
            value = {rule if isinstance(rule, str) else _name(rule): codec for rule, codec in value.items()}
        inner.append(f"{field.name}={value!r}" if field.name != "plan" else "plan=...")
    return f"{type(loss).__name__}({', '.join(inner)})"
