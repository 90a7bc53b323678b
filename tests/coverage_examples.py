"""The example that makes the coverage table, as modules."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "coverage"


def load(*names: str) -> list[ModuleType]:
    """Modules of the example's folder, although this folder has a ``models`` of its own."""
    hidden = {name: sys.modules.pop(name, None) for name in ("models", "run", "table", "problem")}
    sys.path.insert(0, str(FOLDER))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(FOLDER))
        benchmarks = str(FOLDER.parent / "benchmarks")
        if benchmarks in sys.path:
            sys.path.remove(benchmarks)
        for name, module in hidden.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


models, run, table = load("models", "run", "table")
