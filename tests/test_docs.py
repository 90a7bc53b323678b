"""The site: it describes every public name, and its front page says what was measured."""

import ast
import importlib
import json
import re
import tomllib
from pathlib import Path

import pytest
from test_structure import PUBLIC

import numpyro_rad
from examples.benchmarks.figures import as_fraction

DOCS = Path(__file__).resolve().parents[1] / "docs"
RECIPE = DOCS.parent / ".github" / "conda" / "recipe.yaml"
FRONT_PAGE = {  # how a row begins, and whose numbers it has
    "Bayesian neural network": "p1",
    "recurrent network": "p2",
    "convolutional network": "p3",
    "reaction-diffusion equation": "p4",
    "Transformer encoder": "p5",
    "convolutional autoencoder": "p5vae",
}

GENERAL = (  # messages of which one part is put together when they are raised
    "codec= and memory_budget= exclude each other",
)


def described() -> dict[str, set[str]]:
    """The packages of the reference, and the names that each leaves out."""
    text = (DOCS / "api.md").read_text()
    blocks = re.findall(r"\.\. automodule:: (\S+)\n((?:   .*\n)*)", text)
    left_out = {module: re.search(r":exclude-members: (.*)", options) for module, options in blocks}
    return {m: set(found[1].split(", ")) if found else set() for m, found in left_out.items()}


def test_every_public_name_is_described_once():
    reference = described()
    assert set(PUBLIC) <= set(reference)
    seen: dict[object, str] = {}
    for module, left_out in reference.items():
        names = set(getattr(importlib.import_module(module), "__all__", ())) or left_out
        for name in names:
            value = getattr(importlib.import_module(module), name)
            assert (id(value) in seen) == (name in left_out), f"{module}.{name}"
            seen.setdefault(id(value), module)


@pytest.mark.parametrize("row", FRONT_PAGE)
def test_the_front_page_says_what_was_measured(row):
    report = json.loads((DOCS / "benchmarks" / f"{FRONT_PAGE[row]}.json").read_text())
    (found,) = [r for r in report["rivals"] if r["name"] == "ours_default"]
    pages = DOCS / "index.md", DOCS.parent / "README.md"
    lines = {line for page in pages for line in page.read_text().splitlines() if line.startswith(f"| {row}")}
    (line,) = lines  # the same on both
    memory, time = (cell.strip() for cell in line.split("|")[2:4])
    ratio = found["ratio_to_exact"]
    assert memory == f"1/{1 / ratio['temp_bytes']:.0f}" and time == f"{ratio['step']:.2f}x"
    assert as_fraction(ratio["temp_bytes"]).startswith("1/")


def test_no_table_is_empty():
    """A table between its marks comes from a JSON file, so that nobody misses it in the text."""
    for page in DOCS.glob("*.md"):
        for name, table in re.findall(r"(?s)<!-- (\S+)-table -->(.*?)<!-- /\1-table -->", page.read_text()):
            assert table.count("\n| ") > 3, f"{page.name}: {name}"


def test_the_messages_that_are_explained_are_those_of_the_library():
    """Each with gaps where it names what is at hand."""
    said = []
    for file in (DOCS.parent / "numpyro_rad").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                said.append("".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
    explained = re.findall(r"(?m)^\| `([^`]+)` \|", (DOCS / "questions.md").read_text())
    assert len(explained) > 15
    for message in explained:
        parts = [part.strip() for part in re.sub(r"^\w+(Error|Warning): ", "", message).split("...")]
        pattern = re.compile(".*".join(map(re.escape, parts)), re.S)
        assert any(map(pattern.search, said)) or message in GENERAL, message


def test_the_citation_is_of_this_version():
    assert f"version: {numpyro_rad.__version__}\n" in (DOCS.parent / "CITATION.cff").read_text()


@pytest.mark.skipif(not RECIPE.exists(), reason="the archive of the sources has no recipe")
def test_the_recipe_is_of_this_version_and_needs_what_it_needs():
    project = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())["project"]
    recipe = RECIPE.read_text()
    first, end = re.fullmatch(r">=(.+),<(.+)", project["requires-python"]).groups()
    named = {"version": numpyro_rad.__version__, "python_min": first, "python_end": end}
    assert re.findall(r'(?m)^  (\w+): "(.+)"$', recipe.partition("package:")[0]) == list(named.items())
    run = re.search(r"(?m)^  run:\n((?:    - .*\n)+)", recipe)[1].replace("    - ", "").splitlines()
    assert run[1:] == [d.replace(">=", " >=") for d in project["dependencies"]]
    assert project["description"] in recipe and all(f"- {module}\n" in recipe for module in PUBLIC)


def test_every_page_is_in_the_contents():
    contents = (DOCS / "index.md").read_text()
    pages = {str(p.relative_to(DOCS).with_suffix("")) for p in DOCS.rglob("*.md") if "_build" not in p.parts}
    listed = set(re.findall(r"(?m)^([\w/]+)$", "".join(re.findall(r"```{toctree}(.*?)```", contents, re.S))))
    assert pages - {"index"} == listed
