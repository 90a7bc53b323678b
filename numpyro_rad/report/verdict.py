"""What the numbers of a fit mean, in words: findings, each with what to do about it.

Every finding follows by a rule from the numbers of a :class:`~numpyro_rad.diagnostics.records.FitRecord`, and none is
made where the number that it needs is missing. The rules are the functions of this module whose names begin with
``_of_``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from numpyro_rad.diagnostics.records import Alarm, BlockVariance, Estimate, FitRecord, Validation
from numpyro_rad.planning.worth import Option, recommended
from numpyro_rad.report.charts import mean_and_error
from numpyro_rad.wording import estimate_text, is_told_from_zero, number, signed_text, size_text

LEVELS = ("problem", "warning", "note", "good")
"""From the worst to the best."""

TOO_NOISY = 1.0
"""Of ρ: above it the codes add more variance than all other sources together."""

VISIBLE = 0.1
"""Of ρ: below it the codes hardly slow a fit."""

NEEDLESS = 0.01
"""Of ρ: below it fewer bytes would do as well."""

LITTLE_SIGNAL = 0.01
"""Of the signal-to-noise ratio: the noise of a gradient is ten times as long as the gradient."""

GOOD_PARETO_K, R_HAT = 0.7, 1.1
"""Vehtari et al. 2024; Dhaka et al. 2020."""

INSIDE, TOO_FEW_INSIDE = 0.9, 0.8
"""Share of the data that belongs in its predictive intervals, and below which there is a warning."""

TREND_Z, TREND_SHARE = 3.0, 0.1
"""A loss still falls if it fell by so many standard errors, and by this share of the fall before that."""


RISE_Z = 4.0
"""A held-out loss has risen if it did by so many standard errors: more than of one trend, as the lowest is a choice."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing to know about a fit.

    :ivar level: one of :data:`LEVELS`.
    :ivar what: what the numbers say.
    :ivar advice: what to do; empty if nothing.
    """

    level: str
    what: str
    advice: str = ""


def findings(record: FitRecord) -> tuple[Finding, ...]:
    """All findings about a fit, the worst first."""
    rules = (
        _of_values,
        _of_alarms,
        _of_codes,
        _of_memory,
        _of_progress,
        _of_validation,
        _of_trust,
        _of_predictions,
        _of_noise,
        _of_gaps,
    )
    found = [f for rule in rules for f in rule(record)]
    return tuple(sorted(found, key=lambda f: LEVELS.index(f.level)))


def headline(found: tuple[Finding, ...]) -> str:
    """The verdict in one sentence."""
    counts = {level: sum(f.level == level for f in found) for level in LEVELS}
    if counts["problem"]:
        also = f" and {_count(counts['warning'], 'warning')}" if counts["warning"] else ""
        return f"Do not use this fit as it is: {_count(counts['problem'], 'problem')}{also}."
    if counts["warning"]:
        return f"Use this fit with care: {_count(counts['warning'], 'warning')}."
    if counts["good"]:
        return "Nothing that was looked at speaks against this fit."
    return "Too little was measured for a verdict."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def estimate(x: Estimate) -> str:
    """An estimate and its standard error, both to the first or second digit of the error."""
    return estimate_text(x.value, x.standard_error)


# -- rules -------------------------------------------------------------------------------------------------------------


def _of_values(record: FitRecord) -> Iterator[Finding]:
    bad = np.flatnonzero(~np.isfinite(record.losses))
    if not len(bad):
        return
    advice = (
        "Look for NaN in the data, start closer to zero (a smaller init_scale of the guide), lower the learning rate "
        "or clip the gradient."
    )
    if bad[-1] == len(record.losses) - 1:
        good = np.flatnonzero(np.isfinite(record.losses))
        since = int(good[-1]) + 2 if len(good) else 1
        what = f"The loss is NaN or infinite from step {since:,} to the end: the parameters cannot be used."
        yield Finding("problem", what, advice)
    else:
        what = f"{len(bad):,} of {len(record.losses):,} losses are NaN or infinite, the first at step {bad[0] + 1:,}."
        yield Finding("warning", what, advice)


_ALARM_LEVELS = {"nonfinite": "problem", "replan": "note"}


def _of_alarms(record: FitRecord) -> Iterator[Finding]:
    by_kind: dict[str, list[Alarm]] = {}
    for alarm in record.alarms:
        by_kind.setdefault(alarm.kind, []).append(alarm)
    for kind, alarms in by_kind.items():
        first = alarms[0]
        sites = list(dict.fromkeys(a.site for a in alarms if a.site))
        where = f" in {', '.join(sites[:5])}{' and others' * (len(sites) > 5)}" if sites else ""
        what = f"{_count(len(alarms), 'alarm')} of kind “{kind}”{where}, the first at step {first.step:,}."
        yield Finding(_ALARM_LEVELS.get(kind, "warning"), what, first.message[:1].upper() + first.message[1:])


def rho_of(record: FitRecord) -> tuple[float, tuple[float, float] | None, str] | None:
    """The newest ρ, its 95 % confidence interval if there is one, and where it is from."""
    if record.gradient_variance is not None:
        measured = record.gradient_variance
        return measured.rho.value, measured.rho_interval, "measured at the end"
    if record.track is not None:
        rho = np.asarray(record.track.rho, float)
        rho = rho[np.isfinite(rho)]
        if len(rho):
            return float(rho[-1]), None, "running average of the fit"
    return None


def pareto_k_text(k: float | None) -> str:
    """k-hat for people: it is infinite where weights have no moments at all."""
    return number(k) if k is None or not math.isinf(k) else "infinite"


def _rho_text(rho: float) -> str:
    return f"= {rho:.2g}" if rho > 0 else "not distinguishable from 0"


def _of_codes(record: FitRecord) -> Iterator[Finding]:
    plan, known = record.plan, rho_of(record)
    if plan is not None and not any(row.relative_variance > 0 for row in plan.rows):
        yield Finding("good", "All residuals are stored exactly or recomputed: the gradient has no path noise.")
        return
    if known is None or not math.isfinite(known[0]) or (plan is None and known[0] == 0):
        return
    rho, interval, source = known
    low, high = interval if interval is not None else (rho, rho)
    told = f"ρ {_rho_text(rho)}, {source}" + (
        f", 95 % interval {number(low)} to {number(high)}" if interval is not None else ""
    )
    stored = plan.stored_bytes if plan is not None else 0
    now = f" (the plan stores {size_text(stored)} now)" if stored else ""
    more = (
        f"Raise memory_budget{now}, or ask for a noise instead of a size (added_variance=0.1); RAD_ELBO.calibrate "
        "plans with measured variances."
    )
    if low > TOO_NOISY:
        what = f"The memory budget is too small: codes of residuals multiply the gradient's variance by {1 + rho:.2g}"
        yield Finding("problem", f"{what} ({told}).", more)
    elif rho > TOO_NOISY:
        yield Finding("warning", f"The memory budget is probably too small ({told}).", more)
    elif high > TOO_NOISY:
        what = f"Whether the memory budget is large enough is not certain ({told})."
        yield Finding("note", what, "Measure with more draws (gradient_variance).")
    elif rho > VISIBLE:
        what = f"Codes of residuals multiply the gradient's variance by {1 + rho:.2g} ({told})."
        yield Finding("note", what, "This is no bias, but a larger memory_budget would converge a little faster.")
    elif high < NEEDLESS and stored:
        what = f"Codes of residuals add next to no variance ({told}): the budget is larger than it has to be."
        yield Finding("note", what, f"Try memory_budget={stored // 2} (half), or a larger batch in the same memory.")
    else:
        yield Finding("good", f"Codes of residuals do no visible harm ({told}).")
    yield from _of_prediction(record)


def _of_prediction(record: FitRecord) -> Iterator[Finding]:
    measured = record.gradient_variance
    if measured is None or not measured.predicted_rho or measured.predicted_rho <= 0:
        return
    low, high = measured.rho_interval
    if low > 3 * measured.predicted_rho or high < measured.predicted_rho / 3:
        what = f"The plan predicted ρ = {measured.predicted_rho:.2g}, far from the measured {measured.rho.value:.2g}."
        advice = (
            "A prediction holds for the parameters at which it was made, and gradients of the first steps are unlike "
            "those of later ones. RAD_ELBO.calibrate at the present parameters prices the codes anew; "
            "Tracking(replan=(0.0, 0.5)) does so while training."
        )
        yield Finding("note", what, advice)


def _of_memory(record: FitRecord) -> Iterator[Finding]:
    """What ``advise`` would say of the two steps that are known."""
    plan = record.plan
    if plan is None or plan.temporary_bytes is None or plan.exact_temporary_bytes is None:
        return
    known, measured = rho_of(record), record.gradient_variance
    seconds = {} if measured is None else measured.seconds
    added = (plan.added_variance or 0.0) if known is None or not math.isfinite(known[0]) else max(known[0], 0.0)
    loss = record.options.get("ELBO", "RAD_ELBO")
    loss = loss if loss.startswith("RAD_ELBO(") and len(loss) < 80 else "RAD_ELBO"
    exact = Option(plan.exact_loss, plan.exact_temporary_bytes, None, seconds.get("exact"), 0.0, 0.0)
    ours = Option(loss, plan.temporary_bytes, plan.stored_bytes, seconds.get("randomized"), 0.0, added)
    chosen, sentence = recommended((exact, ours))
    yield Finding("good" if chosen is ours else "note", sentence)


def _of_progress(record: FitRecord) -> Iterator[Finding]:
    """One verdict from the losses and the iterates, which need not agree."""
    loss, iterates = _of_trend(record), _of_convergence(record)
    if loss is None or iterates is None:
        yield from (f for f in (loss, iterates) if f is not None)
        yield from _of_iterates(record) if iterates is None else ()
        return
    levelled, travelling = loss.level == "good", "not converged" in iterates.what
    joint = "but" if levelled == travelling else "and"
    what = f"{loss.what[:-1]}, {joint} {iterates.what[0].lower()}{iterates.what[1:]}"
    if levelled and travelling:
        what = f"{what[:-1]}, along directions that the loss hardly depends on."
        advice = (
            "More steps at this learning rate will hardly lower the loss. For precise parameters lower the learning "
            "rate towards the end, or average the iterates."
        )
        yield Finding(iterates.level, what, advice)
    else:
        yield Finding(iterates.level, what, iterates.advice) if levelled else Finding(loss.level, what, loss.advice)


def _of_trend(record: FitRecord) -> Finding | None:
    losses = np.asarray(record.losses, float)
    if len(losses) < 40 or not np.isfinite(losses[-1]):
        return None
    change, error, falls, rises = trend(losses)
    if not math.isfinite(change):
        return None
    told, last = estimate_text(abs(change), error), f"over the last {len(losses) // 4:,} steps"
    if falls:
        what = f"The loss was still falling: by {told} {last}."
        return Finding("warning", what, "Train longer: continue from the state of this result.")
    if rises:
        return Finding("warning", f"The loss rose by {told} {last}.", "Lower the learning rate, or let it decay.")
    if is_told_from_zero(change, error):
        return Finding("good", f"The loss has levelled off: it {'fell' if change > 0 else 'rose'} by {told} {last}.")
    return Finding("good", f"The loss has levelled off: its change {last} is {signed_text(change, error)}.")


def trend(losses: np.ndarray) -> tuple[float, float, bool, bool]:
    """Fall of the loss in the second half of its last half, its standard error, whether it still falls, and rises.

    A fall counts only if it is both beyond its noise and not small against the fall just before and in all.

    :param losses: shape (steps,), at least 40.
    """
    quarters = [mean_and_error(part) for part in np.array_split(losses, 4)]
    before = quarters[1][0] - quarters[2][0]
    change = quarters[2][0] - quarters[3][0]
    error = math.hypot(quarters[2][1], quarters[3][1])
    whole = np.ptp(np.array([mean_and_error(part)[0] for part in np.array_split(losses, 20)]))
    certain = abs(change) > max(TREND_Z * error, 1e-3 * whole)
    return change, error, certain and change > TREND_SHARE * max(before, 0.0), certain and change < 0


def _of_validation(record: FitRecord) -> Iterator[Finding]:
    validation = record.validation
    if validation is None:
        return
    if not np.isfinite(validation.mean).all():
        first = validation.steps[~np.isfinite(validation.mean)][0]
        what = f"The loss on held-out data is NaN or infinite, first at step {int(first):,}."
        yield Finding("warning", what, "Look for NaN and for values out of the support in the held-out data.")
        return
    lowest, rise, rises = rise_since_lowest(validation)
    told = f"was lowest at step {int(validation.steps[lowest]):,}"
    if rises:
        what = f"The loss on held-out data {told} and has risen by {estimate(rise)} since: it overfits."
        advice = "Stop there (stop=Plateau(), or keep the state in a callback), use a stronger prior or more data."
        yield Finding("warning", what, advice)
    elif lowest == len(validation.steps) - 1:
        yield Finding("note", f"The loss on held-out data {told}, the last look.")
    else:
        yield Finding("good", f"The loss on held-out data {told} and has not risen since, beyond its noise.")


def rise_since_lowest(validation: Validation) -> tuple[int, Estimate, bool]:
    """The look with the lowest loss, the rise from there to the last looks, and whether it is beyond noise.

    The levels compared are means over a window of looks around the lowest and at the end. Their noise has two parts:
    that of the iterates, from successive looks, and that of the draws, from the differences of each draw (all looks
    have the same draws, so what they have in common cancels).
    """
    losses, n = np.asarray(validation.losses, float), len(validation.steps)
    lowest, width = int(np.argmin(validation.mean)), max(2, n // 10)
    first, last = max(min(lowest - width // 2, n - width), 0), max(n - width, 0)
    windows = [losses[i : i + width] for i in (first, last)]
    change = windows[1].mean(0) - windows[0].mean(0)  # (draws,)
    jitter = [mean_and_error(w.mean(1))[1] for w in windows]
    spread = float(np.std(change, ddof=1)) / math.sqrt(len(change)) if len(change) > 1 else 0.0
    rise = Estimate(float(change.mean()), math.hypot(*jitter, spread))
    apart = last - first >= width and n >= 8
    return lowest, rise, bool(apart and rise.value > RISE_Z * rise.standard_error)


def _of_convergence(record: FitRecord) -> Finding | None:
    quality = record.quality
    if quality is None or (quality.converged is None and quality.r_hat is None):
        return None
    told = [f"{name} {x:.3g}" for name, x in (("R-hat", quality.r_hat), ("MCSE", quality.mcse)) if x is not None]
    numbers = f" ({', '.join(told)})" if told else ""
    converged = quality.converged
    if converged is None:
        converged = quality.r_hat is not None and quality.r_hat <= R_HAT
    if converged:
        return Finding("good", f"The iterates have converged{numbers}: they move about one place.")
    if quality.r_hat is not None and quality.r_hat <= R_HAT:
        what = f"The iterates have settled, but their average is not precise yet{numbers}."
        return Finding("warning", what, "Train longer, lower the learning rate, or use the averaged iterates.")
    what = f"The iterates have not converged{numbers}: they still travel."
    return Finding("warning", what, "Train longer, or lower the learning rate towards the end.")


def _of_iterates(record: FitRecord) -> Iterator[Finding]:
    """Of convergence as the run itself saw it."""
    known = record.convergence
    if known is None:
        return
    losses = np.asarray(record.losses, float)
    level = len(losses) >= 40 and np.isfinite(losses).all() and not any(trend(losses)[2:])
    if known.converged is None:
        yield Finding("note", f"Convergence is unknown: {known.told}.", "Train longer.")
    elif known.converged:
        yield Finding("good", f"The iterates have converged: {known.told}.")
    elif level:
        what = f"The loss is level, but the parameters are not known to have settled: {known.told}."
        yield Finding("note", what, "More steps, or averaged iterates, come closer to the optimum.")
    else:
        what = f"The iterates have not converged: {known.told}."
        yield Finding("warning", what, "Train longer, or lower the learning rate towards the end.")


def _of_trust(record: FitRecord) -> Iterator[Finding]:
    k = record.quality.pareto_k if record.quality is not None else None
    if k is None:
        return
    told = f"k-hat {pareto_k_text(k)}"
    if k <= GOOD_PARETO_K:
        yield Finding("good", f"The guide is close to the posterior ({told}, at most {GOOD_PARETO_K}).")
        return
    what = f"Expectations under the guide need not be those under the posterior ({told}, above {GOOD_PARETO_K})."
    advice = (
        "Try a richer guide (full covariance, a flow) or reparameterize the model. The joint k-hat of a Bayesian "
        "neural network, and of any model with many latent variables, is nearly always above 0.7: judge such a fit by "
        "its predictions on held-out data."
    )
    yield Finding("warning", what, advice)


def _of_predictions(record: FitRecord) -> Iterator[Finding]:
    checks = record.posterior.checks if record.posterior is not None else ()
    for check in (c for c in checks if math.isfinite(c.inside)):
        error = math.sqrt(INSIDE * (1 - INSIDE) / check.size)
        told = f"{100 * check.inside:.0f} % of the observations of {check.name} lie in their 90 % predictive intervals"
        if check.inside < TOO_FEW_INSIDE and check.inside + 3 * error < INSIDE:
            advice = "Look at those outside: a likelihood with heavier tails, more noise or another mean may fit them."
            yield Finding("warning", f"Only {told}: the model does not expect its data.", advice)
        else:
            yield Finding("good", f"{told}.")


SOURCES = (("minibatch", "minibatches"), ("guide", "the guide's samples"), ("path", "codes of residuals"))
"""The parts of a variance: their field in a record and their name in text."""

_REMEDIES = {
    "minibatch": "a larger batch lowers it; more particles would not",
    "guide": "more particles, or an analytic KL (TraceMeanField_ELBO), lower it; a larger batch alone would not",
    "path": "a larger memory_budget lowers it",
}


def shares(block: BlockVariance) -> dict[str, float]:
    """Parts of the variance of a block by source, such that they add up to 1; negative estimates count as zero."""
    parts = {name: max(getattr(block, name).value, 0.0) for name, _ in SOURCES}
    whole = sum(p for p in parts.values() if math.isfinite(p))
    return {name: p / whole if whole > 0 and math.isfinite(p) else 0.0 for name, p in parts.items()}


def _of_noise(record: FitRecord) -> Iterator[Finding]:
    measured = record.gradient_variance
    if measured is None:
        return
    parts = shares(measured.total)
    largest = max(parts, key=lambda name: parts[name])
    if parts[largest] <= 0:
        return
    remedy = _REMEDIES[largest]
    source = dict(SOURCES)[largest]
    if "batches" in record.options and not measured.total.minibatch.value:  # a loader's, of which one was looked at
        what = f"Within one batch {100 * parts[largest]:.0f} % of the gradient's variance comes from {source}."
        advice = "What batches add to it was not measured: gradient_variance(svi, result, *batch, batches=others) does."
        yield Finding("note", what, advice)
    else:
        what = f"{100 * parts[largest]:.0f} % of the gradient's variance comes from {source}."
        yield Finding("note", what, f"To lower the noise, begin there: {remedy}.")
    signal = measured.signal_to_noise
    error = signal.standard_error if math.isfinite(signal.standard_error) else 0.0
    if not signal.value + 2 * error < LITTLE_SIGNAL:
        return
    what = f"A single gradient is nearly all noise (signal-to-noise ratio {estimate(signal)})"
    losses = np.asarray(record.losses, float)
    if len(losses) >= 40 and np.isfinite(losses).all() and trend(losses)[2]:
        advice = f"Use a larger batch or more particles ({remedy}), or a smaller learning rate."
        yield Finding("warning", f"{what} while the loss was still falling.", advice)
    else:
        advice = "A smaller learning rate, a larger batch, more particles or averaged iterates come closer to it."
        yield Finding("note", f"{what}: as it should be near an optimum, where the mean gradient vanishes.", advice)


def _of_gaps(record: FitRecord) -> Iterator[Finding]:
    if record.gradient_variance is None and record.track is None:
        yield Finding("note", "The noise of the gradient was not measured.", "Call gradient_variance, or run RAD_SVI.")
    if record.quality is None:
        looked = "Convergence and the distance" if record.convergence is None else "The distance"
        what = f"{looked} from the posterior {'were' if record.convergence is None else 'was'} not looked at."
        yield Finding("note", what, "Call fit_quality on the full data.")
    elif record.quality.pareto_k is None:
        yield Finding("note", "The distance of the guide from the posterior is unknown: k-hat was not computed.")
    if not len(record.losses):
        yield Finding("note", "No losses were recorded.")
