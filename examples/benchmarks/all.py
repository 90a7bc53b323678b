"""Run every benchmark, one after the other, each in a process of its own.

    python -m examples.benchmarks.all --data-dir DIR                      # hours
    python -m examples.benchmarks.all --quick --output build/benchmarks  # tiny models, to see that all of them run
    python -m examples.benchmarks.all --list                              # what would be run, and why

What is stored and up to date is not run again, so that it can be interrupted: a report is up to date if it was made by
this version of the package and, where it is of one of the ``WORKLOADS``, with the sizes that this has now. Tables and
figures are made from the reports by ``figures.py`` and ``overview.py``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.benchmarks.record import log, versions
from examples.benchmarks.run import DEFAULT_FOLDER
from examples.benchmarks.training import EXPERIMENTS
from examples.benchmarks.workloads import WORKLOADS

ROOT = DEFAULT_FOLDER.parents[1]
# The data decide these, see ``Workload.load``.
OF_THE_DATA = ("data", "data_size")


@dataclass(frozen=True)
class Stage:
    """One program with its arguments.

    :param name: of its report, ``NAME.json``.
    :param module: of the program, in ``examples``.
    :param arguments: in both sizes.
    :param quick: instead of ``--quick``, where the program has something else or needs more.
    :param reads_data: whether it takes ``--data-dir``.
    :param workload: the one of ``WORKLOADS`` that it measures.
    :param resumes: whether it goes on by itself where it was interrupted, and does nothing if it is done.
    """

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    quick: tuple[str, ...] = ("--quick",)
    reads_data: bool = False
    workload: str | None = None
    resumes: bool = False

    def command(self, output: Path, quick: bool, data_dir: Path | None) -> list[str]:
        """What to run for a report in ``output``."""
        found = [sys.executable, "-m", f"examples.{self.module}", *self.arguments, "--output", str(output)]
        found += self.quick if quick else ()
        return [*found, "--data-dir", str(data_dir)] if self.reads_data and data_dir else found

    def outdated(self, report: dict[str, Any], quick: bool = False) -> str:
        """Why a report should be made again; empty if it need not."""
        package = versions()["numpyro_rad"]
        dated = report.get("match", report.get("compiled", {"": report}))  # these hold a report for each model
        for made_by in (one["versions"]["numpyro_rad"] for one in dated.values() if "versions" in one):
            if made_by != package:
                return f"made by version {made_by}, this is {package}"
        if self.workload is not None:
            now = json.loads(json.dumps(WORKLOADS[self.workload][quick].parameters()))
            then = report["workload"]
            changed = [key for key in now if key not in OF_THE_DATA and now[key] != then.get(key)]
            if changed:
                return f"{self.workload} has another {', '.join(changed)} now"
        return ""


# The quick sizes are there to see that everything runs: one rival of a kind, the fewest repeats.
_FEW = ("--quick", "--repeats", "2", "--draws", "2")
_RIVALS = (*_FEW, "--rivals", "checkpoint_layer,rad2021_sample,ours_4bit,ours_default")
_BUDGETS = (*_FEW, "--rivals", "checkpoint_layer", "--modes", "recompute", "--budgets", "20")


def _of_workloads() -> list[Stage]:
    names = [name for name in WORKLOADS if name != "fc"]
    stages = [Stage(name, "benchmarks.run", (name,), _RIVALS, True, name) for name in names]
    for name in names:
        stages.append(Stage(f"budgets_{name}", "benchmarks.budgets", (name,), _BUDGETS, True, name))
    for name in EXPERIMENTS:
        few = ("--quick", "--seeds", "2", "--guides", "AutoNormal", "--estimators", "ours_4bit")
        stages.append(Stage(f"training_{name}", "benchmarks.training", (name,), few, True, name, resumes=True))
    return stages


STAGES = [
    *_of_workloads(),
    Stage(
        "match", "benchmarks.match", quick=("--quick", "--workloads", "p1", "--rivals", "accumulate", "--rounds", "2")
    ),
    Stage("growth", "benchmarks.growth", quick=("--quick", "--axes", "batch")),
    Stage("memory", "benchmarks.memory", quick=("--quick", "--tasks", "exact_step", "step", "run")),
    Stage("posteriors", "posteriors"),
    Stage("path_sampling", "path_sampling"),
    Stage("uci", "uci", reads_data=True, resumes=True),
    Stage("bigger_than_memory", "bigger_than_memory", quick=("--steps", "3")),
    Stage(
        "coverage",
        "coverage.run",
        ("--repeats", "40"),
        quick=("baseball", "vae", "--small", "--steps", "5", "--repeats", "2"),
    ),
]


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing or out of date."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n    python")[0],
        epilog="Stages: " + " ".join(stage.name for stage in STAGES),
    )
    parser.add_argument("--quick", action="store_true", help="tiny models, for trying things out; takes --output")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="by the names below (default: all)")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="folder with mnist/, cifar10/, uci/")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="of the reports (default: docs/benchmarks)")
    parser.add_argument("--list", action="store_true", help="say what would be run, and run nothing")
    options = parser.parse_args(arguments)
    unknown = set(options.only or ()) - {stage.name for stage in STAGES}
    if unknown:
        parser.error(f"there is no stage {', '.join(sorted(unknown))}")
    if options.quick and options.output is None:
        parser.error("--quick needs an --output: tiny models are not what docs/benchmarks is about")
    failed = []
    for stage in STAGES:
        if options.only and stage.name not in options.only:
            continue
        path = report_of(stage, options.output)
        why = reason(stage, path, options.quick, options.data_dir)
        print(f"{stage.name}: {why or 'up to date'}", flush=True)
        if why and not options.list and not why.startswith("skipped"):
            started = time.monotonic()
            command = stage.command(path, options.quick, options.data_dir)
            status = subprocess.run(command, cwd=ROOT, check=False).returncode
            log(f"{stage.name} took {time.monotonic() - started:.0f} s")
            failed += [stage.name] if status else []
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def report_of(stage: Stage, folder: Path | None) -> Path:
    """Where the report of a stage is."""
    if folder is None and stage.name == "coverage":
        return ROOT / "docs" / "coverage.json"
    return (folder or DEFAULT_FOLDER).resolve() / f"{stage.name}.json"


def reason(stage: Stage, path: Path, quick: bool, data_dir: Path | None) -> str:
    """Why a stage is run, or is skipped; empty if its report is up to date."""
    if stage.name == "uci" and data_dir is None:
        return "skipped, it needs --data-dir"
    if not path.exists():
        return "there is no report"
    return stage.outdated(json.loads(path.read_text()), quick) or ("it may be incomplete" if stage.resumes else "")


if __name__ == "__main__":
    main()
