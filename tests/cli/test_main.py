import subprocess

import pytest
import torch

import icsd as package


def test_version(icsd):
    assert icsd("--version") == (0, f"icsd {package.__version__}\n", "")


def test_without_a_command_the_help_is_shown(icsd):
    code, out, _ = icsd()
    assert code == 0
    assert all(command in out for command in ("train", "profile", "sample", "doctor", "data"))


@pytest.mark.parametrize("command", ["train", "profile", "sample", "doctor", "data"])
def test_every_help_teaches_by_example(icsd, command):
    code, out, _ = icsd(command, "--help")
    assert code == 0
    assert "Example" in out
    assert f"\n  icsd {command}" in out


def test_unknown_commands_and_options_are_named(fails):
    assert "invalid choice: 'generate'" in fails("generate")
    assert "unrecognized arguments: --verbose" in fails("doctor", "--verbose")


def test_operating_system_errors_name_the_file(fails, workplace):
    assert fails("sample", "--file", "absent.txt") == "absent.txt: No such file or directory"


def test_the_process_ends_with_the_exit_code_and_no_traceback(program):
    process = subprocess.run([*program, "train", "--steps", "few"], capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert process.stderr.startswith('icsd: error: Parser key "steps"')
    assert process.stderr.count("\n") == 1
    assert process.stdout == ""


@pytest.mark.parametrize("allocate", [lambda: bytes(2**62), lambda: torch.empty(2**50)], ids=["python", "torch"])
def test_memory_that_does_not_suffice_is_one_line(fails, monkeypatch, allocate):
    monkeypatch.setattr("icsd.cli.doctor.run", lambda options: allocate())
    message = fails("doctor")
    assert message.startswith("memory does not suffice (")
    assert "\n" not in message


def test_help_names_defaults_but_neither_types_nor_null(icsd):
    _, out, _ = icsd("sample", "--help")
    assert "default: sample.png" in " ".join(out.split())
    assert "type:" not in out
    assert "null" not in out
    assert "type: int, default: 16" in " ".join(icsd("train", "--help")[1].split())
