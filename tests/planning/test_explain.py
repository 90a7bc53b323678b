"""Plans in words: what they are expected to cost, and two of them side by side."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax import lax

from numpyro_rad import Keep, StochasticRound, compare, explain, rad
from numpyro_rad.planning import costs
from numpyro_rad.wording import change_text, size_text

pytestmark = [pytest.mark.in_one_go, pytest.mark.usefixtures("no_residual_is_too_small")]

KEY = jax.random.key(0)
X = np.random.default_rng(0).standard_normal((16, 32)).astype(np.float32)
W = np.random.default_rng(1).standard_normal((32, 32)).astype(np.float32) * 0.3


def network(x, w):
    for _ in range(3):
        x = jax.nn.gelu(x @ w)
    return (x**2).sum()


def recurrence(x, w):
    h, _ = lax.scan(lambda h, i: (jnp.tanh(h @ w + i), None), jnp.tanh(x @ w), jnp.arange(64.0))
    return (jnp.sin(h) @ w).sum()


def table(f, **options):
    return explain(rad(f, **options), KEY, X, W, argnums=(0, 1))


# What a plan is expected to cost


def test_a_table_ends_with_the_prediction():
    shown = table(network, memory_budget=5000)
    predicted = shown.predicted
    assert predicted is not None and predicted.added_variance > 0
    last = str(shown).splitlines()[-1]
    time = change_text(predicted.added_seconds, "time")
    variance = change_text(predicted.added_variance, "variance")
    assert last.startswith(f"Predicted: {time} and {variance}, relative to the time of the exact step")
    assert predicted.gap == 0 and last.endswith("no plan for these bytes takes less of both.")
    short = dataclasses.replace(shown, predicted=dataclasses.replace(predicted, gap=0.034))
    assert str(short).endswith("no plan for these bytes takes 3.4 % less of both.")


def test_a_plan_that_is_faster_says_so():
    """What is not held need not be mapped; where that counts, 2 bits take less time than the exact step."""
    dear = dataclasses.replace(costs.CPU, hold_from_bytes=0, hold_per_byte=1000.0, least_encoded_bytes=0)
    shown = table(network, codec=StochasticRound(2), costs=dear)
    assert shown.predicted is not None and -1 < shown.predicted.added_seconds < 0
    said = str(shown).splitlines()[-1]
    assert said.startswith("Predicted: -") and " % time and " in said


def test_a_gap_that_nobody_knows_is_not_printed():
    shown = table(network, codec=StochasticRound(4))
    assert shown.predicted is not None and shown.predicted.gap is None
    last = str(shown).splitlines()[-1]
    assert last.startswith("Predicted: ") and "no plan" not in last and "inf" not in last


def test_a_plan_without_prediction_prints_as_well():
    shown = dataclasses.replace(table(network, codec=Keep()), predicted=None)
    assert "Predicted" not in str(shown)
    assert "nothing is predicted" in str(compare(shown, shown))


# A few rows for people, all rows on demand


def test_rows_of_one_line_and_site_are_one_and_small_ones_are_folded():
    def f(x, w):
        for _ in range(2):
            x = jax.nn.gelu(x @ w) + jax.nn.softplus(x @ w)
        return (x**2).sum() + (jnp.sin(x[0, 0]) * x[0, 1]) ** 3

    shown = table(f, codec=StochasticRound(4))
    head, _, *body = str(shown).splitlines()
    assert head.split() == ["where", "site", "what", "how", "exact", "share", "stored", "share"]
    rows = [line for line in body if line.startswith("test_explain.py:")]
    assert len(rows) == len({tuple(r.split()[:2]) for r in rows}) < len({(r.path, r.decision) for r in shown.rows})
    (folded,) = (line for line in body if "more, each under 1 %" in line)
    groups = {(r.line, r.site) for r in shown.rows}
    assert len(body) - 6 + int(folded.split()[0]) == len(groups)
    total = next(line for line in body if line.startswith("total"))
    assert f"{shown.stored_bytes / 1024:.1f} KiB" in total
    shares = [int(line.split()[-2]) for line in body if line.endswith(" %")]
    assert shares == sorted(shares[:-1], reverse=True) + shares[-1:] and 95 <= sum(shares) <= 105


def test_all_rows_are_there_on_demand():
    shown = table(network, codec=StochasticRound(4))
    lines = shown.table().splitlines()
    body = lines[2 : 2 + len(shown.rows)]
    assert all(row.decision in line and row.operation in line for row, line in zip(shown.rows, body, strict=True))
    assert "rel. variance: of a residual's code, relative to the squared norm of the residual." in lines
    assert lines[-1].startswith("Predicted: ")


def test_distributions_are_named():
    def f(x, w):
        return dist.Gamma(jnp.exp(x @ w), jnp.exp(w[0])).log_prob(jnp.exp(x)).sum()

    shown = table(f, codec=Keep())
    assert "Gamma.log_prob" in {row.within for row in shown.rows} and "Gamma.log_prob" in str(shown)
    assert {row.within for row in table(network, codec=Keep()).rows} == {""}


# Two plans


def test_only_what_differs_is_compared():
    exact, coded = table(network, codec=Keep()), table(network, codec=StochasticRound(4))
    found = compare(exact, coded)
    rows = [{r.path: r for r in shown.rows} for shown in (exact, coded)]
    assert [len(r) for r in rows] == [len(exact.rows), len(coded.rows)]
    pairs = {path: tuple(r.get(path) for r in rows) for path in {**rows[0], **rows[1]}}
    differing = {p: (a, b) for p, (a, b) in pairs.items() if a is None or b is None or a.decision != b.decision}
    assert 0 < len(differing) < len(pairs)
    assert {d.row.path for d in found.rows} == set(differing)
    for d in found.rows:
        pair = differing[d.row.path]
        assert d.decisions == tuple(r.decision if r else "" for r in pair)
        assert d.stored_bytes == tuple(r.stored_bytes if r else 0 for r in pair)
        assert d.relative_variance == tuple(r.relative_variance if r else 0.0 for r in pair)
    assert any(0 == first < second for first, second in (d.relative_variance for d in found.rows))
    assert sum(a - b for a, b in (d.stored_bytes for d in found.rows)) == exact.stored_bytes - coded.stored_bytes


def test_the_order_of_two_plans_only_mirrors_them():
    one, other = table(network, memory_budget=3000), table(network, memory_budget=9000)
    there, back = compare(one, other), compare(other, one)
    assert there.rows
    assert {d.row.path: d.decisions for d in there.rows} == {d.row.path: d.decisions[::-1] for d in back.rows}


def test_a_plan_beside_itself_shows_totals_only():
    shown = table(network, codec=StochasticRound(4))
    found = compare(shown, shown)
    assert "do the same" in str(found)
    assert found.rows == ()
    assert "total" in str(found) and "4-bit" not in str(found)


def test_it_prints_a_table_with_totals():
    one, other = table(network, codec=Keep()), table(network, memory_budget=3000)
    lines = str(compare(one, other)).splitlines()
    assert lines[0].split()[:2] == ["where", "site"] and "first plan" in lines[0] and "second plan" in lines[0]
    total = next(line for line in lines if line.startswith("total"))
    assert [f"{n / 1024:.1f}" for n in (one.stored_bytes, other.stored_bytes)] == total.split()[1::2]
    assert any("keep" in line and "-bit" in line and "test_explain.py" in line for line in lines)
    for name, shown in (("First", one), ("Second", other)):
        (line,) = (line for line in lines if line.startswith(name))
        assert change_text(shown.predicted.added_seconds, "time") in line
        assert change_text(shown.predicted.added_variance, "variance") in line


def test_slices_say_when_most_is_held():
    plan = rad(network, slices=4, exact=True).planned((X, W), {}, (0, 1))[0]
    shown = table(network, slices=4, exact=True)
    assert shown.slices is not None
    assert shown.peak_bytes == plan.peak_bytes == shown.stored_bytes + shown.slices.bytes_each
    said = f"Most is held while a slice runs, {size_text(plan.peak_bytes)}; an exact step in one go holds"
    assert said in str(shown) and said in shown.table()
    assert table(network, exact=True).peak_bytes == table(network, exact=True).stored_bytes


def test_segments_stand_beside_nothing():
    whole = table(recurrence, codec=Keep())
    cut = table(recurrence, memory_budget=whole.stored_bytes // 4, exact=True)
    found = compare(cut, whole)
    (segments,) = (d for d in found.rows if "segments" in d.decisions[0])
    assert segments.decisions[1] == "" and segments.stored_bytes[0] > segments.stored_bytes[1] == 0
    (line,) = (line for line in str(found).splitlines() if "segments" in line)
    assert "  -  " in line


def test_readers_of_an_estimate_and_of_the_value_share_a_row():
    def f(x, w):
        h = jnp.tanh(x @ w)
        return (h @ w).sum() + jnp.linalg.slogdet(h.T @ h + jnp.eye(32))[1] + jnp.cumprod(h, 0).sum()

    exact, coded = table(f, codec=Keep()), table(f, codec=StochasticRound(4))
    found = compare(exact, coded)
    paths = [d.row.path for d in found.rows]
    assert len(paths) == len(set(paths)) > 0
    assert all(a != b for a, b in (d.decisions for d in found.rows))


def test_plans_are_compared_like_their_tables():
    plans = [rad(network, **o).planned((X, W), {}, (0, 1))[0] for o in ({"codec": Keep()}, {"memory_budget": 5000})]
    tables = [table(network, codec=Keep()), table(network, memory_budget=5000)]
    by_plan, by_table = compare(*plans), compare(*tables)
    assert [d.decisions for d in by_plan.rows] == [d.decisions for d in by_table.rows]
    assert {d.row.site for d in by_plan.rows} == {""} != {d.row.site for d in by_table.rows}


def test_a_plan_in_slices_is_compared_with_one_in_one_go():
    """They are plans of one program, whose residuals take as much in one go."""
    sliced, whole = (explain(rad(network, exact=True, slices=n), KEY, X, W) for n in (4, 1))
    assert sliced.exact_bytes == whole.exact_bytes and sliced.slices is not None and whole.slices is None
    found = compare(sliced, whole)
    assert ("in 4 slices", "keep") in {row.decisions for row in found.rows}
    assert [row.decisions[1] for row in found.rows if row.row.operation.startswith("axis of")] == [""]
    assert "in 4 slices" in str(compare(whole, sliced))


def test_different_programs_are_not_compared():
    with pytest.raises(ValueError, match="different programs"):
        compare(table(network), table(recurrence))
    with pytest.raises(ValueError, match="different programs"):
        compare(table(network), explain(rad(network), KEY, X[:8], W, argnums=(0, 1)))
    with pytest.raises(TypeError, match="two results of explain, or two plans, got str"):
        compare(table(network), str(table(network)))
