"""``make bench-all --quick``: every benchmark runs, and writes a report that has its table."""

import json
import subprocess

import pytest

from examples.benchmarks import all as all_benchmarks
from examples.benchmarks import figures

pytestmark = [pytest.mark.slow, pytest.mark.in_one_go]


# uci needs stored data; test_evidence.py runs it on a set of its own
@pytest.mark.parametrize("name", [stage.name for stage in all_benchmarks.STAGES if stage.name != "uci"])
def test_a_stage_runs_in_its_quick_size(name, tmp_path):
    (stage,) = (stage for stage in all_benchmarks.STAGES if stage.name == name)
    path = all_benchmarks.report_of(stage, tmp_path)
    command = stage.command(path, quick=True, data_dir=None)
    ran = subprocess.run(command, cwd=all_benchmarks.ROOT, check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    report = json.loads(path.read_text())
    assert not stage.outdated(report, quick=True)
    if name != "coverage":  # has a page of its own
        assert figures.markdown_table(report).count("\n| ") > 1
