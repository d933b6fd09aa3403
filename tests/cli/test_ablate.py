import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from icsd.cli import ablate
from icsd.evaluation import report
from icsd.evaluation.distances import Estimate
from icsd.evaluation.evaluate import StageResult
from icsd.evaluation.protocol import VERSION, Protocol
from icsd.team import Team

PROTOCOL = Protocol("lite0", "a" * 64, "bilinear", 16, "made, test split", "b" * 64, 9, 20, "c" * 64, 0)
# Stands for the program: training leaves a checkpoint, and the kernel distance depends on arm and seed.
STUB = """
import json, pathlib, sys, yaml
arguments = sys.argv[1:]
with open("calls.txt", "a") as file:
    file.write(json.dumps(arguments) + "\\n")
if "broken.yaml" in arguments:
    sys.exit("no such data")
if arguments[0] == "train":
    folder = pathlib.Path(arguments[arguments.index("--output") + 1]) / arguments[arguments.index("--name") + 1]
    (folder / "checkpoints").mkdir(parents=True)
    given = dict(zip(arguments[1::2], arguments[2::2]))
    keys = {"seed": int(given["--seed"]), "evaluate": False, "evaluate_every": int(given["--evaluate-every"])}
    files = [path for option, path in zip(arguments, arguments[1:]) if option == "--config"]
    config = {}
    for path in files:
        part = yaml.safe_load(pathlib.Path(path).read_text()) or {}
        config |= yaml.safe_load(pathlib.Path(part.pop("base")).read_text()) if "base" in part else {}
        config |= part
    (folder / "config.yaml").write_text(yaml.safe_dump(config | keys))
    (folder / "checkpoints" / "step-00000002.safetensors").touch()
    speed = {"none": 10, "both": 5}.get(folder.parent.name, 1)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in (1, 2):
            line = {"step": step, "seconds": step * speed, "cpu_seconds": step * speed}
            line["evaluation/16/tone_accuracy"] = step / 2 if folder.name != "seed-1" else 0.1
            file.write(json.dumps(line) + "\\n")
else:
    folder = pathlib.Path(arguments[1])
    (folder / "results.json").write_text(pathlib.Path(f"{folder.parent.name}-{folder.name}.json").read_text())
"""


def results_of(arm, seed):
    value = seed + {"none": 1.0, "both": 0.5}[arm]
    return {16: StageResult(PROTOCOL, {"kernel_distance": Estimate(value, 0.1)})}


@pytest.fixture
def sweep(workplace, monkeypatch):
    """A sweep of two arms and three seeds whose runs are a stub."""
    pytest.importorskip("scipy")
    (workplace / "stub.py").write_text(STUB)
    for arm in ("none", "both"):
        for seed in range(3):
            (workplace / f"{arm}-seed-{seed}.json").write_text(report.to_json("made", 2, results_of(arm, seed), "key"))
    monkeypatch.setattr(ablate, "PROGRAM", [sys.executable, str(workplace / "stub.py")])
    with (workplace / "tiny.yaml").open("a") as file:
        file.write("steps: 2\n")
    (workplace / "none.yaml").write_text("losses: {generator: {distillation: 0}}")
    text = "base: [tiny.yaml]\narms: {none: [none.yaml], both: []}\nreference: none\nseeds: [0, 1, 2]\ncount: 20\n"
    text += "evaluate_every: 1\ntargets: {tone_accuracy: 0.75}\n"
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
    rows = rows_of(sweep)
    assert {"arm": "both", "seed": "2", "stage": "16", "metric": "kernel_distance", "value": "2.5"}.items() <= next(
        row for row in rows if (row["arm"], row["seed"], row["metric"]) == ("both", "2", "kernel_distance")
    ).items()
    assert (sweep / "runs" / "intervals.png").stat().st_size > 5000
    assert "6 of 6 finished" in out
    assert report.read(sweep / "runs" / "both" / "seed-2" / "results.json") == results_of("both", 2)


def rows_of(workplace):
    with (workplace / "runs" / "rows.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_cost_of_a_score_and_the_score_at_equal_cost_are_endpoints(icsd, sweep):
    icsd("ablate", "sweep.yaml", "--output", "runs")
    found = {(row["arm"], row["seed"], row["metric"]): float(row["value"]) for row in rows_of(sweep)}
    assert found["both", "0", "steps to tone_accuracy 0.75"] == 1.5
    assert found["both", "0", "seconds to tone_accuracy 0.75"] == 7.5
    assert found["none", "0", "cpu_seconds to tone_accuracy 0.75"] == 15
    assert found["none", "1", "reaches tone_accuracy 0.75"] == 0
    assert found["none", "1", "seconds to tone_accuracy 0.75"] == 20  # its whole cost
    assert found["none", "2", "tone_accuracy at equal seconds"] == 0.5  # after 10 s, when the arm `both` ends
    assert found["both", "2", "tone_accuracy at equal seconds"] == 1
    assert found["both", "2", "steps of training"] == 2


def test_only_what_is_finished_is_reported_on_request(icsd, sweep):
    icsd("ablate", "sweep.yaml", "--output", "runs")
    (sweep / "calls.txt").unlink()
    (sweep / "runs" / "both" / "seed-1" / "results.json").unlink()
    code, out, _ = icsd("ablate", "sweep.yaml", "--output", "runs", "--report")
    assert code == 0
    assert "5 of 6 finished" in out
    assert not (sweep / "calls.txt").exists()


def test_runs_of_other_configurations_or_counts_are_not_mixed(icsd, fails, sweep):
    icsd("ablate", "sweep.yaml", "--output", "runs")
    (sweep / "calls.txt").unlink()
    text = (sweep / "sweep.yaml").read_text()
    (sweep / "sweep.yaml").write_text(text.replace("count: 20", "count: 30"))
    icsd("ablate", "sweep.yaml", "--output", "runs", "--jobs", "1")
    assert len([call for call in calls(sweep) if call[0] == "evaluate"]) == len(calls(sweep)) == 6
    (sweep / "none.yaml").write_text("losses: {generator: {distillation: 2}}")
    message = fails("ablate", "sweep.yaml", "--output", "runs")
    assert "runs/none/seed-0 was trained with another configuration; differing: " in message
    assert "losses.generator.distillation (checkpoint: 0, now: 2.0)" in message
    assert message.endswith("give another --output, or remove runs/none/seed-0")


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("note", [None, '[{"base": "weights.yaml"}]'])
def test_a_change_in_a_file_that_another_one_extends_is_noticed(icsd, fails, sweep, note):
    (sweep / "none.yaml").rename(sweep / "weights.yaml")
    (sweep / "none.yaml").write_text("base: weights.yaml")
    icsd("ablate", "sweep.yaml", "--output", "runs")
    (sweep / "calls.txt").unlink()
    if note is not None:  # of an earlier version
        (sweep / "runs" / "none" / "seed-1.json").write_text(note)
    code, out, err = icsd("ablate", "sweep.yaml", "--output", "runs")
    assert code == 0, err
    assert "6 of 6 finished" in out
    assert not (sweep / "calls.txt").exists()
    edit(sweep / "weights.yaml", "0", "0.5")
    message = fails("ablate", "sweep.yaml", "--output", "runs")
    assert "losses.generator.distillation (checkpoint: 0, now: 0.5)" in message


def test_results_by_other_options_are_measured_again(icsd, sweep):
    icsd("ablate", "sweep.yaml", "--output", "runs")
    (sweep / "calls.txt").unlink()
    edit(sweep / "sweep.yaml", "count: 20", "count: 20\nevaluate: [--seed, '1']")
    _, _, err = icsd("ablate", "sweep.yaml", "--output", "runs", "--report")
    assert "there is no finished run of the reference 'none'" in err
    code, out, err = icsd("ablate", "sweep.yaml", "--output", "runs")
    assert code == 0, err
    assert "6 of 6 finished" in out
    assert [call[:1] + call[4:6] for call in calls(sweep)] == [["evaluate", "--seed", "1"]] * 6


@pytest.mark.parametrize(
    ("old", "new"), [(f'"version": {VERSION}', f'"version": {VERSION - 1}'), ('"measured_by"', '"network"')]
)
def test_results_that_cannot_be_read_are_measured_again(icsd, sweep, old, new):
    icsd("ablate", "sweep.yaml", "--output", "runs")
    (sweep / "calls.txt").unlink()
    edit(sweep / "runs/both/seed-1/results.json", old, new)
    code, out, err = icsd("ablate", "sweep.yaml", "--output", "runs")
    assert code == 0, err
    assert "6 of 6 finished" in out
    assert [call[:2] for call in calls(sweep)] == [["evaluate", "runs/both/seed-1"]]


def test_runs_with_other_evaluations_during_training_are_not_mixed(icsd, fails, sweep):
    icsd("ablate", "sweep.yaml", "--output", "runs")
    edit(sweep / "sweep.yaml", "evaluate_every: 1", "evaluate_every: 2")
    assert "evaluate_every (checkpoint: 1, now: 2)" in fails("ablate", "sweep.yaml", "--output", "runs")


def test_notes_are_written_once_and_torn_ones_are_named(icsd, fails, sweep):
    icsd("ablate", "sweep.yaml", "--output", "runs")
    note = sweep / "runs" / "both" / "seed-1.json"
    before = note.stat()
    icsd("ablate", "sweep.yaml", "--output", "runs")
    assert (note.stat().st_ino, note.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    note.write_text("")
    message = fails("ablate", "sweep.yaml", "--output", "runs")
    assert message.startswith("runs/both/seed-1.json cannot be read (")
    assert message.endswith("): remove it, and runs/both/seed-1/results.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: [", "the arm none cannot be trained: configuration none.yaml is not YAML"),
        ("stepz: 3", "the arm none cannot be trained: Option 'stepz' is not accepted"),
        ("batch_size: 0", "the arm none cannot be trained: batch_size is 0: give at least 2"),
    ],
)
def test_an_arm_that_cannot_be_trained_ends_the_sweep_before_it_begins(fails, sweep, text, message):
    (sweep / "none.yaml").write_text(text)
    assert message in fails("ablate", "sweep.yaml", "--output", "runs")
    assert not (sweep / "runs").exists()


def test_keys_of_an_arm_may_be_written_out(icsd, sweep):
    text = (sweep / "sweep.yaml").read_text().replace("both: []", "both: [{steps: 7}]")
    (sweep / "sweep.yaml").write_text(text)
    icsd("ablate", "sweep.yaml", "--output", "runs")
    (path,) = {call[call.index("runs/both/keys-1.yaml")] for call in calls(sweep) if "runs/both/keys-1.yaml" in call}
    assert (sweep / path).read_text() == "steps: 7\n"


def test_a_folder_that_holds_nothing_to_resume_is_replaced(icsd, sweep):
    (sweep / "runs" / "both" / "seed-1" / "images").mkdir(parents=True)
    assert icsd("ablate", "sweep.yaml", "--output", "runs")[0] == 0
    assert sum(call[0] == "train" and "--resume" not in call for call in calls(sweep)) == 6


def test_a_signal_passes_to_the_runs_once_and_ends_the_sweep(program, sweep):
    slow = (
        "import pathlib, signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(130)))\n"
    )
    slow += "pathlib.Path('started').touch()\ntime.sleep(100)"
    (sweep / "slow.py").write_text(slow)
    start = "import sys; from icsd.cli import ablate, main; ablate.PROGRAM = [sys.executable, 'slow.py']; "
    start += "sys.exit(main.main(['ablate', 'sweep.yaml', '--output', 'runs', '--jobs', '1']))"
    process = subprocess.Popen([program[0], "-c", start], stderr=subprocess.PIPE, text=True)
    while not (sweep / "started").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130, err
    assert "the same command goes on where each run was" in err
    assert [path.name for path in (sweep / "runs").rglob("*.log")] == ["seed-0.log"]
    assert (sweep / "runs" / "none" / "seed-0.log").read_text() == "saved\n"


def test_a_run_that_starts_while_a_signal_arrives_is_stopped_too(tmp_path, monkeypatch):
    children, start = [], subprocess.Popen

    def interrupted(*given, **named):
        time.sleep(1)  # the main thread waits for the runs by now
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)  # and handles the signal meanwhile
        children.append(start(*given, **named))
        return children[-1]

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    monkeypatch.setattr(ablate, "PROGRAM", ["sleep"])
    with pytest.raises(KeyboardInterrupt):
        ablate._run_all([(ablate.Run(None, "none", 0, tmp_path / "seed-0"), [["5"]])], 1, Team())
    assert [child.returncode for child in children] == [-signal.SIGTERM]


def test_names_that_no_run_measures_are_noted(icsd, sweep):
    edit(sweep / "sweep.yaml", "targets: {tone_accuracy", "endpoints: [kernel, accuracie]\ntargets: {tune_accuracy")
    _, out, _ = icsd("ablate", "sweep.yaml", "--output", "runs")
    assert [line.partition(" ")[2].strip() for line in out.splitlines() if line.startswith("note")] == [
        "targets names tune_accuracy, which no finished run measured during training",
        "endpoints names accuracie, which is part of no metric of the finished runs",
    ]


def test_finished_runs_are_not_repeated_and_trained_ones_only_evaluated(icsd, sweep):
    icsd("ablate", "sweep.yaml", "--output", "runs")
    assert icsd("ablate", "sweep.yaml", "--output", "runs", "--print-jobs")[1] == ""
    (sweep / "calls.txt").unlink()
    (sweep / "runs" / "none" / "seed-1" / "results.json").unlink()
    assert icsd("ablate", "sweep.yaml", "--output", "runs")[0] == 0
    assert [call[:2] for call in calls(sweep)] == [["evaluate", "runs/none/seed-1"]]


def test_an_interrupted_run_is_resumed(icsd, sweep):
    icsd("ablate", "sweep.yaml", "--output", "runs")
    (sweep / "calls.txt").unlink()
    folder = sweep / "runs" / "none" / "seed-0"
    (folder / "results.json").unlink()
    (folder / "checkpoints" / "step-00000002.safetensors").rename(folder / "checkpoints" / "step-00000001.safetensors")
    shutil.rmtree(sweep / "runs" / "both")
    _, out, _ = icsd("ablate", "sweep.yaml", "--output", "runs", "--print-jobs")
    first, *others = out.splitlines()
    assert first.startswith("icsd train --resume runs/none/seed-0 && icsd evaluate runs/none/seed-0 --count 20")
    assert all(line.startswith("icsd train --config tiny.yaml --seed ") for line in others)
    assert not (sweep / "calls.txt").exists()


def test_a_failed_run_is_named_and_the_others_are_reported(icsd, sweep):
    (sweep / "broken.yaml").write_text("")
    text = (sweep / "sweep.yaml").read_text().replace("both: []", "both: [], broken: [broken.yaml]")
    (sweep / "sweep.yaml").write_text(text)
    code, out, err = icsd("ablate", "sweep.yaml", "--output", "runs")
    assert code == 2
    assert "runs/broken/seed-2: failed with exit code 1 after" in out
    assert "failed       runs/broken/seed-0: see runs/broken/seed-0.log" in err
    assert "no such data" in (sweep / "runs" / "broken" / "seed-0.log").read_text()
    assert "kernel_distance" in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: []\narms: {a: []}\nreference: none", "reference is 'none': give one of the arms, a"),
        ("base: [missing.yaml]\narms: {a: []}\nreference: a", "base names missing.yaml, which is not there"),
        ("base: []\narms: {a: []}\nreference: a\nseeds: [1, 1]", "seeds is [1, 1]: give different whole numbers"),
        ("base: []\narms: {a: none.yaml}\nreference: a", "a is 'none.yaml': give a list of configuration files"),
        ("base: []\narms: {a: []}\nreference: a\ntargets: {x: 1}", "targets needs evaluate_every"),
        ("base: []\narms: {on: []}\nreference: on", "arms is {True: []}: give a list for each name, with quotes"),
        ("base: []\narms: {0.1: []}\nreference: 0.1", "arms is {0.1: []}: give a list for each name, with quotes"),
        ("base: []\narms: [a]\nreference: a", "arms is ['a']: give a list for each name"),
        ("base: []\narms: {a: []}\nreference: a\ntargets: {x: high}", "targets is {'x': 'high'}: give a number for"),
        ("base: []\narms: {a: []}\nreference: a\ntargets: [x]", "targets is ['x']: give a number for each metric"),
        ("base: []\narms: {a: []}\nreference: a\nevaluate: --encoder x", "evaluate is '--encoder x': give a list such"),
        ("base: []\narms: {a: []}\nreference: a\ncount: many", "count is 'many': give a whole number of images"),
        ("base: []\narms: {a: []}\nreference: a\nseeds: 3", "seeds is 3: give different whole numbers"),
        ("- a list", "sweep.yaml holds no sweep"),
        ("base: [", "sweep.yaml holds no sweep"),
    ],
)
def test_a_sweep_that_cannot_be_used_is_one_line(fails, workplace, monkeypatch, text, message):
    monkeypatch.setattr(ablate, "_run_all", lambda *given: pytest.fail("a run begins"))
    (workplace / "sweep.yaml").write_text(text)
    assert message in fails("ablate", "sweep.yaml", "--output", "runs")
