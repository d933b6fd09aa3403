"""The CUDA backend in the emulator, for the tests that all backends share and for those of this folder.

Test files may set EVERY_ARCHITECTURE, the names of tests that run for all architectures, and FEATURE_SPACE_ONLY, the
names of tests that take too long when streamed.
"""

import functools
import os
import zlib

import pytest
from conformance import Limits
from emulated import ROW_BLOCK_BYTES, STREAM, EmulatedBackend

from icsd.ops import registry

# The orders of the blocks in which each test with a schedule runs; test_sanitized_kernels.py asks for both.
BLOCKS = os.environ.get("ICSD_EMULATOR_BLOCKS", "sequential").split(",")


def pytest_generate_tests(metafunc):
    own = any("emulated" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "emulated" in metafunc.fixturenames and not own and not hasattr(metafunc.module, "emulated"):
        every = metafunc.function.__name__ in getattr(metafunc.module, "EVERY_ARCHITECTURE", ())
        architectures = [75, 80] if every else [80]
        metafunc.parametrize("emulated", architectures, ids="sm_{}".format, indirect=True, scope="module")
    if "schedule" in metafunc.fixturenames and len(BLOCKS) > 1:
        metafunc.parametrize("schedule", BLOCKS, indirect=True)


def pytest_collection_modifyitems(items):
    items[:] = [
        item
        for item in items
        if getattr(item, "originalname", None) not in getattr(item.module, "FEATURE_SPACE_ONLY", ())
        or item.callspec.params.get("regime") == "feature"
    ]


make_backend = functools.cache(EmulatedBackend)


@pytest.fixture(scope="module")
def emulated(request):
    """Register the backend of an architecture as "emulated".

    Its launches must be on the current stream, and it makes only calls that a CUDA graph allows.
    """
    backend = make_backend(os.environ.get("ICSD_EMULATOR_MODE", "plain"), request.param)
    backend.kernels.set_stream(STREAM)
    backend.library.emulator_capability(backend.architecture)  # backends of other architectures share the library
    backend.library.emulator_require_stream(STREAM)
    backend.library.emulator_capture(True)
    with registry.temporarily(backend):
        yield backend
    backend.library.emulator_require_stream(None)
    backend.library.emulator_capture(False)


@pytest.fixture
def schedule(request, emulated):
    """Give every test another hostile schedule, the same in every run, on a device of 4 multiprocessors."""
    emulated.library.emulator_seed(zlib.crc32(request.node.name.encode()))
    emulated.library.emulator_concurrent_blocks(getattr(request, "param", BLOCKS[0]) == "concurrent")
    emulated.library.emulator_multiprocessors(4)


@pytest.fixture
def small_row_blocks(emulated):
    """Let row blocks have as few rows as possible in the regime `streamed`."""
    emulated.kernels.set_row_block_bytes(1)
    yield
    emulated.kernels.set_row_block_bytes(ROW_BLOCK_BYTES)


@pytest.fixture
def backend(emulated, schedule):
    """The name of the backend under test."""
    return emulated.name


@pytest.fixture
def fused_backend(backend):
    """The name of the backend under test, which has kernels."""
    return backend


@pytest.fixture
def limits():
    """The largest inputs that are not too slow."""
    return Limits(samples=130, groups=16)
