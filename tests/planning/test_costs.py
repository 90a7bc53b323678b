"""What work costs: the table of each kind of device, and plans that follow their prices."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from programs import normal

from numpyro_rad import RAD_ELBO, Keep, StochasticRound, explain, rad
from numpyro_rad.ad import _jax, primitives
from numpyro_rad.ad.work import NOTHING, Entries, Multiplications, OneOf, Together
from numpyro_rad.planning import Planner, costs
from numpyro_rad.planning.costs import A100, B200, CPU, H100, H200, V5E, V6E, for_device

pytestmark = pytest.mark.in_one_go

X, W = normal(64, 32), normal(32, 32, seed=1)
TABLES = [CPU, A100, H100, H200, B200, V5E, V6E]


def network(w, x):
    for _ in range(3):
        x = jax.nn.gelu(x @ w)
    return jnp.square(x).sum()


# The table of a device


@pytest.mark.parametrize(
    ("platform", "kind", "table"),
    [
        ("cpu", "cpu", CPU),
        ("gpu", "NVIDIA A100-SXM4-40GB", A100),
        ("gpu", "NVIDIA H100 80GB HBM3", H100),
        ("cuda", "NVIDIA H200", H200),
        ("gpu", "NVIDIA B200", B200),
        ("gpu", "NVIDIA GeForce RTX 4090", A100),
        ("rocm", "AMD Instinct MI300X", A100),
        ("tpu", "TPU v5 lite", V5E),
        ("tpu", "TPU v6 lite", V6E),
        ("tpu", "TPU v4", V5E),
        ("metal", "Apple M3", CPU),
    ],
)
def test_each_device_has_its_table(platform, kind, table):
    assert for_device(platform, kind) is table


def test_the_default_device_chooses():
    assert costs.default() == Planner().prices
    assert costs.default().name == CPU.name
    with jax.default_device(jax.devices("cpu")[0]):
        assert costs.default().name == CPU.name
    assert Planner(costs=H100).prices is H100


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_tables_are_sane(table):
    """Every price is a positive time; what is more work costs no less."""
    numbers = [getattr(table, f.name) for f in dataclasses.fields(table) if f.name.endswith(("_byte", "_start"))]
    prices = [*table.entry.values(), *table.product.values(), table.code_per_entry]
    assert all(0 < price < math.inf for price in prices) and all(0 <= price < math.inf for price in numbers)
    by_arithmetic = [table.entry[k] for k in ("simple", "ordinary", "trigonometric", "power", "random", "series")]
    assert by_arithmetic == sorted(by_arithmetic)
    assert table.offload_per_byte > table.keep_per_byte
    assert table.product.get("bfloat16", 0) <= table.product["float32"]


def test_predictions_say_so():
    assert all("predicted" in t.name and "measured" not in t.name for t in TABLES[1:]) and "measured" in CPU.name


def test_data_sheets_are_read_right():
    """Peak numbers, computed in another way: bytes and operations per second."""
    assert 2e9 / H100.keep_per_byte == pytest.approx(3.35e12)
    assert 2e9 / H100.product["bfloat16"] == pytest.approx(1979e12 / 2, rel=1e-3)
    assert 2e9 / A100.product["float32"] == pytest.approx(156e12)
    assert 1e9 * 2 / A100.entry["simple"] == pytest.approx(19.5e12)
    assert 2e9 / V5E.product["bfloat16"] == pytest.approx(197e12)
    assert 2e9 / V6E.product["bfloat16"] == pytest.approx(918e12)
    assert 2e9 / B200.product["bfloat16"] == pytest.approx(2250e12)
    assert (
        B200.keep_per_byte
        < H200.keep_per_byte
        < H100.keep_per_byte
        < A100.keep_per_byte
        < V5E.keep_per_byte
        < CPU.keep_per_byte
    )


def test_the_local_compiler_is_not_asked_for_another_device(monkeypatch):
    """It would answer for the wrong one."""
    asked = []
    monkeypatch.setattr(_jax, "temporary_bytes", lambda *args: asked.append(args))
    for table in TABLES:
        stored(table, memory_budget=20_000)
        assert bool(asked) == (table is CPU)
        asked.clear()


def test_memory_of_a_host_belongs_to_the_device_that_is_compiled_for():
    assert [_jax.has_host_memory(table.platform) for table in TABLES] == [False] + [True] * (len(TABLES) - 1)


def test_a_table_without_a_price_is_refused():
    entry = {kind: price for kind, price in CPU.entry.items() if kind != "gamma"}
    with pytest.raises(ValueError, match="no price of gamma"):
        dataclasses.replace(CPU, entry=entry)
    with pytest.raises(ValueError, match="no price of float32"):
        dataclasses.replace(CPU, product={"bfloat16": 1.0})


@pytest.mark.parametrize("make", [Planner, RAD_ELBO, lambda **options: rad(network, **options)])
def test_costs_are_a_cost_model(make):
    make(costs=H100)
    with pytest.raises(TypeError, match=r"costs='H100' is not a CostModel. Pass one of"):
        make(costs="H100")


# Work and its price


def test_work_adds_up():
    once = Together((Entries(100, "simple"), Multiplications(10, "float32")))
    expected = 100 * CPU.entry["simple"] + 10 * CPU.small_product
    assert CPU.nanoseconds(once) == expected
    assert CPU.nanoseconds(Together((once, once), 7)) == pytest.approx(14 * expected)
    assert CPU.nanoseconds(OneOf((NOTHING, once, Entries(1, "simple")))) == expected
    assert CPU.nanoseconds(NOTHING) == 0


def test_products_are_priced_by_their_dtype():
    half, single, strange = (H100.nanoseconds(Multiplications(1e9, d)) for d in ("bfloat16", "float32", "int8"))
    assert half < single == strange
    large, small = (
        CPU.nanoseconds(Multiplications(1e7, "float32")),
        CPU.nanoseconds(Multiplications(1e7 - 1, "float32")),
    )
    assert large < small


V, S = np.ones((10, 50), np.float32), np.eye(20, dtype=np.float32)
LEFT, RIGHT = np.ones((300, 400), np.float32), np.ones((400, 300), np.float32)

EXPECTED = {  # function, operands, nanoseconds on two CPU cores as they were measured: number of operations times price
    "add": (jnp.add, (V, V), 500 * 0.05),
    "exp": (jnp.exp, (V,), 500 * 0.3),
    "div": (lax.div, (V, V), 500 * 0.3),
    "sin": (jnp.sin, (V,), 500 * 1.0),
    "atan2": (lax.atan2, (V, V), 500 * 2.0),
    "lgamma": (lax.lgamma, (V,), 500 * 10.0),
    "bessel_i0e": (lax.bessel_i0e, (V,), 500 * 8.0),
    "igamma": (lax.igamma, (V, V), 500 * 200.0),
    "cumsum": (lax.cumsum, (V,), 500 * 1.0),
    "reduce_sum": (lambda v: v.sum(0), (V,), 500 * 0.3),
    "sort": (lax.sort, (V,), 500 * 50.0),
    "random_bits": (lambda key: jax.random.bits(key, (300,)), (jax.random.key(0),), 300 * 12.0),
    "dot_general": (lax.dot, (V, V.T), 10 * 10 * 50 * 0.015),
    "dot_general, large": (lax.dot, (LEFT, RIGHT), 300 * 400 * 300 * 0.008),
    "cholesky": (lax.linalg.cholesky, (S,), 4 * 20**3 * 0.015),
    "scan": (
        lambda v: lax.scan(lambda c, x: (c * x, jnp.sin(c)), jnp.ones(50), v),
        (V,),
        10 * (50 * 0.05 + 50 * 1.0),
    ),
    "cond": (lambda v: lax.cond(v[0, 0] > 0, jnp.exp, lambda v: v + v, v), (V,), 500 * 0.3),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_prices_of_a_cpu(name):
    f, operands, nanoseconds = EXPECTED[name]
    name = name.partition(",")[0]
    (equation,) = [e for e in _equations(jax.make_jaxpr(f)(*operands)) if e.primitive.name == name]
    assert CPU.nanoseconds(primitives.work(equation)) == pytest.approx(nanoseconds, rel=1e-12)


def _equations(jaxpr):
    """Equations of a program, those of ``jit`` opened."""
    for equation in jaxpr.jaxpr.eqns:
        yield from _equations(equation.params["jaxpr"]) if equation.primitive.name == "jit" else [equation]


# Plans follow prices

BANDWIDTH_IS_SCARCE = dataclasses.replace(CPU, name="slow memory", keep_per_byte=100.0, least_encoded_bytes=0)
COMPUTE_IS_SCARCE = dataclasses.replace(
    CPU,
    name="slow arithmetic",
    entry={kind: 1000 * price for kind, price in CPU.entry.items()},
    keep_per_byte=1e-3,
    code_per_entry=1300.0,
    least_encoded_bytes=0,
)


def stored(model, **options):
    plan = rad(network, costs=model, **options).planned((W, X), {}, 0)[0]
    kept = sum(plan.kept_bytes(v) for v in plan.kept)
    return kept, len(plan.encoded), plan


def test_scarce_bandwidth_computes_again_and_scarce_arithmetic_stores():
    """Without codes: what is kept where memory is slow is a part of what is kept where arithmetic is."""
    few, _, plan = stored(BANDWIDTH_IS_SCARCE, exact=True, memory_budget="1MiB")
    many, _, other = stored(COMPUTE_IS_SCARCE, exact=True, memory_budget="1MiB")
    assert few < many
    assert plan.predicted.added_seconds < 0.05 and other.predicted.added_seconds < 0.05  # each is good where it belongs


def test_codes_are_for_devices_with_arithmetic_to_spare():
    """In the same budget, codes take the place of exact values where a byte is dear and an operation is cheap."""
    exact = rad(network, codec=Keep()).planned((W, X), {}, 0)[0].stored_bytes
    budget = exact + 10_000
    free_starts = {"code_start": 0.0, "keep_start": 0.0, "most_slices": 1}  # slices would need neither
    with_codes = dataclasses.replace(BANDWIDTH_IS_SCARCE, **free_starts)
    without = dataclasses.replace(COMPUTE_IS_SCARCE, **free_starts)
    _, many, _ = stored(with_codes, memory_budget=budget, objective="time")
    _, few, _ = stored(without, memory_budget=budget, objective="time")
    assert many > few


def test_the_table_says_whose_prices_it_used():
    shown = explain(rad(network, costs=H100, codec=Keep()), jax.random.key(0), W, X)
    assert shown.priced_for == H100.name
    assert "Priced for: H100, predicted from its data sheet." in str(shown) and "Priced for" in shown.table()
    assert "Priced for: two CPU cores, measured." in str(explain(rad(network, codec=Keep()), jax.random.key(0), W, X))


def test_a_cost_model_is_short_in_words():
    assert repr(RAD_ELBO(costs=H100)) == "RAD_ELBO(costs=CostModel(name='H100, predicted from its data sheet'))"


def test_plans_for_a_tpu_have_groups_of_whole_rows():
    """Parts of a row do not fit its tiles; a codec that was asked for is taken as it is."""
    x, w, v = normal(512, 512), normal(512, 512), normal(512, 1000)

    def coded(**options):
        plan = rad(lambda x: jnp.sin(jnp.sin(x @ w) @ v).sum(), slices=1, **options).planned((x,), {}, 0)[0]
        return {(value.aval.shape[-1], encoded.codec.group) for value, encoded in plan.encoded.items()}

    budget = x.nbytes // 4
    for_tpu, here = coded(memory_budget=budget, costs=costs.V5E), coded(memory_budget=budget)
    assert for_tpu and all(group == row for row, group in for_tpu)
    assert here and not all(group == row for row, group in here)
    assert {group for _, group in coded(codec=StochasticRound(bits=4), costs=costs.V5E)} == {256}
