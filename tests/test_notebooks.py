"""Notebooks are text and import what their extra installs; they run, and show pictures but no warnings.

`make docs` runs them too, and fails where one fails or writes to stderr: here they run without the site.
"""

import ast
import importlib.metadata as metadata
import os
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import jupytext
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.md"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path: Path, tmp_path: Path) -> None:
    notebook = jupytext.read(path)
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # as users run it
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute(env=environment)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_text(path: Path) -> None:
    """Every cell is Python, and nothing of what it shows is in the file."""
    text, notebook = path.read_text(), jupytext.read(path)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            compile(cell.source, str(path), "exec")
    assert text.startswith("---\njupytext:") and "image/png" not in text and len(text) < 20_000


def test_an_extra_installs_what_notebooks_import() -> None:
    """In the environment of the tests there is more: there a notebook runs that does not on the site."""
    assert "numpyro_rad[notebooks]" in PROJECT["optional-dependencies"]["docs"]
    asked = set(requirements("numpyro_rad[notebooks]"))
    installed = asked | {name for given in asked for name in needed(given)}
    owners = metadata.packages_distributions()
    imported = {module for path in NOTEBOOKS for module in imports(path)} - sys.stdlib_module_names - {"numpyro_rad"}
    assert {module for module in imported if not installed & {name.lower() for name in owners[module]}} == set()
    assert any("checkpoint=" in path.read_text() for path in NOTEBOOKS) and "orbax-checkpoint" in installed


def requirements(text: str) -> Iterator[str]:
    """Names of the distributions that one of ours asks for, its extras' included."""
    name, extras = distribution(text), re.search(r"\[(.*)\]", text)
    if name != "numpyro_rad":
        yield name
        return
    for asked in PROJECT["dependencies"]:
        yield distribution(asked)
    for extra in extras[1].split(",") if extras else ():
        for asked in PROJECT["optional-dependencies"][extra]:
            yield from requirements(asked)


def needed(name: str) -> Iterator[str]:
    """Names of what an installed distribution asks for."""
    for text in metadata.requires(name) or ():
        if "extra ==" not in text:
            yield distribution(text)


def distribution(requirement: str) -> str:
    """The name in a requirement."""
    return re.split(r"[\s\[<>=!;~(]", requirement)[0].lower()


def imports(path: Path) -> Iterator[str]:
    """Top-level names of the modules that a notebook imports."""
    for cell in jupytext.read(path).cells:
        if cell.cell_type == "code":
            for node in ast.walk(ast.parse(cell.source)):
                if isinstance(node, ast.Import):
                    yield from (alias.name.split(".")[0] for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and node.module:
                    yield node.module.split(".")[0]
