"""Sampled derivatives of layered graphs: their variance is that of a closed form, which is that of all draws."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import path_sampling
from examples.benchmarks import figures
from numpyro_rad.codecs import SampleAxis

UNITS, DEPTH, DRAWS = 16, 3, 64 * path_sampling.ROWS
SURPRISING = 4.5  # standard errors


def every_draw(graph, stratum):
    """The gradient for each choice of one unit in each stratum of each layer."""
    slopes, (depth, units) = graph.slopes(), graph.weights.shape[:2]
    chosen = itertools.product(range(stratum), repeat=depth * units // stratum)
    for choice in chosen:
        kept = np.arange(stratum) == np.reshape(choice, (depth, units // stratum, 1))
        cotangent = graph.end
        for weights, slope, mask in zip(
            graph.weights[::-1], slopes[::-1], kept.reshape(depth, units)[::-1], strict=True
        ):
            cotangent = weights.T @ (stratum * mask * slope * cotangent)
        yield cotangent


@pytest.mark.parametrize("kind", path_sampling.GRAPHS)
def test_the_closed_form_is_the_variance_over_all_draws(kind):
    graph = path_sampling.layered(path_sampling.GRAPHS[kind], 2, 6)
    draws = np.array(list(every_draw(graph, 2)))
    mean = draws.mean(0)
    expected = np.sum((draws - mean) ** 2) / len(draws) / np.sum(mean**2)
    assert path_sampling.closed_form(graph, 2) == pytest.approx(expected, rel=1e-10)
    exact = jax.grad(path_sampling.output)(
        jnp.float32(graph.start)[None], list(jnp.float32(graph.weights)), jnp.float32(graph.end), jnp.eye(6)
    )
    np.testing.assert_allclose(mean, exact[0], rtol=2e-5, atol=1e-7)


def surprise(squared, expected):
    return abs(squared.mean() - expected) / (squared.std(ddof=1) / len(squared) ** 0.5)


@pytest.mark.in_one_go
@pytest.mark.parametrize("kind", ["both_signs", "one_sign", "neighbours"])
def test_rad_samples_paths(kind):
    graph = path_sampling.layered(path_sampling.GRAPHS[kind], DEPTH, UNITS)
    squared = path_sampling.of_the_input(graph, path_sampling.CODECS["sampled"], DRAWS)
    assert surprise(squared, path_sampling.closed_form(graph, path_sampling.STRATUM)) < SURPRISING


@pytest.mark.in_one_go
def test_steps_entry_by_entry_are_sampled_once():
    graph = path_sampling.layered(path_sampling.alone, DEPTH, UNITS)
    squared = path_sampling.of_the_input(graph, path_sampling.CODECS["sampled"], DRAWS)
    assert surprise(squared, path_sampling.STRATUM - 1) < SURPRISING
    assert surprise(squared, path_sampling.closed_form(graph, path_sampling.STRATUM)) > SURPRISING


@pytest.mark.in_one_go
def test_what_is_not_read_by_each_other_is_sampled_once():
    graph = path_sampling.layered(path_sampling.both_signs, DEPTH, UNITS)
    squared = path_sampling.of_the_weights(graph, path_sampling.CODECS["sampled"], DRAWS)
    assert surprise(squared, path_sampling.STRATUM - 1) < SURPRISING


@dataclasses.dataclass(frozen=True)
class OneSlot(SampleAxis):
    """Wrong: the same place in all strata of a row."""

    def _chosen(self, seed, shape):
        chosen = super()._chosen(seed, shape)
        return jnp.broadcast_to(chosen[..., :1, :], chosen.shape)


@pytest.mark.in_one_go
def test_a_choice_that_is_not_independent_is_caught():
    graph = path_sampling.layered(path_sampling.one_sign, DEPTH, UNITS)
    squared = path_sampling.of_the_input(graph, OneSlot(keep=1 / path_sampling.STRATUM), DRAWS)
    assert surprise(squared, path_sampling.closed_form(graph, path_sampling.STRATUM)) > SURPRISING


@pytest.mark.slow
def test_the_program_writes_a_report_with_its_table_and_picture(tmp_path):
    report = path_sampling.main(["--quick", "--output", str(tmp_path / "path_sampling.json")])
    figures.main([str(tmp_path / "path_sampling.json")])
    assert (tmp_path / "path_sampling.png").stat().st_size > 10_000
    assert set(report["path_sampling"]) == set(path_sampling.TITLES)
