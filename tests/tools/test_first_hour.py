"""The first hour on a GPU, as a dry run in the emulator with the libraries of a bare machine."""

import os
import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import gpu_report, records
from tools import first_hour

ROOT = Path(__file__).parents[2]
# Python runs this before anything else: libraries that a bare machine lacks, and the metadata of an installed package.
BARE = """
import importlib.metadata, sys
sys.modules.update(dict.fromkeys(["jsonargparse", "yaml", "PIL", "tqdm", "safetensors", "tensorboard", "matplotlib",
    "regex", "hypothesis", "scipy", "pyarrow", "pytest_benchmark"]))
"""


def dry_run(folder, *arguments, module="tools.first_hour"):
    (folder / "sitecustomize.py").write_text(BARE)
    variables = {
        "ICSD_EMULATED": "1",
        "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False)


@pytest.mark.timeout(600)
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator is written for x86-64")
def test_a_dry_run_leaves_a_record_of_every_step(tmp_path):
    file = tmp_path / "gpu.jsonl"
    done = dry_run(tmp_path, "--results", str(file))
    found = records.read(file)
    assert done.returncode == 0, (done.stdout + done.stderr, gpu_report.failures(found))
    counts = Counter(record["kind"] for record in found)
    assert counts == {"start": 1, "step": 5, "machine": 1, "copy": 1, "time": 1, "compiled": 1, "tests": 1}
    (tests,) = (record for record in found if record["kind"] == "tests")
    assert tests["passed"] > 0
    shown = dry_run(tmp_path, "gpu", str(file), module="benchmarks")
    assert "Nothing failed." in shown.stdout, shown.stderr


def step(*lines, seconds=20.0):
    return first_hour.Step("a step", seconds, [sys.executable, "-c", "\n".join(lines)])


@pytest.mark.parametrize(
    ("tried", "status"),
    [
        (step("print('done')"), "passed"),
        (step("raise SystemExit(3)"), "failed"),
        (step("import time; print('begun', flush=True); time.sleep(60)", seconds=1.5), "out of time"),
        (first_hour.Step("a step", 5, ["no-such-program"]), "missing"),
    ],
)
def test_every_step_ends(tried, status, tmp_path, monkeypatch):
    monkeypatch.setattr(first_hour, "GRACE", 1)
    passed = first_hour.run(tried, tmp_path / "gpu.jsonl", deadline=float("inf"))
    assert passed == (status == "passed")
    (record,) = records.read(tmp_path / "gpu.jsonl")
    assert record["status"] == status
    assert record["seconds"] < 5


def test_no_step_begins_after_the_last_minute(tmp_path):
    assert not first_hour.run(step("print('done')"), tmp_path / "gpu.jsonl", deadline=0)
    (record,) = records.read(tmp_path / "gpu.jsonl")
    assert record["status"] == "out of time"


def test_the_limits_of_all_phases_fit_into_the_time(tmp_path):
    assert sum(max(step.seconds for step in phase) for phase in first_hour.phases(tmp_path)) <= first_hour.SECONDS
