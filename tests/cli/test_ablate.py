import json
import sys

import pytest

from icsd.cli import ablate
from icsd.evaluation import report
from icsd.evaluation.distances import Estimate
from icsd.evaluation.evaluate import StageResult
from icsd.evaluation.protocol import Protocol

PROTOCOL = Protocol("lite0", "a" * 64, "bilinear", 16, "made, test split", "b" * 64, 9, 20, "c" * 64, 0)
# Stands for the program: training leaves a checkpoint, and the kernel distance depends on arm and seed.
STUB = """
import json, pathlib, sys
arguments = sys.argv[1:]
with open("calls.txt", "a") as file:
    file.write(json.dumps(arguments) + "\\n")
if "broken.yaml" in arguments:
    sys.exit("no such data")
if arguments[0] == "train":
    folder = pathlib.Path(arguments[arguments.index("--output") + 1]) / arguments[arguments.index("--name") + 1]
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text("steps: 2")
    (folder / "checkpoints" / "step-00000002.safetensors").touch()
else:
    folder = pathlib.Path(arguments[1])
    (folder / "results.json").write_text(pathlib.Path(f"{folder.parent.name}-{folder.name}.json").read_text())
"""


def results_of(arm, seed):
    value = seed + {"none": 1.0, "both": 0.5}[arm]
    return {16: StageResult(PROTOCOL, {"kernel_distance": Estimate(value, 0.1)}, {})}


@pytest.fixture
def sweep(workplace, monkeypatch):
    """A sweep of two arms and three seeds whose runs are a stub."""
    pytest.importorskip("scipy")
    (workplace / "stub.py").write_text(STUB)
    for arm in ("none", "both"):
        for seed in range(3):
            (workplace / f"{arm}-seed-{seed}.json").write_text(report.to_json("made", 2, results_of(arm, seed)))
    monkeypatch.setattr(ablate, "PROGRAM", [sys.executable, str(workplace / "stub.py")])
    (workplace / "none.yaml").write_text("losses: {}")
    text = "base: [tiny.yaml]\narms: {none: [none.yaml], both: []}\nreference: none\nseeds: [0, 1, 2]\ncount: 20\n"
    (workplace / "sweep.yaml").write_text(text)
    return workplace


def calls(workplace):
    return [json.loads(line) for line in (workplace / "calls.txt").read_text().splitlines()]


def test_every_run_is_trained_and_evaluated_and_differences_are_paired(icsd, sweep):
    code, out, err = icsd("ablate", "sweep.yaml", "--output", "runs", "--jobs", "2")
    assert code == 0, err
    assert len(calls(sweep)) == 12
    (line,) = [line for line in out.splitlines() if line.startswith("kernel_distance")]
    assert "both" in line
    assert "-0.5" in line
    assert line.endswith("*")
    rows = (sweep / "runs" / "rows.csv").read_text().splitlines()
    assert len(rows) == 1 + 6
    assert report.read(sweep / "runs" / "both" / "seed-2" / "results.json") == results_of("both", 2)


def test_finished_runs_are_not_repeated_and_trained_ones_only_evaluated(icsd, sweep):
    icsd("ablate", "sweep.yaml", "--output", "runs")
    (sweep / "calls.txt").unlink()
    (sweep / "runs" / "none" / "seed-1" / "results.json").unlink()
    assert icsd("ablate", "sweep.yaml", "--output", "runs")[0] == 0
    assert [call[:2] for call in calls(sweep)] == [["evaluate", "runs/none/seed-1"]]


def test_an_interrupted_run_is_resumed(icsd, sweep):
    folder = sweep / "runs" / "none" / "seed-0"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("steps: 2")
    _, out, _ = icsd("ablate", "sweep.yaml", "--output", "runs", "--print-jobs")
    first, *others = out.splitlines()
    assert first.startswith("icsd train --resume runs/none/seed-0 && icsd evaluate runs/none/seed-0 --count 20")
    assert all(line.startswith("icsd train --config tiny.yaml") for line in others)
    assert not (sweep / "calls.txt").exists()


def test_a_failed_run_is_named_and_the_others_are_reported(icsd, sweep):
    (sweep / "broken.yaml").write_text("")
    text = (sweep / "sweep.yaml").read_text().replace("both: []", "both: [], broken: [broken.yaml]")
    (sweep / "sweep.yaml").write_text(text)
    code, out, err = icsd("ablate", "sweep.yaml", "--output", "runs")
    assert code == 2
    assert "failed       runs/broken/seed-0: see runs/broken/seed-0.log" in err
    assert "no such data" in (sweep / "runs" / "broken" / "seed-0.log").read_text()
    assert "kernel_distance" in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: []\narms: {a: []}\nreference: none", "reference is 'none': give one of the arms, a"),
        ("base: [missing.yaml]\narms: {a: []}\nreference: a", "base names missing.yaml, which is not there"),
        ("base: []\narms: {a: []}\nreference: a\nseeds: [1, 1]", "seeds is [1, 1]: give different numbers"),
        ("- a list", "sweep.yaml holds no sweep"),
        ("base: [", "sweep.yaml holds no sweep"),
    ],
)
def test_a_sweep_that_cannot_be_used_is_one_line(fails, workplace, text, message):
    (workplace / "sweep.yaml").write_text(text)
    assert message in fails("ablate", "sweep.yaml", "--output", "runs")
