"""The variance of the gradient, by source: against closed forms, against brute force, and with planted errors."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from closed_form import BATCH, POINTS, SIZE, A, B, initialised, linear_guide, linear_model, linear_parts
from models import wave
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from programs import few, flat, network, normal
from zscores import assert_unbiased, bound

from numpyro_rad import RAD_ELBO, NoiseKeys, StochasticRound
from numpyro_rad.codecs import SampleAxis
from numpyro_rad.diagnostics import records, variance
from numpyro_rad.diagnostics.variance import gradient_variance, moments_of

pytestmark = pytest.mark.usefixtures("arrays_of_any_size_count")


def distances(found, expected):
    """|z| of each part of a result about what is expected; infinite for a part that should vanish and does not."""
    gaps = {}
    for name, value in expected.items():
        part = getattr(found, name)
        gap = abs(part.value - value)
        gaps[name] = gap / part.standard_error if part.standard_error > 0 else (np.inf if gap > 1e-12 else 0.0)
    return gaps


CASES = {
    "no codes": (lambda: Trace_ELBO(), BATCH, None),
    "rounded": (lambda: RAD_ELBO(codec=StochasticRound(2)), BATCH, StochasticRound(2)),
    "sampled": (lambda: RAD_ELBO(codec=SampleAxis(0.25)), None, SampleAxis(0.25)),
}


@pytest.mark.parametrize("case", few(CASES))
def test_a_linear_model_in_closed_form(case):
    elbo, size, codec = CASES[case]
    svi, state = initialised(elbo(), size=size)
    found = gradient_variance(svi, state, A, B, draws=3000, size=size)
    expected = linear_parts(size, codec)
    expected["total"] = expected["minibatch"] + expected["guide"] + expected["path"]
    assert max(distances(found.total, expected).values()) < bound(3 * 5)
    sampled = case == "sampled"  # so much path noise that it takes more draws to see the rest as well
    for name in ("path", "total") if sampled else expected:
        assert getattr(found.total, name).value == pytest.approx(expected[name], rel=0.05), name
    total = found.total
    assert total.total.value == pytest.approx(total.minibatch.value + total.guide.value + total.path.value)
    exact = expected["guide"] + expected["minibatch"]
    assert sampled or found.rho.value == pytest.approx(expected["path"] / exact, rel=0.05)
    assert found.rho_interval[0] <= found.rho.value <= found.rho_interval[1]
    assert found.signal_to_noise.value == pytest.approx(expected["squared_norm"] / expected["total"], rel=0.1)
    assert found.noise_scale.value == pytest.approx(1 / found.signal_to_noise.value)
    if codec is None:
        assert (total.path.value, total.path.standard_error, found.predicted_rho) == (0, 0, 0)
    if size is None:
        assert (total.minibatch.value, total.minibatch.standard_error) == (0, 0)


def no_new_path(keys):
    return keys | {"other path": keys["path"], "b": keys["a"]}


def one_minibatch(keys):
    return keys | {"d": keys["d"]._replace(minibatch=keys["a"].minibatch)}


def guide_with_the_minibatch(keys):
    return keys | {"c": keys["c"]._replace(minibatch=keys["d"].guide)}


PLANTED = {"path": no_new_path, "minibatch": one_minibatch, "guide": guide_with_the_minibatch}


@pytest.mark.slow
@pytest.mark.parametrize("part", PLANTED)
def test_wrong_keys_are_caught(part, monkeypatch):
    right = variance._keys
    monkeypatch.setattr(variance, "_keys", lambda *operands: PLANTED[part](right(*operands)))
    svi, state = initialised(RAD_ELBO(codec=StochasticRound(2)), size=BATCH)
    found = gradient_variance(svi, state, A, B, draws=300, size=BATCH)
    assert distances(found.total, linear_parts(BATCH, StochasticRound(2)))[part] > bound(15)


@pytest.mark.slow
def test_batches_are_drawn_with_replacement():
    """Four sets of targets: the gradient of each is its mean, minus A'b."""
    svi, state = initialised(Trace_ELBO())
    pool = [B + normal(POINTS, seed=i, scale=0.7) for i in range(4)]
    found = gradient_variance(svi, state, A, pool[0], batches=[(A, b) for b in pool[1:]], draws=1500)
    means = np.stack([np.asarray(A.T @ b) for b in pool])
    expected = {"minibatch": means.var(0).sum(), "guide": linear_parts()["guide"], "path": 0.0}
    assert max(distances(found.total, expected).values()) < bound(3)
    assert found.total.minibatch.value == pytest.approx(expected["minibatch"], rel=0.08)


def test_constrained_parameters_in_closed_form():
    """z = loc + s eps with s = exp(u): dL/du = s (c eps + k s eps^2) - 1, for k = 1 + n and c the gradient in loc.

    Its variance is s^2 (c^2 + 2 k^2 s^2), and a minibatch moves c only: the mean over eps is k s^2 - 1 in any.
    """
    n, s, dims = 10, 0.5, 40
    y = normal(n, dims, seed=6) + 1.0

    def model(y, size):
        z = numpyro.sample("z", dist.Normal(jnp.zeros(dims), 1.0).to_event(1))
        with numpyro.plate("points", n, subsample_size=size):
            numpyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=numpyro.subsample(y, event_dim=1))

    def guide(y, size):
        scale = numpyro.param("scale", jnp.full(dims, s), constraint=constraints.positive)
        numpyro.sample("z", dist.Normal(jnp.zeros(dims), scale).to_event(1))

    svi, state = initialised(Trace_ELBO(), model, guide, (y, 5))
    found = gradient_variance(svi, state, y, 5, draws=600)
    ys, k = np.asarray(y, np.float64), 1 + n
    squared = ys.sum(0) ** 2 + n**2 / 5 * (1 - 5 / n) * ys.var(0, ddof=1)  # mean over minibatches of c^2
    expected = {"minibatch": 0.0, "guide": (s**2 * (squared + 2 * (k * s) ** 2)).sum()}
    expected["squared_norm"] = dims * (k * s**2 - 1) ** 2
    assert max(distances(found.total, expected).values()) < bound(3)
    assert found.total.guide.value == pytest.approx(expected["guide"], rel=0.06)


# Against brute force


def nested_draws(svi, state, args, kwargs, counts):
    """All gradients of nested loops over minibatch, guide and path keys, (minibatches, guides, paths, parameters)."""
    key = jax.random.split(jax.random.key(8), 3)
    keys = [
        jax.random.split(k, counts[: i + 1]) for i, k in enumerate(key)
    ]  # a path belongs to one guide draw, that to one minibatch

    def one(minibatch, guide, path):
        def loss(free):
            named = NoiseKeys(guide, minibatch, path)
            return svi.loss.loss_with_keys(named, svi.constrain_fn(free), svi.model, svi.guide, *args, **kwargs)

        return flat(jax.grad(loss)(svi.optim.get_params(state.optim_state)))

    def of_guide(minibatch, guide, paths):
        return jax.lax.map(lambda path: one(minibatch, guide, path), paths)

    def of_minibatch(operands):
        minibatch, guides, paths = operands
        return jax.lax.map(lambda pair: of_guide(minibatch, *pair), (guides, paths))

    return np.asarray(jax.jit(lambda keys: jax.lax.map(of_minibatch, keys))(tuple(keys)), np.float64)


def nested_parts(draws):
    """Unbiased estimates of the parts by nested analysis of variance, all gradients at hand; and standard errors."""
    n_guides, n_paths = draws.shape[1:3]
    path = draws.var(2, ddof=1).sum(-1)  # (minibatches, guides)
    guide = draws.mean(2).var(1, ddof=1).sum(-1) - path.mean(1) / n_paths  # (minibatches,)
    means = draws.mean((1, 2))
    within = (guide + path.mean(1) / n_paths).mean() / n_guides
    minibatch = len(draws) / (len(draws) - 1) * ((means - means.mean(0)) ** 2).sum(-1) - within
    parts = {"path": path.mean(1), "guide": guide, "minibatch": minibatch}
    return {name: (x.mean(), x.std(ddof=1) / np.sqrt(len(x))) for name, x in parts.items()}


@pytest.mark.slow
def test_slow_twin():
    """A network on minibatches whose every gradient is held, by site."""
    x, y = wave(48)
    guide = AutoNormal(network, init_scale=0.1)
    svi, state = initialised(RAD_ELBO(codec=StochasticRound(1)), network, guide, (x, y), batch_size=12)
    found = gradient_variance(svi, state, x, y, draws=1000, batch_size=12)
    draws = nested_draws(svi, state, (x, y), {"batch_size": 12}, (200, 12, 4))
    sizes = {"v": 16, "w": 32}
    columns = np.repeat(["v", "v", "w", "w"], [16, 16, 32, 32])  # loc and scale of each, in the order of the dictionary
    assert [b.name for b in found.blocks] == list(sizes) and [b.size for b in found.blocks] == [32, 64]
    for block, of in ((found.total, columns != ""), *((b, columns == b.name) for b in found.blocks)):
        for name, (value, error) in nested_parts(draws[..., of]).items():
            part = getattr(block, name)
            assert abs(part.value - value) < bound(9) * np.hypot(part.standard_error, error), (block.name, name)
    assert found.total.path.value > 0.05 * found.total.total.value  # there is something to find


def planted_gradients(draws, size=8):
    """Gradients a, b, c, d of known variances: 1, 4 and 9 times size, around ones."""
    minibatch, guide, path = (normal(draws, 4, size, seed=i, scale=i) for i in (3, 2, 1))
    at = [(0, 0, 0), (0, 0, 1), (0, 1, 2), (1, 2, 3)]
    return [1 + minibatch[:, m] + guide[:, u] + path[:, p] for m, u, p in at]


def test_the_combinations_are_unbiased():
    size, n = 8, 20_000
    a, b, c, d = planted_gradients(n, size)
    estimates = {
        (True, True): jax.vmap(lambda *g: moments_of(*g)[0])(a, b, c, d)[:, 0],
        (False, True): jax.vmap(lambda a, c, d: moments_of(a, None, c, d)[0])(a, c, d)[:, 0],
        (True, False): jax.vmap(lambda a, b, c: moments_of(a, b, c)[0])(a, b, c)[:, 0],
    }
    # without b what belongs to the path is counted with the guide; without d the minibatch belongs to the mean
    assert_unbiased(estimates[True, True], size * np.array([1.0, 4.0, 9.0, 1.0]), "four gradients")
    assert_unbiased(estimates[False, True], size * np.array([0.0, 5.0, 9.0, 1.0]), "without codes")
    assert_unbiased(estimates[True, False], size * np.array([1.0, 4.0, 0.0, 10.0]), "without minibatches")


def test_a_wrong_combination_is_caught():
    size = 8
    estimates = jax.vmap(lambda *g: moments_of(*g)[0])(*planted_gradients(20_000, size))[:, 0]
    wrong = estimates.at[:, variance.GUIDE].add(0.2 * estimates[:, variance.PATH])
    with pytest.raises(AssertionError, match="biased"):
        assert_unbiased(wrong, size * np.array([1.0, 4.0, 9.0, 1.0]))


def test_streaming_moments_are_those_of_all_draws():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((50, 3, 4)) + 5
    moments = variance._Moments(["u", "v", "u"], [1, 2, 3])
    for row in rows:
        moments.add(row)
    assert (moments.names, moments.sizes) == (["total", "u", "v"], [6, 4, 2])
    for block, of in enumerate([[0, 1, 2], [0, 2], [1]]):
        held = rows[:, of].sum(1)
        np.testing.assert_allclose(moments.covariance_of_mean(block), np.cov(held.T) / 50)
        part = moments.estimate(block, 0, 2)
        both = held[:, 0] + held[:, 2]
        assert (part.value, part.standard_error) == pytest.approx((both.mean(), both.std(ddof=1) / 50**0.5))


def test_the_interval_of_rho_covers():
    """Of 95 % intervals 95 % cover, with a denominator so noisy that linearization would not do."""
    rng, runs, covered, unbounded = np.random.default_rng(1), 1000, 0, 0
    for _ in range(runs):
        moments = variance._Moments(["w"], [1])
        common = rng.standard_normal(12)
        for c in common:
            path, guide = 2 + 0.5 * rng.standard_normal() + 2 * c, 4 + 4 * rng.standard_normal() + 2 * c
            moments.add(np.array([[path, guide, 0.0, 1.0]]))
        low, high = moments.ratio((variance.PATH,), (variance.GUIDE, variance.MINIBATCH))[1]
        covered += low <= 0.5 <= high
        unbounded += np.isinf(high)
    assert abs(covered / runs - 0.95) < bound(1) * (0.95 * 0.05 / runs) ** 0.5
    assert 0 < unbounded < runs / 2


# Options


def counted(x, y):
    seen = numpyro.primitives.mutable("seen", {"steps": jnp.zeros(())})
    seen["steps"] = seen["steps"] + 1
    network(x, y)


@pytest.mark.slow
def test_mutable_state_and_static_arguments():
    """A model that keeps count has the variance of one that does not; constants of SVI are handed over."""
    args, guide = wave(24), AutoNormal(network, init_scale=0.1)
    elbo = RAD_ELBO(codec=StochasticRound(2))
    svi, state = initialised(elbo, counted, guide, args)
    found = gradient_variance(svi, state, *args, draws=20)
    plain = SVI(network, guide, optax.adam(1e-2), elbo, batch_size=None)
    key = jax.random.fold_in(state.rng_key, variance._TAG)
    expected = gradient_variance(plain, plain.init(jax.random.key(1), *args), *args, draws=20, key=key)
    assert found.total.path.value > 0
    for name in ("guide", "path", "squared_norm"):
        one, other = getattr(found.total, name), getattr(expected.total, name)  # other programs, so other codes
        assert abs(one.value - other.value) < bound(3) * np.hypot(one.standard_error, other.standard_error)


@pytest.mark.slow
def test_a_calibrated_plan_is_measured_without_complaint():
    """Plates with a key of their own make another program, of which the calibration knows nothing."""
    svi, state = initialised(RAD_ELBO(memory_budget=80), size=BATCH)
    svi.loss = svi.loss.replace(calibration=svi.loss.calibrate(svi, state, A, B, draws=150, size=BATCH))
    before = svi.loss.planner
    found = gradient_variance(svi, state, A, B, draws=150, size=BATCH)
    assert svi.loss.planner is before
    assert found.total.path.value > 0
    assert found.predicted_rho == pytest.approx(found.rho.value, rel=0.5)
    saved = svi.loss.plan_of_update(svi, state, A, B, size=BATCH)[0].to_dict()
    restored = SVI(linear_model, linear_guide, optax.adam(1e-2), RAD_ELBO(plan=saved))
    restored.init(jax.random.key(1), A, B, size=BATCH)
    again = gradient_variance(restored, state, A, B, draws=3, size=BATCH)
    assert again.total.path.value > 0


def test_blocks():
    svi, state = initialised(Trace_ELBO(), network, AutoNormal(network), wave(24))
    names = {
        what: [b.name for b in gradient_variance(svi, state, *wave(24), draws=2, blocks=blocks).blocks]
        for what, blocks in (("site", "site"), ("parameter", "parameter"), ("own", lambda name: name[-3:]))
    }
    assert names["site"] == ["v", "w"]
    assert names["parameter"] == ["v_auto_loc", "v_auto_scale", "w_auto_loc", "w_auto_scale"]
    assert names["own"] == ["loc", "ale"]


def test_draws_are_chosen_and_costs_measured():
    svi, state = initialised(RAD_ELBO(codec=StochasticRound(2)))
    found = gradient_variance(svi, state, A, B, relative_error=0.05, costs=True)
    assert 16 < found.draws < 400
    for part in (found.total.total, found.rho):
        assert part.standard_error <= 0.05 * part.value
    assert set(found.seconds) == set(found.temporary_bytes) == {"exact", "randomized"}
    assert all(s > 0 for s in found.seconds.values())
    assert found.efficiency["exact"] == found.memory_efficiency["exact"] == 1
    exact, both = found.total.guide.value, found.total.total.value
    speed = found.seconds["exact"] / found.seconds["randomized"]
    assert found.efficiency["randomized"] == pytest.approx(exact / both * speed)
    few = gradient_variance(svi, state, A, B, relative_error=1e-9, max_draws=20, costs="randomized")
    assert few.draws == 20 and set(few.seconds) == {"randomized"} and few.efficiency == {}
    assert records.from_dict(records.GradientVariance, json.loads(json.dumps(records.to_dict(found)))) == found
    text = str(found)
    assert text.splitlines()[0].split() == ["block", "size", "minibatch", "guide", "path", "total", "squared_norm"]
    assert (
        text.splitlines()[2].split()[:2] == ["loc", str(SIZE)] and "ρ = path" in text and "B for one gradient" in text
    )


@pytest.mark.slow
def test_the_state_decides_the_draws():
    svi, state = initialised(Trace_ELBO())
    first, second = (gradient_variance(svi, state, A, B, draws=3) for _ in range(2))
    assert first == second
    assert gradient_variance(svi, state, A, B, draws=3, key=jax.random.key(5)) != first
    raw = state._replace(rng_key=jax.random.key_data(state.rng_key))
    assert gradient_variance(svi, raw, A, B, draws=3).total.guide.value > 0


@pytest.mark.slow
def test_keys_of_either_kind_measure_the_plan_that_trains():
    """A typed key and its words are two programs to JAX, of which the calibration knows one."""
    svi, start = initialised(RAD_ELBO(memory_budget=80))
    for state in (start, start._replace(rng_key=jax.random.key_data(start.rng_key))):
        svi.loss = svi.loss.replace(calibration=svi.loss.calibrate(svi, state, A, B, draws=2))
        keys = jax.random.key(5), jax.random.PRNGKey(5)
        typed, raw = (gradient_variance(svi, state, A, B, draws=2, key=key) for key in keys)
        assert typed == raw and typed.total.path.value > 0


def test_a_model_that_looks_at_its_arguments():
    def model(a, b):
        assert float(np.asarray(b).max()) < 100
        linear_model(a, b)

    svi, state = initialised(Trace_ELBO(), model)
    plain, _ = initialised(Trace_ELBO())
    assert gradient_variance(svi, state, A, B, draws=3) == gradient_variance(plain, state, A, B, draws=3)


def test_a_gradient_without_noise():
    """Maximum likelihood on all data: nothing is random, and no number of draws changes that."""

    def model(x):
        numpyro.sample("x", dist.Normal(numpyro.param("mean", jnp.zeros(3)), 1.0).to_event(1), obs=x)

    svi, state = initialised(Trace_ELBO(), model, lambda x: None, (normal(3),))
    found = gradient_variance(svi, state, normal(3))
    assert found.draws == 16 and found.total.total.value == 0 and found.rho.value == 0
    assert found.noise_scale.value == 0 and found.signal_to_noise.value == np.inf


# What goes wrong


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"draws": 1}, "draws=1: a variance and its error take at least 2"),
        ({"max_draws": 0}, "max_draws=0"),
        ({"relative_error": 0.0}, "relative_error=0.0 is not positive"),
        ({"blocks": "layer"}, "blocks='layer' is neither"),
        ({"costs": "all"}, "costs='all' is not one of"),
        ({"batches": [(A[:-1], B[:-1])]}, r"batches\[0\] has other shapes"),
        ({"batches": [A]}, r"batches\[0\] is not a tuple"),
    ],
)
def test_wrong_options(options, complaint):
    svi, state = initialised(Trace_ELBO())
    with pytest.raises(ValueError, match=complaint):
        gradient_variance(svi, state, A, B, **options)


def test_no_parameters_and_no_init():
    def nothing(a, b):
        numpyro.sample("z", dist.Normal(jnp.zeros(SIZE), 1.0).to_event(1))

    for elbo in (Trace_ELBO(), RAD_ELBO()):
        svi, state = initialised(elbo, linear_model, nothing)
        with pytest.raises(ValueError, match="neither model nor guide has a parameter"):
            gradient_variance(svi, state, A, B)
    fresh = SVI(linear_model, linear_guide, optax.adam(1e-2), Trace_ELBO())
    with pytest.raises(ValueError, match="gradient_variance: this SVI has not been initialised"):
        gradient_variance(fresh, state, A, B)


def test_gradients_that_are_not_finite():
    svi, state = initialised(Trace_ELBO())
    with pytest.raises(ValueError, match=r"the gradient in loc is not finite in replicate 1"):
        gradient_variance(svi, state, A, B.at[3].set(jnp.nan))
    with pytest.raises(ValueError, match=r"the square of the gradient in loc overflows"):
        gradient_variance(svi, state, A, B * 1e25)
