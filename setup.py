"""Builds the native module `icsd._native` with ninja; everything else stands in pyproject.toml.

No torch is needed: nothing under csrc/ includes its headers.
"""

import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import ninja
import pybind11
from ninja.ninja_syntax import Writer
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
X86 = platform.machine().lower() in {"x86_64", "amd64"}

COMPILE_FLAGS = [
    *["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno"],
    # GCC 12's AVX-512 headers warn of themselves.
    *["-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized"],
]

# One object of csrc/cpu/kernels.cpp and of rows.cpp for each; csrc/cpu/dispatch.cpp chooses at run time.
CPU_ISAS = {"portable": []}
if X86:
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    avx512 = [*avx2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
    CPU_ISAS |= {"avx2": avx2, "avx512": avx512, "avx512bf16": [*avx512, "-mavx512bf16"]}


class NinjaBuild(build_ext):
    """Writes a build.ninja into the build folder and runs it."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link `ext` to where setuptools wants it."""
        headers = [sysconfig.get_paths()["include"], *os.environ.get("CPATH", "").split(":")]
        if not any((Path(folder) / "Python.h").exists() for folder in headers if folder):
            sys.exit(f"icsd: {headers[0]}/Python.h is missing; install Python's headers (apt-get install python3-dev)")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        with (folder / "build.ninja").open("w") as file:
            self.write(Writer(file, width=120), target)
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder), *(["-v"] if self.verbose > 1 else [])]
        if subprocess.run(command, check=False).returncode:
            sys.exit(f"icsd: the native module did not compile; a C++17 compiler is needed ({self.compiler_command()})")
        print("icsd: built for the CPU alone: CUDA kernels are not part of this version")

    @staticmethod
    def compiler_command() -> str:
        """The C++ compiler, as CXX names it."""
        return os.environ.get("CXX", "c++")

    def write(self, ninja_file: Writer, target: Path) -> None:
        """The rules: every source once, the kernels once for each instruction set."""
        includes = [ROOT / "csrc", sysconfig.get_paths()["include"], pybind11.get_include()]
        flags = [
            *COMPILE_FLAGS,
            *(f"-I{path}" for path in includes),
            *(["-DICSD_X86"] if X86 else []),
            *shlex.split(os.environ.get("CXXFLAGS", "")),
        ]
        quoted = " ".join(shlex.quote(flag) for flag in flags)
        ninja_file.rule(
            "compile",
            f"{self.compiler_command()} -MMD -MF $out.d {quoted} $flags -c $in -o $out",
            depfile="$out.d",
            deps="gcc",
        )
        link_flags = os.environ.get("LDFLAGS", "")
        ninja_file.rule("link", f"{self.compiler_command()} -shared -fopenmp $in {link_flags} -o $out")
        objects = []

        def compile_source(source: str, name: str, source_flags: list[str]) -> None:
            ninja_file.build(
                f"{name}.o", "compile", str(ROOT / "csrc" / source), variables={"flags": " ".join(source_flags)}
            )
            objects.append(f"{name}.o")

        compile_source(
            "binding.cpp",
            "binding",
            [
                f"-DICSD_CPU_ISAS='\"{' '.join(CPU_ISAS)}\"'",
                "-DICSD_CUDA_ARCHITECTURES='\"\"'",
                "-DICSD_COMPILER=__VERSION__",
            ],
        )
        for source in ("operator", "dispatch", "threads"):
            compile_source(f"cpu/{source}.cpp", source, [])
        for isa, isa_flags in CPU_ISAS.items():
            for source in ("kernels", "rows"):
                compile_source(f"cpu/{source}.cpp", f"{source}_{isa}", [f"-DICSD_ISA={isa}", *isa_flags])
        ninja_file.build(str(target), "link", objects)
        ninja_file.default(str(target))


setup(ext_modules=[Extension("icsd._native", sources=[])], cmdclass={"build_ext": NinjaBuild})
