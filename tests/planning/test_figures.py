"""The picture of a plan: the bytes that it holds over time are those of the plan, and it shows other budgets."""

import io
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import lax
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoNormal

from numpyro_rad import RAD_ELBO, BudgetError, Keep, StochasticRound, explain, plan_figure, rad
from numpyro_rad.planning.figures import exact_timeline, timeline

pytestmark = [pytest.mark.in_one_go, pytest.mark.usefixtures("no_residual_is_too_small")]

KEY = jax.random.key(0)
X = np.random.default_rng(0).standard_normal((16, 32)).astype(np.float32)
W = np.random.default_rng(1).standard_normal((32, 32)).astype(np.float32) * 0.3


def network(x, w):
    for _ in range(4):
        x = jnp.tanh(x @ w)
    return (x**2).sum()


def recurrence(x, w):
    def step(h, i):
        return jnp.tanh(h @ w + i), None

    h, _ = lax.scan(step, jnp.tanh(x @ w), jnp.arange(64.0))
    return (jnp.sin(h) @ w).sum()


def conditional(x, w):
    cases = [lambda h: jnp.tanh(h @ w) @ w, lambda h: jax.nn.relu(h @ w)]
    return lax.switch(jnp.argmax(x[0]) % 2, cases, jnp.sin(x @ w)).sum()


def planned(f, *args, **options):
    return rad(f, **options).planned(args, {}, tuple(range(len(args))))[0]


def at(curve, time):
    """Bytes at a time at which nothing jumps."""
    return float(np.interp(time, *curve))


def levels(held):
    """The heights of a curve of steps, in order."""
    return held[np.insert(np.diff(held) != 0, 0, True)].tolist()


def test_arrays_are_held_from_where_they_are_made_to_their_last_reader():
    def products(x, a, b, c, d):
        h = x @ a  # read by the gradients of b and, first on the way back, of d
        return ((h @ b) @ c).sum() + (h @ d).sum()

    shapes = ((64, 8), (8, 32), (32, 64), (64, 1), (32, 2))
    args = [jnp.ones(shape) for shape in shapes]
    first, second = 64 * 32 * 4, 64 * 64 * 4
    exact, coded = (planned(products, *args, codec=codec) for codec in (Keep(), StochasticRound(8)))
    assert levels(exact_timeline(exact.graph)[1]) == [0, first, first + second, first, 0]
    assert levels(timeline(exact)[1]) == [0, first, first + second, first, 0]
    inner = [e for v, e in coded.encoded.items() if v in coded.graph.producer]
    assert all(len(entry.readers) == 1 for entry in inner)
    first, second = (entry.stored_bytes for entry in inner)
    inputs = coded.stored_bytes - first - second  # what stands for x
    assert levels(timeline(coded)[1]) == [inputs + n for n in (0, first, first + second, first)] + [0]


@pytest.mark.parametrize("codec", [Keep(), StochasticRound(4)], ids=str)
@pytest.mark.parametrize("f", [network, recurrence, conditional])
def test_a_plan_holds_its_bytes_between_the_sweeps_and_nothing_outside(f, codec):
    plan = planned(f, X, W, codec=codec)
    times, held = timeline(plan)
    assert times[0] == 0 and times[-1] == 2
    assert held[0] == held[-1] == 0
    assert held.max() == held[times == 1.0].max() == plan.stored_bytes > 0
    assert (np.diff(held[times <= 1.0][:-1]) >= 0).all()
    assert (np.diff(held[times >= 1.0][1:]) <= 0).all()
    assert at((times, held), 0.5) < plan.stored_bytes  # not all at once


def test_everything_exact_is_what_explain_calls_exact():
    for f in (network, recurrence):
        shown = explain(rad(f, codec=Keep()), KEY, X, W, argnums=(0, 1))
        times, held = exact_timeline(planned(f, X, W, codec=Keep()).graph)
        assert held[times == 1.0].max() == held.max() == shown.exact_bytes > 0
        assert held[-1] == 0


def test_a_segmented_loop_holds_one_tape_on_the_way_back_only():
    whole = planned(recurrence, X, W, codec=Keep())
    plan = planned(recurrence, X, W, memory_budget=whole.stored_bytes // 4, exact=True)
    (node,) = plan.segments
    times, held = timeline(plan)
    tape = sum(child.stored_bytes for child in plan.children[node])
    assert tape > 0
    assert held[times <= 1.0][:-1].max() == plan.stored_bytes - tape
    assert plan.stored_bytes - tape < held.max() <= plan.stored_bytes
    assert held[-1] == 0


def test_the_figure_shows_the_plan_among_other_budgets():
    randomized = rad(network, memory_budget=6000)
    plan = randomized.planned((X, W), {}, (0, 1))[0]
    figure = plan_figure(randomized, KEY, X, W, argnums=(0, 1), budgets=[1, 3000, "4kB", 6000])
    left, right = figure.axes
    for axes in (left, right):
        assert axes.get_xlabel() and axes.get_ylabel() and axes.get_legend() is not None
    assert "(KiB)" in left.get_ylabel() and "(KiB" in right.get_xlabel()
    lines = {line.get_label(): line for line in (*left.lines, *right.lines)}
    assert lines["every residual stored exactly"].get_ydata().max() > left.lines[1].get_ydata().max() > 0
    assert left.lines[1].get_ydata().max() == plan.stored_bytes / 1024
    bytes_held, variance = lines["added variance"].get_data()
    assert len(bytes_held) == 3  # one byte is too few
    assert all(np.asarray(bytes_held) * 1024 <= [3000, 4000, 6000])
    assert variance[0] >= variance[1] >= variance[2] == plan.predicted.added_variance < variance[0]
    assert lines["added time"].get_ydata()[2] == plan.predicted.added_seconds
    stars = {line.get_ydata()[0] for line in right.lines if line.get_marker() == "*"}
    assert stars == {plan.predicted.added_seconds, plan.predicted.added_variance}
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    assert picture.getvalue()[:4] == b"\x89PNG" and picture.tell() > 10_000


@pytest.mark.parametrize(
    "options", [{}, {"memory_budget": 10**6}, {"memory_budget": 10**6, "overrides": {"nix": Keep()}}]
)
def test_nobody_is_warned_of_budgets_that_the_figure_invents(options):
    """Nor twice of what its own plan was warned of."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        axes = plan_figure(rad(network, **options), KEY, X, W, argnums=1).axes[1]
    assert len(told) == len(options.get("overrides", ()))
    variance = next(line for line in axes.lines if line.get_label() == "added variance").get_ydata()
    assert max(variance) > 1  # of a plan that would be warned of


@pytest.mark.parametrize("options", [{"codec": Keep()}, {"exact": True}, {"memory_budget": 10**6, "exact": True}])
def test_exact_plans_are_compared_with_exact_plans(options):
    figure = plan_figure(rad(recurrence, **options), KEY, X, W)
    (line,) = (line for line in figure.axes[1].lines if line.get_label() == "added variance")
    assert len(line.get_ydata()) > 1
    assert not np.any(line.get_ydata())


def model(x, y):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([32, 8]).to_event(2))
    numpyro.sample("y", dist.Normal(jnp.tanh(x @ w).sum(1), 0.1).to_event(1), obs=y)


def test_it_takes_what_explain_takes():
    elbo = RAD_ELBO()
    svi = SVI(model, AutoNormal(model), optax.adam(1e-3), elbo)
    params = svi.get_params(svi.init(KEY, X, X[:, 0]))
    shown = explain(elbo, KEY, params, svi.model, svi.guide, X, X[:, 0])
    figure = plan_figure(elbo, KEY, params, svi.model, svi.guide, X, X[:, 0])
    (line,) = (line for line in figure.axes[1].lines if line.get_label() == "this plan")
    scale = 1024 if "KiB" in figure.axes[1].get_xlabel() else 1
    assert line.get_xdata()[0] * scale == shown.stored_bytes


def test_without_bytes_and_without_parameters_there_is_still_a_picture():
    figure = plan_figure(rad(lambda x: x.sum()), KEY, X)
    figure.savefig(io.BytesIO())
    assert figure.axes[0].lines[1].get_ydata().max() == 0


def test_what_cannot_be_drawn_is_said(monkeypatch):
    with pytest.raises(TypeError, match=r"needs a RAD_ELBO, an SVI .* or the result of rad"):
        plan_figure(jax.grad(network), KEY, X, W)
    with pytest.raises(BudgetError):
        plan_figure(rad(network, memory_budget=1), KEY, X, W)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install numpyro_rad\[plots\]"):
        plan_figure(rad(network), KEY, X, W)
