import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from icsd.errors import InputError
from icsd.training import checkpoint
from icsd.training.run_folder import RunFolder, write_text


@dataclass
class Config:
    output: Path = Path("runs")
    steps: int = 3


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path, None, "emoji")


def lines_of(folder):
    return [json.loads(line) for line in folder.metrics_path.read_text().splitlines()]


def test_folders_without_a_name_are_numbered_and_a_name_must_be_new(tmp_path):
    made = [RunFolder.create(tmp_path / "runs", None, "emoji").path.name for _ in range(3)]
    assert made == ["emoji", "emoji-2", "emoji-3"]
    assert RunFolder.create(tmp_path / "runs", "first", "emoji").path.name == "first"
    with pytest.raises(InputError, match=r"name is first, but .*first exists: give another name, or --resume"):
        RunFolder.create(tmp_path / "runs", "first", "emoji")


@pytest.mark.parametrize(
    ("tail", "dropped"),
    [
        (b"", 0),
        (b'{"step": 3, "loss": 0.', 1),
        (b'{"step": 3}', 1),  # without the end of its line, it may be the beginning of a longer number
        (bytes(300), 1),
        (b"\xff\xfe\n", 1),
        (b'{"loss": 1}\n[3]\n{"step": null}\n', 3),
        (b'{"step": 2, "lo\n{"step": 2, "loss": 2.0}\n', 1),  # training went on after a full disk
    ],
)
def test_lines_that_were_cut_off_are_dropped_and_reported(folder, tail, dropped):
    for step in (1, 2, 5):
        folder.append_metrics({"step": step, "loss": 1.0})
    with folder.metrics_path.open("ab") as file:
        file.write(tail)
    notes = folder.begin(Config(), 3)
    assert [line["step"] for line in lines_of(folder)][:2] == [1, 2]
    assert all(line["step"] <= 3 for line in lines_of(folder))
    assert len(notes) == bool(dropped)
    assert all(f"dropped {dropped} unreadable" in note for note in notes)
    assert folder.begin(Config(), 3) == []


def test_the_configuration_is_written_with_every_value(folder):
    folder.begin(Config(), 0)
    assert yaml.safe_load(folder.config_path.read_text()) == {"output": "runs", "steps": 3}


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_other(folder, monkeypatch, fails):
    folder.begin(Config(), 0)
    folder.append_metrics({"step": 9})
    before = {path: path.read_bytes() for path in folder.path.iterdir()}

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, fails, fail)
    with pytest.raises(OSError, match="No space"):
        folder.begin(Config(steps=4), 1)
    assert {path: path.read_bytes() for path in folder.path.iterdir()} == before


HOLD = """
import sys, time
from pathlib import Path
from icsd.training.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).locked():
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_refused_until_the_first_one_is_dead(folder):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(InputError, match=f"another process is training in {folder.path}"), folder.locked():
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        with folder.locked():
            pass
    finally:
        process.kill()
        process.wait()
    with folder.locked(), pytest.raises(InputError, match="another process"), RunFolder(folder.path).locked():
        pass


@pytest.mark.parametrize("content", [None, "", "\n", "\0" * 40])
def test_a_lost_configuration_is_written_again_from_the_checkpoint(folder, content):
    config = {"output": "runs", "steps": 7}
    checkpoint.save(checkpoint.step_path(folder.path, 2), {"step": 2, "config": config, "ema": {}})
    if content is not None:
        folder.config_path.write_text(content)
    assert "was missing or empty; it was written again from" in folder.restore_config()
    assert yaml.safe_load(folder.config_path.read_text()) == config
    assert folder.restore_config() is None


def test_text_is_written_in_utf_8(tmp_path):
    write_text(tmp_path / "note", "pétale 花\n")
    assert (tmp_path / "note").read_bytes() == "pétale 花\n".encode()
    assert (tmp_path / "note").stat().st_mode & 0o777 == 0o644
