"""Every public function for every kind of model that users bring: what it returns is right, not merely returned.

A model is fitted once, and all functions are tried on that fit. Failures are told together, each with the name of its
function, so that one fault does not hide the others.
"""

import dataclasses
import html
import io
import json
import shutil
from functools import cached_property
from typing import Any

import jax
import numpy as np
import optax
import pytest
import xarray
from jax.experimental.compilation_cache import compilation_cache
from numpyro.handlers import replay, seed, substitute, trace
from numpyro.infer import SVI
from programs import few, same, same_run
from user_models import CASES, Case

from numpyro_rad import (
    RAD_ELBO,
    RAD_SVI,
    Checkpoint,
    Keep,
    Tracking,
    compare,
    explain,
    gradient_variance,
    plan_figure,
    report,
    to_arviz,
)
from numpyro_rad.ad.graph import site_name
from numpyro_rad.diagnostics import fit_quality, shadow
from numpyro_rad.diagnostics.records import to_dict
from numpyro_rad.training import fit_record
from numpyro_rad.transform import named_leaves

pytestmark = [
    pytest.mark.usefixtures("arrays_of_any_size_count", "few_codecs", "compiled_once"),
    # NumPyro says so of data that it can look at, and of plates whose size the guide cannot know
    pytest.mark.filterwarnings("ignore:Out-of-support values"),
]


@pytest.fixture
def compiled_once(tmp_path):
    """A program that two functions make alike is compiled for the first of them: that is half of the time."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


STEPS, SAVED = 9, 8
"""Looks at the noise are taken after every step; from five of them on a new plan may be made, once."""


@dataclasses.dataclass(frozen=True, eq=False)
class Fit:
    """A case, and where its run is saved.

    :ivar make: makes the case once more, with a guide that was never used, as another process would.
    """

    make: Any
    folder: Any

    @cached_property
    def case(self) -> Case:
        return self.make()

    @cached_property
    def result(self) -> Any:
        return self.run(self.case, "run")

    def run(self, case: Case, folder: str) -> Any:
        """Codes anywhere are too many for this band, so that the run plans anew."""
        watch = Tracking(interval=1, replan=(0.0, 1e-12), on_alarm="record")
        elbo = RAD_ELBO(base=case.base())
        svi = RAD_SVI(case.model, case.guide, optax.adam(1e-2), elbo, tracking=watch, calibrate=True)
        options = {"progress_bar": False, "checkpoint": Checkpoint(self.folder / folder, every=SAVED, keep=9)}
        return svi.run(case.key(3), STEPS, *case.args, **options, **case.kwargs)

    @property
    def full(self) -> dict[str, Any]:
        """Keyword arguments of the full data."""
        return {**self.case.kwargs, **self.case.full}

    @property
    def everything(self) -> dict[str, Any]:
        """Parameters and mutable state."""
        return {**self.result.params, **(self.result.state.mutable_state or {})}

    @property
    def leaves(self) -> list[str]:
        """Names of the parameter arrays."""
        svi, state = self.result.svi, self.result.state
        return [name for name, _ in named_leaves(svi.optim.get_params(state.optim_state))]

    @property
    def sites(self) -> set[str]:
        """Names that a report has to mention: parameters without what automatic guides and modules append."""
        return {site_name(name) for name in self.result.params}

    def explained(self, elbo: RAD_ELBO) -> Any:
        operands = (self.case.key(0), self.everything, self.case.model, self.case.guide, *self.case.args)
        return explain(elbo, *operands, **self.case.kwargs)


# -- training ----------------------------------------------------------------------------------------------------------


def runs(fit: Fit) -> None:
    """The first loss is that of NumPyro's ELBO, to the bit."""
    case, result = fit.make(), fit.result
    assert result.losses.shape == (STEPS,) and np.isfinite(result.losses).all()
    plain = SVI(case.model, case.guide, optax.adam(1e-2), case.base())
    state = plain.init(case.key(3), *case.args, **case.kwargs)
    end, loss = jax.jit(lambda state: plain.update(state, *case.args, **case.kwargs))(state)
    np.testing.assert_array_equal(result.losses[0], loss)
    assert jax.tree.structure(end.mutable_state) == jax.tree.structure(result.state.mutable_state)
    assert {n: x.shape for n, x in named_leaves(plain.get_params(end))} == {
        n: x.shape for n, x in named_leaves(result.params)
    }


def resumes(fit: Fit) -> None:
    """A run that was killed after its last checkpoint but one goes on to the same bits."""
    assert fit.result.losses.shape == (STEPS,)
    killed = fit.folder / "killed"
    shutil.copytree(fit.folder / "run", killed)
    shutil.rmtree(killed / str(STEPS))
    again = fit.run(fit.make(), "killed")
    assert same_run(again, fit.result)
    assert again.alarms == fit.result.alarms
    assert same(again.track.path, fit.result.track.path, equal_nan=True)


def tracks_and_plans_anew(fit: Fit) -> None:
    track = fit.result.track
    assert list(track.names) == fit.leaves
    assert track.steps.tolist() == list(range(1, STEPS + 1))
    assert all(np.isfinite(x).all() for x in (track.path, track.total, track.squared_norm))
    kinds, path = [a.kind for a in fit.result.alarms], track.path.sum(1)
    assert "nonfinite" not in kinds
    share = path / np.maximum(path + np.abs(track.total.sum(1)), np.finfo(float).tiny)  # of what each look saw
    above = [share[:n].mean() > 4 * share[:n].std(ddof=1) / n**0.5 for n in range(5, STEPS)]  # by more than chance
    assert int(any(above)) <= kinds.count("replan") <= int(path.sum() > 0), (path, track.total, fit.result.alarms)


def effects_happen(fit: Fit) -> None:
    """As often as with NumPyro's ELBO, and in the same order where they are ordered."""
    case, seen = fit.case, fit.case.effects
    counts = []
    for elbo in (case.base(), RAD_ELBO(base=case.base())):
        svi = SVI(case.model, case.guide, optax.adam(1e-2), elbo)
        state = svi.init(case.key(3), *case.args, **case.kwargs)
        step = jax.jit(lambda state, svi=svi: svi.update(state, *case.args, **case.kwargs))
        jax.block_until_ready(step(state))
        jax.effects_barrier()
        seen.clear()
        jax.block_until_ready(step(state))
        jax.effects_barrier()
        counts.append({what: seen.count(what) for what in set(seen)})
    assert counts[0] and counts[0] == counts[1]


def calibrates(fit: Fit) -> None:
    """Variances are numbers from 0 up, one for each residual and each array that is differentiated."""
    svi, state = fit.result.svi, fit.result.state
    found = svi.loss.planner.calibration
    plan, names = svi.loss.plan_of_update(svi, state, *fit.case.args, **fit.case.kwargs)
    some = {site_name(n) for n, tree in fit.result.params.items() if any(np.size(x) for x in jax.tree.leaves(tree))}
    assert len(found.reach) == len(names) and some <= set(names) <= fit.sites
    assert found.program == plan.graph.fingerprint()
    values = [found.gradient_variance, found.gradient_norm, *found.reach]
    values += [v for r in found.residuals.values() for v in (*r.added, *r.relative, r.mean_square)]
    assert np.isfinite(values).all() and min(values) >= 0
    assert found.gradient_norm > 0


def fits_the_step(fit: Fit) -> None:
    case = fit.make()
    svi = SVI(case.model, case.guide, optax.adam(1e-2), RAD_ELBO(base=case.base()))
    state = svi.init(case.key(3), *case.args, **case.kwargs)
    assert svi.loss.fit_step(svi, state, "1GiB", *case.args, **case.kwargs) == 2**30
    assert svi.loss.planner.memory_budget is None


# -- plans -------------------------------------------------------------------------------------------------------------


def explains(fit: Fit) -> None:
    """The table has all bytes of the plan that trains."""
    svi = fit.result.svi
    plan, _ = svi.loss.plan_of_update(svi, fit.result.state, *fit.case.args, **fit.case.kwargs)
    table = fit.explained(svi.loss)
    assert table.stored_bytes == plan.stored_bytes == sum(row.stored_bytes for row in table.rows)
    assert {row.site for row in table.rows} <= {*fit.sites, ""}
    text = table.table()
    assert all(row.operation in text for row in table.rows)


def compares(fit: Fit) -> None:
    coded, kept = (fit.explained(RAD_ELBO(base=fit.case.base(), codec=c)) for c in (None, Keep()))
    assert compare(kept, kept).rows == ()
    found = compare(coded, kept)
    assert found.plans == (coded, kept)
    assert all(d.decisions[0] != d.decisions[1] for d in found.rows)
    assert bool(found.rows) == any(row.relative_variance for row in coded.rows)
    assert "Second plan:" in str(found)


def draws_the_plan(fit: Fit) -> None:
    operands = (fit.case.key(0), fit.everything, fit.case.model, fit.case.guide, *fit.case.args)
    figure = plan_figure(fit.result.svi.loss, *operands, budgets=[], **fit.case.kwargs)
    held = next(line for line in figure.axes[0].lines if line.get_label() == "this plan").get_ydata()
    assert np.isfinite(held).all() and held[0] == 0 and held[-1] == pytest.approx(0)
    assert (held.max() > 0) == (fit.explained(fit.result.svi.loss).stored_bytes > 0)
    figure.savefig(io.BytesIO(), dpi=10)


# -- diagnostics -------------------------------------------------------------------------------------------------------

KEY = jax.random.PRNGKey(11)


def assesses(fit: Fit) -> None:
    """By way of the result, and by hand for a loop of one's own: the same numbers."""
    result, case = fit.result, fit.case
    record = result.assess(*case.args, key=KEY, draws=3, **fit.full).record
    assert not [a for a in record.alarms if a.kind == "assessment"]
    total, quality = record.gradient_variance.total, record.quality
    assert {b.name for b in record.gradient_variance.blocks} == fit.sites
    assert np.isfinite([total.path.value, total.guide.value, total.total.value, quality.elbo.value]).all()
    notes = " ".join(quality.notes)
    assert (quality.pareto_k is None) == bool(case.no_k_hat), notes
    assert case.no_k_hat in notes and "does not work" not in notes

    svi, state = result.svi, result.state
    own = fit_record(svi, state, result.losses, *case.args, **case.kwargs)
    free = jax.tree.leaves(svi.optim.get_params(state.optim_state))  # of a triangle, without its zeros
    assert (own.num_steps, own.num_params) == (STEPS, sum(x.size for x in free))
    assert own.plan.stored_bytes == record.plan.stored_bytes and own.plan.rows == record.plan.rows
    told = {"assess": True, "key": KEY, "draws": 3, "pareto_k": False}
    again = fit_record(svi, state, result.losses, *case.args, **told, **case.kwargs)
    assert again.quality.elbo == quality.elbo or case.full
    assert to_dict(again.gradient_variance) == to_dict(record.gradient_variance)

    alone = fit_quality(svi, fit.everything, *case.args, key=KEY, max_particles=2, pareto_k=False, **fit.full)
    assert np.isfinite(alone.elbo.value) and alone.pareto_k is None


def measures_variance(fit: Fit) -> None:
    """Parts add up to the total, blocks to the whole; codes add path noise, and nothing else does."""
    svi, state = fit.result.svi, fit.result.state
    found = gradient_variance(svi, state, *fit.case.args, draws=3, blocks="parameter", key=KEY, **fit.case.kwargs)
    assert [b.name for b in found.blocks] == fit.leaves
    for block in (found.total, *found.blocks):
        parts = block.minibatch.value + block.guide.value + block.path.value
        np.testing.assert_allclose(parts, block.total.value, rtol=1e-4, atol=1e-6 * abs(found.total.total.value))
    paths = [b.path.value for b in found.blocks]
    np.testing.assert_allclose(sum(paths), found.total.path.value, rtol=1e-4)
    plan, _ = svi.loss.plan_of_update(svi, state, *fit.case.args, **fit.case.kwargs)
    assert (found.total.path.value > 0) == any(p.encoded for p in plan.walk())
    assert "total" in str(found)


def shadows(fit: Fit) -> None:
    """Both runs begin with the same loss."""
    found = shadow(fit.result.svi, fit.case.key(5), 3, *fit.case.args, num_seeds=2, **fit.case.kwargs)
    assert found.exact_losses.shape == found.randomized_losses.shape == (2, 3)
    assert np.isfinite(found.exact_losses).all() and np.isfinite(found.randomized_losses).all()
    np.testing.assert_allclose(found.randomized_losses[:, 0], found.exact_losses[:, 0], rtol=1e-5)
    assert (found.travelled > 0).all() and "2 seeds" in str(found)


# -- for people --------------------------------------------------------------------------------------------------------


def reports(fit: Fit) -> None:
    """Every format names every site; what is saved comes back."""
    result = fit.result
    page = result.report()
    for text in (html.unescape(page), result.report(format="markdown"), result.report(format="terminal")):
        missing = [name for name in fit.sites if name not in text.replace("\\", "")]
        assert not missing, (missing, text[:60])
    for suffix in ("html", "md", "txt", "json"):
        assert fit.folder / f"fit.{suffix}" == result.report(fit.folder / f"fit.{suffix}")
    result.save(fit.folder / "saved.json")
    for name in ("saved.json", "fit.json"):
        assert report.html(report.load(fit.folder / name)) == page
    assert json.dumps(to_dict(report.load(fit.folder / "fit.json"))) == json.dumps(to_dict(result.record))


def goes_to_arviz(fit: Fit) -> None:
    """All latent and deterministic sites with their shapes and types; draws are a function of the key alone."""
    case, result, options = fit.case, fit.result, {"key": jax.random.key(7), "num_samples": 4, "chunk_size": 3}
    if case.no_draws:
        with pytest.raises(ValueError, match=case.no_draws):
            to_arviz(result.svi, result, *case.args, **options, **fit.full)
        return
    data = to_arviz(result.svi, result, *case.args, record=result.record, **options, **fit.full)
    posterior = data["posterior"]
    guide = substitute(seed(case.guide, jax.random.key(0)), fit.everything)
    model = substitute(seed(case.model, jax.random.key(0)), fit.everything)
    model = replay(model, trace(guide).get_trace(*case.args, **fit.full))
    sites = trace(model).get_trace(*case.args, **fit.full)
    wanted, seen = {}, {}
    for name, site in sites.items():
        if site["type"] == "deterministic" or (site["type"] == "sample" and not site["is_observed"]):
            wanted[name] = site["value"]
        elif site["type"] == "sample" and site["value"].size and not name.endswith("penalty"):
            seen[name] = site["value"]
    found = {name: as_read(posterior, name) for name in wanted}
    for name, value in wanted.items():
        assert found[name].shape == (1, 4, *np.shape(value)), name
        half = np.dtype(np.float32) if np.asarray(value).dtype.itemsize == 2 else np.asarray(value).dtype
        assert found[name].dtype == half, name
    for name, value in seen.items():
        if value.dtype.kind != "V" and np.shape(value):  # of a factor nothing is observed
            np.testing.assert_array_equal(np.asarray(as_read(data["observed_data"], name)), value)
    assert np.isfinite(data["sample_stats"]["lp"]).all()
    assert data["fit"]["loss"].shape == (STEPS,)

    plain = to_arviz(
        result.svi,
        jax.device_get(fit.everything),
        *case.args,
        log_likelihood=False,
        posterior_predictive=False,
        **options,
        **fit.full,
    )
    for name in wanted:
        np.testing.assert_array_equal(as_read(plain["posterior"], name), found[name])
    path = fit.folder / "fit.nc"
    data.to_netcdf(path)
    with xarray.open_dataset(path, group="posterior", engine="h5netcdf") as again:
        for name in wanted:
            np.testing.assert_array_equal(as_read(again, name), found[name])


def as_read(group: Any, name: str) -> Any:
    """The values of a site in a group, where it may have another name."""
    found = [v for n, v in group.data_vars.items() if v.attrs.get("site", n) == name]
    assert len(found) == 1, (name, list(group.data_vars))
    return found[0].values


CHECKS = (
    runs,
    resumes,
    tracks_and_plans_anew,
    calibrates,
    fits_the_step,
    explains,
    compares,
    draws_the_plan,
    measures_variance,
    shadows,
    assesses,
    reports,
    goes_to_arviz,
)


@pytest.mark.parametrize("name", few(CASES))
def test_every_function(name, tmp_path):
    fit, failures = Fit(CASES[name], tmp_path), []
    assert fit.result is not None  # without a fit there is nothing to try
    for check in (*CHECKS, *[effects_happen] * (fit.case.effects is not None)):
        try:
            check(fit)
        except Exception as error:
            error.add_note(f"in {check.__name__!r} of {name!r}")
            failures.append(error)
    if failures:
        raise ExceptionGroup(f"{name}: {len(failures)} of {len(CHECKS)} functions", failures)
