"""What a model does besides computing, printing above all, happens as often as without this library, in order."""

from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax.experimental import io_callback
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from programs import few

from numpyro_rad import RAD_ELBO, BudgetError, Keep, StochasticRound, rad
from numpyro_rad.transform import Closure

KEY = jax.random.key(0)


class Log:
    """Remembers who called."""

    def __init__(self):
        self.calls = []

    def note(self, name, x, ordered=False):
        jax.debug.callback(lambda _: self.calls.append(name), x, ordered=ordered)

    def ask(self, name, x, ordered=False):
        """The sum of ``x``, as the host computes it."""

        def answer(x):
            self.calls.append(name)
            return x.sum()

        x = jax.lax.stop_gradient(x)
        return io_callback(answer, jax.ShapeDtypeStruct((), x.dtype), x, ordered=ordered)

    def during(self, f, *args):
        self.calls.clear()
        jax.block_until_ready(f(*args))
        jax.effects_barrier()
        return list(self.calls)


# -- functions: each is called with a log, whether its effects are ordered, and an array ------------------------------


def top(log, ordered, x):
    log.note("before", x, ordered)
    y = jnp.tanh(x) @ x
    log.note("between", x, ordered)  # leads nowhere and depends on what was there early
    z = jnp.sin(y) @ x
    log.note("after", z, ordered)
    return jnp.sum(z * log.ask("host", y, ordered))


def printed(log, ordered, x):
    jax.debug.print("{}", x.sum(), ordered=ordered)
    log.note("beside", x, ordered)
    return jnp.sin(x).sum()


def loop(log, ordered, x):
    def outer(c, i):
        def inner(c, _):
            log.note("inner", c, ordered)
            return jnp.tanh(c) * 1.1, None

        c, _ = jax.lax.scan(inner, c, None, length=2)
        log.note("outer", c, ordered)
        return c, c.sum() * i

    c, s = jax.lax.scan(outer, x, jnp.arange(3.0))
    return c.sum() + s.sum()


def unread_loop(log, ordered, x):
    def body(c, _):
        log.note("unread", c, ordered)
        return c + 1, None

    jax.lax.scan(body, x, None, length=3)
    return jnp.sin(x).sum()


def while_loop(log, ordered, x):
    def body(c):
        log.note("while", c[1], ordered)
        return c[0] + 1, c[1] * 1.5

    n, _ = jax.lax.while_loop(lambda c: c[0] < 3, body, (0, jax.lax.stop_gradient(x)))
    return (jnp.sin(x) * n).sum()


def branch(log, ordered, x):
    def taken(x):
        log.note("taken", x, ordered)
        return jnp.sin(x)

    def other(x):
        log.note("other", x, ordered)
        return x

    return jax.lax.cond(x.sum() > -1e9, taken, other, x).sum()


def rule(log, ordered, x):
    @jax.custom_vjp
    def same(x):
        log.note("value", x, ordered)
        return x

    def forward(x):
        log.note("forward rule", x, ordered)
        return x, ()

    def backward(_, g):
        log.note("backward rule", g, ordered)
        return (g,)

    same.defvjp(forward, backward)
    return jnp.sin(same(jnp.tanh(x) @ x)).sum()


def rule_of_tangents(log, ordered, x):
    @jax.custom_jvp
    def f(x):
        log.note("value", x, ordered)
        return jnp.sin(x)

    @f.defjvp
    def _(primals, tangents):
        log.note("rule", primals[0], ordered)
        return f(*primals), jnp.cos(primals[0]) * tangents[0]

    return f(x).sum()


def run_again(log, ordered, x):
    """JAX itself repeats what a checkpointed function does."""

    def f(x):
        log.note("again", x, ordered)
        return jnp.sin(jnp.tanh(x) @ x)

    return jax.checkpoint(lambda x: jax.checkpoint(f)(f(x)))(x).sum()


def particles(log, ordered, x):
    def f(row):
        log.note("row", row)
        return jnp.sin(jnp.tanh(row)).sum()

    return jax.vmap(f)(x).sum() + jax.lax.map(f, x).sum()


PROGRAMS = (top, printed, loop, unread_loop, while_loop, branch, rule, rule_of_tangents, run_again, particles)
UNORDERED = (run_again, particles)  # JAX has no ordered effects there


UNORDERED_AS_WELL = [pytest.param(f, False, marks=pytest.mark.exhaustive) for f in PROGRAMS if f not in UNORDERED]


@pytest.mark.parametrize(
    ("program", "ordered"),
    [*[(f, f not in UNORDERED) for f in PROGRAMS], *UNORDERED_AS_WELL],
    ids=lambda x: getattr(x, "__name__", "ordered" if x else "unordered"),
)
def test_as_often_and_in_order(program, ordered, capfd):
    log, x = Log(), jnp.linspace(-1.0, 1.0, 9).reshape(3, 3)
    f = partial(program, log, ordered)
    expected = log.during(jax.jit(jax.grad(f)), x)
    expected_print = capfd.readouterr().out
    assert expected
    for codec in (Keep(), StochasticRound(4)):
        seen = log.during(jax.jit(jax.grad(rad(f, codec=codec), argnums=1)), KEY, x)
        assert Counter(seen) == Counter(expected)
        assert not ordered or seen == expected
        assert capfd.readouterr().out == expected_print


def test_a_loop_that_runs_again_is_silent_then():
    log, x = Log(), jnp.linspace(-1.0, 1.0, 256).reshape(16, 16)

    def f(x):
        def body(c, i):
            log.note("step", c, ordered=True)
            return jnp.tanh(c @ x) + i, jax.lax.cond(i > 1, partial(told, "late"), partial(told, "early"), c)

        def told(name, c):
            log.note(name, c)
            return jnp.sin(c).sum()

        c, s = jax.lax.scan(body, x, jnp.arange(64.0))
        return c.sum() + s.sum()

    assert Closure(f, x, rad(f, memory_budget=20_000, exact=True).planner).plan.segments
    expected = log.during(jax.jit(jax.grad(f)), x)
    assert Counter(expected) == {"step": 64, "early": 2, "late": 62}
    seen = log.during(jax.jit(jax.grad(rad(f, memory_budget=20_000, exact=True), argnums=1)), KEY, x)
    assert Counter(seen) == Counter(expected)


def test_a_loop_whose_answers_are_read_does_not_run_again():
    log, x = Log(), jnp.linspace(-1.0, 1.0, 256).reshape(16, 16)

    def f(asks, x):
        def body(c, _):
            return jnp.tanh(c @ x) + (log.ask("host", c) if asks else 0.1), None

        return jax.lax.scan(body, x, None, length=64)[0].sum()

    silent, asking = (partial(f, asks) for asks in (False, True))
    assert Closure(silent, x, rad(silent, memory_budget=80_000, exact=True).planner).plan.segments
    with pytest.raises(BudgetError):
        Closure(asking, x, rad(asking, memory_budget=80_000, exact=True).planner).plan  # noqa: B018
    asking = rad(asking, memory_budget=140_000, exact=True)
    assert log.during(jax.jit(jax.grad(asking, argnums=1)), KEY, x) == ["host"] * 64


def test_layers_that_run_again_are_silent_then():
    log, x = Log(), jnp.linspace(-1.0, 1.0, 1024).reshape(32, 32)

    def f(x):
        h = x
        for i in range(12):
            h = jnp.tanh(h @ x)
            log.note(i, h, ordered=True)
            h = h * log.ask(f"host {i}", h) if i % 4 == 0 else h
        return h.sum()

    budget = {"memory_budget": 32_000, "exact": True}
    assert Closure(f, x, rad(f, **budget).planner).plan.runs_again
    expected = log.during(jax.jit(jax.grad(f)), x)
    seen = log.during(jax.jit(jax.grad(rad(f, **budget), argnums=1)), KEY, x)
    assert Counter(seen) == Counter(expected) and len(seen) == 15
    assert [s for s in seen if isinstance(s, int)] == list(range(12))


def test_effects_do_not_change_the_gradient(double):
    log, x = Log(), jnp.linspace(-1.0, 1.0, 9).reshape(3, 3)
    for program in (top, loop, run_again):
        f = partial(program, log, False)
        exact, ours = jax.grad(f)(x), jax.grad(rad(f, codec=Keep()), argnums=1)(KEY, x)
        assert jnp.allclose(ours, exact, rtol=1e-12)


# -- models ------------------------------------------------------------------------------------------------------------


def series(log, x, y):
    """A print in the model, in its time loop, and in a branch; the guide calls back as well."""
    decay = numpyro.sample("decay", dist.Normal(0.0, 1.0))
    log.note("model", decay, ordered=True)

    def step(h, t):
        x, y = t
        log.note("time", h)
        h = jax.lax.cond(x > 0, lambda h: jnp.tanh(decay * h + x), lambda h: (log.note("branch", h), h)[1], h)
        numpyro.sample("y", dist.Normal(h, 1.0), obs=y)
        return h, None

    scan(step, jnp.zeros(()), (x, y))


def guide(log, x, y):
    loc = numpyro.param("loc", 0.1)
    log.note("guide", loc, ordered=True)
    numpyro.sample("decay", dist.Normal(loc, 0.1))


@pytest.mark.parametrize("num_particles", few((1, 2), 1, slow=0))
def test_updates_call_back_as_often(num_particles):
    log = Log()
    x, y = jnp.array([1.0, -1.0, 2.0, 3.0]), jnp.zeros(4)
    one_by_one = {"num_particles": num_particles, "vectorize_particles": False}  # ordered effects do not pass vmap
    seen = []
    for loss in (Trace_ELBO(**one_by_one), RAD_ELBO(**one_by_one)):
        svi = SVI(partial(series, log), partial(guide, log), optax.adam(0.1), loss)
        state = svi.init(KEY, x, y)
        jax.effects_barrier()
        # JAX runs what is the same for all particles once when it differentiates a loop: so the value is the measure
        step = svi.update if num_particles == 1 or isinstance(loss, RAD_ELBO) else svi.evaluate
        seen.append(log.during(jax.jit(step), state, x, y))
    exact, ours = seen
    assert Counter(ours) == Counter(exact) and len(set(ours)) == 4
    assert [s for s in ours if s in ("guide", "model")] == [s for s in exact if s in ("guide", "model")]


@pytest.mark.slow
def test_calibration_does_not_call_back():
    log = Log()
    x, y = jnp.ones((64, 8)), jnp.zeros(64)

    def model(x, y):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([8]).to_event(1))
        log.note("model", w)
        numpyro.sample("y", dist.Normal(jnp.tanh(x @ w), 1.0), obs=y)

    svi = SVI(model, AutoNormal(model), optax.adam(0.1), RAD_ELBO(codec=StochasticRound(4)))
    state = svi.init(KEY, x, y)
    jax.effects_barrier()
    assert not log.during(lambda: [svi.loss.calibrate(svi, state, x, y).gradient_norm])
