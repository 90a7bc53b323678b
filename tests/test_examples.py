"""The main job from end to end, with tiny settings: its table, its picture and what it says when a file is missing."""

import gzip
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from numpyro.handlers import seed, trace
from numpyro.infer.util import log_density
from programs import few

from examples import bnn, data, noise
from examples.benchmarks import all as all_benchmarks
from examples.benchmarks import budgets, figures, growth, match, measure, memory, overview, record, run
from examples.benchmarks.layers import VARIANTS
from examples.benchmarks.rivals import RIVALS
from examples.benchmarks.workloads import WORKLOADS
from numpyro_rad.errors import VarianceWarning

ROOT = Path(__file__).parents[1]
TINY = ["--hidden", "8", "--layers", "1", "--batch-size", "64", "--steps", "4"]
QUALITY = {"digits": ("accuracy", "calibration_error"), "uci": ("rmse",)}
COST = ("residual_bytes", "temp_bytes", "step_seconds", "compile_seconds")


@pytest.fixture(autouse=True)
def folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Files that a program writes without being asked for go to the folder of the test."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def hardly_optimized() -> Iterator[None]:
    """The compiler optimizes little."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def write_uci(folder: Path, points: int = 60) -> None:
    """A small regression set with two splits, in the format of the stored ones; one feature is constant."""
    rng = np.random.default_rng(0)
    x = np.column_stack([rng.normal(size=(points, 2)), np.full(points, 0.1)])
    y = 50.0 + 10.0 * x[:, 0] + rng.normal(size=points)
    rows, cut = np.stack([rng.permutation(points) for _ in range(2)]).astype(np.uint16), points * 9 // 10
    (folder / "uci").mkdir()
    np.savez(folder / "uci" / "small.npz", X=x, y=y, train_idx=rows[:, :cut], test_idx=rows[:, cut:])


def write_mnist(folder: Path) -> None:
    """Ten training and five test images in MNIST's format."""
    rng = np.random.default_rng(0)
    (folder / "mnist").mkdir()
    for part, count in (("train", 10), ("t10k", 5)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (folder / "mnist" / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))


@pytest.mark.parametrize("dataset", few(["digits", "uci:small"], slow=2))
def test_ends_with_one_table_and_one_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str], dataset: str) -> None:
    write_uci(tmp_path)
    figure, page = tmp_path / "picture.png", tmp_path / "report.html"
    arguments = ["--dataset", dataset, "--data-dir", str(tmp_path), "--figure", str(figure), "--codec", "keep"]
    numbers = bnn.main([*TINY, *arguments, "--report", str(page)])

    assert list(numbers) == ["Trace_ELBO", "RAD_ELBO"]
    quality = ("elbo", "log_likelihood", *QUALITY[dataset.split(":")[0]])
    for name in (*quality, *COST):
        assert all(math.isfinite(run[name]) for run in numbers.values()), name
    # nothing random in the plan: the two runs are one and the same up to rounding
    for name in quality:
        np.testing.assert_allclose(numbers["RAD_ELBO"][name], numbers["Trace_ELBO"][name], rtol=1e-3, err_msg=name)
    assert 0 < numbers["RAD_ELBO"]["residual_bytes"] <= numbers["Trace_ELBO"]["residual_bytes"]

    printed = capsys.readouterr()
    assert "training on" in printed.err  # the progress bar
    assert printed.out.count("Trace_ELBO") == 1
    assert "test RMSE" in printed.out if dataset.startswith("uci") else "calibration error" in printed.out
    assert f"Picture: {figure}\n" in printed.out and printed.out.endswith(f"Report:  {page}\n")
    assert "In 16 slices of rows, with an exact gradient: temporary memory " in printed.out
    assert "RAD_ELBO" in page.read_text() and page.stat().st_size < 2_000_000
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.exhaustive
def test_same_seed_same_numbers(tmp_path: Path) -> None:
    arguments = [*TINY, "--figure", str(tmp_path / "picture.png"), "--codec", "2"]
    first, second = bnn.main(arguments), bnn.main(arguments)
    for name in ("elbo", "log_likelihood", "residual_bytes"):
        assert first["RAD_ELBO"][name] == second["RAD_ELBO"][name]


@pytest.mark.slow
def test_impossible_budget_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--memory-budget 1"):
        bnn.main([*TINY, "--memory-budget", "1", "--figure", str(tmp_path / "picture.png")])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--dataset", "mnist", "--data-dir", "nowhere"], "--data-dir DIR"),
        (["--dataset", "fashion_mnist", "--data-dir", "nowhere"], "zalandoresearch/fashion-mnist"),
        (["--dataset", "uci:concrete", "--data-dir", "nowhere"], "DIR/uci/concrete.npz"),
        (["--dataset", "cifar"], "no data set 'cifar'"),
        (["--steps", "0"], "0 is not positive"),
        (["--codec", "3"], "invalid choice"),
        (["--codec", "2", "--memory-budget", "1MiB"], "not allowed with"),
    ],
)
def test_bad_input_is_a_sentence(capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        bnn.main(arguments)
    assert exit_.value.code == 2
    assert complaint in capsys.readouterr().err


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bnn.main(["--help"])
    printed = capsys.readouterr().out
    options = printed[printed.index("options:") :]
    assert options.count("(default:") == options.count("\n  --")


def test_missing_data_without_a_folder() -> None:
    with pytest.raises(data.DataNotFound, match="no data directory was given"):
        data.load("mnist")


def test_idx_files(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    mnist = data.load("mnist", tmp_path)
    assert mnist.x_train.shape == (10, 784)
    assert mnist.x_test.shape == (5, 784)
    assert mnist.num_classes == 10
    np.testing.assert_array_equal(mnist.y_test, np.arange(5))
    np.testing.assert_allclose([mnist.x_train.mean(), mnist.x_train.std()], [0.0, 1.0], atol=1e-5)


@pytest.mark.parametrize("content", [b"", b"\0\0\x08\x01\0\0\0\x05abc", b"\0\0\x0d\x01\0\0\0\x01abcd"])
def test_damaged_idx_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.gz").write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match="not a complete IDX file"):
        data.read_idx(tmp_path / "file.gz")


def test_uci_split(tmp_path: Path) -> None:
    write_uci(tmp_path)
    first, second = (data.load("uci:small", tmp_path, split) for split in (0, 1))
    assert first.x_train.shape == (54, 3)
    assert first.x_test.shape == (6, 3)
    assert not np.array_equal(first.x_train, second.x_train)
    np.testing.assert_allclose(first.x_train.std(0), [1.0, 1.0, 0.0], atol=1e-6)  # the constant feature stays at 0
    np.testing.assert_allclose([first.y_train.mean(), first.y_train.std()], [0.0, 1.0], atol=1e-5)
    with pytest.raises(ValueError, match="splits 0 to 1"):
        data.load("uci:small", tmp_path, 2)


def test_scores_against_a_slow_twin() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(3, 40, 4)), rng.integers(0, 4, 40)
    scores, _ = bnn.classification_scores(logits, labels)
    likelihoods, confidences, hits = [], [], []
    for point, label in enumerate(labels):
        each = [np.exp(draw[point]) / np.exp(draw[point]).sum() for draw in logits]
        probabilities = sum(each) / len(each)
        likelihoods.append(probabilities[label])
        confidences.append(probabilities.max())
        hits.append(probabilities.argmax() == label)
    gaps = 0.0
    for b in range(bnn.CALIBRATION_BINS):
        inside = [i for i, c in enumerate(confidences) if b <= c * bnn.CALIBRATION_BINS < b + 1]
        if inside:
            gaps += abs(sum(confidences[i] - hits[i] for i in inside)) / len(labels)
    assert scores == pytest.approx(
        {
            "accuracy": np.mean(hits),
            "log_likelihood": np.mean(np.log(likelihoods)),
            "calibration_error": gaps,
        }
    )

    means, precisions, targets, target_std = rng.normal(size=(3, 5)), rng.gamma(6.0, size=3), rng.normal(size=5), 7.0
    expected = []
    for point, target in enumerate(targets):  # the density of 7 y, from y = N(mean, 1 / precision)
        stds = target_std / np.sqrt(precisions)
        errors = target_std * (target - means[:, point])
        expected.append(np.log(np.mean(np.exp(-0.5 * (errors / stds) ** 2) / (stds * math.sqrt(2 * math.pi)))))
    found = bnn.regression_scores(means, precisions, targets, target_std)
    rmse = target_std * math.sqrt(np.mean((means.mean(0) - targets) ** 2))
    assert found == pytest.approx({"rmse": rmse, "log_likelihood": np.mean(expected)})


def test_stored_data(data_dir: Path) -> None:
    mnist, concrete = data.load("mnist", data_dir), data.load("uci:concrete", data_dir, split=19)
    assert mnist.x_train.shape == (60000, 784)
    assert mnist.y_test[:5].tolist() == [7, 2, 1, 0, 4]
    assert concrete.x_train.shape == (927, 8)
    assert concrete.x_test.shape == (103, 8)


def write_cifar10(folder: Path) -> None:
    """Ten training and five test images in the format of the stored CIFAR-10 batches."""
    rng = np.random.default_rng(0)
    (folder / "cifar10").mkdir()
    for file, count in (("train_batch1", 10), ("test_batch", 5)):
        pixels = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        np.savez(folder / "cifar10" / f"{file}.npz", images=pixels, labels=np.arange(count) % 10)


TINY_WORKLOADS = {
    "p1": {"depth": 2, "width": 8, "inputs": 8, "data_size": 32},
    "p2": {"side": 4, "units": 8},
    "p3": {"side": 8, "channels": (2, 4), "data_size": 32},
    "p4": {"side": 5, "steps": 12, "batch": 1, "micro_batches": 1},
    "p5": {"depth": 1, "width": 8, "heads": 2, "tokens": 4, "vocabulary": 5, "data_size": 32},
    "p5vae": {"side": 4, "channels": (2, 4), "latents": 2},
    "fc": {"side": 4, "widths": (8, 8)},
}


@pytest.mark.parametrize("name", few(TINY_WORKLOADS, slow=7))
@pytest.mark.usefixtures("hardly_optimized")
def test_benchmark_from_run_to_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    sizes = {"batch": 8, "micro_batches": 2, "training_steps": 1, **TINY_WORKLOADS[name]}
    tiny = replace(WORKLOADS[name][0], **sizes)
    monkeypatch.setitem(WORKLOADS, name, (tiny, tiny))
    output, page = tmp_path / f"{name}.json", tmp_path / "page.md"
    run.main([name, "--rivals", "ours_4bit", "--repeats", "1", "--draws", "2", "--output", str(output)])

    report = json.loads(output.read_text())
    rows = {row["name"]: row for row in report["rivals"]}
    assert report["workload"]["data_size"] == 1 if name == "p4" else report["workload"]["data_size"] > 8
    assert not [row["failure"] for row in rows.values() if "failure" in row]
    assert list(rows) == ["exact", "ours_4bit"]
    assert 0 <= rows["ours_4bit"]["gradient"]["rho"] < 1

    page.write_text(f"before\n<!-- {name}-table -->\nold\n<!-- /{name}-table -->\nafter\n")
    figures.main([str(output), "--table-only", "--into", str(page)])
    assert "old" not in page.read_text()
    assert figures.markdown_table(report) in page.read_text()


@pytest.mark.exhaustive
@pytest.mark.usefixtures("encode_all", "hardly_optimized")
def test_budget_curves_from_run_to_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sizes = {"batch": 8, "micro_batches": 2, "training_steps": 1, **TINY_WORKLOADS["p1"]}
    tiny = replace(WORKLOADS["p1"][0], **sizes)
    monkeypatch.setitem(WORKLOADS, "p1", (tiny, tiny))
    output, page = tmp_path / "budgets_p1.json", tmp_path / "page.md"
    settings = ["--rivals", "exact", "--budgets", "0.01,59.9,60", "--repeats", "1", "--draws", "2"]
    budgets.main(["p1", *settings, "--output", str(output)])

    report = json.loads(output.read_text(), parse_constant=pytest.fail)  # no NaN, no infinity
    rows = {row["name"]: row for row in report["rivals"]}
    assert list(rows) == ["exact", *(f"{m}_{p}" for m in budgets.MODES for p in ("60", "59.9", "0.01"))]
    total = report["budgets"]["exact_residual_bytes"]
    assert total > 0
    for name, row in rows.items():
        assert ("failure" in row) == name.endswith("0.01"), (name, row)
        if name == "exact" or name.endswith("0.01"):
            continue
        assert 0 < row["stored_bytes"] <= row["budget_bytes"] == int(row["budget_percent"] / 100 * total)
        rho = row["gradient"].get("rho", 0.0)
        assert row["ratio_to_exact"]["cost"] == pytest.approx(row["ratio_to_exact"]["step"] * (1 + rho))
        assert -1 < row["predicted"]["added_seconds"] < 10
        if row["mode"] == "compress":
            assert row.get("same_as") == ("compress_60" if name.endswith("59.9") else None)
    for mode, reason in (
        ("recompute", "Try memory_budget="),
        ("compress", "with 1 bit"),
        ("joint", "Try memory_budget="),
    ):
        assert reason in rows[f"{mode}_0.01"]["failure"]
    assert rows["recompute_60"]["gradient"]["equals_exact_to_rounding"]
    assert rows["compress_60"]["note"] == "8-bit"
    measured, predicted = rows["compress_60"]["gradient"]["rho"], rows["compress_60"]["predicted"]["added_variance"]
    assert 0.1 < measured / predicted < 10  # of the plan that was predicted, and where it was calibrated

    page.write_text("before\n<!-- budgets_p1-table -->\nold\n<!-- /budgets_p1-table -->\nafter\n")
    figures.main([str(output), "--into", str(page), "--figure", str(tmp_path / "curve.png")])
    assert "old" not in page.read_text()
    assert figures.markdown_table(report) in page.read_text()
    assert all(row["label"] in page.read_text() for row in rows.values())
    assert (tmp_path / "curve.png").stat().st_size > 10_000


@pytest.mark.parametrize("axis", few(["depth", "batch", "particles", "loop length", "weighed particles"], slow=0))
@pytest.mark.usefixtures("hardly_optimized")
def test_growth_from_run_to_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, axis: str) -> None:
    rivals = ("weighed", "weighed_budget") if axis == "weighed particles" else ("exact", "ours_4bit")
    few_rivals = replace(growth.AXES[axis], rivals=rivals)  # each is compiled, of either size
    monkeypatch.setitem(growth.AXES, axis, few_rivals)
    output, page = tmp_path / "growth.json", tmp_path / "page.md"
    growth.main(["--quick", "--axes", axis, "--output", str(output)])

    found = json.loads(output.read_text(), parse_constant=pytest.fail)["growth"]
    assert list(found) == [axis]
    rows, quick = found[axis], growth.AXES[axis].quick
    assert [(r["size"], r["rival"]) for r in rows] == [(n, r) for n in quick for r in rivals]
    for row in rows:
        assert row["temp_bytes"] > 0 and ("stored_bytes" in row) == (row["family"] == "ours")
        if row["rival"] == "ours_4bit":
            assert row["planning"]["residuals"] > 10 and row["planning"]["seconds"] < 1
    small, large = ([r for r in rows if r["size"] == n and r["rival"] == rivals[0]] for n in quick)
    assert small[0]["temp_bytes"] < large[0]["temp_bytes"]

    page.write_text("before\n<!-- growth-table -->\nold\n<!-- /growth-table -->\nafter\n")
    figures.main([str(output), "--into", str(page), "--figure", str(tmp_path / "growth.png")])
    assert "old" not in page.read_text() and all(r["label"] in page.read_text() for r in rows)
    assert (tmp_path / "growth.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.usefixtures("hardly_optimized")
def test_match_from_run_to_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny = replace(WORKLOADS["p1"][0], batch=8, micro_batches=2, **TINY_WORKLOADS["p1"])
    monkeypatch.setitem(WORKLOADS, "p1", (tiny, tiny))
    output = tmp_path / "match.json"
    match.main(["--workloads", "p1", "--rivals", "accumulate", "--rounds", "1", "--output", str(output)])
    report = json.loads(output.read_text(), parse_constant=pytest.fail)
    (row,) = report["match"]["p1"]["rows"]
    assert row["rival"] == "accumulate" and row["ours"]["peak_bytes"] <= row["temp_bytes"]
    assert row["ours"]["gradient"]["relative_difference"] < 1e-4
    assert f"| {tiny.title} | accumulation | " in figures.markdown_table(report)


@pytest.mark.exhaustive
def test_memory_from_run_to_page(tmp_path: Path) -> None:
    output, page = tmp_path / "memory.json", tmp_path / "page.md"
    tasks = ["exact_step", "to_arviz"]
    memory.main(["--quick", "--tasks", *tasks, "--output", str(output)])
    rows = {row["task"]: row for row in json.loads(output.read_text(), parse_constant=pytest.fail)["memory"]}
    assert list(rows) == tasks
    assert all(0 < row["program_bytes"] < row["resident_before_bytes"] for row in rows.values())
    page.write_text("before\n<!-- memory-table -->\nold\n<!-- /memory-table -->\nafter\n")
    figures.main([str(output), "--into", str(page), "--figure", str(tmp_path / "memory.png")])
    assert "old" not in page.read_text() and "to_arviz, 20 draws" in page.read_text()
    assert (tmp_path / "memory.png").stat().st_size > 10_000


def test_budget_curves_say_what_they_cannot_read(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, complaint in (("--modes jiont", "unknown mode 'jiont'"), ("--budgets 50,0", "more than 0 percent")):
        with pytest.raises(SystemExit):
            budgets.main(["p1", *arguments.split()])
        assert complaint in capsys.readouterr().err
    assert budgets.parse_arguments(["p1", "--modes", "joint,recompute"]).modes == ["recompute", "joint"]
    assert "exact" in budgets.parse_arguments(["p4"]).rivals
    assert "checkpoint_dots" not in budgets.parse_arguments(["p4"]).rivals  # makes no sense there


@pytest.mark.parametrize("name", few(TINY_WORKLOADS, slow=9))
@pytest.mark.usefixtures("hardly_optimized")
def test_every_variant_of_a_layer_is_that_layer(name: str) -> None:
    """The same loss and gradient from every way to write the layer, up to the precision of bfloat16."""
    workload, data = replace(WORKLOADS[name][0], **TINY_WORKLOADS[name]).load(0, None)
    variants = {rival.layer for rival in RIVALS.values() if rival.name not in workload.without}
    if "checkpoint_dots" not in workload.without:  # which JAX decides whether that rival uses it
        variants.add("named_product")
    x, y = (array[:4] for array in data)

    @partial(jax.jit, static_argnums=0)
    def value_and_grad(variant: str, weights: dict) -> tuple:
        def loss(weights: dict) -> jax.Array:
            return -log_density(seed(workload.model(variant), 0), (x, y), {}, weights)[0]

        return jax.value_and_grad(loss)(weights)

    sites = trace(seed(workload.model(), 0)).get_trace(x, y)
    unknown = [s for s in sites.values() if s["type"] == "param" or (s["type"] == "sample" and not s["is_observed"])]
    weights = {site["name"]: site["value"] for site in unknown}
    assert {"plain", "checkpoint", "bfloat16_residuals"} <= variants
    expected, slope = value_and_grad("plain", weights)
    for variant in variants:
        rtol = {"bfloat16_residuals": 0.02, "bfloat16": 0.1}.get(variant, 1e-4)
        value, gradient = value_and_grad(variant, weights)
        np.testing.assert_allclose(value, expected, rtol=rtol, err_msg=variant)
        for key, exact in slope.items():
            error = np.linalg.norm(gradient[key] - exact) / np.linalg.norm(exact)
            assert error < rtol, (variant, key, error)


def test_benchmarks_read_stored_images(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    write_cifar10(tmp_path)
    shapes = {"p2": (10, 784), "p3": (10, 32, 32, 3), "p5vae": (10, 28, 28, 1), "fc": (10, 784)}
    for name, shape in shapes.items():
        workload, (x, y) = WORKLOADS[name][0].load(0, tmp_path)
        assert x.shape == shape
        assert workload.data_size == 10
        np.testing.assert_array_equal(y, x if name == "p5vae" else np.arange(10))
        if name != "p5vae":
            test_x, test_y = workload.held_out(0, tmp_path)
            assert test_x.shape == (5, *shape[1:])
            np.testing.assert_array_equal(test_y, np.arange(5))


@pytest.mark.parametrize("name", few(["p4", "p5", "p5vae"], slow=2))
@pytest.mark.usefixtures("hardly_optimized")
def test_quick_workloads_have_the_exact_gradient(name: str) -> None:
    """The exact plan and, for 8 bits, the same up to a small random error; no part of the gradient vanishes."""
    workload, data = WORKLOADS[name][1].load(0, None)
    gradients = {}
    for rival in ("exact", "ours_exact", "ours_8bit"):
        step = measure.build(RIVALS[rival], workload, data, 0, workload.batch)
        params = step.svi.optim.get_params(step.state.optim_state)
        gradients[rival] = step.gradient()(params, jax.random.key(1), step.batch)
    for rival, rtol in (("ours_exact", 1e-5), ("ours_8bit", 0.05)):
        difference = measure.gradient_difference(gradients[rival], gradients["exact"])["relative_difference"]
        assert difference < rtol, rival
    assert difference > 0  # what was rounded is random
    for key, value in gradients["exact"].items():
        assert 0 < np.linalg.norm(value) < 1e9, key


def test_a_rival_that_makes_no_sense_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["p4", "--rivals", "small_batch"])
    assert "small_batch makes no sense for p4" in capsys.readouterr().err
    assert "accumulate" not in run.parse_arguments(["p4"]).rivals
    assert "checkpoint_sqrt" in run.parse_arguments(["p4"]).rivals


def reaction_diffusion_misfit(workload: object, control: np.ndarray) -> float:
    """The slow twin of the time integral of P4, in NumPy."""
    points = np.linspace(0.0, 1.0, workload.side)
    x, y, dx = points[None, :], points[:, None], points[1]
    inside = np.zeros((workload.side, workload.side))
    inside[1:-1, 1:-1] = 1.0
    start = density = np.sin(np.pi * x) * np.sin(np.pi * y) * inside
    dt, total = dx**2 / 4, 0.0
    for k in range(workload.steps):
        s, c = np.sin(np.pi * k * dt), np.cos(np.pi * k * dt)
        source = control[0] + control[1] * s + control[2] * c
        source = source + (control[3] * s + control[4] * c) * np.sin(2 * np.pi * x)
        source = source + (control[5] * s + control[6] * c) * np.cos(2 * np.pi * x)
        laplace = sum(np.roll(density, shift, axis) for shift in (1, -1) for axis in (0, 1)) - 4 * density
        density = inside * (density + dt * (0.25 * laplace / dx**2 + source * density))
        target = start + 0.25 * np.sin(2 * np.pi * x) * np.sin(np.pi * y) * inside * np.sin(np.pi * (k + 1) * dt)
        total += dt * np.mean(((density - target) / workload.noise_scale) ** 2)
    return total


@pytest.mark.usefixtures("double", "hardly_optimized")
def test_reaction_diffusion_gradient() -> None:
    """Value and gradient of P4 in float64 against its slow twin; the equation stands still at the prior mean."""
    workload, (initial, amplitude) = WORKLOADS["p4"][1].load(0, None)
    rng = np.random.default_rng(0)
    control = workload.prior_mean() + workload.prior_scale * rng.normal(size=7)

    def misfit(control: jax.Array, variant: str = "plain") -> jax.Array:
        return workload.misfit(control, initial, amplitude, VARIANTS[variant](workload.layer))[0]

    np.testing.assert_allclose(misfit(control), reaction_diffusion_misfit(workload, control), rtol=1e-10)
    differences = []
    for i in range(7):
        up, down = (control + sign * 1e-5 * np.eye(7)[i] for sign in (1, -1))
        differences.append((reaction_diffusion_misfit(workload, up) - reaction_diffusion_misfit(workload, down)) / 2e-5)
    assert np.abs(differences).min() > 1e-3  # every coefficient matters
    for variant in ("plain", "checkpoint", "checkpoint_sqrt"):
        slope = jax.jit(jax.grad(misfit), static_argnums=1)(control, variant)
        np.testing.assert_allclose(slope, differences, rtol=1e-6, err_msg=variant)

    still, _ = jax.lax.scan(
        lambda u, source: (workload.layer.layers[0](u, source), None),
        initial,
        workload.sources(workload.prior_mean() + 0 * control),
    )
    np.testing.assert_allclose(still, initial, atol=1e-10)


def test_tables_come_from_the_stored_numbers() -> None:
    text = "".join(
        (ROOT / "docs" / page).read_text()
        for page in ("benchmarks.md", "fits.md", "experiments.md", "path_sampling.md")
    )
    stored = sorted((ROOT / "docs" / "benchmarks").glob("*.json"))
    assert len(stored) >= 16
    for path in stored:
        assert figures.with_table(text, path.stem, json.loads(path.read_text())) == text, path.stem
    reports = overview.stored()
    for page in overview.PAGES:
        assert overview.filled(page, reports) == page.read_text(), page.name


def test_stored_reports_are_of_this_version_and_of_these_workloads() -> None:
    """No table is older than what it measures, as far as sizes and versions tell."""
    names = [stage.name for stage in all_benchmarks.STAGES]
    assert len(set(names)) == len(names)
    seen = 0
    for stage in all_benchmarks.STAGES:
        path = all_benchmarks.report_of(stage, None)
        if path.exists():
            seen += 1
            assert not stage.outdated(json.loads(path.read_text())), stage.name
    assert seen >= 16
    p1, match = (next(stage for stage in all_benchmarks.STAGES if stage.name == name) for name in ("p1", "match"))
    report = json.loads(all_benchmarks.report_of(p1, None).read_text())
    report["workload"]["depth"] += 1
    assert p1.outdated(report) == "p1 has another depth now"
    report = json.loads(all_benchmarks.report_of(match, None).read_text())
    report["match"]["p5"]["versions"]["numpyro_rad"] = "0.0.1"
    assert match.outdated(report).startswith("made by version 0.0.1")


def test_only_what_is_missing_is_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[str]] = []

    def run_one(command: list[str], **_: object) -> SimpleNamespace:
        ran.append(command)
        return SimpleNamespace(returncode="examples.benchmarks.growth" in command)

    monkeypatch.setattr(all_benchmarks.subprocess, "run", run_one)
    (tmp_path / "memory.json").write_text(json.dumps({"versions": record.versions()}))
    only = ["--only", "memory", "growth", "uci", "posteriors"]
    with pytest.raises(SystemExit, match="failed: growth"):
        all_benchmarks.main(["--quick", "--output", str(tmp_path), *only])
    assert [command[2] for command in ran] == ["examples.benchmarks.growth", "examples.posteriors"]
    assert all(
        ["--output", str(tmp_path / f"{n}.json"), "--quick"] == c[3:6] for n, c in zip(only[2::2], ran, strict=True)
    )
    assert "memory: up to date" in capsys.readouterr().out
    for wrong in (["--only", "p0"], ["--quick"]):
        with pytest.raises(SystemExit, match="2"):
            all_benchmarks.main(wrong)


@pytest.mark.slow
def test_default_run_learns(tmp_path: Path) -> None:
    """The program as it is started by make demo: it learns the digits, with either ELBO."""
    program = "import json; from examples import bnn; print(json.dumps(bnn.main([])))"
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # it computes for longer than it compiles
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**env, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr
    numbers = json.loads(result.stdout.splitlines()[-1])
    assert all(run["accuracy"] > 0.94 for run in numbers.values())  # both get about 0.967 of 360 images
    assert numbers["RAD_ELBO"]["residual_bytes"] < numbers["Trace_ELBO"]["residual_bytes"] / 2
    assert (tmp_path / "bnn_digits.png").is_file()


@pytest.mark.slow
def test_noise_writes_its_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The smaller budget adds more variance, and each report is there."""
    options = ["--hidden", "32", "--layers", "2", "--steps", "40", "--interval", "10", "--folder", str(tmp_path)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VarianceWarning)
        results = noise.main(["--budgets", "60kB,1MiB", *options])
    small, large = (result.record.gradient_variance.rho.value for result in results.values())
    assert small > 2 * large
    printed = capsys.readouterr().out
    for budget in results:
        assert (tmp_path / f"noise_{budget}.html").stat().st_size < 2_000_000
        assert f"noise_{budget}.html" in printed
