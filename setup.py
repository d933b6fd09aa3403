"""Builds the native module `icsd._native` with ninja; everything else stands in pyproject.toml.

No torch is needed: nothing under csrc/ includes its headers. With nvcc (CUDACXX, CUDA_HOME/bin or PATH) CUDA kernels
are part of it; ICSD_CUDA=0 leaves them out, ICSD_CUDA_ARCHITECTURES="80 90" builds for fewer devices.
"""

import os
import platform
import shlex
import shutil
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
    *["-std=c++17", "-O3", "-falign-loops=64", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno"],
    # GCC 12's AVX-512 headers warn of themselves.
    *["-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized"],
]

# One object of kernels.cpp, rows.cpp, tiles.cpp (and amx.cpp) in csrc/cpu for each; dispatch.cpp chooses at run time.
CPU_ISAS = {"portable": []}
if X86:
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    avx512 = [*avx2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
    avx512bf16 = [*avx512, "-mavx512bf16"]
    CPU_ISAS |= {"avx2": avx2, "avx512": avx512, "avx512bf16": avx512bf16}
    CPU_ISAS |= {"amx": [*avx512bf16, "-mamx-tile", "-mamx-bf16"]}

# Compute capabilities with machine code.
CUDA_ARCHITECTURES = ["75", "80", "86", "89", "90", "100", "120"]
CUDA_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "--threads", "2", "-compress-mode=size"]


def find_nvcc() -> str | None:
    """CUDA's compiler, unless ICSD_CUDA=0 says to do without."""
    if os.environ.get("ICSD_CUDA") == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    return os.environ.get("CUDACXX") or (f"{home}/bin/nvcc" if home else shutil.which("nvcc"))


def cuda_architectures() -> list[str]:
    """The capabilities to build for."""
    return os.environ.get("ICSD_CUDA_ARCHITECTURES", "").replace(",", " ").split() or CUDA_ARCHITECTURES


def generate_code(architectures: list[str]) -> list[str]:
    """Machine code for each, and PTX for drivers: sm_80's for devices in between, the newest's for those to come."""
    new = sorted((arch for arch in architectures if int(arch) >= 80), key=int)
    codes = [f"-gencode=arch=compute_75,code=sm_{arch}" for arch in architectures if arch not in new]
    if new:
        *others, newest = new
        codes.append(f"-gencode=arch=compute_80,code=[{','.join(['compute_80', *(f'sm_{arch}' for arch in others)])}]")
        codes.append(f"-gencode=arch=compute_{newest},code=[compute_{newest},sm_{newest}]")
    return codes


def for_host(flags: list[str]) -> str:
    """Flags for nvcc to hand to the host's compiler."""
    return " ".join("-Xcompiler " + shlex.quote(flag.replace(",", "\\,")) for flag in flags)


class NinjaBuild(build_ext):
    """Writes a build.ninja into a folder of its own under build/ and runs it.

    What did not change since it was last built is not compiled again, whatever environment it is for: of all sources,
    only the binding includes headers from there.
    """

    def build_extension(self, ext: Extension) -> None:
        """Compile and link `ext` to where setuptools wants it."""
        headers = [sysconfig.get_paths()["include"], *os.environ.get("CPATH", "").split(":")]
        if not any((Path(folder) / "Python.h").exists() for folder in headers if folder):
            sys.exit(f"icsd: {headers[0]}/Python.h is missing; install Python's headers (apt-get install python3-dev)")
        nvcc = find_nvcc()
        if nvcc is not None and shutil.which(nvcc) is None:
            sys.exit(f"icsd: {nvcc} (from CUDACXX or CUDA_HOME) is no program; correct it, or set ICSD_CUDA=0")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        with (folder / "build.ninja").open("w") as file:
            self.write(Writer(file, width=120), target, nvcc)
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder), *(["-v"] if self.verbose > 1 else [])]
        if subprocess.run(command, check=False).returncode:
            sys.exit(
                f"icsd: the native module did not compile; a C++17 compiler is needed ({self.compiler_command()})"
                + (f", and an nvcc that knows it ({nvcc}); ICSD_CUDA=0 builds for the CPU alone" if nvcc else "")
            )
        if nvcc is None:
            print("icsd: built for the CPU alone: no nvcc in CUDACXX, CUDA_HOME or PATH, or ICSD_CUDA=0")
        else:
            print(f"icsd: built for the CPU and, with {nvcc}, for sm_{', sm_'.join(cuda_architectures())}")

    @staticmethod
    def compiler_command() -> str:
        """The C++ compiler, as CXX names it."""
        return os.environ.get("CXX", "c++")

    def write(self, ninja_file: Writer, target: Path, nvcc: str | None) -> None:
        """The rules: every source once, the CPU's kernels once for each instruction set."""
        flags = [
            *COMPILE_FLAGS,
            f"-I{ROOT / 'csrc'}",
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
        link_flags = ["-fopenmp", *shlex.split(os.environ.get("LDFLAGS", ""))]
        if nvcc is None:
            link = f"{self.compiler_command()} -shared $in {' '.join(link_flags)} -o $out"
        else:
            host = f"-ccbin {shlex.quote(self.compiler_command().split()[-1])}"  # without a ccache before it
            link = f"{nvcc} {host} -shared -cudart static $in {for_host(link_flags)} -o $out"
            flags = [*CUDA_FLAGS, *map(shlex.quote, generate_code(cuda_architectures())), f"-I{ROOT / 'csrc'}"]
            host_flags = for_host(["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"])
            ninja_file.rule(
                "compile_cuda",
                f"{nvcc} {host} -MMD -MF $out.d {' '.join(flags)} {host_flags} -c $in -o $out",
                depfile="$out.d",
                deps="gcc",
            )
        ninja_file.rule("link", link)
        objects = []

        def compile_source(source: str, name: str, source_flags: list[str]) -> None:
            ninja_file.build(
                f"{name}.o", "compile", str(ROOT / "csrc" / source), variables={"flags": " ".join(source_flags)}
            )
            objects.append(f"{name}.o")

        binding_flags = [
            f"-DICSD_CPU_ISAS='\"{' '.join(CPU_ISAS)}\"'",
            f"-DICSD_CUDA_ARCHITECTURES='\"{' '.join(cuda_architectures()) if nvcc else ''}\"'",
            *(["-DICSD_CUDA"] if nvcc else []),
            "-DICSD_COMPILER=__VERSION__",
            *(shlex.quote(f"-I{path}") for path in (sysconfig.get_paths()["include"], pybind11.get_include())),
        ]
        for source in ("module", "cpu", *(["cuda"] if nvcc else [])):
            compile_source(f"binding/{source}.cpp", f"binding_{source}", binding_flags)
        for source in ("operator", "streamed", "feature", "dispatch", "memory", "threads"):
            compile_source(f"cpu/{source}.cpp", source, [])
        for isa, isa_flags in CPU_ISAS.items():
            for source in ["kernels", "rows", "tiles", *(["amx"] if isa == "amx" else [])]:
                compile_source(f"cpu/{source}.cpp", f"{source}_{isa}", [f"-DICSD_ISA={isa}", *isa_flags])
        for source in sorted((ROOT / "csrc" / "cuda").rglob("*.cu")) if nvcc else []:
            ninja_file.build(f"{source.stem}_cuda.o", "compile_cuda", str(source))
            objects.append(f"{source.stem}_cuda.o")
        ninja_file.build(str(target), "link", objects)
        ninja_file.default(str(target))


setup(ext_modules=[Extension("icsd._native", sources=[])], cmdclass={"build_ext": NinjaBuild})
