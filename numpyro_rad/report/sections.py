"""What a report says after its verdict: sections of sentences, tables and figures, whatever they are rendered as."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from numpyro_rad.diagnostics.records import Estimate, FitRecord, PlanRecord, PlanRow, Posterior, Validation
from numpyro_rad.planning.worth import UNTOUCHED
from numpyro_rad.report import charts
from numpyro_rad.report.charts import Curve
from numpyro_rad.report.noise import noise, noise_over_time
from numpyro_rad.report.parts import MAX_ROWS, Section, Table, largest, thin
from numpyro_rad.report.verdict import estimate, pareto_k_text, rho_of
from numpyro_rad.wording import NO_LINE, change_text, number, saving_text, seconds_text, size_text


def sections(record: FitRecord) -> tuple[Section, ...]:
    """The sections that there are numbers for."""
    parts = (_loss, _held_out, noise, noise_over_time, _plan, _quality, _posterior, _alarms, _settings)
    return tuple(s for part in parts for s in part(record))


def summary(record: FitRecord) -> tuple[tuple[str, str], ...]:
    """The main figures of a fit: names and values."""
    found = [("steps", f"{record.num_steps:,}"), ("parameters", f"{record.num_params:,}")]
    if math.isfinite(record.seconds):
        steps = record.activities.get("steps")
        told = "" if steps is None else f" ({seconds_text(steps)} of it steps)"
        found.append(("wall time", seconds_text(record.seconds) + told))
    finite = np.isfinite(record.losses)
    if finite.any():
        mean, error = charts.mean_and_error(np.asarray(record.losses, float)[-max(2, len(record.losses) // 20) :])
        found.append(("loss at the end", estimate(Estimate(mean, error))))
    rho = rho_of(record)
    if rho is not None:
        low, high = rho[1] or (rho[0], rho[0])
        bounded = low <= 0 and math.isfinite(high)
        found.append(("ρ", number(rho[0]) if not bounded else f"below {number(high)}" if high > 0 else "0"))
    if record.plan is not None:
        found += _memory(record.plan)
    if record.quality is not None and record.quality.pareto_k is not None:
        found.append(("k-hat", pareto_k_text(record.quality.pareto_k)))
    return tuple(found)


def _memory(plan: PlanRecord) -> Iterator[tuple[str, str]]:
    """What is stored and what the whole step takes; nothing is called a saving that the step does not have."""
    if plan.stored_bytes:
        saving = f" ({saving_text(plan.exact_bytes, plan.stored_bytes)})" if plan.saves is not False else ""
        yield "residuals", f"{size_text(plan.stored_bytes)}{saving}"
    if plan.temporary_bytes is not None:
        exact = plan.exact_temporary_bytes
        beside = "" if exact is None else f" ({saving_text(exact, plan.temporary_bytes)})"
        yield "step's memory", f"{size_text(plan.temporary_bytes)}{beside}"


# -- loss --------------------------------------------------------------------------------------------------------------


def _loss(record: FitRecord) -> Iterator[Section]:
    losses = np.asarray(record.losses, float)
    if not np.isfinite(losses).any():
        return
    figures = [partial(_loss_figure, "Loss", losses, 0)]
    if len(losses) >= 40:
        figures.append(partial(_loss_figure, "Loss, second half of the run", losses, len(losses) // 2))
    rows = []
    for name, start, stop in (("first", 0.0, 0.05), ("middle", 0.475, 0.525), ("last", 0.95, 1.0)):
        part = losses[int(start * len(losses)) : max(int(stop * len(losses)), int(start * len(losses)) + 1)]
        mean, error = charts.mean_and_error(part)
        spread = float(np.std(part[np.isfinite(part)])) if np.isfinite(part).any() else math.nan
        rows.append((f"{name} 5 % of the steps", number(mean), number(error), number(spread)))
    text = (
        "The loss is the negative ELBO, estimated anew in each step. The line is its mean over bins of steps, the dark "
        "band two Monte Carlo standard errors of that mean; the pale band holds nine in ten of the single losses.",
    )
    table = Table(
        "Loss along the run", ("when", "mean (nats)", "standard error", "spread of single losses"), tuple(rows)
    )
    yield Section("Loss", text, (table,), tuple(figures))


def _loss_figure(title: str, losses: np.ndarray, start: int) -> str:
    means = charts.binned(losses[start:])
    edges = np.append(means.x, len(losses) - start + 1)
    low, high = _quantiles(losses[start:], means.x, edges)
    x = means.x + start
    shown = [
        Curve("nine in ten single losses", "grey", x, np.full(len(x), np.nan), (low, high)),
        Curve(
            "mean ± 2 standard errors",
            "blue",
            x,
            means.mean,
            (means.mean - 2 * np.nan_to_num(means.error), means.mean + 2 * np.nan_to_num(means.error)),
        ),
    ]
    finite = means.mean[np.isfinite(means.mean)]
    told = f"From {number(float(finite[0]))} to {number(float(finite[-1]))}." if len(finite) else "No finite loss."
    return charts.curves(title, f"Running mean of the loss with its error. {told}", shown, ("step", "loss (nats)"))


def _held_out(record: FitRecord) -> Iterator[Section]:
    validation = record.validation
    if validation is None or not np.isfinite(validation.mean).any():
        return
    text = (
        "The negative ELBO with held-out data in the place of the training data, evaluated exactly and with the same "
        f"{validation.losses.shape[1]} draws of the guide at each look. The guide's divergence from the prior counts "
        "once, whatever the number of rows: compare looks with one another, not the level with that of the training.",
    )
    mean, lowest = validation.mean, int(np.nanargmin(np.where(np.isfinite(validation.mean), validation.mean, np.nan)))
    rows = tuple(
        (name, f"{int(validation.steps[i]):,}", number(float(mean[i])), number(_error(validation.losses[i])))
        for name, i in (("first", 0), ("lowest", lowest), ("last", len(mean) - 1))
    )
    table = Table("Looks at the held-out loss", ("look", "step", "mean (nats)", "standard error of the draws"), rows)
    yield Section("Loss on held-out data", text, (table,), (partial(_held_out_figure, validation),))


def _error(draws: np.ndarray) -> float:
    if len(draws) < 2 or not np.isfinite(draws).all():
        return math.nan
    return float(np.std(draws, ddof=1)) / math.sqrt(len(draws))


def _held_out_figure(validation: Validation) -> str:
    steps, mean = thin(np.asarray(validation.steps, float), validation.mean)
    described = (
        f"From {number(float(mean[0]))} to {number(float(mean[-1]))}, at the lowest {number(float(np.nanmin(mean)))}."
    )
    shown = [Curve("mean over the draws", "green", steps, mean)]
    return charts.curves("Held-out loss over time", described, shown, ("step", "loss (nats)"))


def _quantiles(y: np.ndarray, x: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """5 % and 95 % quantiles of the finite numbers in the bins around ``x``."""
    bounds = np.round(np.concatenate([[0], (x[1:] + x[:-1]) / 2, [len(y)]])).astype(int)
    low, high = np.full(len(x), np.nan), np.full(len(x), np.nan)
    for i in range(len(x)):
        part = y[bounds[i] : bounds[i + 1]]
        part = part[np.isfinite(part)]
        if len(part):
            low[i], high[i] = np.quantile(part, [0.05, 0.95])
    return low, high


# -- memory ------------------------------------------------------------------------------------------------------------


def _plan(record: FitRecord) -> Iterator[Section]:
    plan = record.plan
    if plan is None:
        return
    saving = f" ({saving_text(plan.exact_bytes, plan.stored_bytes)})" if plan.saves is not False else ""
    text = [
        f"Between the two sweeps of a gradient, {size_text(plan.stored_bytes)} are stored in place of "
        f"{size_text(plan.exact_bytes)}{saving}.",
        *_step_text(plan),
    ]
    if plan.untouched:
        text.append(UNTOUCHED)
    elif plan.added_seconds is not None and plan.added_variance is not None:
        time, variance = change_text(plan.added_seconds, "time"), change_text(plan.added_variance, "variance")
        text.append(f"Predicted, relative to the exact step and its gradient: {time} and {variance}.")
    tables = (_decisions_table(plan), *([_rows_table(plan)] if plan.rows else []))
    figures = (partial(_timeline_figure, plan),) if len(plan.timeline) > 1 and not plan.untouched else ()
    yield Section("Memory", (" ".join(text),), tables, figures)


def _step_text(plan: PlanRecord) -> Iterator[str]:
    """What the whole step takes, beside the exact one."""
    own, exact = plan.temporary_bytes, plan.exact_temporary_bytes
    if own is None:
        return
    text = f"The whole compiled step takes {size_text(own)} of temporary memory"
    if exact is None:
        yield f"{text}; what it takes with exact gradients was not measured."
    else:
        yield f"{text}, with {plan.exact_loss} {size_text(exact)}: {saving_text(exact, own)}."


def _timeline_figure(plan: PlanRecord) -> str:
    rows = charts.decimated(np.array(plan.timeline, float))
    unit, scale = _unit(float(rows[:, 1:].max()))
    shown = [
        Curve("all stored exactly", "grey", rows[:, 0], rows[:, 2] / scale, dash="5 3"),
        Curve("this plan", "blue", rows[:, 0], rows[:, 1] / scale),
    ]
    peaks = [size_text(int(rows[:, c].max())) for c in (1, 2)]
    described = f"Peak {peaks[0]} by this plan, {peaks[1]} if all residuals were stored exactly."
    labels = ("forward sweep 0 to 1, backward sweep 1 to 2", f"bytes held ({unit})")
    return charts.curves("Bytes held between the sweeps", described, shown, labels, from_zero=True)


def _unit(n_bytes: float) -> tuple[str, float]:
    return next(((u, s) for u, s in (("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10)) if n_bytes >= s), ("B", 1.0))


def _decisions_table(plan: PlanRecord) -> Table:
    by: dict[str, list[PlanRow]] = {}
    for row in plan.rows:
        by.setdefault(row.decision.split(", segment ")[0], []).append(row)
    rows = sorted(by.items(), key=lambda item: -sum(r.exact_bytes for r in item[1]))
    cells = [(name, f"{len(found):,}", *_bytes(found)) for name, found in rows]
    return Table("What becomes of the residuals", ("decision", "residuals", "exact", "stored"), tuple(cells[:30]))


def _bytes(rows: Sequence[PlanRow]) -> tuple[str, str]:
    return size_text(sum(r.exact_bytes for r in rows)), size_text(sum(r.stored_bytes for r in rows))


def _rows_table(plan: PlanRecord) -> Table:
    """Residuals, the noisiest first and then by their exact bytes."""
    order = sorted(plan.rows, key=lambda r: (largest(r.relative_variance), -r.exact_bytes))
    cells = [
        (
            r.line or NO_LINE,
            r.site,
            r.operation,
            r.decision,
            "x".join(map(str, r.shape)) or "scalar",
            size_text(r.exact_bytes),
            size_text(r.stored_bytes),
            f"{r.relative_variance:.1e}" if r.relative_variance else "0",
        )
        for r in order[:MAX_ROWS]
    ]
    rest = order[MAX_ROWS:]
    if rest:
        cells.append((f"{len(rest):,} others", "", "", "", "", *_bytes(rest), f"≤ {rest[0].relative_variance:.1e}"))
    header = ("where", "site", "read by", "decision", "shape", "exact", "stored", "rel. variance")
    return Table("Plan, the noisiest residuals first", header, tuple(cells), text_columns=5, folded=True)


# -- the rest ----------------------------------------------------------------------------------------------------------


def _quality(record: FitRecord) -> Iterator[Section]:
    quality = record.quality
    if quality is None:
        yield from _convergence(record)
        return
    converged = {None: "unknown", True: "yes", False: "no"}[quality.converged]
    rows = (
        ("ELBO (nats)", estimate(quality.elbo), "a mean over draws of the guide; higher is better"),
        ("Pareto k-hat", pareto_k_text(quality.pareto_k), "at most 0.7: expectations under the guide can be trusted"),
        ("largest split R-hat of the iterates", number(quality.r_hat), "near 1: they move about one place"),
        ("largest relative MCSE of the mean iterate", number(quality.mcse), "small: their average is precise"),
        ("converged (Dhaka et al. 2020)", converged, "by the two numbers above"),
    )
    text = (
        "R-hat and MCSE are those of the optimizer's iterates. R-hat and effective sample size of independent draws "
        "from the guide, which other tools may show, say nothing about the fit.",
        *quality.notes,
    )
    yield Section("Quality of the fit", text, (Table("Quality", ("what", "value", "how to read it"), rows, 3),))


def _convergence(record: FitRecord) -> Iterator[Section]:
    """What the run itself knows, where nothing was measured afterwards."""
    known = record.convergence
    if known is None:
        return
    said = {None: "It is unknown whether the iterates have converged", True: "The iterates have converged"}
    what = said.get(known.converged, "The iterates have not converged")
    yield Section("Convergence", (f"{what}: {known.told}.",), ())


def _posterior(record: FitRecord) -> Iterator[Section]:
    posterior = record.posterior
    if posterior is None:
        return
    tables = [*_sites_table(posterior), *_checks_table(posterior)]
    text = [f"From {posterior.draws:,} draws of the guide, which stands in for the posterior."] if tables else []
    if any(site.size > 1 for site in posterior.sites):
        text.append("Of a site of several entries the smallest and the largest over them.")
    if posterior.checks:
        text.append(
            "The check draws the data anew for each draw: nine in ten observations should lie in their 90 % intervals, "
            "and their mean and spread within those of new data."
        )
    yield Section("Posterior", (*([" ".join(text)] if text else []), *posterior.notes), tuple(tables))


def _sites_table(posterior: Posterior) -> Iterator[Table]:
    rows = []
    for site in posterior.sites[:MAX_ROWS]:
        ranges = (_range(x, site.sd[0]) for x in (site.mean, site.sd, site.low, site.high))
        rows.append((site.name, f"{site.size:,}", *ranges))
    if len(posterior.sites) > MAX_ROWS:
        rest = posterior.sites[MAX_ROWS:]
        rows.append((f"{len(rest):,} others", f"{sum(s.size for s in rest):,}", "", "", "", ""))
    if rows:
        header = ("site", "entries", "mean", "sd", "5 %", "95 %")
        yield Table("Sites under the guide", header, tuple(rows), folded=len(rows) > 12)


def _checks_table(posterior: Posterior) -> Iterator[Table]:
    rows = []
    for c in posterior.checks[:MAX_ROWS]:
        scale = 0.1 * c.predicted_sd[0]
        beside = (_rounded(c.mean, scale), _range(c.predicted_mean, scale))
        spread = (_rounded(c.sd, scale), _range(c.predicted_sd, scale))
        rows.append((c.name, f"{c.size:,}", f"{100 * c.inside:.0f} %", *beside, *spread))
    if rows:
        header = ("data", "observations", "in 90 % intervals", "mean", "predicted mean", "sd", "predicted sd")
        yield Table("Data beside what is predicted for them (5 to 95 %)", header, tuple(rows))


def _range(ends: tuple[float, float], scale: float) -> str:
    low, high = (_rounded(x, scale) for x in ends)
    return low if low == high else f"{low} to {high}"


def _rounded(x: float, scale: float) -> str:
    """Three digits, or fewer where they are far below a scale."""
    if math.isfinite(x) and math.isfinite(scale) and scale > 0:
        x = round(x, 2 - math.floor(math.log10(scale))) + 0.0
    return number(x)


def _alarms(record: FitRecord) -> Iterator[Section]:
    if not record.alarms:
        return
    rows = [(f"{a.step:,}", a.kind, a.site, a.message) for a in record.alarms[:MAX_ROWS]]
    if len(record.alarms) > MAX_ROWS:
        rows.append(("", f"{len(record.alarms) - MAX_ROWS:,} later ones", "", ""))
    yield Section("Alarms", (), (Table("Alarms", ("step", "kind", "site", "message"), tuple(rows), 4, len(rows) > 12),))


def _settings(record: FitRecord) -> Iterator[Section]:
    pairs = (("Options", record.options), ("Versions", record.versions))
    tables = [
        Table(title, ("name", "value"), tuple((str(k), str(v)) for k, v in found.items()), 2, folded=True)
        for title, found in pairs
        if found
    ]
    if record.activities:
        rows = [(name, seconds_text(s), f"{s / record.seconds:.0%}") for name, s in record.activities.items()]
        tables.insert(0, Table("Wall time", ("part of the run", "time", "share"), tuple(rows)))
    if tables:
        yield Section("Settings", (), tuple(tables))
