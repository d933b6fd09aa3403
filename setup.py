"""Builds the native module `icsd._native` with ninja; everything else is in pyproject.toml.

No torch is needed: nothing under csrc/ includes its headers. With nvcc (CUDACXX, CUDA_HOME/bin or PATH) the module has
CUDA kernels: for the GPUs of this machine or, if it has none, for all that are supported. ICSD_CUDA=0 builds without
them; ICSD_CUDA_ARCHITECTURES="80 90" or "all" chooses the GPUs. ICSD_CPU_ISAS="avx2 amx" builds the CPU kernels for
these instruction sets only.
"""

import itertools
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path

import ninja
import pybind11
import setuptools
from ninja.ninja_syntax import Writer
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
COMPILER = shlex.split(os.environ.get("CXX", "c++"))  # perhaps a ccache, the compiler and its options
COMPILER_OPTIONS = list(itertools.dropwhile(lambda word: not word.startswith("-"), COMPILER))
COMPILER_PROGRAM = COMPILER[-len(COMPILER_OPTIONS) - 1]
X86 = platform.machine().lower() in {"x86_64", "amd64"}

COMPILE_FLAGS = [
    *["-std=c++17", "-O3", "-falign-loops=64", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno"],
    # GCC 12's AVX-512 headers warn of themselves.
    *["-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized"],
]

# csrc/cpu/kernels is compiled once for each of these; csrc/cpu/runtime/dispatch.cpp chooses one at run time.
CPU_ISAS = {"portable": []}
if X86:
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    avx512 = [*avx2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
    avx512bf16 = [*avx512, "-mavx512bf16"]
    CPU_ISAS |= {"avx2": avx2, "avx512": avx512, "avx512bf16": avx512bf16}
    CPU_ISAS |= {"amx": [*avx512bf16, "-mamx-tile", "-mamx-bf16"]}
if chosen_isas := os.environ.get("ICSD_CPU_ISAS", "").split():
    if unknown := [isa for isa in chosen_isas if isa not in CPU_ISAS]:
        sys.exit(f"icsd: ICSD_CPU_ISAS names {', '.join(unknown)}; choose from {', '.join(CPU_ISAS)}, or unset it")
    CPU_ISAS = {isa: CPU_ISAS[isa] for isa in chosen_isas}

# Compute capabilities that are supported.
CUDA_ARCHITECTURES = ["75", "80", "86", "89", "90", "100", "120"]
CUDA_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "--threads", "2", "-compress-mode=size"]
CUDA_VERSION = (12, 8)  # the first nvcc that knows sm_120 and -compress-mode


def find_nvcc() -> str | None:
    """Return CUDA's compiler, or None if there is none or ICSD_CUDA=0."""
    if os.environ.get("ICSD_CUDA") == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    return os.environ.get("CUDACXX") or (f"{home}/bin/nvcc" if home else shutil.which("nvcc"))


def check_nvcc(nvcc: str) -> None:
    """Exit with an explanation if nvcc is missing or too old."""
    if shutil.which(nvcc) is None:
        sys.exit(f"icsd: {nvcc} (from CUDACXX or CUDA_HOME) is not a program; correct it, or set ICSD_CUDA=0")
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.(\d+)", output)
    if release is None:
        sys.exit(f"icsd: `{nvcc} --version` names no release; correct CUDACXX or CUDA_HOME, or set ICSD_CUDA=0")
    if tuple(map(int, release.groups())) < CUDA_VERSION:
        found, needed = ".".join(release.groups()), ".".join(map(str, CUDA_VERSION))
        sys.exit(f"icsd: {nvcc} is of CUDA {found}, CUDA {needed} or later is needed; install it, or set ICSD_CUDA=0")


def is_supported(arch: str) -> bool:
    """Return true for a compute capability that the kernels can be compiled for."""
    return int(arch) >= int(CUDA_ARCHITECTURES[0])


def installed_gpus() -> list[str]:
    """Return the compute capabilities of this machine's GPUs, e.g. 90, without those that are not supported."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = {line.strip().replace(".", "") for line in output.splitlines() if re.fullmatch(r"\d+\.\d\s*", line)}
    return sorted(filter(is_supported, found))


@cache
def cuda_architectures() -> list[str]:
    """Return the compute capabilities to build for."""
    chosen = re.sub(
        "[,;.]", lambda match: "" if match[0] == "." else " ", os.environ.get("ICSD_CUDA_ARCHITECTURES", "")
    )
    chosen = chosen.split()
    if chosen == ["all"]:
        return CUDA_ARCHITECTURES
    if unknown := [arch for arch in chosen if not (re.fullmatch(r"\d{2,3}", arch) and is_supported(arch))]:
        sys.exit(
            f"icsd: ICSD_CUDA_ARCHITECTURES names {', '.join(unknown)}; give numbers from {CUDA_ARCHITECTURES[0]} on, "
            f"e.g. {' '.join(CUDA_ARCHITECTURES)}, or all"
        )
    return chosen or installed_gpus() or CUDA_ARCHITECTURES


def generate_code(architectures: list[str]) -> list[str]:
    """Return nvcc's flags: machine code for each, PTX of the newest and, if there are several, of sm_80.

    From sm_90 on, kernels are compiled anew, since they may be launched before the previous one has finished.
    """
    new = sorted((arch for arch in architectures if int(arch) >= 80), key=int)
    codes = [f"-gencode=arch=compute_75,code=sm_{arch}" for arch in architectures if arch not in new]
    if new:
        *others, newest = new
        if others:
            machine_code = [f"sm_{arch}" for arch in others if int(arch) < 90]
            codes.append(f"-gencode=arch=compute_80,code=[{','.join(['compute_80', *machine_code])}]")
        if newer := [f"sm_{arch}" for arch in others if int(arch) >= 90]:
            codes.append(f"-gencode=arch=compute_90,code=[{','.join(newer)}]")
        codes.append(f"-gencode=arch=compute_{newest},code=[compute_{newest},sm_{newest}]")
    return codes


def for_host(flags: list[str]) -> str:
    """Return flags that nvcc hands to the host's compiler."""
    return " ".join("-Xcompiler " + shlex.quote(flag.replace(",", "\\,")) for flag in flags).replace("$", "$$")


class NinjaBuild(build_ext):
    """A build with ninja, in a folder of its own under build/.

    A file that has not changed is not compiled again, whatever environment it is built for: only the binding includes
    headers of Python.
    """

    def build_extension(self, ext: Extension) -> None:
        """Compile and link `ext` to where setuptools wants it."""
        headers = [sysconfig.get_paths()["include"], *os.environ.get("CPATH", "").split(":")]
        if not any((Path(folder) / "Python.h").exists() for folder in headers if folder):
            sys.exit(f"icsd: {headers[0]}/Python.h is missing; install Python's headers (apt-get install python3-dev)")
        if shutil.which(COMPILER_PROGRAM) is None:
            sys.exit(
                f"icsd: there is no C++ compiler {COMPILER_PROGRAM}; install one (apt-get install g++), or set CXX"
            )
        nvcc = find_nvcc()
        if nvcc is not None:
            check_nvcc(nvcc)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_binding(folder / "binding.cpp", nvcc)
        with (folder / "build.ninja").open("w") as file:
            write_build(Writer(file, width=120), target, nvcc)
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder), *(["-v"] if self.verbose > 1 else [])]
        if subprocess.run(command, check=False).returncode:
            sys.exit(
                "icsd: the native module was not built; the command that failed and its errors are above. It takes a "
                f"compiler of C++17, of GCC 12 or later (CXX is {shlex.join(COMPILER)})"
                + (f" and an nvcc that works with it ({nvcc}; ICSD_CUDA=0 builds for the CPU only)" if nvcc else "")
            )
        if nvcc is None:
            print("icsd: built for the CPU only: there is no nvcc in CUDACXX, CUDA_HOME or PATH, or ICSD_CUDA=0")
        else:
            print(f"icsd: built for the CPU and, with {nvcc}, for sm_{', sm_'.join(cuda_architectures())}")


def write_binding(path: Path, nvcc: str | None) -> None:
    """Write a source that includes csrc/binding: pybind11's headers, which take most of its time, are read once."""
    names = [source.name for source in sorted((ROOT / "csrc" / "binding").glob("*.cpp"))]
    text = "".join(f'#include "binding/{name}"\n' for name in names if nvcc or name != "cuda.cpp")
    if not path.exists() or path.read_text() != text:  # an older file is not compiled again
        path.write_text(text)


def quoted(arguments: list[str]) -> str:
    """Return arguments as ninja takes them for the shell."""
    return shlex.join(arguments).replace("$", "$$")


def write_build(build: Writer, target: Path, nvcc: str | None) -> None:
    """Write the rules and every object's: each source once, those of the CPU's kernels once for each instruction set.

    Sources are named from the build folder, whose own path may have a space in it.
    """
    sources = Path("../../csrc")
    flags = [*COMPILE_FLAGS, f"-I{sources}", *(["-DICSD_X86"] if X86 else [])]
    users_flags = shlex.split(os.environ.get("CXXFLAGS", ""))
    flags += users_flags
    compiler = quoted(COMPILER)
    rule(build, "compile", f"{compiler} -MMD -MF $out.d {quoted(flags)} $flags -c $in -o $out")
    link_flags = ["-fopenmp", "-Wl,-s", *shlex.split(os.environ.get("LDFLAGS", ""))]
    if nvcc is None:
        link = f"{compiler} -shared $in {quoted(link_flags)} -o $out"
    else:
        nvcc_on_host = quoted([nvcc, "-ccbin", COMPILER_PROGRAM])  # without a ccache before it
        cuda_flags = quoted([*CUDA_FLAGS, *generate_code(cuda_architectures()), f"-I{sources}"])
        host_flags = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", *COMPILER_OPTIONS, *users_flags]
        rule(
            build, "compile_cuda", f"{nvcc_on_host} -MMD -MF $out.d {cuda_flags} {for_host(host_flags)} -c $in -o $out"
        )
        link = f"{nvcc_on_host} -shared -cudart static $in {for_host([*COMPILER_OPTIONS, *link_flags])} -o $out"
    build.rule("link", link, description="link $out")
    objects = []

    def compile_all(folder: str, suffix: str, flags: list[str], rule: str = "compile") -> None:
        for source in sorted((ROOT / "csrc" / folder).glob("*.cu" if rule == "compile_cuda" else "*.cpp")):
            if (source.stem, suffix) in left_out:
                continue
            name = f"{folder.replace('/', '_')}_{source.stem}{suffix}.o"
            build.build(name, rule, str(sources / folder / source.name), variables={"flags": quoted(flags)})
            objects.append(name)

    left_out = {("amx", f"_{isa}") for isa in CPU_ISAS if isa != "amx"}
    for folder in ("cuda/kernels", "cuda", "cuda/runtime") if nvcc else ():  # first, since they take longest
        compile_all(folder, "", [], "compile_cuda")
    build.build("binding.o", "compile", "binding.cpp", variables={"flags": quoted(binding_flags(nvcc))})
    objects.append("binding.o")
    compile_all("cpu", "", [])
    compile_all("cpu/runtime", "", [f"-DICSD_HAS_{isa.upper()}" for isa in CPU_ISAS])
    for isa, isa_flags in CPU_ISAS.items():
        compile_all("cpu/kernels", f"_{isa}", [f"-DICSD_ISA={isa}", *isa_flags])
    build.build(str(target).replace("$", "$$"), "link", objects)  # the writer itself escapes spaces and colons


def rule(build: Writer, name: str, command: str) -> None:
    """Write a rule whose compiler lists the headers that it reads. ninja shows the file, and a command that failed."""
    build.rule(name, command, description="compile $out", depfile="$out.d", deps="gcc")


def binding_flags(nvcc: str | None) -> list[str]:
    """Return the flags for csrc/binding."""
    architectures = " ".join(cuda_architectures()) if nvcc else ""
    return [
        f'-DICSD_CPU_ISAS="{" ".join(CPU_ISAS)}"',
        f'-DICSD_CUDA_ARCHITECTURES="{architectures}"',
        *(["-DICSD_CUDA"] if nvcc else []),
        "-DICSD_COMPILER=__VERSION__",
        f"-I{sysconfig.get_paths()['include']}",
        f"-I{pybind11.get_include()}",
    ]


if int(setuptools.__version__.partition(".")[0]) < 77:
    sys.exit(f"icsd: setuptools is {setuptools.__version__}, 77 or later is needed; run: pip install -U setuptools")
setup(ext_modules=[Extension("icsd._native", sources=[])], cmdclass={"build_ext": NinjaBuild})
