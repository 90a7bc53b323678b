"""The examples that show what fits end at: known posteriors, the UCI sets, a network that does not fit in memory."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.infer import Trace_ELBO
from numpyro.infer.util import log_density
from test_examples import write_uci

from examples import bigger_than_memory, posteriors, uci
from examples.benchmarks import figures
from numpyro_rad import RAD_ELBO, StochasticRound

MOST_BIAS_RATIO = 10  # 1 on average, of 40 differences or more; without a bias 2 at most were seen
KNOWN = {
    "regression": lambda: posteriors.regression(60, features=5),
    "hierarchy": lambda: posteriors.hierarchy(60, groups=6),
    "state_space": lambda: posteriors.state_space(7, outputs=4),
}


def regression_twin(known):
    """Textbook: covariance ``(x'x / noise**2 + 1)^-1``."""
    x, y = known.args
    noise = len(x) ** 0.5 / 10
    covariance = np.linalg.inv(x.T @ x / noise**2 + np.eye(x.shape[1]))
    return covariance @ x.T @ y / noise**2, covariance


def hierarchy_twin(known):
    """Gelman et al. (2013), section 5.4: the groups are summed out for mu, and each is then a weighted mean."""
    membership, y = known.args
    noise, between, prior = (len(y) / membership.shape[1]) ** 0.5 / 4, 0.5, 2.0
    counts = membership.sum(0)
    means, errors = membership.T @ y / counts, noise**2 / counts
    mu_variance = 1 / (np.sum(1 / (errors + between**2)) + 1 / prior**2)
    mu = mu_variance * np.sum(means / (errors + between**2))
    weight = between**2 / (between**2 + errors)  # of the data of a group
    theta = weight * means + (1 - weight) * mu
    covariance = np.diag(np.concatenate([[0.0], weight * errors]))
    shared = np.concatenate([[1.0], 1 - weight])
    return np.concatenate([[mu], theta]), covariance + mu_variance * np.outer(shared, shared)


def state_space_twin(known):
    """Kalman's filter forward, the smoother of Rauch, Tung and Striebel backward; marginal covariances only."""
    seen, y = known.args
    transition, process = posteriors.TRANSITION, posteriors.STATE_NOISE**2 * np.eye(2)
    filtered, predicted = [], []
    mean, covariance = np.zeros(2), np.zeros((2, 2))
    for observed in y:
        mean, covariance = transition @ mean, transition @ covariance @ transition.T + process
        predicted.append((mean, covariance))
        innovation = seen @ covariance @ seen.T + posteriors.OUTPUT_NOISE**2 * np.eye(len(seen))
        gain = covariance @ seen.T @ np.linalg.inv(innovation)
        mean, covariance = mean + gain @ (observed - seen @ mean), covariance - gain @ seen @ covariance
        filtered.append((mean, covariance))
    smoothed = [filtered[-1]]
    for (mean, covariance), (next_mean, next_covariance) in zip(filtered[-2::-1], predicted[:0:-1], strict=True):
        later_mean, later_covariance = smoothed[0]
        gain = covariance @ transition.T @ np.linalg.inv(next_covariance)
        mean = mean + gain @ (later_mean - next_mean)
        smoothed.insert(0, (mean, covariance + gain @ (later_covariance - next_covariance) @ gain.T))
    blocks = [covariance for _, covariance in smoothed]
    return np.concatenate([mean for mean, _ in smoothed]), blocks


@pytest.mark.parametrize("name", KNOWN)
def test_posteriors_are_those_of_the_textbooks(name):
    known = KNOWN[name]()
    mean, precision = posteriors.posterior(known)
    covariance = np.linalg.inv(precision)
    expected_mean, expected = {
        "regression": regression_twin,
        "hierarchy": hierarchy_twin,
        "state_space": state_space_twin,
    }[name](known)
    if name == "state_space":
        covariance = [covariance[2 * t : 2 * t + 2, 2 * t : 2 * t + 2] for t in range(len(expected))]
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(covariance, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.usefixtures("double")
def test_the_elbo_is_highest_where_it_is_said_to_be(name):
    """The ELBO of a quadratic log density is a mean over a few points, whose first two moments are the guide's."""
    known = KNOWN[name]()
    mean, precision = posteriors.posterior(known)
    size = known.dimensions
    points = size**0.5 * np.concatenate([np.eye(size), -np.eye(size)])

    def factor(free):
        return jnp.tril(free) if known.full else jnp.diag(jnp.diag(free))

    def elbo(loc, free):
        def log_joint(eps):
            values = known.split(loc + factor(free) @ eps)
            return log_density(known.model, tuple(map(jnp.asarray, known.args)), {}, values)[0]

        return jnp.mean(jax.vmap(log_joint)(points)) + jnp.sum(jnp.log(jnp.diag(free)))

    covariance = np.linalg.inv(precision)
    best = np.linalg.cholesky(covariance) if known.full else np.diag(posteriors.best(known, precision))
    np.testing.assert_allclose(np.linalg.norm(best, axis=1), posteriors.best(known, precision), rtol=1e-10)
    value_and_slope = jax.jit(jax.value_and_grad(elbo, (0, 1)))
    highest, gradients = value_and_slope(mean, best)
    _, steep = value_and_slope(mean + 0.1, 1.1 * best)
    for flat, slope in zip(gradients, steep, strict=True):
        assert np.abs(flat).max() < 1e-8 * np.abs(slope).max()

    # what is lost elsewhere is the divergence from the posterior above its least
    far = posteriors.distance(known, mean, precision)
    other = mean + 0.2, 1.3 * best
    params = dict(zip(("auto_loc", "auto_scale_tril"), other, strict=True))
    if not known.full:
        params = {f"{n}_auto_loc": v for n, v in known.split(other[0]).items()}
        params |= {f"{n}_auto_scale": v for n, v in known.split(np.diag(other[1])).items()}
    np.testing.assert_allclose(far(params), highest - value_and_slope(*other)[0], rtol=1e-7)


def test_scores_tell_noise_from_a_bias():
    noise = np.random.default_rng(0).normal(0.0, 0.1, (5, 100))
    assert posteriors.scores(noise)["largest_t"] < posteriors.scores(noise)["bound"]
    assert 0.5 < posteriors.scores(noise)["bias_ratio"] < 2
    biased = posteriors.scores(noise + 0.5)
    assert biased["bias_ratio"] > 50 and biased["difference"] == pytest.approx(0.5, rel=0.1)
    assert posteriors.scores(np.zeros((5, 3)))["largest_t"] == 0
    curve = np.concatenate([np.full(50, 1.0), np.zeros(50)])  # of 20 looks, 16 have to be near
    assert posteriors.steps_needed(np.stack([curve, np.ones(100)])) == [66 * posteriors.EVERY, None]


@pytest.mark.slow
@pytest.mark.untouched
def test_randomized_fits_end_at_the_posterior(tmp_path):
    output = tmp_path / "posteriors.json"
    posteriors.main(["--quick", "--output", str(output)])
    report = json.loads(output.read_text(), parse_constant=pytest.fail)
    assert list(report["posteriors"]) == list(KNOWN)
    for name, found in report["posteriors"].items():
        rows = {row["estimator"]: row for row in found["rows"]}
        assert list(rows) == list(posteriors.ESTIMATORS)
        assert rows["RAD_ELBO"]["plan"]["untouched"]
        for bits in (4, 2):
            plan = rows[f"RAD_ELBO, {bits} bits"]["plan"]
            assert plan["coded_bytes"] > plan["exact_bytes"] / 2 and plan["stored_bytes"] < plan["exact_bytes"]
        for row in rows.values():
            assert None not in row["steps"], name
            for part in ("means", "deviations"):
                for other in ("exact", "closed_form"):
                    assert row[other][part]["largest_t"] < row[other][part]["bound"], (name, row["estimator"], part)
                assert row["exact"][part]["bias_ratio"] < MOST_BIAS_RATIO, (name, row["estimator"], part)
        assert 0.98 < rows["RAD_ELBO, 4 bits"]["steps_ratio"] < 1.02
    table = figures.markdown_table(report)
    assert all(f"| {e} | " in table for e in posteriors.ESTIMATORS) and report["versions"]["jax"] in table


@dataclasses.dataclass(frozen=True)
class ToNearest(StochasticRound):
    """The nearest level instead of a random one."""

    def encode(self, seed, x):
        layout = self._layout(x.shape)
        entries = layout.split(x)
        low, step = self._fit(layout, entries)
        number, below, above = self._neighbours(layout, entries, low, step, x.dtype)
        return *layout.pack(number + (2 * entries > below + above)), low, step


@pytest.mark.slow
def test_a_planted_bias_is_caught():
    nearest = {f"{bits} bits": RAD_ELBO(8, codec=ToNearest(bits=bits)) for bits in (4, 2)}
    known = posteriors.models(quick=True)["regression"]
    found = posteriors.measured(known, {"Trace_ELBO": Trace_ELBO(8), **nearest}, 1000, 5)
    for row in found["rows"][1:]:
        assert row["exact"]["means"]["bias_ratio"] > MOST_BIAS_RATIO < row["exact"]["deviations"]["bias_ratio"]
    for other in ("exact", "closed_form"):  # with two bits half a standard deviation, with four a hundredth
        means = found["rows"][2][other]["means"]
        assert means["largest_t"] > means["bound"]
    assert found["rows"][2]["steps"] == [None] * 5


def write_published(folder: Path) -> None:
    lines = ["dataset,setup,metric,n_splits,mean,std_error", "small,paper_2016,test_ll,20,-2.5,0.05"]
    lines += ["small,paper_2016,test_rmse,20,3.25,0.1", "small,two_layers_2016,test_rmse,20,1,0.1"]
    (folder / "uci" / "mc_dropout_summary.csv").write_text("\n".join(lines) + "\n")


def test_uci_scores_are_compared_split_by_split(tmp_path):
    write_uci(tmp_path)
    assert [d.name for d in uci.splits("small", tmp_path, None)] == ["uci:small"] * 2
    assert len(uci.splits("small", tmp_path, 1)) == 1
    exact, ours = uci.summary([1.0, 2.0, 4.0]), uci.summary([1.5, 2.5, 4.5])
    assert exact["standard_error"] == pytest.approx(np.sqrt(7 / 9))  # variance 7 / 3 of three values
    found = uci.difference(ours, exact)
    assert found["mean"] == pytest.approx(0.5) and found["standard_error"] == pytest.approx(0)
    assert found["within_one_standard_error"]
    assert not uci.difference(uci.summary([2.0, 3.0, 5.0]), exact)["within_one_standard_error"]
    assert uci.published("small", tmp_path) == {} == uci.published("small", None)
    write_published(tmp_path)
    assert uci.published("small", tmp_path) == {
        "paper_2016": {
            "log_likelihood": {"mean": -2.5, "standard_error": 0.05},
            "rmse": {"mean": 3.25, "standard_error": 0.1},
        }
    }


def test_uci_without_data_is_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match="--data-dir DIR"):
        uci.main(["--data-dir", str(tmp_path), "--output", str(tmp_path / "uci.json")])


@pytest.mark.slow
def test_uci_from_run_to_page(tmp_path):
    """Quick, on a set made up here: y = 50 + 10 x + noise of deviation 1."""
    write_uci(tmp_path, points=400)
    write_published(tmp_path)
    output = tmp_path / "uci.json"
    arguments = ["--data-dir", str(tmp_path), "--sets", "small", "--output", str(output)]
    report = uci.main(["--quick", *arguments])
    rows = report["uci"]["small"]["estimators"]
    assert list(rows) == list(uci.ESTIMATORS)
    for name, row in rows.items():
        assert 0.5 < row["rmse"]["mean"] < 3 and -3 < row["log_likelihood"]["mean"] < -1
        assert name == uci.EXACT or row["coded_share"] > 0.5
    four, two = (abs(rows[f"RAD_ELBO, {bits} bits"]["rmse_difference"]["mean"]) for bits in (4, 2))
    assert 0 < four < 1 and 0 < two < 1
    stored = output.read_text()
    assert json.loads(stored, parse_constant=pytest.fail) == report
    assert uci.main(["--quick", *arguments])["uci"] == report["uci"]  # fitted once
    assert output.read_text() == stored
    with pytest.raises(SystemExit, match="another steps"):
        uci.main(arguments)
    table = figures.markdown_table(report)
    assert "3.25 ± 0.10" in table and table.count("| small | 2 | ") == 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_a_network_that_does_not_fit_is_trained(tmp_path):
    output = tmp_path / "memory.json"
    command = [sys.executable, "-m", "examples.bigger_than_memory", "--steps", "3", "--output", str(output)]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # it computes for longer than it compiles
    root = Path(__file__).parents[1]
    result = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    report = json.loads(output.read_text())
    exact, ours = report["bigger_than_memory"].values()
    assert exact["exit_status"] != 0 and exact["ended"].startswith("out of memory") and not exact["losses"]
    assert ours["exit_status"] == 0 and len(ours["losses"]) == 3 and ours["losses"][-1] < ours["losses"][0]
    assert ours["temp_bytes"] < exact["temp_bytes"] / 4
    assert 0 < ours["most_resident_bytes"] < report["limit_bytes"] < exact["temp_bytes"]
    assert len(result.stdout.splitlines()) == 2 and "trained to the end" in result.stdout
    assert "trained to the end" in figures.markdown_table(report)
    assert output.with_suffix(".png").stat().st_size > 10_000


def test_an_end_is_told_in_words():
    assert bigger_than_memory.ending(0, []) == "trained to the end"
    assert bigger_than_memory.ending(1, ["x", "RESOURCE_EXHAUSTED: Out of memory"]).startswith("out of memory: RES")
    assert bigger_than_memory.ending(-9, []) == "ended by SIGKILL"
    assert bigger_than_memory.ending(1, ["ValueError: no"]) == "failed: ValueError: no"
