import os
import subprocess
import sys
from pathlib import Path

import pytest

from icsd.cli.streams import LenientStream, lenient_streams

CHECKPOINT = Path("runs/procedural-flowers/checkpoints/step-00000002.safetensors")


@pytest.mark.parametrize(
    "streams", ["| head -1", "2>&-", "2>/dev/full", ">/dev/full 2>/dev/full", ">&- 2>&-", "<&- >&-"]
)
def test_training_goes_on_without_its_display(program, workplace, streams):
    command = f'"$@" train --config tiny.yaml --steps 2 {streams}; exit ${{PIPESTATUS[0]}}'
    run = subprocess.run(["bash", "-c", command, "bash", *program], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert CHECKPOINT.exists()
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("arguments", [["train", "--steps", "0"], ["sample", "x", "--checkpoint", "absent"]])
def test_errors_keep_their_exit_code_without_a_stream(program, workplace, arguments):
    command = ["bash", "-c", '"$@" 2>&-', "bash", *program, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout, run.stderr) == (2, "", "")


def test_text_after_an_error_is_dropped(tmp_path):
    reader, writer = os.pipe()
    stream = LenientStream(os.fdopen(writer, "w"))
    stream.write("read\n")
    assert os.read(reader, 100) == b"read\n"
    os.close(reader)
    assert [stream.write("lost\n") for _ in range(3)] == [5, 5, 5]
    assert not stream.isatty()


@pytest.mark.parametrize("text", ["caf\udce9.png", "\ud800"])
def test_bytes_that_are_no_text_are_escaped(tmp_path, text):
    with open(tmp_path / "out", "w", encoding="utf-8") as file:
        LenientStream(file).write(text)
    assert "\\ud" in (tmp_path / "out").read_text()


def test_streams_are_given_back():
    before = sys.stdout, sys.stderr
    with lenient_streams():
        assert sys.stdout is not before[0]
    assert (sys.stdout, sys.stderr) == before
