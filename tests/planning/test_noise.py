"""How errors of codes multiply on their way to the gradient."""

import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from programs import few, normal

from numpyro_rad import Keep, rad
from numpyro_rad.planning.noise import CodeNoise, EqualShares, ErrorPropagation

pytestmark = [pytest.mark.in_one_go, pytest.mark.usefixtures("encode_all")]


class Known:
    """A model in which residuals have the mean squares that one gives them, one where none is given."""

    knows_energies = True

    def __init__(self, squares=None):
        self.squares = squares or {}

    def alone(self, path, value, codec):
        return 1.0

    def relative(self, path, value, codec):
        return codec.relative_variance(value.aval.shape)

    def mean_square(self, path):
        return self.squares.get(path, 1.0)

    def reach(self, position):
        return 1.0


def graph_and_paths(f, *args):
    """The graph of a program and the paths of what may be coded in it, in the order of the backward sweep."""
    plan, _ = rad(f, codec=Keep()).planned(args, {}, 0)
    order = {
        (*p.path, p.carrier[r].number): None
        for p in plan.walk()
        for e in reversed(p.graph.edges)
        for r, linear in zip(e.residuals, e.linear, strict=True)
        if linear
    }
    return plan.graph, list(order)


def codes_of(paths, relative, alone=1.0):
    """A code for each path, from one number or one for each."""
    relative, alone = (np.broadcast_to(a, len(paths)).tolist() for a in (relative, alone))
    return {path: CodeNoise(a, v) for path, a, v in zip(paths, alone, relative, strict=True)}


X = normal(16, 8)


LINEAR = {
    "product": lambda x: x @ normal(8, 5),
    "batched product": lambda x: jnp.einsum("bi,bij->bj", x, normal(16, 8, 3)),
    "convolution": lambda x: lax.conv(x[None, None], normal(1, 1, 1, 1), (1, 1), "SAME"),
    "broadcast": lambda x: jnp.broadcast_to(x, (3, 16, 8)),
    "sum": lambda x: x.sum(0),
    "slice": lambda x: x[2:5],
    "gather": lambda x: x[jnp.array([3, 3, 1])],
    "pad": lambda x: jnp.pad(x, 2),
    "concatenation": lambda x: jnp.concatenate([x, jnp.ones((2, 8))]),
    "transposition": jnp.transpose,
    "cumulative sum": lambda x: jnp.cumsum(x, 0),
}


@pytest.mark.parametrize("name", few(LINEAR, *list(LINEAR)[::2], slow=3))
def test_entries_of_jacobians(name):
    """The last step of each program is the one that is named; those before it only rearrange."""
    f = LINEAR[name]
    plan, _ = rad(lambda x: (f(x) * 2.0).sum(), codec=Keep()).planned((X,), {}, 0)
    known = [e.entries[0] for e in plan.graph.edges if e.entries]
    assert np.count_nonzero(jax.jacobian(f)(X)) in known


def chain(x, *weights):
    for w in weights:
        x = x @ w
    return x.sum()


WEIGHTS = tuple(normal(8, 8, seed=i) for i in range(4))


def test_a_chain():
    """Behind the i-th residual come those nearer to x: A_i is the product of their 1 + v, whatever the energies are."""
    graph, paths = graph_and_paths(chain, X, *WEIGHTS)
    assert len(paths) == 4
    v, c = np.array([0.1, 3.0, 0.5, 2.0]), np.array([1.0, 0.2, 5.0, 0.1])
    expected = np.append(np.cumprod(1 + v[::-1])[::-1][1:], 1.0)
    found = ErrorPropagation(graph, Known(dict(zip(paths, (0.3, 7.0, 2.0, 0.1), strict=True)))).effects(
        codes_of(paths, v, c)
    )
    assert [found.amplified[p] for p in paths] == pytest.approx(expected)
    assert found.total == pytest.approx((c * expected).sum())
    assert found.arriving[paths[0]] == 0  # nothing comes before it
    # of what the first two make, all that reaches the third, with what follows
    assert found.arriving[paths[2]] == pytest.approx((c[0] * (1 + v[1]) + c[1]) * (1 + v[3]))


def test_what_the_codes_of_a_chain_add_in_all():
    """Products of independent matrices: the energy of the product of r + e is that of r times the product of 1 + v."""
    graph, paths = graph_and_paths(chain, X, *WEIGHTS)
    v = np.array([0.4, 1.0, 0.2, 2.0])
    alone = v  # what each adds to a gradient of norm one
    total = ErrorPropagation(graph, Known()).effects(codes_of(paths, v, alone)).total
    assert total == pytest.approx(np.prod(1 + v) - 1)
    draws = np.random.default_rng(0)
    norms = []
    for _ in range(400):
        row = np.ones((1, 32)) / 32**0.5
        for variance in v:
            exact = draws.standard_normal((32, 32)) / 32**0.5
            row = row @ (exact + draws.standard_normal((32, 32)) * variance**0.5 / 32**0.5)
        norms.append((row**2).sum())
    error = np.std(norms) / len(norms) ** 0.5
    assert abs(np.mean(norms) - 1 - total) < 4 * error < 0.5 * total
    assert abs(np.mean(norms) - 1 - alone.sum()) > 4 * error  # to first order


def skip(x, a, b, c):
    return (x @ a + x @ b @ c).sum()


def test_an_error_multiplies_on_its_own_way_only():
    graph, paths = graph_and_paths(skip, X, *WEIGHTS[:3])
    found = ErrorPropagation(graph, Known()).effects(codes_of(paths, 1.0))
    assert sorted(found.amplified.values()) == pytest.approx([1.0, 1.0, 2.0])
    assert sorted(found.arriving.values()) == pytest.approx([0.0, 0.0, 1.0])


def shared(x, a, b):
    """What b makes goes two ways, with and without a code."""
    y = x @ a
    return ((y + x) @ b).sum()


@pytest.mark.parametrize("square", [0.5, 1 / 8, 0.01])
def test_shares_of_two_ways(square):
    """A unit of error in the cotangent of y + x reaches x directly, and 8 mean squares of it through a."""
    graph, (b, a) = graph_and_paths(shared, X, *WEIGHTS[:2])
    found = ErrorPropagation(graph, Known({a: square})).effects({a: CodeNoise(0.0, 3.0), b: CodeNoise(1.0, 0.0)})
    through = 8 * square
    assert found.amplified[b] == pytest.approx((1 + 4 * through) / (1 + through))
    assert found.arriving[a] == pytest.approx(through / (1 + through))
    equal = ErrorPropagation(graph, EqualShares(graph)).effects({a: CodeNoise(0.0, 3.0), b: CodeNoise(1.0, 0.0)})
    assert equal.amplified[b] == pytest.approx((1 + 4) / 2)


def loop(x, scales):
    def step(h, scale):
        return h * scale, None

    return lax.scan(step, x, scales)[0].sum()


@pytest.mark.parametrize("length", [1, 5, 1000])
def test_a_loop(length):
    """What is made k iterations from the end of the sweep is multiplied k times."""
    graph, (path,) = graph_and_paths(loop, X, normal(length, 16, 8))
    v = 1e-3
    found = ErrorPropagation(graph, Known()).effects({path: CodeNoise(1.0, v)})
    assert found.total == pytest.approx(((1 + v) ** length - 1) / (length * v))
    contracting = ErrorPropagation(graph, Known({path: 0.5})).effects({path: CodeNoise(1.0, v)})
    assert contracting.total < found.total or length == 1


def test_a_loop_that_explodes_says_nothing():
    """A mean gain above one, to the power of the iterations, is no prediction: only what codes add to it counts."""
    graph, (path,) = graph_and_paths(loop, X, normal(4000, 16, 8))
    found = ErrorPropagation(graph, Known({path: 4.0})).effects({path: CodeNoise(1.0, 1e-4)})
    assert found.total == pytest.approx((1.0001**4000 - 1) / 0.4)
    assert np.isfinite(ErrorPropagation(graph, Known()).effects({path: CodeNoise(1.0, 1.0)}).total)


@pytest.mark.parametrize("square", [1e30, 1e-30, np.inf, np.nan, 0.0])
@pytest.mark.parametrize("f", [loop, chain])
def test_numbers_out_of_range(f, square):
    """A plan is found whatever the residuals are like."""
    graph, paths = graph_and_paths(f, X, *((normal(4000, 16, 8),) if f is loop else WEIGHTS * 6))
    propagation = ErrorPropagation(graph, Known(dict.fromkeys(paths, square)))
    found = propagation.effects(codes_of(paths, 100.0))
    for numbers in ([found.total], found.amplified.values(), found.arriving.values()):
        assert np.isfinite(list(numbers)).all()
    between = found.towards(propagation.effects(codes_of(paths, 0.1)), 0.5)
    assert np.isfinite([*between.amplified.values(), *between.arriving.values()]).all()


def test_a_loop_that_never_runs():
    graph, (path,) = graph_and_paths(loop, X, normal(0, 16, 8))
    assert ErrorPropagation(graph, Known()).effects({path: CodeNoise(0.0, 1.0)}).total == 0


def nested(x, scales):
    def step(h, scales):
        return loop_of(h, scales), None

    def loop_of(h, scales):
        return lax.scan(lambda h, s: (h * s, None), h, scales)[0]

    return lax.scan(step, x, scales)[0].sum()


def test_loops_in_loops():
    graph, (path,) = graph_and_paths(nested, X, normal(6, 5, 16, 8))
    v = 0.01
    found = ErrorPropagation(graph, Known()).effects({path: CodeNoise(1.0, v)})
    assert found.total == pytest.approx(((1 + v) ** 30 - 1) / (30 * v))


def branches(x, a, b, c):
    return lax.cond(a[0, 0] > 0, lambda x: x @ a @ c, lambda x: x @ b, x).sum()


def test_branches():
    """Both count alike: which one is taken is not known."""
    graph, paths = graph_and_paths(branches, X, *WEIGHTS[:3])
    found = ErrorPropagation(graph, Known()).effects(codes_of(paths, 1.0))
    assert sorted(found.amplified.values()) == pytest.approx([1.0, 1.0, 2.0])


def mixed(x, scales, a, b):
    x = jnp.tanh(shared(x, a, b) + x @ jnp.sin(b))
    x = lax.cond(b[0, 0] > 0, lambda x: jnp.tanh(x @ jnp.sin(a)), jnp.cos, x)
    return (jnp.sin(x @ jnp.sin(b)) + x @ jnp.sin(a)).sum()


def test_one_code_changes_as_much_as_its_price_says():
    """The total is linear in each code; outside of loops its price is the slope."""
    graph, paths = graph_and_paths(mixed, X, normal(3, 16, 8), *WEIGHTS[:2])
    assert len(paths) >= 7
    draws = np.random.default_rng(3)
    propagation = ErrorPropagation(
        graph, Known({p: m for p, m in zip(paths, draws.uniform(0.05, 0.2, len(paths)), strict=True)})
    )
    codes = codes_of(paths, draws.uniform(0, 2, len(paths)), draws.uniform(0, 1, len(paths)))
    before = propagation.effects(codes)
    for path in paths:
        other = CodeNoise(*draws.uniform(0, 3, 2))
        after = propagation.effects({**codes, path: other})
        slope = before.change(path, other) - before.change(path, codes[path])
        assert after.total - before.total == pytest.approx(slope, rel=1e-9, abs=1e-9)


def test_in_loops_the_price_is_near():
    graph, (path,) = graph_and_paths(loop, X, normal(50, 16, 8))
    propagation = ErrorPropagation(graph, Known())
    before, after = (propagation.effects({path: CodeNoise(1.0, v)}) for v in (0.01, 0.0101))
    slope = (after.total - before.total) / 0.0001
    assert slope < before.arriving[path] < 2 * slope


def test_towards():
    graph, paths = graph_and_paths(chain, X, *WEIGHTS)
    propagation = ErrorPropagation(graph, Known())
    a, b = (propagation.effects(codes_of(paths, v)) for v in (0.1, 3.0))
    for weight, other in ((0.0, a), (1.0, b)):
        found = a.towards(b, weight)
        assert [found.amplified[p] for p in paths] == pytest.approx([other.amplified[p] for p in paths])
    half = a.towards(b, 0.5)
    for path, kind in itertools.product(paths[1:], ("amplified", "arriving")):
        of = [getattr(e, kind)[path] for e in (a, half, b)]
        assert of[1] ** 2 == pytest.approx(of[0] * of[2])


FINGERPRINT = """
import jax, numpyro, numpyro.distributions as dist, optax
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoNormal
from numpyro_rad import RAD_ELBO

def model():
    for name in "abcdefgh":
        numpyro.sample(name, dist.Normal(0.0, 1.0).expand([3]).to_event(1))

svi = SVI(model, AutoNormal(model), optax.adam(1e-2), RAD_ELBO())
state = svi.init(jax.random.key(0))
plan, _ = svi.loss.plan_of_update(svi, state)
print(plan.graph.fingerprint())
"""


@pytest.mark.slow
def test_programs_are_known_in_other_processes():
    """NumPyro adds up sites in the order of a set of names, which is another one with another seed of the hashes."""

    def of_process(seed):
        env = {**os.environ, "PYTHONHASHSEED": str(seed)}
        done = subprocess.run([sys.executable, "-c", FINGERPRINT], env=env, capture_output=True, text=True)
        return done.stdout.strip()

    known = {of_process(seed) for seed in (0, 1)}
    assert len(known) == 1 and len(known.pop()) == 16
