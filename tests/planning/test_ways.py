"""Ways through a program under a budget, where the compiled gradient takes more than its plan says."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import pytest
from programs import normal

from numpyro_rad.ad import _jax
from numpyro_rad.planning import costs
from numpyro_rad.planning.planner import Planner
from numpyro_rad.planning.ways import TRIES, Search, Way

X, W = normal(256, 32), [normal(32, 32, seed=i, scale=0.3) for i in range(5)]
U = [normal(64, 64, seed=i) for i in range(4)]
COSTS = dataclasses.replace(costs.CPU, untouched_bytes=0, slice_start=10.0)


def network(w, u, x):
    """A network whose rows stay to themselves, and besides what is dear to make again: stored where there is room."""
    outside = sum(jax.scipy.special.gammaln(1.5 + jnp.sin(v)).sum() for v in u)
    for v in w:
        x = jax.nn.gelu(x @ v)
    return jnp.square(x).sum() + outside


def chosen(budget: int, taken) -> tuple[Way, list[tuple[int, int]]]:
    """The way that is found, and number of slices and planned bytes of those that were compiled before it.

    :param taken: from a plan to what its compiled gradient takes.
    """
    jaxpr, _, _ = _jax.trace(network, W, U, X)
    planner, asked = Planner(memory_budget=budget, exact=True, costs=COSTS), []

    def compiled(plan):
        asked.append((1 if plan.graph.slices is None else plan.graph.slices.number, plan.peak_bytes))
        return taken(plan)

    active = [True] * len((*W, *U)) + [False]
    search = Search(jaxpr, active, budget, lambda g: planner._request(g, {}), COSTS, compiled)
    return search.way(may_be_untouched=False), asked


def test_the_cheapest_that_fits_is_taken():
    way, asked = chosen(200_000, lambda plan: plan.peak_bytes)
    assert len(asked) == 1 and way.plan is not None and way.plan.peak_bytes <= 200_000


def test_what_takes_too_much_gives_way_to_what_holds_less():
    """Twice what is planned: at most TRIES programs are compiled, each plans less than the one it takes the place of,
    and the first that fits is taken."""
    budget = 220_000
    way, asked = chosen(budget, lambda plan: 2 * plan.peak_bytes)
    assert way.plan is not None and 2 * way.plan.peak_bytes <= budget
    assert 1 < len(asked) <= TRIES and asked[-1][1] < asked[0][1]


def test_less_is_held_outside_before_there_are_more_slices():
    """What is kept outside of slices takes four times its bytes: the same number of slices is tried with less of it."""

    def taken(plan):
        return plan.peak_bytes + 3 * plan.stored_bytes

    way, asked = chosen(150_000, taken)
    assert way.plan is not None and way.graph.slices is not None
    assert any(a[0] == b[0] > 1 and b[1] < a[1] for a, b in itertools.pairwise(asked))


@pytest.mark.parametrize("excess", [1.5, 3.0, 1000.0])
def test_where_nothing_fits_there_is_still_a_plan_within_the_budget(excess):
    way, asked = chosen(150_000, lambda plan: int(excess * 150_000))
    assert way.plan is not None and way.plan.peak_bytes <= 150_000 and len(asked) <= TRIES
