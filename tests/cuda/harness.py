"""Builds CUDA translation units for the emulator (tests/cuda/emulator) with nothing but g++."""

import ctypes
import fcntl
import hashlib
import os
import random
import subprocess
import sysconfig
from collections.abc import Iterable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
EMULATOR = Path(__file__).parent / "emulator"
CACHE = ROOT / "build" / "emulator"
COMPILER = os.environ.get("CXX", "g++").split()[-1]  # without a ccache before it: results are cached here

# Libraries of several modes live in one process: nothing unique among them, no names in common.
LANGUAGE = ["-std=c++17", "-fPIC", "-fno-gnu-unique", "-fno-strict-aliasing"]
INCLUDES = [f"-I{EMULATOR / 'include'}", f"-I{ROOT / 'csrc'}"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-unused-parameter"]

# Each mode adds this to the translation unit, to the runtime, and to what links either. The runtime itself is never
# instrumented: what it does is no part of the program under test.
KERNEL_FLAGS = {
    "plain": ["-O2"],
    "address": [
        *("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        # Checks by calls, and without those that AddressSanitizer makes too: this halves the time of compilation.
        *("--param=asan-instrumentation-with-call-threshold=0", "-fno-sanitize=null,object-size,pointer-overflow,vptr"),
    ],
    "thread": ["-O1", "-g1", "-fsanitize=thread"],
    "counted": ["-O2", "-fno-tree-vectorize", "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"],
}
RUNTIME_FLAGS = {"plain": [], "address": ["-DEMULATOR_ASAN"], "thread": ["-DEMULATOR_TSAN"], "counted": []}
LINK_FLAGS = {
    "plain": [],
    "address": ["-fsanitize=address,undefined"],
    "thread": ["-fsanitize=thread"],
    "counted": [],
}
SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:malloc_context_size=4:quarantine_size_mb=32",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


def run(command: list[str | Path]) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


@cache
def compiler_version() -> str:
    return run([COMPILER, "--version"])


def cached(name: str, key: str, make) -> Path:
    """The file `make(path)` writes, made once for each key: other processes that need it wait."""
    digest = hashlib.sha256("\0".join([compiler_version(), key]).encode()).hexdigest()[:16]
    target = CACHE / digest / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        if not target.exists():
            partial = target.with_name(f"{os.getpid()}.{name}")
            make(partial)
            partial.replace(target)
    return target


@cache
def content() -> str:
    """Return a digest of all sources of the repository that are compiled here."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in (ROOT / "csrc", EMULATOR) for path in folder.rglob("*.[ch]*")):
        digest.update(f"{path}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def compile_object(source: Path, flags: list[str]) -> Path:
    """Compile a source, unless the same was compiled before.

    It is preprocessed to see that, which takes a second. The file `.seen` has the result for unchanged sources.
    """
    command = [COMPILER, "-x", "c++", *LANGUAGE, *INCLUDES, *flags, source]
    seen = [flag for flag in flags if not flag.startswith("-D")]  # the others are seen in what they make of the source

    def compile_changed() -> Path:
        key = run([*command, "-E"]) + " ".join(seen)
        return cached(f"{source.stem}.o", key, lambda target: run([*command, "-c", "-o", target]))

    key = " ".join([content(), source.read_text(), *map(str, command)])
    index = cached(f"{source.stem}.seen", key, lambda target: target.write_text(str(compile_changed())))
    return Path(index.read_text())


def link(name: str, parts: list[Path], flags: list[str]) -> Path:
    return cached(
        name, " ".join(map(str, [*parts, *flags])), lambda target: run([COMPILER, *parts, *flags, "-o", target])
    )


def device_flags(arch: int) -> list[str]:
    return ["-D__CUDACC__", f"-D__CUDA_ARCH__={arch}0"]


def build_runtime(mode: str, arch: int) -> Path:
    sources = [s for s in sorted((EMULATOR / "runtime").glob("*.cpp")) if s.stem != "meter" or mode == "counted"]
    flags = ["-O2", *WARNINGS, *RUNTIME_FLAGS[mode], *device_flags(arch)]
    objects = [compile_object(source, flags) for source in sources]
    return link("libemulator.so", objects, ["-shared", "-pthread", *LINK_FLAGS[mode]])


def compile_kernels(sources: Iterable[Path], mode: str, arch: int) -> list[Path]:
    flags = ["-include", "cuda_runtime.h", "-w", *KERNEL_FLAGS[mode], *device_flags(arch)]  # nvcc includes it too
    sources = list(sources)
    for source in random.Random(os.getpid()).sample(sources, len(sources)):  # processes that build the same share it
        compile_object(source, flags)
    return [compile_object(source, flags) for source in sources]


def link_library(name: str, sources: list[Path], mode: str, arch: int) -> Path:
    parts = [*compile_kernels(sources, mode, arch), build_runtime(mode, arch)]
    return link(f"lib{name}.so", parts, ["-shared", *LINK_FLAGS[mode]])


def build_native(mode: str = "plain", arch: int = 80) -> Path:
    """`icsd._native` with the emulated CUDA kernels; calls of the CPU's stay unresolved, all but those for memory."""
    import pybind11

    definitions = ["-DICSD_CUDA", "-DICSD_EMULATOR", '-DICSD_CPU_ISAS=""', '-DICSD_COMPILER=""']
    definitions.append(f'-DICSD_CUDA_ARCHITECTURES="{arch}"')
    flags = ["-O1", "-w", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}", *definitions]
    binding = [compile_object(source, flags) for source in sorted((ROOT / "csrc" / "binding").glob("*.cpp"))]
    memory = compile_object(ROOT / "csrc" / "cpu" / "runtime" / "memory.cpp", ["-O1"])
    # Apart, since the binding has thread-local storage of its own, and that of the kernels is their shared memory.
    kernels = link_library("kernels", sorted((ROOT / "csrc" / "cuda").rglob("*.cu")), mode, arch)
    return link("_native.so", [*binding, memory, kernels], ["-shared", "-Wl,-z,lazy", *LINK_FLAGS[mode]])


def build_program(source: Path, mode: str) -> Path:
    """A `.cu` with a `main`."""
    return link(source.stem, [*compile_kernels([source], mode, 80), build_runtime(mode, 80)], LINK_FLAGS[mode])


def open_library(path: Path, seed: int) -> ctypes.CDLL:
    """A library with what it and the emulator export; see runtime/device.cpp and runtime/meter.cpp."""
    library = ctypes.CDLL(str(path))
    library.emulator_failure.restype = ctypes.c_char_p
    library.emulator_launch_library.restype = ctypes.c_char_p
    counters = ["emulator_bytes_read", "emulator_bytes_written"]
    for name in (
        "emulator_launches",
        "emulator_launch_offset",
        "emulator_launch_shared",
        *counters,
        *(f"{name}_until" for name in counters),
    ):
        if hasattr(library, name):
            getattr(library, name).restype = ctypes.c_uint64
    library.emulator_require_stream.argtypes = [ctypes.c_void_p]
    library.emulator_seed.argtypes = [ctypes.c_uint64]
    library.emulator_seed(seed)
    if hasattr(library, "emulator_watch"):
        library.emulator_watch.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return library


def load(source: Path, mode: str = "plain", seed: int = 1) -> ctypes.CDLL:
    """A `.cu` whose `extern "C"` functions are called with pointers to tensors' memory."""
    return open_library(link_library(source.stem, [source], mode, arch=80), seed)


def pointer(tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
