"""What every test shares: where the data files are, double precision, small residuals that count."""

import dataclasses
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

# Most of the time of the tests goes to the compiler, and they do not measure time: machine code need not be polished.
# What is allocated, fused and shared is decided before and stays as it is.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import jax
import pytest

import numpyro_rad.ad.schedule
from numpyro_rad.planning import Planner, costs, strategies
from numpyro_rad.planning.costs import CostModel


def of_tests(of_the_device: Callable[[], CostModel] = costs.default) -> CostModel:
    """Prices as they are, but for small models that stand for large ones: these are not left to JAX however long a plan
    takes, and their budgets are met by codes, recomputation and segments. Slices have tests of their own."""
    return dataclasses.replace(of_the_device(), untouched_bytes=0, most_slices=1, most_added_time=math.inf)


costs.default = of_tests


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--data-dir",
        default=os.environ.get("NUMPYRO_RAD_DATA"),
        help="folder with the data files (default: the environment variable NUMPYRO_RAD_DATA); "
        "tests that need a file skip without it",
    )
    parser.addoption(
        "--slices",
        type=int,
        help="run whatever can be run in slices in so many, unless a test says otherwise or is marked in_one_go",
    )
    parser.addoption(
        "--every-version",
        action="store_true",
        help="with JAX before 0.11, run all tests rather than those that depend on versions",
    )


# With the oldest versions, those tests run whose subject is where versions differ: JAX's programs and its compiler,
# keys, effects and source lines, NumPyro's objects, files of ArviZ and Orbax, warnings. Plans, prices, statistics,
# records, reports, messages and the loop of a run are our own: the newest versions try them.
DEPENDS_ON_VERSIONS = frozenset(
    """archive bases checkpoints effects elbo exactness invariants lines modules primitives structure transformed
    untouched warnings""".split()
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out exhaustive tests unless they are asked for, and with old versions what does not depend on them, unless
    files or all tests are asked for: of a folder those tests run that would run of the whole."""
    if "exhaustive" not in config.option.markexpr:  # it may be one case of a slow test
        _keep(config, items, [item for item in items if item.get_closest_marker("exhaustive") is None])
    whole = all(Path(arg).is_dir() for arg in config.args)
    if jax.__version_info__ >= (0, 11) or config.getoption("--every-version") or not whole:
        return
    kept = [item for item in items if item.path.stem.removeprefix("test_") in DEPENDS_ON_VERSIONS]
    _keep(config, items, kept)


def _keep(config: pytest.Config, items: list[pytest.Item], kept: list[pytest.Item]) -> None:
    config.hook.pytest_deselected(items=list(set(items) - set(kept)))
    items[:] = kept


@pytest.fixture
def data_dir(request: pytest.FixtureRequest) -> Path:
    """The folder with the data files; a test that asks for it is skipped where there is none."""
    folder = request.config.getoption("--data-dir")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs data files: pass --data-dir or set NUMPYRO_RAD_DATA")
    return Path(folder)


@pytest.fixture
def ctrl_c():
    """Ctrl-C raises, also where the tests were started in the background and ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def in_slices(request, monkeypatch):
    """Slices wherever a program can be cut, with ``--slices``."""
    number, way = request.config.getoption("--slices"), Planner._way

    def forced(planner, *args):
        exact = planner.codec is None or planner.codec.exact
        free = exact and planner.slices is None and planner.plan is None and planner.added_variance is None
        return way(dataclasses.replace(planner, slices=number) if free else planner, *args)

    if number is not None and request.node.get_closest_marker("in_one_go") is None:
        monkeypatch.setattr(Planner, "_way", forced)


@pytest.fixture(autouse=True)
def as_users_see_it(request):
    """Tests that are marked ``untouched`` see what users of small models see."""
    if request.node.get_closest_marker("untouched") is not None:
        request.getfixturevalue("priced")(untouched_bytes=CostModel.untouched_bytes)


@pytest.fixture
def double():
    """Double precision for a test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def ordered(monkeypatch):
    """Barriers order small bodies of loops as they do large ones."""
    monkeypatch.setattr(numpyro_rad.ad.schedule, "ORDERED_FROM", 0)


@pytest.fixture
def priced(monkeypatch):
    """Changes prices for the whole test, also where a test hands in none: ``priced(least_encoded_bytes=0)``.

    This is the one place where tests reach into prices; what a single plan is priced by is handed in as ``costs=``.
    """

    def change(**fields):
        model = dataclasses.replace(costs.default(), **fields)
        monkeypatch.setattr(costs, "default", lambda: model)
        return model

    return change


@pytest.fixture
def no_residual_is_too_small(priced):
    """Small programs are compared quickly, so that even their residuals have to be encoded."""
    priced(least_encoded_bytes=0)


@pytest.fixture
def few_codecs(monkeypatch):
    """Calibrations compile in a fraction of the time, where it does not matter which codecs there are."""
    monkeypatch.setattr(strategies, "LADDER", strategies.LADDER[:2])
    monkeypatch.setattr(strategies, "MEASURED", ())


FREE_STARTS = {"least_encoded_bytes": 0, "keep_start": 0.0, "code_start": 0.0, "make_start": 0.0}


@pytest.fixture
def encode_all(priced, ordered):
    """Residuals of small models are encoded as well, whatever time that takes; the prices."""
    return priced(**FREE_STARTS, code_per_entry=0.0)


@pytest.fixture
def arrays_of_any_size_count(priced):
    """Small arrays are coded, and what it takes to start a kernel does not outweigh their bytes; the prices."""
    return priced(**FREE_STARTS)
