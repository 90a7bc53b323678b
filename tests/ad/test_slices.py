"""Parts of programs that run slice by slice: found where an axis stays to itself, exact, smaller, and left alone
otherwise."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import lax
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from programs import numbers, planned
from random_programs import ARGS, INDEX, loss, seeded

from numpyro_rad import RAD_ELBO, RAD_SVI, BudgetError, StochasticRound, explain, rad, transform, value_and_grad
from numpyro_rad.ad import _jax, axes, primitives
from numpyro_rad.ad import slices as slices_module
from numpyro_rad.ad.codecs import InResult
from numpyro_rad.planning.costs import CostModel

pytestmark = pytest.mark.in_one_go

ROWS, INPUTS, HIDDEN, CLASSES = 12, 5, 6, 3


X, LABELS = numbers(ROWS, INPUTS), np.arange(ROWS) % CLASSES
W, V, B = numbers(INPUTS, HIDDEN) / 2, numbers(HIDDEN, CLASSES), numbers(CLASSES)
EACH = numbers(ROWS, HIDDEN, seed=1)  # what every row has of its own
IMAGES, KERNEL, OF_CHANNELS = numbers(ROWS, 6, 6, 2), numbers(3, 3, 2, 4) / 3, numbers(3, 3, 1, 4)
SERIES, STEP = numbers(4, ROWS, HIDDEN), numbers(HIDDEN, HIDDEN) / 2


def cross_entropy(logits):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), LABELS[:, None], 1).sum()


def network(w, v, b):
    """Weights are used in the part and outside of it, and a bias is added to what the part sums up."""
    return 2 * cross_entropy(jax.nn.relu(X @ w) @ v + b) / ROWS + (w**2).sum() + b[0]


def each_its_own(z, w, v):
    """Latent variables of rows: their gradient has the axis."""
    hidden = jnp.tanh(X @ w + z)
    return (cross_entropy(hidden @ v) + 0.5 * (z**2).sum()) * 3


def columns(z, w, v):
    """The same, transposed."""
    return each_its_own(z.T, w, v)


def images(kernel, v):
    """Convolutions are slow in loops on a CPU, so slices run one after the other."""
    numbers = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(IMAGES, kernel, (1, 1), "SAME", dimension_numbers=numbers)
    each = lax.conv_general_dilated(y, OF_CHANNELS, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=4)
    pooled = lax.reduce_window(jax.nn.gelu(y + each), 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return cross_entropy(pooled.reshape(ROWS, -1) @ jnp.tile(v, (6, 1)))


def series(step, h):
    """A loop, with a branch in it."""

    def iterate(h, x):
        h = jnp.tanh(h @ step + x)
        return lax.cond(True, lambda h: h * 0.9, jnp.sin, h), (h**2).sum(1)

    h, squares = lax.scan(iterate, h, SERIES)
    return squares.sum() + jnp.exp(h).sum()


def particles(w, v):
    """Weights of their own for each particle, under ``vmap``; the mean is taken over them."""

    def one(key):
        return network(w + 0.1 * jax.random.normal(key, w.shape, w.dtype), v, B)

    return jax.vmap(one)(jax.random.split(jax.random.key(1), 8)).mean()


def attention(w, v, b):
    """Rows are sequences, whose entries meet each other."""
    x = numbers(ROWS, 4, INPUTS) @ w
    a = jax.nn.softmax(jnp.einsum("nik,njk->nij", x, x))
    return cross_entropy(jnp.einsum("nij,njk->nk", a, x) @ v + b)


def embedding(w, v):
    """Rows are picked from a table."""
    return cross_entropy(jnp.tanh(w[LABELS] @ v[:, :2]) @ v[:2])


def standardized(w, v, b):
    """Data are brought to one scale before: that has no derivative, so it is no matter that it mixes rows."""
    x = (X - X.mean(0)) / jnp.std(jnp.asarray(X), axis=0)
    x = x.reshape(1, ROWS, INPUTS).reshape(ROWS, 1, INPUTS)[:, 0]
    return cross_entropy(jnp.sort(x, axis=0) @ w @ v + b)


def with_own_rules(w, v, b):
    """Functions with derivatives of their own, a compiled one and one that is computed again."""

    @jax.jit
    def layer(x):
        return jax.nn.silu(x @ w)

    return cross_entropy(jax.nn.softplus(jax.checkpoint(layer)(X)) @ v + jax.nn.relu6(b))


PROGRAMS = {
    "network": (network, (W, V, B), ROWS),
    "latent variables of rows": (each_its_own, (EACH, W, V), ROWS),
    "latent variables in columns": (columns, (EACH.T, W, V), ROWS),
    "images": (images, (KERNEL, numbers(6, CLASSES)), ROWS),
    "series": (series, (STEP, EACH), ROWS),
    "particles": (particles, (W, V), 8),
    "attention": (attention, (W, V, B), ROWS),
    "embedding": (embedding, (W, V), ROWS),
    "standardized data": (standardized, (W, V, B), ROWS),
    "rules of its own": (with_own_rules, (W, V, B), ROWS),
}


def batch_norm(w, v, b):
    h = X @ w
    return cross_entropy(jax.nn.relu((h - h.mean(0)) / (h.std(0) + 0.1)) @ v + b)


def two_batch_norms(w, v, b):
    """With something to compute before each, and sums of a part that go back to its axis."""
    h = X
    for _ in range(2):
        h = jnp.sin(jnp.tanh(h @ w) @ w.T)
        h = (h - h.mean(0)) / (h.std(0) + 0.1)
    return cross_entropy(jax.nn.relu(h @ w) @ v + b)


def over_rows(w, v, b):
    h = X @ w
    return cross_entropy(jax.nn.softmax(h @ h.T) @ h @ v + b)


def neighbours(w, v, b):
    return cross_entropy(jnp.cumsum(jnp.tanh(X @ w), 0) @ v + b)


def two_numbers(w, v, b):
    """The second factor is known only when all rows have been seen."""
    h = jnp.tanh(X @ w) @ v + b
    return h.sum() * jnp.exp(h).sum()


def kernel_of_features(w, v, b):
    """A Gaussian process on what a network makes of each row."""
    h = X
    for _ in range(2):
        h = jnp.tanh(h @ w @ w.T)
    root = jnp.linalg.cholesky(h @ h.T + jnp.eye(ROWS))
    z = lax.linalg.triangular_solve(root, h[:, :1] + b[0], left_side=True, lower=True)
    return (z**2).sum() / 2 + jnp.log(jnp.diagonal(root)).sum() + (v**2).sum()


def weighed_particles(w, v, b):
    """The weight of a particle is known only when all have run."""

    def one(key):
        return network(w + 0.1 * jax.random.normal(key, w.shape, w.dtype), v, b)

    return jax.nn.logsumexp(jax.vmap(one)(jax.random.split(jax.random.key(1), 8)))


def groups(w, v, b):
    """Whole numbers are handed on, too: of each row the unit of most activity, by which others are weighed."""
    h = jnp.tanh(X @ w) @ v
    return (jnp.cumsum(h, 0) * jax.nn.one_hot(jnp.argmax(h, 1), CLASSES)).sum() * h.sum() + b.sum()


def prints(w, v, b):
    jax.debug.callback(lambda: None)
    return network(w, v, b)


BEHIND = {f.__name__: f for f in (batch_norm, over_rows, neighbours)}
STAGES = {f.__name__: f for f in (two_numbers, two_batch_norms, kernel_of_features, weighed_particles, groups)}


def gradients(f, args, **options):
    """Value and gradient, by JAX and in slices."""
    argnums = tuple(range(len(args)))

    def in_slices(*args):
        return jax.value_and_grad(lambda *args: rad(f, **options)(jax.random.key(0), *args), argnums)(*args)

    return jax.jit(lambda *args: (jax.value_and_grad(f, argnums)(*args), in_slices(*args)))(*args)


def assert_same(expected, got, rtol=1e-9):
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(b, a, rtol=0, atol=rtol * max(1e-3, np.abs(a).max()))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", PROGRAMS)
def test_exact(name):
    """Slices that do not divide the axis, too."""
    f, args, size = PROGRAMS[name]
    plan = planned(f, args, exact=True, slices=5)
    assert plan.graph.slices.axis_size == size and plan.graph.slices.number in (4, 5)
    assert_same(*gradients(f, args, exact=True, slices=5))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", BEHIND)
def test_what_comes_behind_a_step_that_mixes(name):
    assert planned(BEHIND[name], (W, V, B), exact=True, slices=3).graph.slices.axis_size == ROWS
    assert_same(*gradients(BEHIND[name], (W, V, B), exact=True, slices=3))


@pytest.mark.usefixtures("double")
def test_what_one_key_draws_for_all_rows_is_drawn_for_all():
    """What an entry is depends on how many there are."""

    def f(w, v, b):
        drawn = jax.random.gamma(jax.random.key(2), jnp.exp(jnp.tanh(X @ w)))
        return jnp.sin(drawn @ v + b).sum()

    assert_same(*gradients(f, (W, V, B), exact=True, slices=3))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", STAGES)
def test_what_does_not_end_in_one_number_runs_again(name):
    """The last slice is smaller, of most."""
    assert planned(STAGES[name], (W, V, B), exact=True, slices=5).graph.slices.again
    assert_same(*gradients(STAGES[name], (W, V, B), exact=True, slices=5))


def test_what_prints_is_left_alone():
    assert planned(prints, (W, V, B), exact=True, slices=3).graph.slices is None


def test_a_part_that_runs_again_can_be_mapped():
    """A step for each of several data sets."""
    g = jax.grad(lambda w, v, b: rad(two_numbers, exact=True, slices=3)(jax.random.key(0), w, v, b))
    many = np.stack([W, 2 * W, -W])
    np.testing.assert_allclose(
        jax.vmap(lambda w: g(w, V, B))(many), jax.vmap(lambda w: jax.grad(two_numbers)(w, V, B))(many), 1e-3, 1e-3
    )


@pytest.mark.usefixtures("double")
def test_a_wrong_cotangent_of_a_stage_is_caught(monkeypatch):
    """Slices that all take the cotangent of the first one."""
    taken = slices_module._Stage.taken

    def first(self, arrays, places, start, size):
        return taken(self, arrays, places, 0 if places is self.cotangent_places else start, size)

    monkeypatch.setattr(slices_module._Stage, "taken", first)
    with pytest.raises(AssertionError):
        assert_same(*gradients(kernel_of_features, (W, V, B), exact=True, slices=3))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("primitive", "wrong", "f"),
    [
        ("cumsum", axes._elementwise, neighbours),
        ("reduce_max", lambda e: axes._reduction(e, sums=True), lambda w, v, b: (jnp.tanh(X @ w).max(0) @ v + b).sum()),
    ],
)
def test_a_wrong_signature_is_caught(monkeypatch, primitive, wrong, f):
    monkeypatch.setitem(axes._RULES, primitive, wrong)
    with pytest.raises((AssertionError, TypeError, ValueError)):  # other numbers, or shapes that do not fit
        assert planned(f, (W, V, B), exact=True, slices=3).graph.slices.axis_size == ROWS
        assert_same(*gradients(f, (W, V, B), exact=True, slices=3))


def by_random_program(seed):
    """Whether there was something to cut."""
    f, options = loss(seeded(seed)), {"exact": True, "slices": 2 + seed % 3}
    assert_same(*gradients(lambda *args: f(*args, INDEX), ARGS, **options))
    return planned(lambda *args: f(*args, INDEX), ARGS, **options).graph.slices is not None


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("seed", [3, 10])
def test_random_programs(seed):
    assert by_random_program(seed)


@pytest.mark.exhaustive
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("seed", range(100, 400))
def test_more_random_programs(seed):
    by_random_program(seed)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_precisions_that_meet_in_the_sum(dtype):
    """Gradients of half precision, added up to a loss of single precision."""

    def f(w, x):
        return jnp.sin((jax.nn.gelu(x @ w) @ w.T).astype(jnp.float32)).sum()

    args = W.astype(dtype), X.astype(dtype)
    assert planned(f, args, exact=True, slices=3).graph.slices.number == 3
    (value, gradient), (own, own_gradient) = gradients(f, args, exact=True, slices=3)
    np.testing.assert_allclose(own, value, rtol=1e-2)
    for a, b in zip(own_gradient, gradient, strict=True):
        assert a.dtype == b.dtype == dtype
        np.testing.assert_allclose(*(np.asarray(g, np.float32) for g in (a, b)), rtol=0.1, atol=0.1)


def test_half_precision_is_added_up_in_full():
    """512 slices whose sums a half could not hold."""
    x = np.ones((512, 4), np.float16)

    def f(w):
        return (x * w).sum(dtype=jnp.float32) * jnp.float32(0.1)

    (_, expected), (_, got) = gradients(f, (np.full(4, 0.1, np.float16),), exact=True, slices=512)
    assert planned(f, (np.ones(4, np.float16),), exact=True, slices=512).graph.slices.number == 512
    np.testing.assert_allclose(np.asarray(got[0], np.float32), np.asarray(expected[0], np.float32), rtol=2e-3)


# -- models ------------------------------------------------------------------------------------------------------------

N, WIDTH = 256, 32
DATA = jnp.asarray(numbers(N, INPUTS), jnp.float32), jnp.asarray(numbers(N, seed=2), jnp.float32)


def regression(x, y, batch=None):
    w = numpyro.sample("w", dist.Normal(0, 1).expand([INPUTS, WIDTH]).to_event(2))
    v = numpyro.sample("v", dist.Normal(0, 0.1).expand([WIDTH, WIDTH]).to_event(2))
    with numpyro.plate("rows", N, subsample_size=batch) as rows:
        z = numpyro.sample("z", dist.Normal(0, 1))
        h = jnp.tanh(jnp.tanh(x[rows] @ w) @ v)
        numpyro.sample("y", dist.Normal(h.sum(-1) + z, 0.5), obs=y[rows])


def step(elbo, batch=None):
    """A compiled update, its state and the SVI. The optimizer divides by nothing small: its steps can be compared."""
    svi = SVI(regression, AutoNormal(regression, init_scale=0.1), optax.adam(1e-3, eps=1.0), elbo)
    state = svi.init(jax.random.key(0), *DATA, batch=batch)
    update = jax.jit(lambda state, *data: svi.update(state, *data, batch=batch))
    return update.lower(state, *DATA).compile(), state, svi


def same_step(elbo, base, batch=None):
    (update, state, svi), (reference, _, plain) = step(elbo, batch), step(base, batch)
    (after, value), (expected, loss) = update(state, *DATA), reference(state, *DATA)
    np.testing.assert_allclose(value, loss, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(svi.get_params(after)), jax.tree.leaves(plain.get_params(expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    sizes = [c.memory_analysis().temp_size_in_bytes for c in (update, reference)]
    return sizes, svi.loss.plan_of_update(svi, state, *DATA, batch=batch)[0]


@pytest.mark.slow
def test_rows_of_a_model():
    (size, whole), plan = same_step(RAD_ELBO(exact=True, slices=8), Trace_ELBO())
    assert plan.graph.slices.axis_size == N and plan.graph.slices.lines[0].startswith("test_slices.py:")
    assert size < whole / 2


@pytest.mark.slow
def test_minibatches_of_a_model():
    _, plan = same_step(RAD_ELBO(exact=True, slices=4), Trace_ELBO(), batch=64)
    assert plan.graph.slices.axis_size == 64


@pytest.mark.slow
def test_particles_of_a_model_and_their_rows():
    """There are fewer particles than slices, so each is cut into slices of rows."""
    (size, whole), plan = same_step(RAD_ELBO(num_particles=4, exact=True, slices=16), Trace_ELBO(num_particles=4))
    assert (plan.graph.slices.axis_size, plan.graph.slices.number) == (4, 16)
    assert size < whole / 4


@pytest.mark.slow
def test_particles_that_are_weighed_run_again():
    base = RenyiELBO(alpha=0.5, num_particles=8)
    (size, whole), plan = same_step(RAD_ELBO(base=base, exact=True, slices=8), base)
    assert plan.graph.slices.axis_size == 8 and plan.graph.slices.again
    assert size < whole / 4


def test_values_that_are_not_differentiated_have_the_bits_of_the_base():
    svi = step(RAD_ELBO(slices=4))[2]
    state = svi.init(jax.random.key(0), *DATA)
    key, params = jax.random.key(3), svi.get_params(state)
    value = jax.jit(lambda p: svi.loss.loss(key, p, svi.model, svi.guide, *DATA))(params)
    assert value == jax.jit(lambda p: Trace_ELBO().loss(key, p, svi.model, svi.guide, *DATA))(params)


@pytest.mark.usefixtures("encode_all")
def test_codes_outside_of_slices_are_unbiased():
    """The gradient in what the part takes is a residual like any other, unless it becomes that of an input entry by
    entry: coded, its mean is right."""
    args = (numbers(2, INPUTS), W[:2], V, B)

    def f(low, rank, v, b):
        return network(low.T @ rank, v, b)

    plan = planned(f, args, slices=3, codec=StochasticRound(bits=4))
    assert [value.aval.shape for value in plan.encoded] == [W.shape]
    assert {str(codec) for codec in plan.kept.values()} == {str(InResult())}
    g = rad(f, slices=3, codec=StochasticRound(bits=4))
    draws = jax.jit(jax.vmap(lambda key: jax.grad(g, 1)(key, *args)))(jax.random.split(jax.random.key(0), 400))
    exact = jax.grad(f)(*args)
    spread = np.std(draws, 0) / np.sqrt(len(draws))
    assert np.all(np.abs(np.mean(draws, 0) - exact) < 5 * spread + 1e-5 * np.abs(exact).max())


def wide(x, y):
    """The weights take 64 KiB, the sums of a row much less."""
    w = numpyro.sample("w", dist.Normal(0, 0.1).expand([16, 1024]).to_event(2))
    b = numpyro.sample("b", dist.Normal(0, 1.0))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Normal(jnp.tanh(x @ w).sum(-1) + b, 1.0), obs=y)


def test_a_gradient_in_the_place_of_a_result_takes_no_memory():
    """What slices add up for weights is where the gradient of their locations goes; not so where they are parts of one
    latent vector."""
    data = numbers(32, 16), numbers(32)

    def sliced(guide, **options):
        svi = SVI(wide, guide, optax.adam(1e-3), RAD_ELBO(slices=32, exact=True, **options))
        state = svi.init(jax.random.key(0), *data)
        size = jax.jit(svi.update).lower(state, *data).compile().memory_analysis().temp_size_in_bytes
        return svi.loss.plan_of_update(svi, state, *data)[0], size

    weights = 4 * 16 * 1024
    plan, size = sliced(AutoDelta(wide))
    assert plan.graph.slices.axis_size == 32 and plan.peak_bytes < weights / 4 and size < weights / 4
    assert sliced(AutoNormal(wide))[0].stored_bytes < weights / 4
    assert sliced(AutoDiagonalNormal(wide))[0].stored_bytes >= weights


# -- under a budget ----------------------------------------------------------------------------------------------------


@pytest.fixture
def of_themselves(priced):
    """Slices as users of large models get them; in other tests budgets are met by codes."""
    priced(slice_start=0.0, most_slices=CostModel.most_slices)


def budgeted(budget, **options):
    svi = SVI(regression, AutoNormal(regression), optax.adam(1e-3), RAD_ELBO(memory_budget=budget, **options))
    return svi.loss.plan_of_update(svi, svi.init(jax.random.key(0), *DATA), *DATA)[0]


@pytest.mark.usefixtures("of_themselves")
def test_a_budget_takes_as_few_slices_as_it_needs():
    assert budgeted("1GiB").graph.slices is None
    numbers = []
    for budget in (60_000, 30_000):
        plan = budgeted(budget)
        assert plan.peak_bytes <= budget and plan.predicted.added_variance < 0.05
        numbers.append(plan.graph.slices.number)
    assert 1 < numbers[0] < numbers[1]
    assert budgeted(60_000, slices=1).graph.slices is None


@pytest.mark.usefixtures("of_themselves")
def test_more_slices_where_less_memory_saves_time(priced):
    """Down to where what a slice holds is no longer dear."""
    numbers = [budgeted(60_000).graph.slices.number]
    for hold_from in (16_000, 2_000):
        priced(slice_start=0.0, most_slices=CostModel.most_slices, hold_per_byte=1e3, hold_from_bytes=hold_from)
        slices = budgeted(60_000).graph.slices
        assert slices.bytes_each < hold_from
        numbers.append(slices.number)
    assert numbers[0] < numbers[1] < numbers[2]


@pytest.mark.usefixtures("of_themselves", "arrays_of_any_size_count")
def test_without_options_slices_are_taken_where_they_save_more_than_they_cost(priced):
    """From free to start, over dearer ones, to none where they take longer to start than the step takes."""
    numbers = []
    for start in (0.0, 3.0, 30.0, 1e6):
        priced(slice_start=start, code_per_entry=1e3)
        slices = budgeted(None).graph.slices
        numbers.append(1 if slices is None else slices.number)
    assert numbers == sorted(numbers, reverse=True) and numbers[0] > numbers[1] > numbers[-2] > numbers[-1] == 1
    priced(slice_start=0.0, untouched_bytes=2**24)
    assert budgeted(None).untouched


@pytest.mark.usefixtures("of_themselves")
def test_without_options_nothing_takes_longer_than_it_may(priced):
    """What saves less is taken where the rest would take too long, and in the end nothing."""
    sizes = []
    for most in (math.inf, 0.1, 0.03, -1.0):
        priced(most_added_time=most)
        plan = budgeted(None)
        assert plan.untouched or plan.predicted.added_seconds <= most
        sizes.append(plan.peak_bytes)
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] and plan.untouched


@pytest.mark.usefixtures("of_themselves", "arrays_of_any_size_count")
def test_without_options_nothing_is_asked_of_the_compiler(monkeypatch):
    monkeypatch.setattr(_jax, "temporary_bytes", lambda f, avals: pytest.fail("the compiler was asked"))
    plan = budgeted(None)
    assert plan.graph.slices is not None and not plan.encoded and plan.predicted.added_variance == 0


def long_series(step, h):
    """Many steps, of which a slice holds more than all that it adds up."""
    h, squares = lax.scan(lambda h, x: (jnp.tanh(h @ step + x), (h**2).sum(1)), h, jnp.tile(SERIES, (64, 1, 1)))
    return squares.sum() + jnp.exp(h).sum()


@pytest.mark.usefixtures("arrays_of_any_size_count")
def test_time_is_compared_with_the_exact_step_in_one_go(priced):
    """Where slices cost nothing to start it is about the same, however many there are."""
    priced(slice_start=0.0)
    few, many = (budgeted(None, slices=n, exact=True).predicted.added_seconds for n in (2, 32))
    assert abs(few) < 0.2 and abs(many) < 1
    priced(slice_start=1e6)
    assert budgeted(None, slices=2, exact=True).predicted.added_seconds > 100


@pytest.mark.usefixtures("of_themselves", "double")
def test_loops_inside_of_slices_are_cut_into_segments(priced):
    """So that few slices do, even of a loop whose steps are dear to start."""
    priced(slice_start=1e4)
    args, budget = (STEP, SERIES[0]), 20_000
    slices = planned(long_series, args, memory_budget=budget, exact=True).graph.slices
    in_one_pass = planned(long_series, args, slices=slices.number, exact=True).graph.slices
    assert slices.bytes_each < budget < in_one_pass.bytes_each
    assert_same(*gradients(long_series, args, memory_budget=budget, exact=True))


@pytest.mark.usefixtures("of_themselves", "arrays_of_any_size_count")
def test_outside_of_slices_codes_are_taken_where_nothing_else_fits():
    within = budgeted(60_000, slices=8)
    assert not any(p.encoded for p in within.walk())
    tight = budgeted(within.graph.slices.bytes_each + 300, slices=8)
    assert tight.encoded and tight.peak_bytes <= within.graph.slices.bytes_each + 300


@pytest.mark.usefixtures("of_themselves")
def test_a_budget_bounds_what_the_compiled_step_takes():
    """Where Trace_ELBO fits, the step is its own; where not, it takes slices until the compiler says that it fits."""
    most = step(Trace_ELBO())[0].memory_analysis().temp_size_in_bytes
    assert same_step(RAD_ELBO(memory_budget=most + 4096), Trace_ELBO())[1].untouched
    (size, _), plan = same_step(RAD_ELBO(memory_budget=most // 2), Trace_ELBO())
    assert not plan.untouched and size <= 1.15 * most // 2


@pytest.mark.usefixtures("of_themselves")
def test_what_the_compiler_says_decides(monkeypatch):
    """A program that is found to take too much is cut more finely, as long as one pass is not cheaper; one of which
    nothing is known is not."""

    def told(*sizes):
        answers = itertools.chain(sizes, itertools.repeat(sizes[-1]))
        monkeypatch.setattr(transform, "TEMPORARY_BYTES", transform.Recent(8))
        monkeypatch.setattr(_jax, "temporary_bytes", lambda f, avals: next(answers))

    told(None)
    number = budgeted(40_000).graph.slices.number
    assert not budgeted("1GiB").untouched
    told(10_000)
    assert budgeted(1 << 20).untouched
    told(160_000, 40_000)
    assert budgeted(40_000).graph.slices.number > number
    told(160_000, 120_000, 40_000)
    assert budgeted(40_000).graph.slices is None


@pytest.mark.usefixtures("of_themselves")
def test_a_program_with_a_named_axis_is_planned_without_the_compiler():
    """It cannot be compiled outside of the ``vmap`` that names the axis."""

    def f(w, scale):
        return jnp.sum(jnp.tanh(jnp.tanh(X @ w) @ w.T) ** 2) * lax.psum(scale, "copies")

    def of_two(g):
        return jax.vmap(g, axis_name="copies")(np.stack([W, -W]), np.asarray([1.0, 2.0]))

    found = of_two(lambda w, s: jax.grad(rad(f, memory_budget=600, exact=True), 1)(jax.random.key(0), w, s))
    np.testing.assert_allclose(found, of_two(jax.grad(f)), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("of_themselves")
def test_the_compiler_is_asked_of_results_that_are_no_numbers(monkeypatch):
    asked, ask = [], _jax.temporary_bytes
    monkeypatch.setattr(_jax, "temporary_bytes", lambda f, avals: asked.append(ask(f, avals)) or asked[-1])

    def f(w, count):
        h = jnp.tanh(jnp.tanh(X @ w) @ w.T)
        return jnp.sum(h**2), {"count": count + 1, "key": jax.random.key(count), "mean": h.mean()}

    found = value_and_grad(f, has_aux=True, memory_budget="1MiB")(jax.random.key(0), W, 3)
    np.testing.assert_allclose(found[1], jax.grad(f, has_aux=True)(W, 3)[0], rtol=1e-5)
    assert found[0][1]["count"] == 4 and asked and None not in asked


@pytest.mark.usefixtures("of_themselves")
def test_a_budget_for_slices_alone_is_refused():
    with pytest.raises(BudgetError, match="Try memory_budget=") as error:
        budgeted(100, slices=4, exact=True)
    assert budgeted(error.value.smallest_bytes, slices=4, exact=True).peak_bytes <= error.value.smallest_bytes


@pytest.mark.usefixtures("of_themselves")
def test_a_saved_plan_knows_its_slices():
    plan = budgeted(60_000)
    svi = SVI(regression, AutoNormal(regression), optax.adam(1e-3), RAD_ELBO(plan=plan.to_dict()))
    again = svi.loss.plan_of_update(svi, svi.init(jax.random.key(0), *DATA), *DATA)[0]
    assert again.graph.slices == plan.graph.slices and again.stored_bytes == plan.stored_bytes


@pytest.mark.slow
@pytest.mark.usefixtures("of_themselves")
def test_a_run_whose_budget_is_met_by_slices_measures_no_codes():
    svi = RAD_SVI(regression, AutoNormal(regression), optax.sgd(1e-4), RAD_ELBO(memory_budget=60_000), tracking=None)
    result = svi.run(jax.random.key(0), 5, *DATA, progress_bar=False)
    assert svi.loss.planner.calibration is None and result.record.plan.stored_bytes < 60_000
    np.testing.assert_allclose(result.losses[0], step(Trace_ELBO())[2].run(jax.random.key(0), 1, *DATA).losses[0], 1e-5)
    assert any(row.decision.endswith("slices") for row in result.record.plan.rows)


def test_explain_says_so():
    svi = step(RAD_ELBO(exact=True, slices=8))[2]
    text = str(explain(svi, svi.init(jax.random.key(0), *DATA), *DATA))
    assert "axis of 256" in text and "in 8 slices" in text and "test_slices.py:" in text


def test_explain_says_what_runs_again():
    shown = explain(rad(kernel_of_features, exact=True, slices=3), jax.random.key(0), W, V, B, argnums=(0, 1, 2))
    assert "once more on the way back" in str(shown)
    assert "slices" in {row.operation for row in shown.rows}
    assert not any(name.startswith("slices") for name in shown.defaults)


def test_options_are_checked():
    with pytest.raises(TypeError, match="a number of slices is expected"):
        RAD_ELBO(slices=2.5)
    with pytest.raises(ValueError, match="at least 1 slice"):
        RAD_ELBO(slices=0)
    with pytest.raises(ValueError, match="exclude each other"):
        RAD_ELBO(plan={}, slices=2)


def test_signatures_of_all_that_is_cheap():
    """Whatever may be computed again is either known here or mixes: nothing in between."""
    unknown = {"empty", "scatter", "random_seed"}
    assert {n for n in primitives.names(lambda t: t.cheap) if axes.rule_of(n) is None} <= unknown
