"""Small programs are left to JAX: without options, ``RAD_ELBO`` is then ``Trace_ELBO`` to the bit and to the byte.

Here, and nowhere else in the tests, small models are what they are to users.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from models import classes, logistic, network_regression, stochastic_volatility, wave
from modules import MUTABLE
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from numpyro.infer.autoguide import AutoIAFNormal, AutoNormal
from programs import assert_equal_trees, few, program

import numpyro_rad.planning.ways
from numpyro_rad import RAD_ELBO, RAD_SVI, Keep, StochasticRound, explain, rad
from numpyro_rad.planning import worth

pytestmark = [pytest.mark.in_one_go, pytest.mark.untouched]


def with_effects(x):
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
    jax.debug.callback(SEEN.append, scale)
    numpyro.sample("x", dist.Normal(jnp.tanh(x * scale), scale), obs=x)


SEEN = []

MODELS = {
    "network": lambda: program(network_regression, AutoNormal(network_regression), *wave(32)),
    "minibatches": lambda: program(logistic, AutoNormal(logistic), *classes(40), batch_size=16),
    "loop": lambda: program(stochastic_volatility, AutoNormal(stochastic_volatility), jnp.ones((5, 2))),
    "flow": lambda: program(logistic, AutoIAFNormal(logistic, num_flows=1), *classes(40)),
    "effects": lambda: program(with_effects, AutoNormal(with_effects), jnp.ones(7)),
}

BASES = {
    "one particle": Trace_ELBO(),
    "particles": Trace_ELBO(num_particles=3),
    "mean field": TraceMeanField_ELBO(),
    "Rényi": RenyiELBO(num_particles=2),
}


@pytest.fixture
def nothing_is_linearized(monkeypatch):
    def refuse(*_):
        raise AssertionError("the program was linearized")

    monkeypatch.setattr(numpyro_rad.planning.ways, "linearize", refuse)


def compiled(svi, state, args, kwargs):
    return jax.jit(lambda state, args: svi.update(state, *args, **kwargs)).lower(state, args).compile()


@pytest.mark.parametrize("name", few(MODELS, "network", "loop", slow=2))
@pytest.mark.usefixtures("nothing_is_linearized")
def test_the_step_is_that_of_trace_elbo(name):
    """Loss, parameters and temporary memory of a step; nothing happens more or less often."""
    p = MODELS[name]()
    found = []
    for elbo in (Trace_ELBO(), RAD_ELBO()):
        svi = p.svi(elbo)
        state = svi.init(jax.random.key(0), *p.args, **p.kwargs)
        step = compiled(svi, state, p.args, p.kwargs)
        SEEN.clear()
        after, loss = step(state, p.args)
        jax.effects_barrier()
        found.append((step.memory_analysis().temp_size_in_bytes, loss, svi.get_params(after), len(SEEN)))
    assert found[0][0] == found[1][0] and found[0][3] == found[1][3]
    assert_equal_trees(found[1][1:3], found[0][1:3])


@pytest.mark.parametrize("name", few(BASES, "particles", slow=3))
@pytest.mark.usefixtures("nothing_is_linearized")
def test_any_base(name):
    p = MODELS["network"]()
    expected, found = (p.value_and_grad(elbo) for elbo in (BASES[name], RAD_ELBO(base=BASES[name])))
    assert_equal_trees(found, expected)


@pytest.mark.usefixtures("nothing_is_linearized")
def test_mutable_state():
    model, guide, args = MUTABLE["plain"]()
    states = []
    for elbo in (Trace_ELBO(), RAD_ELBO()):
        svi = SVI(model, guide, optax.adam(1e-2), elbo)
        state = svi.init(jax.random.key(0), *args)
        for _ in range(2):
            state, _ = svi.update(state, *args)
        states.append((svi.get_params(state), state.mutable_state))
    assert_equal_trees(states[1], states[0])


# -- whatever is done to a function ------------------------------------------------------------------------------------


def many(x, y):
    """A number, another that nobody differentiates, and an integer."""
    z = jnp.tanh(x @ y)
    return z.sum(), jnp.exp(z), jnp.argmax(z)


X, Y = (np.random.default_rng(i).standard_normal((4, 4)).astype(np.float32) for i in range(2))


def first(f):
    return lambda *args: f(*args)[0]


WRAPPERS = {
    "grad": lambda f: jax.grad(first(f), (0, 1)),
    "vjp of all": lambda f: lambda x, y: jax.vjp(lambda *a: f(*a)[:2], x, y)[1]((jnp.float32(2), jnp.ones((4, 4)))),
    "hessian": lambda f: jax.jacrev(jax.jacrev(first(f))),
    "vmap": lambda f: jax.vmap(jax.grad(first(f)), (0, None)),
    "scan": lambda f: lambda x, y: jax.lax.scan(lambda c, _: (jax.grad(first(f))(c, y), c), x, None, 3),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(first(f)), (0, 1)),
    "in a loop": lambda f: jax.grad(lambda x, y: jax.lax.fori_loop(0, 3, lambda _, c: c * first(f)(c, y), x).sum()),
}


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.usefixtures("nothing_is_linearized")
def test_transformed(name):
    wrap, key = WRAPPERS[name], jax.random.key(0)
    x = jnp.stack([X, 2 * X]) if name == "vmap" else X
    found = jax.jit(wrap(lambda *args: rad(many)(key, *args)))(x, Y)
    assert_equal_trees(found, jax.jit(wrap(many))(x, Y))


# -- when --------------------------------------------------------------------------------------------------------------


OPTIONS = [
    {"codec": Keep()},
    {"memory_budget": "10KiB"},
    {"added_variance": 0.1},
    {"exact": True},
    {"overrides": {"w*": StochasticRound(8)}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_whoever_chooses_gets_a_plan(options):
    assert MODELS["network"]().explain(RAD_ELBO()).untouched
    assert not MODELS["network"]().explain(RAD_ELBO(**options)).untouched


def test_large_programs_are_planned(priced):
    """A program counts by its residuals, of which the linearized one has fewer than it computes numbers."""
    p = MODELS["network"]()
    whole = p.explain(RAD_ELBO())
    assert whole.stored_bytes == whole.exact_bytes > 0
    for limit, untouched in ((whole.stored_bytes + 1, True), (whole.stored_bytes, False)):
        priced(untouched_bytes=limit)
        assert p.explain(RAD_ELBO()).untouched == untouched


# -- what is said ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_explain_and_saved_plans():
    p = MODELS["network"]()
    svi = p.svi(RAD_ELBO())
    state = svi.init(jax.random.key(0), *p.args)
    assert worth.UNTOUCHED in str(explain(svi, state, *p.args))
    plan, _ = svi.loss.plan_of_update(svi, state, *p.args)
    _, loss = jax.jit(svi.update)(state, *p.args)
    svi.loss = svi.loss.with_plan(plan)
    assert svi.loss.plan_of_update(svi, state, *p.args)[0].untouched
    np.testing.assert_array_equal(jax.jit(svi.update)(state, *p.args)[1], loss)
    assert not p.explain(RAD_ELBO(plan={**plan.to_dict(), "untouched": False})).untouched


@pytest.mark.slow
def test_a_run_and_its_report():
    p = MODELS["network"]()
    svi = RAD_SVI(p.model, p.guide, optax.adam(1e-2), RAD_ELBO())
    result = svi.run(jax.random.key(0), 10, *p.args, progress_bar=False)
    result.assess(draws=2)
    assert result.record.plan.untouched and not result.record.plan.saves
    assert result.record.gradient_variance.rho.value == 0
    text = result.report(format="markdown")
    assert "no path noise" in text and "Left to JAX" in " ".join(text.split())
