"""The build of the native module, with a compiler that only writes down what it was asked: any path, clear causes."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = """#!/bin/sh
for each; do [ "$before" = -o ] && touch "$each"; [ "$before" = -MF ] && echo "x:" > "$each"; before=$each; done
printf '%s\\n' "$PWD" "$@" "" >> "$CALLS"
[ "${STATUS:-0}" = 0 ] || exit $STATUS
"""


def build(folder, **environment):
    """Build a copy of the sources; return the process and the calls of the compiler, each with its folder first."""
    folder.mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "icsd_command.py"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / "icsd").mkdir()
    (folder / "icsd" / "__init__.py").touch()
    compiler = folder / "c++"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    nvcc = folder / "nvcc"
    nvcc.write_text(COMPILER + "echo release 12.8\n")
    nvcc.chmod(0o755)
    calls = folder / "calls"
    variables = {"CXX": shlex.quote(str(compiler)), "CALLS": str(calls), "ICSD_CUDA": "0"} | environment
    run = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=folder,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    written = calls.read_text().split("\n\n")[:-1] if calls.exists() else []
    return run, [call.split("\n") for call in written]


@pytest.mark.parametrize("name", ["my projects", "price $5", "it's; (a) & b"])
def test_any_path_can_be_built_in(tmp_path, name):
    run, calls = build(tmp_path / name / "icsd")
    assert run.returncode == 0, run.stdout + run.stderr
    assert list((tmp_path / name / "icsd" / "icsd").glob("_native.*"))
    compiled = [call for call in calls if "-c" in call]
    assert len(compiled) > 20
    for folder, *arguments in compiled:
        assert (Path(folder) / arguments[arguments.index("-c") + 1]).is_file()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CXX": "absent-c++"}, "there is no C++ compiler absent-c++"),
        ({"ICSD_CPU_ISAS": "avx2 sse9"}, "ICSD_CPU_ISAS names sse9; choose from portable"),
        ({"STATUS": "1"}, "the native module was not built; the command that failed and its errors are above"),
        ({"ICSD_CUDA": "1", "CUDACXX": "/absent/nvcc"}, "/absent/nvcc (from CUDACXX or CUDA_HOME) is not a program"),
        ({"ICSD_CUDA": "1", "CUDACXX": "/bin/true"}, "`/bin/true --version` names no release"),
        (
            {"ICSD_CUDA": "1", "CUDACXX": "./nvcc", "ICSD_CUDA_ARCHITECTURES": "8.0;90a,7.0"},
            "ICSD_CUDA_ARCHITECTURES names 90a, 70; give numbers from 75 on, e.g. 75 80",
        ),
    ],
)
def test_causes_are_told_apart(tmp_path, environment, message):
    run, _ = build(tmp_path / "a b", **environment)
    assert run.returncode == 1
    assert run.stderr.strip().splitlines()[-1].startswith("icsd: ")
    assert message in run.stderr


def test_kernels_of_chosen_instruction_sets_alone(tmp_path):
    run, calls = build(tmp_path / "icsd", ICSD_CPU_ISAS="portable")
    assert run.returncode == 0, run.stdout + run.stderr
    flags = {
        flag for call in calls for flag in call if flag.startswith(("-DICSD_ISA=", "-DICSD_HAS_", "-DICSD_CPU_ISAS="))
    }
    assert flags == {"-DICSD_ISA=portable", "-DICSD_HAS_PORTABLE", '-DICSD_CPU_ISAS="portable"'}


def test_gpus_of_this_machine_that_are_too_old_are_left_out(tmp_path):
    gpus = tmp_path / "bin" / "nvidia-smi"
    gpus.parent.mkdir()
    gpus.write_text("#!/bin/sh\necho 7.0\necho 8.9\n")
    gpus.chmod(0o755)
    path = f"{gpus.parent}{os.pathsep}{os.environ['PATH']}"
    nvcc = str(tmp_path / "icsd" / "nvcc")
    run, calls = build(tmp_path / "icsd", ICSD_CUDA="1", CUDACXX=nvcc, ICSD_CUDA_ARCHITECTURES="", PATH=path)
    assert run.returncode == 0, run.stdout + run.stderr
    codes = {flag for call in calls for flag in call if flag.startswith("-gencode=")}
    assert codes == {"-gencode=arch=compute_89,code=[compute_89,sm_89]"}


def test_options_of_the_environment_reach_every_compiler(tmp_path):
    folder = tmp_path / "icsd"
    options = {"CXX": f"{folder}/c++ -m64 -pthread", "CXXFLAGS": "-DSEEN", "LDFLAGS": "-Wl,-rpath,$ORIGIN/lib"}
    run, calls = build(folder, ICSD_CUDA="1", CUDACXX=f"{folder}/nvcc", ICSD_CUDA_ARCHITECTURES="8.0;9.0", **options)
    assert run.returncode == 0, run.stdout + run.stderr
    compiled = [call for call in calls if "-c" in call]
    by_nvcc = [call for call in compiled if "-ccbin" in call]
    assert by_nvcc
    for call in compiled:
        assert {"-m64", "-pthread", "-DSEEN"} < set(call)
    for call in by_nvcc:
        assert call[call.index("-ccbin") + 1] == f"{folder}/c++"
        assert call[call.index("-DSEEN") - 1] == "-Xcompiler"
    (linked,) = (call for call in calls if "-shared" in call)
    assert "-Wl\\,-rpath\\,$ORIGIN/lib" in linked
