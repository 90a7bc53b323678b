"""Codecs: bytes to the byte, unbiased in every entry, variance as stated, exact where promised, loud where impossible.

Statistical tests use 4096 draws with fixed keys: enough to see a bias of a tenth of the standard deviation of an entry
(z = 6.4), while a rounding codec that forgets its noise or a sampling codec that forgets its scale is off by one
standard deviation or more.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import few
from zscores import assert_unbiased, assert_uncorrelated, bound, z_scores

from numpyro_rad.ad import _jax
from numpyro_rad.ad.seeds import fold, seed_words
from numpyro_rad.codecs import (
    BitMask,
    Codec,
    DitheredRound,
    FloatRound,
    Keep,
    RandomProjection,
    RotatedRound,
    SampleAxis,
    SampledRound,
    StochasticRound,
)

DRAWS = 4096
ROUNDING = [StochasticRound(bits) for bits in (1, 2, 4, 8, 3, 6)] + [StochasticRound(2, group=16)]
DITHERED = [DitheredRound(bits) for bits in (1, 2, 4, 8, 3, 6)] + [DitheredRound(2, group=16)]
ROTATED = [RotatedRound(bits) for bits in (1, 2, 3, 4)] + [RotatedRound(2, group=16)]
FLOATS = [FloatRound(bits) for bits in (4, 6, 8)]
SAMPLING = [SampleAxis(0.1), SampleAxis(0.3, "shared"), SampleAxis(0.3, centred=True), SampleAxis(0.1, "shared", True)]
LINEAR = [*SAMPLING, RandomProjection(0.1), RandomProjection(0.5)]
SAMPLED = [SampledRound(), SampledRound(1, 16, 3), SampledRound(2, 64, 2)]
RANDOM = [*ROUNDING, *LINEAR, *SAMPLED, *DITHERED, *ROTATED, *FLOATS]
WITH_GROUPS = StochasticRound | RotatedRound | FloatRound
SHAPES = [(), (0,), (1,), (3,), (7,), (255,), (257,), (1000,), (5, 3, 129), (0, 4), (4, 0), (6, 512), (3, 2000)]


def struct(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


@jax.jit
def seed(number):
    return fold(seed_words(jax.random.key(11)), number)


def normal(shape, dtype=np.float32, number=0):
    return jnp.asarray(np.random.default_rng(number).standard_normal(shape), dtype)


@partial(jax.jit, static_argnums=0)
def round_trip(codec, seed, x):
    return codec.decode(seed, codec.encode(seed, x), struct(x))


def draw(codec, x, draws=DRAWS, start=0):
    """(draws, *x.shape) decoded arrays, one seed each."""
    seeds = jax.vmap(seed)(jnp.arange(start, start + draws, dtype=jnp.uint32))
    return np.asarray(jax.jit(jax.vmap(lambda s: round_trip(codec, s, x)))(seeds))


def label(value):
    return str(value) if isinstance(value, Codec) else None


# Bytes


@pytest.mark.parametrize("codec", few([Keep(), BitMask(), *RANDOM], *RANDOM[::5], slow=6), ids=label)
def test_stored_bytes_are_those_of_the_code(codec):
    with jax.enable_x64(True):
        for dtype in (jnp.float32, jnp.float64, jnp.bfloat16, jnp.float16, jnp.bool_):
            for shape in SHAPES:
                if not codec.supports(shape, dtype):
                    continue
                x, s = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((2,), jnp.uint32)
                code = jax.eval_shape(codec.encode, s, x)
                assert codec.stored_bytes(shape, dtype) == sum(c.size * c.dtype.itemsize for c in code), (shape, dtype)
                decoded = jax.eval_shape(lambda s, c, x=x: codec.decode(s, c, x), s, code)
                assert (decoded.shape, decoded.dtype) == (x.shape, x.dtype)


def test_stored_bytes_of_a_batch():
    assert StochasticRound(2).stored_bytes((4096, 512), jnp.float32) == 4096 * 512 // 4 + 4096 * 2 * 8
    assert BitMask().stored_bytes((4096, 512), jnp.bool_) == 4096 * 512 // 8
    assert SampleAxis(0.1).stored_bytes((8, 100), jnp.float32) == 8 * 10 * 4
    assert RandomProjection(0.1).stored_bytes((8, 100), jnp.bfloat16) == 8 * 10 * 2


@pytest.mark.slow
def test_groups_end_where_the_shares_of_devices_end(monkeypatch):
    """What belongs to an eighth of the rows is an eighth of each array of the code."""
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    for shape in [(64, 512), (64, 100), (520, 50), (256, 10), (64, 3, 129), (4096,)]:
        x = normal(shape)
        whole = StochasticRound(2).encode(seed(0), x)
        assert all(a.shape[0] % 8 == 0 for a in whole)
        others = StochasticRound(2).encode(seed(0), x.at[shape[0] // 8 :].add(1))
        assert all(np.array_equal(a[: len(a) // 8], b[: len(b) // 8]) for a, b in zip(whole, others, strict=True))


def test_no_padding_where_groups_divide():
    for codec in (StochasticRound(2), BitMask()):
        x = jnp.zeros((8, 512), bool if codec == BitMask() else jnp.float32)
        assert " pad[" not in str(jax.make_jaxpr(codec.encode)(seed(0), x))


# Unbiased, and the checker sees what is not


@pytest.mark.parametrize("codec", few(RANDOM, *RANDOM[::2], slow=4), ids=label)
def test_unbiased_in_every_entry(codec):
    x = normal((2, 300) if isinstance(codec, StochasticRound) else (3, 41)) + 0.5  # the last stratum is smaller
    assert_unbiased(draw(codec, x), x, str(codec))


@pytest.mark.parametrize("dtype", few([jnp.bfloat16, jnp.float16], jnp.bfloat16, slow=0))
@pytest.mark.parametrize(
    "codec",
    [
        *ROUNDING,
        *DITHERED[1:3],
        RotatedRound(2),
        *FLOATS,
        SampleAxis(0.1),
        SampleAxis(0.3, centred=True),
        RandomProjection(0.5),
    ],
    ids=label,
)
def test_unbiased_in_half_precision(codec, dtype):
    x = (normal((2, 40)) + 3).astype(dtype)  # off zero, where numbers are too far apart to round to the nearest
    assert_unbiased(draw(codec, x), x, str(codec))


@pytest.mark.parametrize("codec", few(RANDOM, *RANDOM[::3], slow=99), ids=label)
def test_unbiased_in_double_precision(codec):
    with jax.enable_x64(True):
        x = normal((2, 40), np.float64)
        draws = draw(codec, x)
        assert draws.dtype == np.float64
        assert_unbiased(draws, x, str(codec))


@pytest.mark.parametrize("codec", [StochasticRound(2), DitheredRound(2), DitheredRound(4)], ids=label)
def test_unbiased_where_levels_are_a_few_ulps_apart(codec):
    x = jnp.float32(1000) + normal((300,)) * 1e-3  # spacing of float32 there: 6e-5
    assert_unbiased(draw(codec, x), x)


ADVERSARIAL = {
    "spike": np.eye(1, 256)[0] * 1e6 + 1e-3,
    "one sign": np.random.default_rng(0).random(256),
    "powers of two": 2.0 ** np.arange(-20, 12).repeat(8),
    "tiny": np.random.default_rng(1).standard_normal(256) * 1e-33,  # what is below 1e-38 is flushed to zero
    "alternating signs": np.where(np.arange(256) % 2, 1.0, -1.0) * np.linspace(1, 2, 256),
    "sorted": np.sort(np.random.default_rng(2).standard_normal(256)),
    "rank one": np.outer(np.linspace(-1, 1, 16), np.linspace(0.5, 3, 16)).reshape(-1),
    "heavy tail": np.random.default_rng(3).standard_t(2, 256),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "codec",
    [StochasticRound(4), DitheredRound(1), DitheredRound(4), RotatedRound(1), RotatedRound(4), *FLOATS],
    ids=label,
)
def test_unbiased_on_adversarial_arrays(codec):
    """A hundred thousand draws: a bias of a fiftieth of the standard deviation of an entry would be seen. To draw a
    rotation takes longer: of a twentieth.
    """
    draws = 16_000 if isinstance(codec, RotatedRound) else 100_000
    for name, array in ADVERSARIAL.items():
        x = jnp.asarray(array, jnp.float32)
        assert_unbiased(draw(codec, x, draws=draws), x, f"{codec} of {name}")


class Nearest(StochasticRound):
    def encode(self, seed, x):
        layout = self._layout(x.shape)
        x = layout.split(x)
        low, step = self._fit(layout, x)
        return *layout.pack(jnp.round((x - layout.to_entries(low)) / layout.to_entries(step))), low, step


class Clipped(StochasticRound):
    def encode(self, seed, x):
        return super().encode(seed, jnp.clip(x, -2, 2))


class Unscaled(SampleAxis):
    def decode(self, seed, code, like):
        return super().decode(seed, tuple(c / 10 for c in code), like)


class OtherSeed(RandomProjection):
    def decode(self, seed, code, like):
        return super().decode(fold(seed, 3), code, like)


class OffCentre(DitheredRound):
    def decode(self, seed, code, like):
        packed, low, step = code
        return super().decode(seed, (packed, low + step * 0.03, step), like)


class OneHadamard(RotatedRound):
    """Random signs before a fixed rotation: cheaper, and biased where a few entries are larger than the rest."""

    def _rotation(self, seed, layout, dtype):
        _, signs = super()._rotation(seed, layout, dtype)
        matrix = np.ones((1, 1), dtype)
        while len(matrix) < signs.shape[1]:
            matrix = np.block([[matrix, matrix], [matrix, -matrix]]) / np.sqrt(2)
        return jnp.asarray(matrix, dtype), signs


class Truncated(FloatRound):
    """As if the random number were never small enough to round up."""

    def encode(self, seed, x):
        layout = self._layout(x.shape)
        x = layout.split(x)
        lowest, _ = self._lowest(layout, jnp.abs(x), x.dtype)
        number, _, _ = self._neighbours(jnp.abs(x), layout.to_entries(lowest))
        return *layout.pack(number + (x < 0) * 2 ** (self.bits - 1)), lowest.astype(jnp.int8)


class SlightlyLarge(StochasticRound):
    def decode(self, seed, code, like):
        packed, low, step = code
        return super().decode(seed, (packed, low, step * 1.02), like)


@pytest.mark.parametrize(
    "codec",
    [Nearest(), Clipped(8), Unscaled(0.1), OtherSeed(0.5), SlightlyLarge(4), OffCentre(4), Truncated(8)],
    ids=repr,
)
def test_checker_catches_a_planted_bias(codec):
    x = normal((2, 60))
    with pytest.raises(AssertionError, match="biased"):
        assert_unbiased(draw(codec, x), x)


def test_bound_is_the_normal_quantile():
    assert bound(1, 0.05) == pytest.approx(1.96, abs=1e-3)
    z = z_scores(np.random.default_rng(0).standard_normal((400, 10_000)), np.zeros(10_000))
    assert 3.5 < np.abs(z).max() < bound(10_000) < 5.5
    assert np.std(z) == pytest.approx(1, abs=0.05)


# Variance and independence


@pytest.mark.parametrize("codec", [RotatedRound(1), OneHadamard(1)], ids=repr)
def test_a_rotation_has_to_be_uniform(codec):
    """One large entry among small ones of the same size: the first Hadamard transform of it has two values."""
    x = jnp.asarray(np.concatenate([[3.0], np.full(63, 0.3)]), jnp.float32)
    draws = draw(codec, x, draws=20_000)
    if isinstance(codec, OneHadamard):
        with pytest.raises(AssertionError, match="biased"):
            assert_unbiased(draws, x)
    else:
        assert_unbiased(draws, x)


def test_groups_that_are_turned_together_err_apart():
    """Of 256 rows that are all the same, along one direction: as if each had a matrix of its own, up to rows / n**2."""
    x, direction = jnp.tile(normal((1, 128)), (256, 1)), jnp.tile(normal((1, 128), number=1), (256, 1))
    for codec in (RotatedRound(1), RotatedRound(3)):
        along = ((draw(codec, x, draws=1000) - np.asarray(x)) * np.asarray(direction)).sum((1, 2))
        assert 0.8 < along.var() / float(codec.variance_along(x, direction)) < 1.25

    class OneSign(RotatedRound):
        def _rotation(self, seed, layout, dtype):
            matrix, signs = super()._rotation(seed, layout, dtype)
            return matrix, jnp.ones_like(signs)

    along = ((draw(OneSign(1), x, draws=200) - np.asarray(x)) * np.asarray(direction)).sum((1, 2))
    assert along.var() > 50 * float(RotatedRound(1).variance_along(x, direction))


def test_what_is_turned_has_an_error_that_depends_on_its_length_alone():
    for x in (normal((256,)), jnp.asarray(ADVERSARIAL["spike"], jnp.float32)):
        for bits, expected in ((1, 0.56), (2, 0.128), (3, 0.034), (4, 0.009)):
            relative = float(RotatedRound(bits).variance(x) / (x**2).sum())
            assert relative == pytest.approx(expected, rel=0.02)
            assert RotatedRound(bits).relative_variance(x.shape) == pytest.approx(relative, rel=1e-5)
    assert np.array_equal(round_trip(RotatedRound(1), seed(0), jnp.zeros(300)), np.zeros(300))


@pytest.mark.parametrize("codec", FLOATS, ids=label)
def test_small_floats_err_in_proportion_to_each_entry(codec):
    """Whatever else is in its group, as far as the exponent reaches; of smaller ones the errors are all as large."""
    most, octaves = {4: (1 / 8, 6), 6: (1 / 24, 14), 8: (1 / 80, 30)}[codec.bits]
    exponents = np.random.default_rng(0).permutation(np.linspace(-40, 0, 256))
    for largest in (1e-12, 1.0, 1e12):  # as far as float32 holds squares
        x = jnp.asarray(largest * 2.0**exponents * np.where(np.arange(256) % 2, 1, -1), jnp.float32)
        decoded = draw(codec, x, draws=100)
        assert np.all((decoded == 0) | (np.sign(decoded) == np.sign(x)))
        groups = np.abs(np.asarray(x)).reshape(-1, 32)
        smallest = np.repeat(groups.max(1) * 2.0 ** (1 - octaves), 32)  # at most: the largest may be rounded up
        size = np.abs(np.asarray(x, np.float64))
        variance = np.asarray(codec._variances(x), np.float64)
        assert np.all(variance <= np.where(size >= smallest, most * size**2, size * smallest) * (1 + 1e-5))
        assert np.any(variance > 0.9 * most * size**2)
    powers = jnp.asarray(2.0 ** np.arange(-3, 3).repeat(40), jnp.float32)
    for exact in (jnp.full(300, 2.0**-120), jnp.full(300, 2.0**127), jnp.zeros(300), powers, -powers, jnp.float32(0.5)):
        assert np.array_equal(round_trip(codec, seed(0), exact), exact)


@pytest.mark.parametrize("codec", few(RANDOM, *RANDOM[::3], slow=5), ids=label)
def test_variance_is_the_measured_one(codec):
    x = normal((3, 300) if isinstance(codec, StochasticRound) else (3, 41)) + 0.5
    squared = ((draw(codec, x).astype(np.float64) - np.asarray(x)) ** 2).sum((1, 2))
    error = squared.std() / np.sqrt(DRAWS)
    assert abs(squared.mean() - float(codec.variance(x))) < bound(1) * error


def test_dither_spreads_every_error_alike():
    """Whatever an entry is: uniform over one step, half the variance of plain rounding for normal entries."""
    x = normal((2, 256))
    for bits, ratio in ((1, 0.36), (2, 0.5), (4, 0.5)):
        codec = DitheredRound(bits)
        step = np.repeat(np.asarray(codec.encode(seed(0), x)[2]), 256).reshape(x.shape)
        places = (draw(codec, x) - np.asarray(x)) / step
        assert np.abs(places).max() < 0.5 + 1e-5
        assert np.all(np.abs(places.var(0) * 12 - 1) < 0.1)
        assert codec.relative_variance(x.shape) == pytest.approx(
            ratio * StochasticRound(bits).relative_variance(x.shape), rel=0.1
        )


def test_dither_of_another_seed_is_no_help():
    """What the test of variances would say of a decoder that takes back the wrong noise."""

    class Forgetful(DitheredRound):
        def decode(self, seed, code, like):
            return super().decode(fold(seed, 5), code, like)

    x = normal((3, 300)) + 0.5
    squared = ((draw(Forgetful(4), x).astype(np.float64) - np.asarray(x)) ** 2).sum((1, 2))
    assert squared.mean() > 2 * float(DitheredRound(4).variance(x))
    assert_unbiased(draw(Forgetful(4), x), x)


@pytest.mark.parametrize("codec", [Keep(), *RANDOM], ids=label)
@pytest.mark.parametrize("shape", few([(7,), (40,), (30, 129), (2, 2000)], (40,), (30, 129), slow=0), ids=str)
def test_relative_variance_model(codec, shape):
    repeats = [normal(shape, number=i) for i in range(max(4, 6000 // int(np.prod(shape))))]
    x = jnp.stack(repeats)
    measured = jnp.sum(jax.jit(jax.vmap(codec.variance))(x)) / jnp.sum(x**2)
    assert codec.relative_variance(shape) == pytest.approx(float(measured), rel=0.25)


UNCORRELATED = [*ROUNDING, DitheredRound(4), FloatRound(4), SampleAxis(0.1), RandomProjection(0.1)]


@pytest.mark.parametrize("codec", few(UNCORRELATED, *UNCORRELATED[::2], slow=0), ids=label)
def test_errors_are_uncorrelated(codec):
    x = normal((2, 40)) + 0.2
    errors = draw(codec, x).reshape(DRAWS, -1) - np.asarray(x).reshape(-1)
    i, j = np.triu_indices(errors.shape[1], 1)
    if isinstance(codec, SampleAxis):  # the entries of one stratum share a draw
        i, j = i[i // 10 != j // 10], j[i // 10 != j // 10]
    if not isinstance(codec, RandomProjection):  # all the entries of a projection share its matrix
        assert_uncorrelated(errors[:, i], errors[:, j], f"errors of {codec} within an array")
    other = draw(codec, x, start=DRAWS).reshape(DRAWS, -1) - np.asarray(x).reshape(-1)
    assert_uncorrelated(errors, other, f"errors of {codec} between seeds")
    assert_uncorrelated(errors[:-1], errors[1:], f"errors of {codec} between consecutive seeds")


def test_checker_catches_a_planted_correlation():
    errors = draw(StochasticRound(2), normal((40,)))
    noise = np.random.default_rng(0).standard_normal(errors.shape)
    with pytest.raises(AssertionError, match="correlated"):
        assert_uncorrelated(errors, errors * 0.1 + 0.3 * errors.std() * noise)


def test_shared_sample_is_the_same_in_every_row():
    zeros = np.asarray(round_trip(SampleAxis(0.1, "shared"), seed(0), jnp.ones((8, 60)))) == 0
    assert np.all(zeros == zeros[0]) and zeros.mean() == pytest.approx(0.9)
    zeros = np.asarray(round_trip(SampleAxis(0.1, "row"), seed(0), jnp.ones((8, 60)))) == 0
    assert len(np.unique(zeros, axis=0)) == 8


# Exact, bounded, loud


def test_keep_and_mask_are_exact():
    for shape in [(), (0,), (1,), (257,), (5, 3, 129)]:
        mask = jnp.asarray(np.asarray(normal(shape)) > 0)
        assert np.array_equal(round_trip(BitMask(), seed(0), mask), mask)
        assert np.array_equal(round_trip(Keep(), seed(0), mask), mask)
    key = jax.random.split(jax.random.key(0), 3)
    assert Keep().encode(seed(0), key)[0] is key
    assert Keep().stored_bytes(key.shape, key.dtype) == 3 * key.dtype.itemsize
    assert Keep().exact and BitMask().exact and not any(codec.exact for codec in RANDOM)
    assert float(Keep().variance(jnp.ones(3))) == float(BitMask().variance(jnp.ones(3, bool))) == 0


@pytest.mark.parametrize("codec", few([*ROUNDING, *DITHERED], *ROUNDING[::2], *DITHERED[::2], slow=9), ids=label)
def test_constant_groups_are_exact(codec):
    for value in (0.0, -0.1, 3e30, 2e-38):
        x = jnp.full((2, 513), value, jnp.float32)
        assert np.array_equal(round_trip(codec, seed(0), x), x)
        assert float(codec.variance(x)) == 0
    scalar = jnp.float32(0.1)
    assert round_trip(codec, seed(0), scalar) == scalar


def test_two_valued_groups_are_exact_at_one_bit():
    x = (normal((4, 300)) > 0).astype(jnp.float32)
    assert np.array_equal(round_trip(StochasticRound(1), seed(0), x), x)


@pytest.mark.parametrize("codec", few(ROUNDING, *ROUNDING[::2], slow=0), ids=label)
@pytest.mark.parametrize(
    "shape", few([(), (0,), (3,), (257,), (5, 3, 129)], (), (0,), (257,), (5, 3, 129), slow=0), ids=str
)
def test_error_is_below_one_step(codec, shape):
    x = jnp.stack([normal(shape) * np.float32(scale) for scale in (1e-30, 1, 1e37)])
    decoded = np.asarray(jax.jit(jax.vmap(lambda x: round_trip(codec, seed(0), x)))(x))
    steps = jax.jit(jax.vmap(lambda x: codec.encode(seed(0), x)[-1]))(x)
    for scale, exact, estimate, step in zip((1e-30, 1, 1e37), x, decoded, steps, strict=True):
        if exact.size:
            assert np.max(step) <= np.ptp(exact) / (2**codec.bits - 1) * (1 + 1e-6)
            assert np.max(np.abs(estimate - np.asarray(exact))) <= np.max(step) + 1e-6 * scale


@pytest.mark.parametrize(
    ("bad", "dtype"),
    [
        (np.nan, jnp.float32),
        (np.inf, jnp.float32),
        (-np.inf, jnp.bfloat16),
        pytest.param(np.nan, jnp.bfloat16, marks=pytest.mark.exhaustive),
        pytest.param(np.inf, jnp.bfloat16, marks=pytest.mark.exhaustive),
        pytest.param(-np.inf, jnp.float32, marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.parametrize("codec", RANDOM, ids=label)
def test_not_finite_stays_visible(codec, bad, dtype):
    x = np.array(normal((3, 512)), dtype)
    x[1, 300] = bad
    x = jnp.asarray(x)
    decoded = np.asarray(round_trip(codec, seed(0), x)).astype(np.float32)
    assert np.all(np.isfinite(decoded[[0, 2]]))
    poisoned = np.isnan(decoded[1])
    assert not np.any(np.isinf(decoded))
    if isinstance(codec, WITH_GROUPS):
        group = min(codec.group, 512)
        start = 300 // group * group
        assert np.all(poisoned[start : start + group]) and poisoned.sum() == group
    elif isinstance(codec, RandomProjection) or codec.centred:
        assert np.all(poisoned)
    else:
        assert poisoned.sum() == codec.stored_bytes((1, 512), jnp.float32) // 4 and np.all(decoded[1][~poisoned] == 0)


def test_bad_arguments_say_what_to_do():
    for make, message in [
        (lambda: StochasticRound(5), "Use 1, 2, 3, 4, 6 or 8"),
        (lambda: RotatedRound(8), "Use 1, 2, 3 or 4"),
        (lambda: RotatedRound(2, group=100), "such as 64"),
        (lambda: StochasticRound(2, group=100), "Try 256"),
        (lambda: FloatRound(2), "4, 6 and 8"),
        (lambda: FloatRound(8, group=100), "Try 32"),
        (lambda: StochasticRound(2, group=0), "Try 256"),
        (lambda: SampleAxis(0.0), "Keep"),
        (lambda: SampleAxis(0.9), "Keep"),
        (lambda: SampleAxis(float("nan")), "Keep"),
        (lambda: SampleAxis(per="column"), "'row' or 'shared'"),
        (lambda: RandomProjection(1.5), "at most 1"),
        (lambda: BitMask().encode(seed(0), jnp.ones(3)), "boolean"),
        (lambda: StochasticRound().encode(seed(0), jnp.arange(3)), "int32"),
        (lambda: SampleAxis().encode(seed(0), jnp.ones(())), "at least 1 axes"),
        (lambda: RandomProjection().encode(seed(0), jnp.ones(3, bool)), "bool"),
        (lambda: seed_words(jax.random.split(jax.random.key(0))), "one PRNG key"),
        (lambda: fold(seed(0), -1), "32-bit"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()


def test_supports():
    assert Keep().supports((), jax.random.key(0).dtype) and Keep().supports((2,), jnp.int32)
    assert BitMask().supports((2,), jnp.bool_) and not BitMask().supports((2,), jnp.float32)
    for codec in RANDOM:
        assert codec.supports((2,), jnp.bfloat16) and codec.supports((2,), np.dtype("float64"))
        for dtype in (jnp.int32, jnp.bool_, jnp.complex64, jax.random.key(0).dtype):
            assert not codec.supports((2,), dtype)
        assert codec.supports((), jnp.float32) == isinstance(codec, WITH_GROUPS)


def test_labels_and_hashing():
    assert [str(c) for c in (StochasticRound(), Keep(), BitMask())] == ["2-bit", "keep", "1-bit mask"]
    assert [str(c) for c in (SampleAxis(), SampleAxis(0.1, "shared"), RandomProjection())] == [
        "sample 0.1 per row",
        "sample 0.1 shared",
        "project 0.1",
    ]
    assert len({Keep(), Keep(), StochasticRound(4), StochasticRound(4), *RANDOM}) == len(RANDOM) + 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        StochasticRound().bits = 4  # ty: ignore


# Seeds and transformations


def test_seeds_of_all_key_kinds():
    keys = [jax.random.key(0), jax.random.key(1), *(jax.random.key(0, impl=impl) for impl in ("rbg", "unsafe_rbg"))]
    words = [seed_words(key) for key in keys]
    assert all(w.shape == (2,) and w.dtype == jnp.uint32 for w in words)
    assert len({tuple(np.asarray(w)) for w in words[:3]}) == 3
    assert np.array_equal(words[0], seed_words(jax.random.PRNGKey(0)))
    assert np.array_equal(words[0], jax.jit(seed_words)(keys[0]))


def test_fold_gives_different_seeds():
    numbers = jnp.arange(20_000, dtype=jnp.uint32)
    one = jax.jit(jax.vmap(lambda i: fold(seed(0), i)))(numbers)
    two = jax.jit(jax.vmap(lambda i: fold(fold(seed(0), 3), i)))(numbers)
    both = np.concatenate([one, two])
    assert len(np.unique(both, axis=0)) == len(both)
    bits = np.unpackbits(both.view(np.uint8), axis=1)  # every bit of every word fair, and fair against its successor
    assert_unbiased(bits.astype(np.float64), np.full(bits.shape[1], 0.5))
    flips = bits[1:] ^ bits[:-1]
    assert_unbiased(flips.astype(np.float64), np.full(bits.shape[1], 0.5))
    traced = [jnp.uint32(n) for n in (3, 5)]
    assert np.array_equal(fold(seed(0), *traced), fold(fold(seed(0), traced[0]), traced[1]))
    assert not np.array_equal(fold(seed(0), 3), fold(seed(0), 3, 0))
    assert not np.array_equal(fold(seed(0), 3, 5), fold(seed(0), 5, 3))
    assert np.array_equal(fold(seed(0), 7), jax.jit(lambda s: fold(s, 7))(seed(0)))


@pytest.mark.parametrize("codec", few([Keep(), *RANDOM], Keep(), *RANDOM[::3], slow=9), ids=label)
def test_jit_and_vmap_change_nothing(codec):
    x = normal((3, 4, 300))
    plain = jnp.stack([round_trip(codec, seed(i), x[i]) for i in range(3)])
    seeds = jnp.stack([seed(i) for i in range(3)])
    mapped = jax.jit(jax.vmap(lambda s, x: round_trip(codec, s, x)))(seeds, x)
    np.testing.assert_allclose(mapped, plain, rtol=1e-5, atol=1e-5)  # a level chosen differently would be off by 1e-2


@pytest.mark.parametrize(
    "codec", [BitMask(), StochasticRound(4), StochasticRound(1), SampledRound(2, size=4)], ids=label
)
def test_lanes_that_fill_no_byte_are_padded_apart(codec):
    """A padding or concatenation of all entries would be fused with what makes the codes, for four times the time."""
    x = jnp.zeros((1437, 256), bool if isinstance(codec, BitMask) else jnp.float32)
    program = jax.make_jaxpr(lambda x: codec.encode(seed(0), x))(x)
    sizes = [e.outvars[0].aval.size for e in equations_of(program.jaxpr) if e.primitive.name in ("pad", "concatenate")]
    assert sizes and max(sizes) < x.size / 50, sizes


def equations_of(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in _jax.inner_jaxprs(equation):
            yield from equations_of(inner.jaxpr)
