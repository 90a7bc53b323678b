"""Calibration: what it says codes add to the variance of the gradient is what they add."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree
from models import network_regression, wave
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from programs import few, normal
from zscores import bound

from numpyro_rad import RAD_ELBO, Keep, NoiseKeys, StochasticRound, explain
from numpyro_rad.codecs import Codec, DitheredRound, FloatRound, RotatedRound, SampleAxis, SampledRound
from numpyro_rad.errors import VarianceWarning
from numpyro_rad.planning import calibration, strategies

KEY = jax.random.key(4)


pytestmark = pytest.mark.usefixtures("arrays_of_any_size_count")


# A part of a large residual


@pytest.mark.parametrize("last", [False, True], ids=["all alike", "the last alone"])
@pytest.mark.parametrize("shape", [(70, 3, 41), (70, 300), (1, 45, 100), (5, 5130)], ids=str)
def test_a_part_stands_for_the_whole(shape, last, monkeypatch):
    """(iterations, *shape of the residual): on average over the draws, whichever entries it is that count."""
    monkeypatch.setattr(calibration, "MOST_ENTRIES", 512)
    x = jnp.zeros(shape).at[-1].set(1.0) if last else normal(*shape) ** 2
    x = x[..., : x.shape[-1] // 256 * 256] if len(shape) == 2 else x  # of vectors whole rows are taken
    value = SimpleNamespace(aval=jax.ShapeDtypeStruct(x.shape[1:], jnp.float32))

    def total(words):
        taken, _, times = calibration._part(words, value, x, x)
        assert taken.size < x.size
        return taken.sum() * times

    draws = np.asarray(jax.jit(jax.vmap(total))(jax.random.bits(KEY, (4000, 2), jnp.uint32)), np.float64)
    error = draws.std() / len(draws) ** 0.5 + 1e-5 * abs(draws.mean())
    assert abs(draws.mean() - float(x.sum())) < bound(8) * error


# Variance along a direction

DRAWS = 8192
CODECS = [
    *(StochasticRound(bits) for bits in (1, 2, 4, 8)),
    StochasticRound(2, group=16),
    *(DitheredRound(bits) for bits in (1, 4)),
    SampleAxis(0.2),
    SampleAxis(0.2, "shared"),
    SampleAxis(0.2, centred=True),
    SampleAxis(0.2, "shared", centred=True),
    SampleAxis(1 / 64),
    SampledRound(),
    SampledRound(1, 64, 3),
    RotatedRound(1),
    RotatedRound(3, group=16),
    FloatRound(4),
    FloatRound(8),
]


def z_of_variance(codec, x, direction):
    """z-score of the sample variance of <direction, code of x> about the predicted one."""

    def along(seed):
        return jnp.vdot(direction, codec.decode(seed, codec.encode(seed, x), x))

    seeds = jax.random.bits(KEY, (DRAWS, 2), jnp.uint32)
    draws = np.asarray(jax.jit(lambda seeds: lax.map(along, seeds, batch_size=512))(seeds), np.float64)
    squares = (draws - draws.mean()) ** 2
    predicted = float(codec.variance_along(x, direction))
    return (squares.mean() * DRAWS / (DRAWS - 1) - predicted) / (squares.std() / DRAWS**0.5)


@pytest.mark.parametrize("shape", few([(6, 40), (70,), (2, 3, 130)], (6, 40), (2, 3, 130), slow=0), ids=str)
@pytest.mark.parametrize("codec", few(CODECS, *CODECS[::3], slow=99), ids=str)
def test_variance_along_a_direction(codec, shape):
    """Entries of the direction differ a thousandfold, and x is not centred."""
    x = normal(*shape) + 0.5
    direction = normal(*shape, seed=1) * jnp.exp(normal(*shape, seed=2, scale=1.5))
    assert abs(z_of_variance(codec, x, direction)) < bound(len(CODECS) * 3)


@pytest.mark.parametrize("codec", [StochasticRound(2), SampleAxis(0.2, "shared")], ids=str)
def test_errors_taken_for_equal_are_caught(codec, monkeypatch):
    x, ramp = normal(6, 40, scale=0.5) + 0.5, jnp.exp(jnp.linspace(-6.0, 2.0, 40)) * jnp.ones((6, 1))
    x = jnp.where(jnp.arange(40) < 20, 3 * jnp.sign(x), x)  # exact at the ends of the range
    assert abs(z_of_variance(codec, x, ramp)) < bound(2)
    monkeypatch.setattr(type(codec), "variance_along", Codec.variance_along)
    assert abs(z_of_variance(codec, x, ramp)) > bound(2)


def test_exact_codecs_add_none():
    assert Keep().variance_along(normal(4, 4), normal(4, 4)) == 0


# Models


def small_network(x, y):
    return network_regression(x, y, hidden=(16,), scale=0.3)


def recurrence(xs, y):
    """A recurrent network over stacked inputs (steps, series, features)."""
    w = numpyro.sample("w", dist.Normal(jnp.zeros((8, 8)), 0.5).to_event(2))
    u = numpyro.sample("u", dist.Normal(jnp.zeros((xs.shape[2], 8)), 0.5).to_event(2))

    def step(h, x):
        h = jnp.tanh(h @ w + x @ u)
        return h, None

    h, _ = lax.scan(step, jnp.ones((xs.shape[1], 8)), xs)
    numpyro.sample("y", dist.Normal(h.sum(-1), 0.3).to_event(1), obs=y)


def branching(x, y):
    w = numpyro.sample("w", dist.Normal(jnp.zeros((x.shape[1], 12)), 1.0).to_event(2))
    v = numpyro.sample("v", dist.Normal(jnp.zeros((12, 12)), 1.0).to_event(2))
    h = jnp.tanh(x @ w)
    h = lax.cond(x[0, 0] > 0, lambda h: jnp.tanh(h @ v), lambda h: jnp.sin(h @ v) ** 2, h)
    numpyro.sample("y", dist.Normal(h.sum(-1), 0.5).to_event(1), obs=y)


def regression_data(points=48):
    x = normal(points, 3)
    return x, jnp.sin(x.sum(1))


MODELS = {
    "network": (small_network, wave(48)),
    "recurrence": (recurrence, (normal(6, 12, 3), normal(12))),
    "branch": (branching, regression_data()),
}


def prepared(model, args, guide=None, **options):
    """An SVI under a RAD_ELBO and its first state."""
    svi = SVI(model, guide or AutoNormal(model, init_scale=0.1), optax.adam(1e-2), RAD_ELBO(**options))
    return svi, svi.init(jax.random.key(1), *args)


def plan_of(svi, state, args, elbo=None):
    return (elbo or svi.loss).plan(KEY, svi.get_params(state), svi.model, svi.guide, *args)[0]


def measured(svi, state, args, elbo, guides=64, paths=64):
    """Path variance of the gradient in the unconstrained parameters, and the variance of its path mean."""
    free = svi.optim.get_params(state.optim_state)

    def one(guide_key, path_key):
        def loss(free):
            keys = NoiseKeys(guide_key, guide_key, path_key)
            return elbo.loss_with_keys(keys, svi.constrain_fn(free), svi.model, svi.guide, *args)

        return ravel_pytree(jax.grad(loss)(free))[0]

    some = jax.vmap(jax.vmap(one, (None, 0)))
    keys = jax.random.split(jax.random.key(11), guides), jax.random.split(jax.random.key(12), (guides, paths))
    draws = np.asarray(jax.jit(some)(*keys), np.float64)  # (guides, paths, parameters)
    within = draws.var(1, ddof=1).sum(-1).mean()
    return within, draws.mean(1).var(0, ddof=1).sum() - within / paths


@pytest.mark.parametrize("name", few(MODELS, slow=3))
def test_predicted_is_measured(name):
    codec, (model, args) = StochasticRound(4), MODELS[name]
    svi, state = prepared(model, args)
    found = svi.loss.calibrate(svi, state, *args, draws=200)
    assert svi.loss.planner.calibration is None and found.n_draws == 200
    elbo = RAD_ELBO(codec=codec, calibration=found)
    plan = plan_of(svi, state, args, elbo)
    assert any(p.encoded for p in plan.walk())
    within, between = measured(svi, state, args, elbo)
    assert plan.predicted.added_variance == pytest.approx(found.predicted(plan))
    assert found.predicted(plan) * found.reference_variance == pytest.approx(within, rel=0.25)
    assert found.gradient_variance == pytest.approx(between, rel=0.5)  # 64 draws of a long-tailed sum


def residual_blocks(x, y):
    """Blocks with a skip connection and a normalization, as in a Transformer."""
    h = x @ numpyro.sample("first", dist.Normal(jnp.zeros((x.shape[1], 16)), 1.0).to_event(2))
    for i in range(3):
        a = numpyro.sample(f"a{i}", dist.Normal(jnp.zeros((16, 32)), 0.25).to_event(2))
        b = numpyro.sample(f"b{i}", dist.Normal(jnp.zeros((32, 16)), 0.2).to_event(2))
        centred = h - h.mean(-1, keepdims=True)
        h = h + jnp.tanh(centred * lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-3) @ a) @ b
    numpyro.sample("y", dist.Normal(h.sum(-1), 0.5).to_event(1), obs=y)


DEEP = {
    "blocks": (residual_blocks, regression_data(64), StochasticRound(2)),
    "recurrence": (*MODELS["recurrence"], StochasticRound(2)),
    "branch": (*MODELS["branch"], SampledRound(2, size=4)),
}


@pytest.mark.filterwarnings("ignore:codes add")  # as many as these nobody should use
@pytest.mark.parametrize("name", few(DEEP, slow=3))
def test_errors_that_multiply(name):
    """Codes together add more than twice what they add one by one."""
    model, args, codec = DEEP[name]
    svi, state = prepared(model, args)
    found = svi.loss.calibrate(svi, state, *args, draws=12)
    elbo = RAD_ELBO(codec=codec, calibration=found)
    plan = plan_of(svi, state, args, elbo)
    within, _ = measured(svi, state, args, elbo, guides=16, paths=128)
    variance = found.variance_model(plan.graph)
    coded = [((*p.path, v.number), v, e.codec) for p in plan.walk() for v, e in p.encoded.items()]
    one_by_one = sum(variance.alone(*residual) for residual in coded)
    assert one_by_one * found.reference_variance < 0.5 * within
    assert found.predicted(plan) * found.reference_variance == pytest.approx(within, rel=0.35)


POINTS, SIZE = 40, 6
A = normal(POINTS, SIZE, seed=3)
B = A @ jnp.ones(SIZE) + normal(POINTS, seed=4)


def linear_model(b):
    z = numpyro.sample("z", dist.Normal(jnp.zeros(SIZE), 1.0).to_event(1))
    numpyro.sample("b", dist.Normal(A @ z, 1.0).to_event(1), obs=b)


def linear_guide(b):
    loc = numpyro.param("loc", 0.1 * jnp.ones(SIZE))
    numpyro.sample("z", dist.Normal(loc, 1.0).to_event(1))


@pytest.mark.slow
def test_a_linear_model_in_closed_form():
    """z = loc + eps, gradient = (1 + A'A) z - A'b: its covariance is (1 + A'A)^2; what is coded is the misfit A z - b.

    An error e of the misfit moves the gradient by A'e, so that its variance is the sum of Var(e_i) |A_i|^2.
    """
    svi, state = prepared(linear_model, (B,), linear_guide)
    found = svi.loss.calibrate(svi, state, B, draws=300)
    precision = np.eye(SIZE) + np.asarray(A.T @ A)
    assert found.gradient_variance == pytest.approx((precision**2).sum(), rel=0.2)
    mean = precision @ np.full(SIZE, 0.1) - np.asarray(A.T @ B)
    assert found.gradient_norm**2 == pytest.approx((precision**2).sum() + (mean**2).sum(), rel=0.1)

    codec = StochasticRound(4)
    z = 0.1 + normal(2000, SIZE, seed=5)
    weights = jnp.sqrt((A**2).sum(1))
    expected = jax.vmap(lambda z: codec.variance_along(A @ z - B, weights))(z).mean()
    elbo = RAD_ELBO(codec=codec, calibration=found)
    predicted = found.predicted(plan_of(svi, state, (B,), elbo)) * found.reference_variance
    assert predicted == pytest.approx(float(expected), rel=0.15)  # z itself is coded too and adds a thousandth
    assert measured(svi, state, (B,), elbo)[0] == pytest.approx(float(expected), rel=0.15)


def test_deterministic_gradients_are_compared_with_their_norm():
    def model(x, y):
        w = numpyro.param("w", normal(3, 8))
        numpyro.sample("y", dist.Normal(jnp.tanh(x @ w).sum(-1), 1.0).to_event(1), obs=y)

    args = regression_data()
    svi, state = prepared(model, args, lambda x, y: None)
    found = svi.loss.calibrate(svi, state, *args)
    assert found.gradient_variance < 1e-6 * found.gradient_norm**2
    assert found.reference_variance == pytest.approx(found.gradient_norm**2)


# What goes wrong


@pytest.mark.slow
def test_gradients_that_are_not_finite():
    x, y = regression_data()
    svi, state = prepared(branching, (x, y))
    with pytest.raises(ValueError, match=r"calibrate: the gradient in .*w_auto_loc.* is not finite in draw 1 of 3"):
        svi.loss.calibrate(svi, state, x.at[3, 1].set(jnp.nan), y)
    assert svi.loss.planner.calibration is None


@pytest.mark.parametrize("draws", [1, 0, -1])
def test_a_variance_takes_two_draws(draws):
    args = regression_data()
    svi, state = prepared(branching, args)
    with pytest.raises(ValueError, match=f"draws={draws}"):
        svi.loss.calibrate(svi, state, *args, draws=draws)


@pytest.mark.exhaustive
def test_another_program_warns():
    args = regression_data()
    svi, state = prepared(branching, args, memory_budget="2kB")
    before = plan_of(svi, state, regression_data(64))
    svi.loss = svi.loss.replace(calibration=svi.loss.calibrate(svi, state, *args, draws=2))
    plan_of(svi, state, args)
    with pytest.warns(UserWarning, match="calibration was made for another program"):
        after = plan_of(svi, state, regression_data(64))
    assert after.to_dict() == before.to_dict()
    found = svi.loss.calibrate(svi, state, *regression_data(64), draws=2)  # does not ask the old one
    svi.loss = svi.loss.replace(calibration=found)
    plan_of(svi, state, regression_data(64))


def empty_site(x):
    return numpyro.sample("none", dist.Normal(jnp.zeros((0, 2)), 1.0).to_event(2))


def empty_parameter(x):
    return jnp.tanh(numpyro.param("none", jnp.zeros(0)))


def empty_carry(x):
    return lax.scan(lambda c, row: (jnp.tanh(c * row.sum()), jnp.sin(c)), x[0, :0], x)[0]


@pytest.mark.parametrize(
    "none", few([empty_site, empty_parameter, empty_carry], empty_parameter, slow=0), ids=lambda f: f.__name__
)
def test_what_is_empty_is_passed_over(none, monkeypatch):
    monkeypatch.setattr(strategies, "LADDER", strategies.LADDER[:1])
    monkeypatch.setattr(strategies, "MEASURED", ())

    def model(x):
        w = numpyro.sample("w", dist.Normal(jnp.zeros(3), 1.0).to_event(1))
        numpyro.sample("y", dist.Normal(jnp.tanh(x @ w) + none(x * w).sum(), 0.5).to_event(1), obs=x[:, 0])

    svi = SVI(model, AutoNormal(model), optax.adam(1e-3), RAD_ELBO())
    found = svi.loss.calibrate(svi, svi.init(KEY, normal(8, 3)), normal(8, 3), draws=2)
    noises = found.residuals.values()
    assert found.gradient_norm > 0 and noises
    assert np.isfinite([*found.reach, *(x for n in noises for x in (*n.added, *n.relative, n.mean_square))]).all()


@pytest.mark.slow
def test_a_budget_that_is_too_small_is_no_hindrance():
    args = regression_data()
    svi, state = prepared(branching, args, memory_budget=0)
    assert svi.loss.calibrate(svi, state, *args, draws=2).n_draws == 2


# What it is for


def two_kinds(x, y):
    """Products read values that lie anywhere (first), and values that are zero or one (last)."""
    first = numpyro.sample("first", dist.Normal(jnp.zeros((x.shape[1], 32)), 0.5).to_event(2))
    middle = numpyro.sample("middle", dist.Normal(jnp.zeros((32, 32)), 0.2).to_event(2))
    last = numpyro.sample("last", dist.Normal(jnp.zeros((32, 8)), 0.2).to_event(2))
    h = jnp.sin(x @ first) @ middle
    numpyro.sample("y", dist.Normal(jnp.tanh((h > 0).astype(h.dtype) @ last).sum(-1) + h.sum(-1), 0.5), obs=y)


def test_dither_is_chosen_where_it_is_better(no_residual_is_too_small, monkeypatch):
    """Where entries lie between the levels, and nowhere without a calibration."""
    args = (normal(256, 16), normal(256))
    svi, state = prepared(two_kinds, args, memory_budget=20_000, slices=1, objective="variance")

    def plan_and_codecs():
        plan = plan_of(svi, state, args)
        return plan, {type(e.codec) for p in plan.walk() for e in p.encoded.values()}

    plain = svi.loss
    assert DitheredRound not in plan_and_codecs()[1]
    svi.loss = plain.replace(calibration=plain.calibrate(svi, state, *args, draws=4))
    chosen, kinds = plan_and_codecs()
    assert DitheredRound in kinds
    by_site = {r.site: r.decision for r in explain(svi, state, *args).rows if r.operation == "dot_general"}
    assert "dithered" in by_site["middle"] and "dithered" not in by_site["last"]
    monkeypatch.setattr(strategies, "MEASURED", ())
    svi.loss = plain.replace(calibration=plain.calibrate(svi, state, *args, draws=4))
    without, _ = plan_and_codecs()
    assert chosen.predicted.added_variance < 0.8 * without.predicted.added_variance


def uneven(x, y):
    """Two networks side by side, of which the first counts a thousand times as much as the second."""
    for name, weight in (("much", 1000.0), ("little", 1.0)):
        w = numpyro.sample(name, dist.Normal(jnp.zeros((x.shape[1], 32)), 1.0).to_event(2))
        h = jnp.tanh(x @ w)
        numpyro.factor(f"{name} fits", -weight * ((h.sum(-1) - y) ** 2).sum() / len(y))


@pytest.mark.slow
def test_what_matters_gets_more_bits():
    x = normal(64, 3)
    args = (x, jnp.sin(x.sum(1)))
    svi, state = prepared(uneven, args)
    ample = plan_of(svi, state, args, RAD_ELBO(exact=True)).stored_bytes

    def stored():
        elbo = RAD_ELBO(memory_budget=ample // 6, calibration=svi.loss.planner.calibration)
        rows = explain(elbo, KEY, svi.get_params(state), svi.model, svi.guide, *args).rows
        found = {s: sum(r.stored_bytes for r in rows if r.site == s and len(r.shape) == 2) for s in ("much", "little")}
        return found["much"], found["little"]

    much, little = stored()
    assert 0.5 < much / little < 2
    svi.loss = svi.loss.replace(calibration=svi.loss.calibrate(svi, state, *args))
    much_after, little_after = stored()
    assert much_after > 1.5 * little_after and much_after > much


def with_steps(x, y):
    seen = numpyro.primitives.mutable("seen", {"steps": jnp.zeros(())})
    seen["steps"] = seen["steps"] + 1
    branching(x, y)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "particles"), [(branching, 3), (with_steps, 1)])
def test_particles_and_mutable_state(model, particles):
    """The first update plans by the calibration: else it would warn."""
    args = regression_data()
    svi, state = prepared(model, args, AutoNormal(branching), num_particles=particles, memory_budget="6kB")
    found = svi.loss.calibrate(svi, state, *args)
    svi.loss = svi.loss.replace(calibration=found)
    assert found.gradient_variance > 0 and any(any(r.added) for r in found.residuals.values())
    state, loss = jax.jit(svi.update)(state, *args)
    assert np.isfinite(loss)
    assert state.mutable_state is None or state.mutable_state["seen"]["steps"] == 2  # svi.init is a step too


@pytest.mark.exhaustive
def test_batches_count():
    """Minibatches that the caller draws are part of the variance if the calibration sees them."""
    x, y = regression_data(96)
    batches = [(x[i : i + 32], y[i : i + 32] * 3) for i in (0, 32, 64)]
    svi, state = prepared(branching, batches[0])
    alone = svi.loss.calibrate(svi, state, *batches[0], draws=12)
    several = svi.loss.calibrate(svi, state, *batches[0], batches=batches[1:], draws=12)
    assert several.program == alone.program and several.gradient_variance != alone.gradient_variance


@pytest.mark.slow
def test_the_same_state_gives_the_same_calibration():
    args = regression_data()
    svi, state = prepared(branching, args)
    assert svi.loss.calibrate(svi, state, *args) == svi.loss.calibrate(svi, state, *args)


@pytest.mark.slow
def test_entries_that_do_not_count_do_no_harm_where_they_were_measured():
    """Padded rows hold -999 and are masked in the likelihood: entries next to theirs are lost in plain rounding."""
    rng = np.random.default_rng(0)
    there = np.arange(12) < rng.integers(4, 13, 64)[:, None]
    x = rng.standard_normal((64, 12, 4)).astype(np.float32)
    args = np.where(there[..., None], x, np.float32(-999)), np.where(there, np.sin(x.sum(-1)), 0), there

    def model(x, y, there):
        h = x
        for i, (n, m) in enumerate(((4, 32), (32, 32), (32, 1))):
            w = numpyro.sample(f"w{i}", dist.Normal(0, n**-0.5).expand([n, m]).to_event(2))
            h = h @ w if i == 2 else jax.nn.gelu(h @ w)
        with numpyro.handlers.mask(mask=there):
            numpyro.sample("y", dist.Normal(h[..., 0], 0.3), obs=y)

    guide = AutoNormal(model, init_scale=0.01)
    svi = SVI(model, guide, optax.adam(1e-3), RAD_ELBO(codec=Keep()))
    state = svi.init(KEY, *args)
    budget = explain(svi, state, *args).exact_bytes // 4
    plain = RAD_ELBO(memory_budget=budget, slices=1)
    prices = plain.calibrate(svi, state, *args)
    measured = plain.replace(calibration=prices)
    params = svi.get_params(state)

    @partial(jax.jit, static_argnums=0)
    def gradient(elbo, key, *args):
        return ravel_pytree(jax.grad(lambda p: elbo.loss(key, p, model, guide, *args))(params))[0]

    exact = gradient(Trace_ELBO(), KEY, *args)
    errors = [float(jnp.sum((gradient(elbo, KEY, *args) - exact) ** 2)) for elbo in (plain, measured)]
    assert errors[1] < 1e-3 * float(jnp.sum(exact**2)) < 0.1 * errors[0]
    with pytest.warns(VarianceWarning, match=r"^codes add .* by the calibration.*More bits"):
        gradient(RAD_ELBO(codec=StochasticRound(4), slices=1, calibration=prices), KEY, *args)
    svi.loss = measured
    assert any("float" in row.decision for row in explain(svi, state, *args).rows)


# Groups of another size


def test_what_was_measured_of_a_codec_holds_for_its_other_groups():
    """Scaled as for normal entries: plans for a TPU have whole rows for groups, which nobody measured."""
    codecs = StochasticRound(8), StochasticRound(2), DitheredRound(2)
    path, value = ("r",), SimpleNamespace(aval=jax.ShapeDtypeStruct((64, 1024), jnp.float32))
    noise = calibration.ResidualNoise(added=(1.0, 300.0, 170.0), relative=(0.1, 0.3, 0.2), mean_square=1.0)
    model = calibration._Measured(calibration.Calibration("", 2.0, 1.0, codecs, {path: noise}, (), 8))
    for codec, measured in ((StochasticRound(2), 300.0), (DitheredRound(2), 170.0)):
        assert model.alone(path, value, codec) == pytest.approx(measured / model.calibration.reference_variance)
        wider = type(codec)(2, group=1024)
        ratio = wider.relative_variance((64, 1024)) / codec.relative_variance((64, 1024))
        assert 1.1 < ratio < 2
        assert model.alone(path, value, wider) == pytest.approx(ratio * model.alone(path, value, codec))
