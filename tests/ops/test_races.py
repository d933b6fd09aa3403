"""The native code under ThreadSanitizer, and two planted races that it must find."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g",
    "-w",
    "-fsanitize=thread",
    "-DICSD_ISA=portable",
    "-DICSD_HAS_PORTABLE",
    f"-I{ROOT / 'csrc'}",
]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """`races.cpp` and the CPU operator, without libgomp."""
    folder = tmp_path_factory.mktemp("races")
    compiler = os.environ.get("CXX", "c++").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no compiler {compiler[0]}")
    sources = [source for source in (ROOT / "csrc" / "cpu").rglob("*.cpp") if source.stem != "amx"]  # not portable
    sources.append(Path(__file__).with_name("races.cpp"))
    objects = [f"{number}.o" for number in range(len(sources))]  # files of two folders may have the same name
    for source, name in zip(sources, objects, strict=True):
        subprocess.run([*compiler, *FLAGS, "-fopenmp", "-c", str(source), "-o", name], cwd=folder, check=True)
    subprocess.run([*compiler, "-fsanitize=thread", *objects, "-o", "races", "-pthread"], cwd=folder, check=True)
    return folder / "races"


def races(program, *arguments):
    environment = os.environ | {"ICSD_CPU_ISA": "portable", "TSAN_OPTIONS": "exitcode=66:halt_on_error=1"}
    run = subprocess.run([program, *arguments], env=environment, capture_output=True, text=True, check=False)
    if "unexpected memory mapping" in run.stderr:
        pytest.skip("ThreadSanitizer does not run on this kernel's address layout")
    return run


@pytest.mark.timeout(600)
def test_calls_at_once_do_not_race(program):
    run = races(program)
    assert run.returncode == 0, run.stderr[:4000]
    assert run.stdout == "done\n"


@pytest.mark.parametrize("plant", ["shared", "barrier"])
def test_a_planted_race_is_found(program, plant):
    run = races(program, plant)
    assert run.returncode == 66
    assert "data race" in run.stderr
