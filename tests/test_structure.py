"""The package keeps its shape: imports run one way, JAX's internals stay in one module, importing costs nothing.

Each rule is a function from a package folder to the sentences that say how it is broken, so that each can also be tried
on a small package that breaks it.
"""

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import numpyro_rad

PACKAGE = Path(numpyro_rad.__file__).parent

# From the bottom to the top. A module may import from the lines above its own, and nothing else of the package.
LAYERS = (
    ("annotations",),
    ("ad", "ad.seeds", "ad.layout", "ad.loops", "ad.work", "mistakes", "tables", "tracing", "wording"),
    ("fits",),
    ("ad._jax", "ad.codecs"),
    ("ad.primitives", "ad.convolutions", "ad.rounding", "ad.rotation", "ad.floating", "ad.sampling"),
    ("ad.graph", "ad.invariants", "ad.axes", "ad.tangents"),
    ("ad.coefficients", "ad.plan", "ad.bounds"),
    ("ad.edges", "ad.segments", "ad.recompute", "ad.schedule"),
    ("ad.elimination", "ad.control"),
    ("ad.sweep",),
    ("ad.linearize",),
    ("ad.parts",),
    ("ad.slices",),
    ("planning.solver", "planning.noise", "planning.costs"),
    ("planning.worth", "planning.readers", "planning.request", "planning.timing"),
    ("planning.problem",),
    ("planning.assembly",),
    ("planning.search",),
    ("planning.strategies",),
    ("planning.ways", "planning.calibration"),
    ("planning.planner",),
    ("planning.explain",),
    ("planning", "planning.figures"),
    ("transform", "subsampling"),
    ("tuning",),
    ("elbo",),
    ("diagnostics.records", "diagnostics.signal", "diagnostics.convergence", "diagnostics.plates"),
    ("diagnostics.variance", "diagnostics.quality", "diagnostics.draws"),
    ("diagnostics.posterior",),
    ("diagnostics.tracking",),
    ("diagnostics",),
    ("report.charts",),
    ("report.verdict", "report.archive", "report.parts"),
    ("report.noise",),
    ("report.sections",),
    ("report.document",),
    ("report",),
    ("training.batches", "training.checkpoints"),
    ("training.steps", "training.optimizers", "training.progress"),
    ("training.results",),
    ("training.fingerprint",),
    ("training.validation",),
    ("training.arguments",),
    ("training.advice", "training.loop"),
    ("training.svi",),
    ("training", "codecs", "errors"),
    ("__init__",),
    ("__main__",),
)
PUBLIC = ("numpyro_rad", *(f"numpyro_rad.{p}" for p in "codecs diagnostics errors planning report training".split()))

LEVEL = {module: level for level, line in enumerate(LAYERS) for module in line}

JAX_INTERNALS = ("jax._src", "jax.interpreters", "jax.extend", "jax.core")
MAY_USE_JAX_INTERNALS = {"ad._jax"}
MAY_IMPORT_NUMPYRO = {
    "fits",
    "elbo",
    "subsampling",
    "tuning",
    "diagnostics.variance",
    "diagnostics.plates",
    "diagnostics.quality",
    "diagnostics.draws",
    "diagnostics.posterior",
    "report.archive",
    "training.arguments",
    "training.advice",
    "training.results",
    "training.svi",
    "training.validation",
}


def modules(package: Path) -> Iterator[tuple[str, ast.Module]]:
    """Each module by its name below the package, and its syntax tree; a subpackage is the module of its __init__."""
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[1:] and parts[-1] == "__init__" else parts)
        yield name, ast.parse(file.read_text(encoding="utf-8"), str(file))


def imported_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Every dotted name that is imported anywhere in a module, and its line; relative imports keep their dots.

    ``from a import b`` gives ``a.b``: whether ``b`` is a module or something in one, the prefix tells what is needed.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            separator = "" if source.endswith(".") else "."
            yield from ((f"{source}{separator}{alias.name}", node.lineno) for alias in node.names)


def dotted_attributes(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Every chain such as ``jax.core.Tracer`` in a module, and its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node), node.lineno


def lies_in(name: str, *prefixes: str) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def module_of(name: str) -> str:
    """The module with a place in LAYERS that an imported name, dotted below the package, is or lies in."""
    while name and name not in LEVEL:
        name = name.rpartition(".")[0]
    return name or "__init__"


def upward_imports(package: Path) -> list[str]:
    """Imports within the package that do not go to a lower layer, and modules that have no layer."""
    broken = []
    for module, tree in modules(package):
        if module not in LEVEL:
            broken.append(f"{module} has no place in the order of imports: give it one in LAYERS of {__file__}")
            continue
        for name, line in imported_names(tree):
            if name.startswith("."):
                broken.append(f"{module}, line {line}: the relative import {name}; write the package's name")
            elif lies_in(name, package.name):
                target = module_of(name.removeprefix(package.name).removeprefix("."))
                if target != module and LEVEL[target] >= LEVEL[module]:
                    broken.append(f"{module}, line {line}: imports {target}, which is not below it")
    return broken


def stray_internals(package: Path) -> list[str]:
    """Uses of JAX's internals outside the one module that may know them."""
    return [
        f"{module}, line {line}: {name}; only ad._jax may use {', '.join(JAX_INTERNALS)}"
        for module, tree in modules(package)
        if module not in MAY_USE_JAX_INTERNALS
        for names in (imported_names, dotted_attributes)
        for name, line in names(tree)
        if lies_in(name, *JAX_INTERNALS)
    ]


def stray_numpyro(package: Path) -> list[str]:
    """Imports of NumPyro outside the modules that are about it."""
    return [
        f"{module}, line {line}: imports {name}; only {' and '.join(sorted(MAY_IMPORT_NUMPYRO))} may import numpyro"
        for module, tree in modules(package)
        if module not in MAY_IMPORT_NUMPYRO
        for name, line in imported_names(tree)
        if lies_in(name, "numpyro")
    ]


def import_side_effects(module: str, folder: Path) -> str:
    """What a fresh interpreter complains of when it imports a module: warnings, errors, JAX arrays left alive."""
    program = f"import {module}, jax; arrays = jax.live_arrays(); assert not arrays, f'arrays at import: {{arrays}}'"
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return result.stdout + result.stderr + ("" if result.returncode == 0 else f"exit status {result.returncode}")


def undocumented(module: ModuleType | SimpleNamespace) -> list[str]:
    """Public names that do not exist or have no docstring of their own (the one that a dataclass makes is none)."""
    broken = []
    for name in module.__all__:
        value = getattr(module, name, None)
        own = vars(value).get("__doc__") if isinstance(value, type) else inspect.getdoc(value)
        if value is None or not own or own.startswith(f"{name}("):
            broken.append(f"{name} is public and has no docstring")
    return broken


@pytest.mark.parametrize("rule", [upward_imports, stray_internals, stray_numpyro], ids=lambda rule: rule.__name__)
def test_imports(rule: Callable[[Path], list[str]]) -> None:
    assert rule(PACKAGE) == []


def test_import_is_silent_and_creates_no_array() -> None:
    assert import_side_effects("numpyro_rad", PACKAGE.parent) == ""


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_have_docstrings(name: str) -> None:
    assert undocumented(importlib.import_module(name)) == []


def test_the_front_door_is_narrow() -> None:
    assert len(numpyro_rad.__all__) <= 18
    for name in PUBLIC[1:]:  # what a package has too is the same there
        package = importlib.import_module(name)
        assert all(getattr(numpyro_rad, n) is getattr(package, n) for n in {*numpyro_rad.__all__} & {*package.__all__})


def test_the_page_about_the_house_knows_every_room() -> None:
    page = PACKAGE.parent / "docs" / "how_it_is_built.md"
    named = set(re.findall(r"\w+", page.read_text(encoding="utf-8")))
    rooms = {module.rpartition(".")[2] for module in LEVEL if module.partition(".")[0] in ("ad", "planning")}
    assert rooms - named == set()
    files = re.findall(r"`(\w+/\w+\.py|\w+\.py)`", page.read_text(encoding="utf-8"))
    assert len(files) > 8 and [f for f in files if not ((PACKAGE / f).exists() or (PACKAGE.parent / f).exists())] == []


def plant(folder: Path, files: dict[str, str]) -> Path:
    """Write a package ``small`` whose modules, by their dotted names, have the given text."""
    package = folder / "small"
    for name, text in {"__init__": "", **files}.items():
        file = package.joinpath(*name.split(".")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text), encoding="utf-8")
    return package


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"ad.graph": "from small.ad.plan import Plan"}, "ad.graph, line 1: imports ad.plan"),
        ({"ad.graph": "from small.ad import primitives, sweep"}, "ad.graph, line 1: imports ad.sweep"),
        ({"ad.graph": "import small.ad.plan"}, "ad.graph, line 1: imports ad.plan"),
        ({"ad.codecs": "from small.ad._jax import trace"}, "ad.codecs, line 1: imports ad._jax"),
        ({"ad.graph": "def late():\n    from small.ad.plan import Plan"}, "ad.graph, line 2: imports ad.plan"),
        ({"ad.sweep": "from small.planning import Planner"}, "ad.sweep, line 1: imports planning"),
        ({"elbo": "from small import make_plan"}, "elbo, line 1: imports __init__"),
        ({"elbo": "import small"}, "elbo, line 1: imports __init__"),
        ({"ad.plan": "from .graph import Graph"}, "ad.plan, line 1: the relative import .graph.Graph"),
        ({"ad.plan": "from . import graph"}, "ad.plan, line 1: the relative import .graph"),
        ({"report.__init__": "from small.training.svi import RAD_SVI"}, "report, line 1: imports training.svi"),
        ({"planning.planers": ""}, "planning.planers has no place"),
    ],
)
def test_upward_import_is_found(tmp_path: Path, files: dict[str, str], complaint: str) -> None:
    (found,) = upward_imports(plant(tmp_path, files))
    assert found.startswith(complaint)


def test_downward_imports_pass(tmp_path: Path) -> None:
    files = {
        "__init__": "from small.elbo import RAD_ELBO",
        "elbo": "import numpyro.infer\nfrom small.ad import codecs, graph\nimport small_relative.plan",
        "ad.plan": "from small.ad.primitives import of",
        "ad._jax": "from jax._src import core\nimport jax.core\njax.core.Tracer",
        "report.__init__": "from small.report.document import html",
        "report.document": "import small.report.charts",
        "__main__": "from small import report",
    }
    package = plant(tmp_path, files)
    assert upward_imports(package) == stray_internals(package) == stray_numpyro(package) == []


@pytest.mark.parametrize(
    "text",
    [
        "import jax._src.core",
        "from jax._src import core",
        "from jax import core",
        "from jax.interpreters import ad",
        "import jax.extend as jex",
        "from jax.extend.core import Primitive",
        "import jax\nTracer = jax.core.Tracer",
    ],
)
def test_internals_are_found(tmp_path: Path, text: str) -> None:
    found = stray_internals(plant(tmp_path, {"ad.sweep": text}))
    assert found
    assert all(complaint.startswith("ad.sweep, line") for complaint in found)


@pytest.mark.parametrize("text", ["import numpyro", "from numpyro.infer import SVI", "import numpyro.infer.util as u"])
def test_numpyro_is_found(tmp_path: Path, text: str) -> None:
    (found,) = stray_numpyro(plant(tmp_path, {"transform": text, "training.svi": "import numpyro"}))
    assert found.startswith("transform, line 1")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("import jax.numpy as jnp\nZERO = jnp.zeros(3)", "arrays at import"),
        ("import warnings\nwarnings.warn('at import')", "UserWarning: at import"),
        ("print('hello')", "hello"),
    ],
)
def test_side_effects_are_found(tmp_path: Path, text: str, complaint: str) -> None:
    plant(tmp_path, {"__init__": text})
    assert complaint in import_side_effects("small", tmp_path)


def test_missing_docstrings_are_found() -> None:
    class Documented:
        """Says what it is."""

    class Heir(Documented):
        pass

    class Automatic:
        __doc__ = "Automatic(bits: int)"

    def function() -> None:
        pass

    names = {"Documented": Documented, "Heir": Heir, "Automatic": Automatic, "function": function}
    found = undocumented(SimpleNamespace(__all__=[*names, "Absent"], **names))
    assert [complaint.split()[0] for complaint in found] == ["Heir", "Automatic", "function", "Absent"]
