"""What is known of primitives: the registry, its safe default, and primitives of a user's own."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core as jex_core
from jax.interpreters import ad, batching, mlir
from programs import normal

from numpyro_rad import Keep, explain, rad
from numpyro_rad.ad import axes, primitives
from numpyro_rad.ad.primitives import UNKNOWN, Traits, elementwise, names, of, register
from numpyro_rad.ad.work import Entries
from numpyro_rad.planning.costs import CPU

pytestmark = pytest.mark.in_one_go

KEY = jax.random.key(0)
X, W = normal(64, 32), normal(32, 32, seed=1)


@pytest.fixture
def own():
    """``x / (1 + |x|)``, a primitive of a user's own, whose derivative is made of JAX's; forgotten after the test."""
    softsign = jex_core.Primitive("users_softsign")

    def value(x):
        return x / (1 + jnp.abs(x))

    softsign.def_impl(value)
    softsign.def_abstract_eval(lambda x: x)
    mlir.register_lowering(softsign, mlir.lower_fun(value, multiple_results=False))
    batching.primitive_batchers[softsign] = lambda operands, axes: (softsign.bind(*operands), axes[0])
    ad.defjvp(softsign, lambda t, x: t * (1 - jnp.abs(softsign.bind(x))) ** 2)
    yield softsign
    primitives._REGISTRY.pop(softsign.name, None)


def network_of(primitive):
    def network(w, x):
        return jnp.sin(primitive.bind(x @ w) @ w).sum()

    return network


def decisions(f):
    """What becomes of the residuals of an exact plan, and which steps it makes again."""
    plan = rad(f, codec=Keep()).planned((W, X), {}, 0)[0]
    kept = {plan.graph.producer[v].name for v in plan.kept if v in plan.graph.producer}
    equations = [e for e in plan.graph.equations if e.name == "users_softsign"]
    return kept, all(e.cheap for e in equations), plan


def test_a_primitive_is_computed_again_once_it_is_registered(own):
    f = network_of(own)
    kept, cheap, before = decisions(f)
    assert "users_softsign" in kept and not cheap
    register(own, elementwise())
    kept, cheap, after = decisions(f)
    assert "users_softsign" not in kept and cheap
    assert after.stored_bytes < before.stored_bytes
    assert {r.decision for r in explain(rad(f, codec=Keep()), KEY, W, X).rows} >= {"keep", "recompute"}


def test_gradients_are_the_same_before_and_after(own):
    f = network_of(own)
    expected = jax.jit(jax.grad(f))(W, X)
    before = jax.jit(jax.grad(rad(f, codec=Keep()), 1))(KEY, W, X)
    register(own, elementwise("power"))
    after = jax.jit(jax.grad(rad(f, codec=Keep()), 1))(KEY, W, X)
    for found in (before, after):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_registered_primitive_has_a_price_and_axes(own):
    (equation,) = jax.make_jaxpr(own.bind)(X).eqns
    assert axes.signature(equation) == ([(None, None)], [(None, None)])  # what is not known mixes what it reads
    register(own, elementwise("gamma"))
    assert axes.signature(equation) == ([(0, 1)], [(0, 1)])
    assert primitives.work(equation) == Entries(X.size, "gamma")
    assert CPU.nanoseconds(primitives.work(equation)) == X.size * CPU.entry["gamma"]


def test_what_is_not_known_is_kept_exactly():
    assert of("nobody_has_heard_of_it") is UNKNOWN == Traits()
    assert not (UNKNOWN.cheap or UNKNOWN.rearranges or UNKNOWN.bilinear or UNKNOWN.structural or UNKNOWN.coefficient)


def test_registering_twice_is_fine_and_changing_is_not(own):
    register(own, elementwise())
    register("users_softsign", elementwise())
    with pytest.raises(ValueError, match=r"something else is known of 'users_softsign' already: Traits\(cheap=True"):
        register(own, elementwise("power"))
    with pytest.raises(ValueError, match="something else is known of 'dot_general' already"):
        register("dot_general", elementwise())
    with pytest.raises(ValueError, match="only scan and cond are split, and loop is neither"):
        register("loop", Traits(splits=True))


def test_mistakes_are_told():
    with pytest.raises(TypeError, match="register: 3 is neither a primitive of JAX nor the name of one"):
        register(3, elementwise())
    with pytest.raises(TypeError, match=r"the function elementwise does not say what is known of 'p'.*elementwise\(\)"):
        register("p", elementwise)
    with pytest.raises(ValueError, match="cost='cheap' is none of simple, "):
        elementwise("cheap")
    with pytest.raises(ValueError, match="splits and cheap exclude each other"):
        Traits(splits=True, cheap=True)
    with pytest.raises(ValueError, match="bilinear and structural exclude each other"):
        Traits(bilinear=True, structural=True)
    assert "p" not in primitives._REGISTRY


# What holds of JAX's own


def test_no_primitive_has_two_lines():
    found = [name for _, line in primitives._LINES for name in line.split()]
    assert sorted(found) == sorted(set(found)) == sorted(names(lambda traits: True))


OF_OTHER_VERSIONS = {"betainc", "closed_call", "one_minus_square", "random_gamma_grad"}


def test_every_name_is_one_of_jax():
    """A name that is misspelt would never be asked for."""
    installed = {o.name for o in gc.get_objects() if isinstance(o, jex_core.Primitive)}
    strangers = names(lambda traits: True) - installed
    assert strangers <= OF_OTHER_VERSIONS, sorted(strangers - OF_OTHER_VERSIONS)


@pytest.mark.parametrize(
    ("trait", "some", "others"),
    [
        ("cheap", "add tanh gather reduce_sum random_bits", "dot_general sort cholesky igamma while scan"),
        ("rearranges", "reshape gather random_split convert_element_type", "add reduce_sum cumsum scatter-add"),
        ("draws_bits", "random_bits threefry2x32", "random_split random_seed"),
        ("bilinear", "mul dot_general conv_general_dilated", "div triangular_solve add"),
        ("structural", "reduce_sum cumsum scatter-add transpose", "mul reduce_max dot_general"),
        ("coefficient", "mul div select_n neg add add_any sub copy", "tanh reduce_sum convert_element_type"),
        ("sums", "select_n neg add add_any sub copy", "mul div exp"),
        ("passes_estimate", "reshape transpose broadcast_in_dim squeeze rev copy convert_element_type", "slice neg"),
        ("splits", "scan cond", "while jit"),
        ("calls", "jit custom_jvp_call custom_vjp_call", "scan while cond"),
    ],
)
def test_traits(trait, some, others):
    assert all(getattr(of(name), trait) for name in some.split())
    assert not any(getattr(of(name), trait) for name in others.split())


def test_calls_are_what_their_bodies_are():
    def equation(f):
        return jax.make_jaxpr(jax.jit(f))(X).eqns[0]

    assert primitives.is_cheap(equation(lambda x: jnp.tanh(x).sum()))
    assert not primitives.is_cheap(equation(lambda x: jnp.tanh(x @ W)))
    assert primitives.is_rearrangement(equation(lambda x: x.T[:2].reshape(-1)))
    assert not primitives.is_rearrangement(equation(jnp.tanh))
    assert primitives.draws_bits(equation(lambda x: x + jax.random.normal(KEY, x.shape)))
    assert not primitives.draws_bits(equation(jnp.tanh))


SMALL = np.random.default_rng(0).uniform(0.5, 1.5, (6, 4)).astype(np.float32)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: jnp.dot(x, SMALL.T),
        lambda x: lax.cumsum(x, 0),
        lambda x: lax.slice_in_dim(x, 1, 3),
        lambda x: lax.broadcast_in_dim(x, (5, 6, 4), (1, 2)),
        lambda x: x.sum(0),
        jnp.tanh,
        jnp.transpose,
        lambda x: lax.conv(x[None, None], SMALL[None, None, :3, :2], (1, 1), "VALID"),
    ],
    ids="dot cumsum slice broadcast sum tanh transpose conv".split(),
)
def test_entries_of_jacobians(f):
    """Counted in the matrix itself."""
    equation = jax.make_jaxpr(f)(SMALL).eqns[-1]
    assert primitives.jacobian_entries(equation, 0) == np.count_nonzero(jax.jacobian(f)(SMALL))
