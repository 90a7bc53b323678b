"""The models of the coverage table: right values and gradients at small sizes, and a page that is not stale.

Each model is initialized and evaluated in one compiled program. Barriers between its parts make the compiler run each
of them, rather than find out that two are the same. A kind of model is in the fast set once; all the others are slow.
"""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from numpyro.infer import SVI, Trace_ELBO
from programs import few

from examples.coverage import run, table
from examples.coverage.models import MODELS
from numpyro_rad import RAD_ELBO, Keep
from numpyro_rad.planning.explain import Row

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "coverage.md"

# As little optimization as possible: the programs are compiled to run once.
COMPILER = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

FAST = ("vae",)


def evaluate(example, key):
    """Losses of the two ELBOs, and gradients of ``Trace_ELBO`` and of the exact plan, at the guide's first state."""
    problem = example.make(small=True)
    exact, rad = Trace_ELBO(**problem.elbo), RAD_ELBO(**problem.elbo)
    keep = RAD_ELBO(**problem.elbo, codec=Keep())
    svi = SVI(problem.model, problem.guide, problem.optimizer, exact)
    state = svi.init(key, *problem.args, **problem.settings)
    params = svi.optim.get_params(state.optim_state)

    def loss(elbo):
        def of(params, key):
            operands = (svi.constrain_fn(params), problem.model, problem.guide, *problem.args)
            return elbo.loss(key, *operands, **problem.settings)

        return of

    results = []
    for part in (loss(exact), loss(rad), jax.grad(loss(exact)), jax.grad(loss(keep))):
        params, key = jax.lax.optimization_barrier((params, key))
        results.append(part(params, key))
    return results


@pytest.mark.parametrize("name", few(MODELS, *FAST, slow=5))
def test_value_and_exact_gradient(name):
    example = MODELS[name]
    for package in example.needs:
        pytest.importorskip(package)
    lowered = jax.jit(lambda key: evaluate(example, key)).lower(jax.random.key(0))
    results = lowered.compile(COMPILER)(jax.random.key(0))
    exact, rad, expected, found = jax.tree.map(np.asarray, results)
    assert np.isfinite(exact)
    # One program computes both, and the compiler may fuse their sums differently: run.py compares the bits.
    np.testing.assert_allclose(rad, exact, rtol=1e-6)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    difference = sum(np.sum((a - b) ** 2) for a, b in pairs)
    norm = sum(np.sum(x**2) for x in jax.tree.leaves(expected))
    assert norm > 0, "a gradient of zero agrees with anything"
    assert difference <= (1e-5**2) * norm  # float32 sums in another order differ by about 1e-7


def test_importing_the_models_makes_no_array():
    source = "import examples.coverage.models, jax; assert not jax.live_arrays()"
    assert subprocess.run([sys.executable, "-c", source], cwd=ROOT).returncode == 0


def test_there_are_enough_models():
    assert len(MODELS) >= 20
    assert set(FAST) <= set(MODELS)
    assert all(example.make.__doc__ and example.source for example in MODELS.values())


def test_page_is_what_its_numbers_say():
    report = json.loads(PAGE.with_suffix(".json").read_text())
    assert PAGE.read_text() == table.markdown(report), "stale: run.py --table-only writes it again"
    assert [row["name"] for row in report["models"]] == list(MODELS)
    assert not report["settings"]["small"]


def test_shares_add_up_and_count_what_is_shared_once():
    def row(operation, decision, exact_bytes, stored_bytes):
        return Row("a.py:1", "w", operation, (exact_bytes // 4,), "float32", decision, exact_bytes, stored_bytes, 0.0)

    rows = [
        row("dot_general", "4-bit", 80_000, 10_000),
        row("mul", "4-bit", 80_000, 0),  # the code of the row before
        row("mul", "alive", 0, 0),
        row("elementwise", "keep", 8_000, 8_000),
        row("elementwise", "recompute", 60_000, 0),
        row("recomputation", "keep", 20_000, 20_000),  # what the row before is made from
    ]
    found = run.residual_shares(rows, 100_000)
    assert (found["total_bytes"], found["compressed_bytes"], found["eliminated_bytes"]) == (148_000, 80_000, 0)
    assert (found["kept_bytes"], found["recomputed_bytes"]) == (28_000, 40_000)
    assert [k["reason"] for k in found["kept"]] == ["source of recomputation", "small"]
    found = run.residual_shares(rows, 200_000)
    assert (found["total_bytes"], found["eliminated_bytes"], found["recomputed_bytes"]) == (200_000, 52_000, 40_000)


@pytest.mark.slow
def test_program_measures_a_model_and_writes_its_page(tmp_path):
    output = tmp_path / "coverage.json"
    run.main(["proportion_test", "--small", "--steps", "5", "--repeats", "2", "--output", str(output)])
    report = json.loads(output.read_text())
    (row,) = report["models"]
    assert not row["failures"]
    assert row["value"]["same_bits"]
    assert row["gradient"]["relative_difference"] < 1e-5
    assert row["temp_bytes"]["exact"] > 0 and row["step"]["ours"]["median_ratio"] > 0
    assert row["untouched"] is False  # the tests lift the limit
    assert "proportion_test" in output.with_suffix(".md").read_text()
