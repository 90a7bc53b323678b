"""Training curves of the paper's experiments: what they are summed up to, pairs of runs, and a run that goes on."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from examples.benchmarks import figures, measure, record, training
from examples.benchmarks.curves import spread, steps_to, summarize, trailing_mean
from examples.benchmarks.layers import VARIANTS
from examples.benchmarks.rivals import RIVALS
from examples.benchmarks.training import ESTIMATORS, EXPERIMENTS, Experiment, Training, chosen_rate
from examples.benchmarks.workloads import WORKLOADS

AT = list(range(0, 101, 10))
LAST = 80


def planted(name: str, seed: int, slope: float, start: float = 10.0, diverged: bool = False) -> dict:
    """A run whose losses fall on a straight line; the part of the data falls twice as fast, but for a bend."""
    line = [start - slope * k for k in AT]
    return {
        "estimator": name,
        "seed": seed,
        "diverged": diverged,
        "loss": [None] * len(AT) if diverged else line,
        "data_loss": [None] * len(AT) if diverged else [2 * value for value in line],
    }


def test_steps_to_a_loss() -> None:
    assert steps_to(AT, [10.0 - k / 10 for k in AT], 7.5) == pytest.approx(25.0)
    assert steps_to([0, 10, 20], [3.0, 1.0, 2.0], 2.5) == pytest.approx(2.5)  # the first time
    assert steps_to([0, 10, 20], [1.0, 0.0, -1.0], 1.0) == 0.0
    assert steps_to([0, 10, 20], [3.0, None, 1.0], 2.0) == 20.0  # nothing to interpolate from
    assert steps_to([0, 10], [3.0, 2.0], 1.9) is None
    assert steps_to([0, 10], [3.0, None], 1.0) is None


def test_means_of_what_came_before() -> None:
    values = np.random.default_rng(0).normal(size=9)
    assert trailing_mean(values, 1) == pytest.approx(values)
    found = trailing_mean(values, 4)
    assert found[:2] == pytest.approx([values[0], values[:2].mean()])
    assert found[3:] == pytest.approx(np.convolve(values, np.ones(4) / 4, "valid"))


def test_spread_over_seeds() -> None:
    found = spread([1.0, 2.0, 4.0])
    assert found["mean"] == pytest.approx(7 / 3) and found["there"] == 3
    assert found["standard_error"] == pytest.approx(np.std([1, 2, 4], ddof=1) / 3**0.5)
    assert spread([2.0])["standard_error"] is None and spread([2.0])["mean"] == 2.0
    missing = spread([1.0, None])
    assert missing["mean"] is missing["standard_error"] is None and missing["there"] == 1
    assert spread([])["mean"] is None


def test_summary_of_planted_runs() -> None:
    """Steps in proportion to slopes, differences within pairs that starts far apart do not blur, who never arrives."""
    runs = []
    for seed, start in ((1, 10.0), (2, 50.0), (3, -30.0)):
        runs += [planted("exact", seed, 0.1, start), planted("small_batch", seed, 0.04, start)]
        runs += [planted("slower", seed, 0.08, start), planted("never", seed, 0.01, start)]
    runs += [planted("sometimes", 1, 0.1), planted("sometimes", 2, 0.0, diverged=True)]
    found = summarize(runs, AT, LAST)

    for field, factor in (("loss", 1), ("data_loss", 2)):
        exact, slower = found["exact"][field], found["slower"][field]
        assert exact["final"]["mean"] == pytest.approx(factor * (10 - 8))
        assert exact["steps_to"]["exact"]["values"] == pytest.approx([1.0] * 3)
        assert exact["steps_to"]["small_batch"]["mean"] == pytest.approx(0.4)
        assert slower["difference"]["mean"] == pytest.approx(factor * 1.6)
        assert slower["difference"]["standard_error"] < 1e-9 < 1 < slower["final"]["standard_error"]
        assert slower["steps_to"]["exact"]["mean"] == pytest.approx(1.25)
        assert slower["steps_to"]["small_batch"]["mean"] == pytest.approx(0.5)
        never = found["never"][field]["steps_to"]["exact"]
        assert never["mean"] is None and never["there"] == 0 and len(never["values"]) == 3
        sometimes = found["sometimes"][field]
        assert sometimes["difference"]["there"] == 1 and sometimes["difference"]["mean"] is None
    assert found["sometimes"]["diverged"] == 1 and found["slower"]["diverged"] == 0
    assert "small_batch" not in summarize([planted("exact", 1, 0.1)], AT, LAST)["exact"]["loss"]["steps_to"]


def test_the_rate_of_the_least_final_loss() -> None:
    tuning = [
        {"estimator": "a", "rate": 0.1, "final_loss": 2.0, "diverged": False},
        {"estimator": "a", "rate": 0.3, "final_loss": 1.0, "diverged": False},
        {"estimator": "a", "rate": 1.0, "final_loss": 0.5, "diverged": True},
        {"estimator": "b", "rate": 0.3, "final_loss": None, "diverged": True},
        {"estimator": "b", "rate": 0.1, "final_loss": None, "diverged": True},
    ]
    assert chosen_rate(tuning, "a") == 0.3
    assert chosen_rate(tuning, "b") == 0.1  # none is sound


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_are_evaluated_at_their_final_step(name: str) -> None:
    for experiment in EXPERIMENTS[name]:
        at = experiment.evaluated_at()
        assert at[0] == 0 and experiment.steps in at and len(at) <= 200
        assert at[-1] > 1.2 * experiment.steps
        assert experiment.small_rows < WORKLOADS[name][0].batch or "small_batch" in WORKLOADS[name][0].without
    estimators = EXPERIMENTS[name][0].estimators(WORKLOADS[name][0])
    assert estimators[0] == "exact" and {"ours_default", "ours_4bit", "different_sample_10"} <= set(estimators)


def test_points_start_where_normals_do() -> None:
    """With either guide a run starts at the same weights; the data of the stored benchmarks name the guide."""
    base, data = replace(WORKLOADS["p4"][1], side=5, steps=12).load(0, None)  # one site: fast to compile
    starts = {}
    for guide in ("AutoNormal", "AutoDelta"):
        workload = replace(base, guide_name=guide)
        step = measure.build(RIVALS["exact"], workload, data, 3, 1)
        starts[guide] = step.svi.get_params(step.state)
        assert workload.parameters()["guide_name"] == guide
    locations = {name: value for name, value in starts["AutoNormal"].items() if name.endswith("_loc")}
    assert len(starts["AutoNormal"]) == 2 * len(locations) and set(starts["AutoDelta"]) == set(locations)
    for name, value in locations.items():
        np.testing.assert_allclose(starts["AutoDelta"][name], value, rtol=1e-6)


@pytest.mark.parametrize("name", ("fc", "p2", "p3"))
def test_held_out_rows_are_others_of_the_same_kind(name: str) -> None:
    workload, (x, y) = WORKLOADS[name][1].load(0, None)
    test_x, test_y = workload.held_out(0, None)
    assert test_x.shape[1:] == x.shape[1:] and set(np.unique(test_y)) == set(np.unique(y))
    x, test_x = np.asarray(x).reshape(len(x), -1), np.asarray(test_x).reshape(len(test_x), -1)
    assert not {row.tobytes() for row in x} & {row.tobytes() for row in test_x}
    centres = [[rows[labels == c].mean(0) for c in range(10)] for rows, labels in ((x, y), (test_x, test_y))]
    assert np.corrcoef(np.ravel(centres[0]), np.ravel(centres[1]))[0, 1] > 0.9
    assert WORKLOADS["p4"][1].held_out(0, None) is None


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    output = tmp_path / "folder" / "report.json"
    report = {"curve": [1.0, None, 3], "runs": [{"rate": 0.1, "names": ["a, b", "[ c ]"]}], "empty": []}
    record.write(report, output)
    assert json.loads(output.read_text()) == report
    assert '"curve": [1.0, null, 3]' in output.read_text()
    with pytest.raises(ValueError, match="JSON"):
        record.write({"curve": [float("nan")]}, output)
    assert json.loads(output.read_text()) == report and len(list(output.parent.iterdir())) == 1


def test_the_command_line_says_what_it_cannot_read(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, complaint in (
        ("p4 --estimators small_batch", "small_batch: the estimators of p4 are exact"),
        ("fc --estimators ours_3bit", "ours_3bit: the estimators of fc are exact, small_batch"),
        ("p5", "invalid choice"),
    ):
        with pytest.raises(SystemExit):
            training.main(arguments.split())
        assert complaint in capsys.readouterr().err
    assert training.parse_arguments(["fc", "--estimators", "ours_4bit"]).estimators == ["exact", "ours_4bit"]
    with pytest.raises(SystemExit):
        training.main(["--help"])
    told = capsys.readouterr().out
    assert all(f"  {name} " in told and rival.note in told for name, rival in ESTIMATORS.items())


def test_the_small_batch_takes_the_first_rows() -> None:
    """The rows of every step, seen by a step that changes nothing."""
    workload = replace(WORKLOADS["fc"][1], data_size=100)
    data = np.arange(100)[:, None], 7 * np.arange(100)
    runs = Training(workload, data, None, Experiment(4, (1e-3,), small_rows=3), {})
    runs.build = lambda rival, seed: SimpleNamespace(state=seed, batch=tuple(a[: workload.batch] for a in data))
    runs.evaluate = lambda state: np.ones(2)
    seen: dict[str, list] = {"exact": [], "small_batch": []}
    for name, rows in seen.items():

        def step(state, rate, x, y, rows=rows):
            rows.append(x[:, 0].tolist())
            np.testing.assert_array_equal(y, 7 * x[:, 0])
            return state, 0.0

        runs.compiled[name] = step
        assert runs.follow(name, 1, 1e-3, 5).losses["loss"]
    assert len(seen["exact"]) == 5
    for all_rows, first in zip(seen["exact"], seen["small_batch"], strict=True):
        assert first == all_rows[:3] and len(set(all_rows)) == workload.batch
    assert runs.start(1)[1].tolist() == seen["exact"] != runs.start(2)[1].tolist()


@pytest.mark.slow
def test_training_from_run_to_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Three estimators that are trained and one that is checked, with either guide; then what is missing, alone."""
    tiny = WORKLOADS["fc"][1]  # smaller ones have no residual that is worth a code
    monkeypatch.setitem(WORKLOADS, "fc", (tiny, tiny))
    monkeypatch.setitem(EXPERIMENTS, "fc", 2 * (Experiment(40, (1e-3, 1e-2), small_rows=8),))
    output, page = tmp_path / "training_fc.json", tmp_path / "page.md"
    estimators = ["exact", "small_batch", "ours_4bit", "checkpoint_layer"]
    arguments = ["fc", "--estimators", ",".join(estimators), "--seeds", "2", "--output", str(output)]
    training.main(arguments)

    first = output.read_text()
    report = json.loads(first, parse_constant=pytest.fail)
    assert list(report["training"]["guides"]) == training.GUIDES
    for entry in report["training"]["guides"].values():
        assert list(entry["costs"]) == estimators
        assert entry["costs"]["checkpoint_layer"]["check"]["equals_exact"]
        exact_bytes = entry["costs"]["exact"]["stored_bytes"]
        assert 0 < entry["costs"]["ours_4bit"]["stored_bytes"] < exact_bytes / 2
        assert 0 < entry["costs"]["small_batch"]["stored_bytes"] < exact_bytes / 4
        trained = estimators[:3]
        assert [(run["estimator"], run["seed"]) for run in entry["runs"]] == [(n, s) for n in trained for s in (1, 2)]
        assert len(entry["tuning"]) == 2 * len(trained)
        starts = [{run["loss"][0] for run in entry["runs"] if run["seed"] == seed} for seed in (1, 2)]
        assert [len(start) for start in starts] == [1, 1] and starts[0] != starts[1]
        assert len({tuple(run["loss"]) for run in entry["runs"]}) == 6
        for run in entry["runs"]:
            assert not run["diverged"] and run["loss"][-1] < run["loss"][0]
            assert run["data_loss"][-1] < run["loss"][-1] or entry is report["training"]["guides"]["AutoDelta"]
            assert run["rate"] == chosen_rate(entry["tuning"], run["estimator"])
            assert run["test"]["accuracy"] > 0.2  # of ten classes
        mine = entry["summary"]["exact"]["loss"]["steps_to"]["exact"]["values"]
        assert mine == pytest.approx([1.0, 1.0])

    monkeypatch.setattr(Training, "measure_costs", pytest.fail)
    training.main(arguments)
    assert output.read_text() == first  # nothing was missing

    entry = report["training"]["guides"]["AutoNormal"]
    lost = entry["runs"].pop(2)
    record.write(report, output)
    training.main(arguments)
    again = json.loads(output.read_text())["training"]["guides"]["AutoNormal"]["runs"]
    assert again[:-1] == entry["runs"]
    assert {**again[-1], "date": ""} == {**lost, "date": ""}  # the same losses

    page.write_text("before\n<!-- training_fc-table -->\nold\n<!-- /training_fc-table -->\nafter\n")
    figures.main([str(output), "--into", str(page), "--figure", str(tmp_path / "curves.png")])
    text = page.read_text()
    assert "old" not in text and all(text.count(f"| {ESTIMATORS[name].label}") >= 2 for name in estimators)
    assert text.count("| deterministic |") == text.count("| Bayesian |") == 4 and text.count(" as exact (") == 2
    assert (tmp_path / "curves.png").stat().st_size > 10_000

    monkeypatch.setattr(training, "AVERAGED", 2)
    fresh = training.continued(output, replace(tiny, data="digits", data_size=1437), EXPERIMENTS["fc"][0])
    assert fresh["training"]["guides"] == {}  # other settings: nothing of it is taken over


@pytest.mark.parametrize("guide", training.GUIDES)
def test_losses_are_those_of_numpyro(guide: str) -> None:
    """The evaluation beside NumPyro's own ELBO: the same for a point, one of its draws for normals."""
    workload, data = replace(WORKLOADS["p4"][1], side=5, steps=12, guide_name=guide).load(0, None)
    runs = Training(workload, data, None, EXPERIMENTS["p4"][1], {})
    step = runs.reference
    loss, data_loss = np.asarray(runs.evaluate(step.state))
    svi, params = step.svi, step.svi.get_params(step.state)
    draws = jax.vmap(lambda key: svi.loss.loss(key, params, svi.model, svi.guide, *data))
    losses = jax.jit(draws)(jax.random.split(jax.random.key(1), 50))
    misfit = workload.misfit(params["control_auto_loc"], *data, VARIANTS["plain"](workload.layer))[0]
    if guide == "AutoDelta":
        np.testing.assert_allclose(losses, loss, rtol=1e-5)
        assert data_loss == pytest.approx(0.5 * float(misfit), rel=1e-5)
    else:
        assert abs(loss - losses.mean()) < 5 * losses.std() < 15  # without its entropy it would be off by 22
        assert data_loss == pytest.approx(0.5 * float(misfit), rel=0.1)
