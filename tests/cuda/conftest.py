"""The CUDA backend in the emulator, for the tests that all backends share and for those of this folder.

Test files may set EVERY_ARCHITECTURE, the names of tests that run for all architectures, and FEATURE_SPACE_ONLY, the
names of tests that take too long when streamed.
"""

import os
import zlib

import pytest
from conformance import Limits
from emulated import EmulatedBackend

from icsd.ops import registry


def pytest_generate_tests(metafunc):
    if "emulated" in metafunc.fixturenames and not hasattr(metafunc.module, "emulated"):
        every = metafunc.function.__name__ in getattr(metafunc.module, "EVERY_ARCHITECTURE", ())
        architectures = [75, 80] if every else [80]
        metafunc.parametrize("emulated", architectures, ids="sm_{}".format, indirect=True, scope="module")


def pytest_collection_modifyitems(items):
    items[:] = [
        item
        for item in items
        if getattr(item, "originalname", None) not in getattr(item.module, "FEATURE_SPACE_ONLY", ())
        or item.callspec.params.get("regime") == "feature"
    ]


@pytest.fixture(scope="module")
def emulated(request):
    """The backend of an architecture, registered as "emulated"."""
    backend = EmulatedBackend(os.environ.get("ICSD_EMULATOR_MODE", "plain"), request.param)
    with registry.temporarily(backend):
        yield backend


@pytest.fixture
def schedule(request, emulated):
    """Another hostile order of threads and blocks for every test, the same one in every run."""
    emulated.library.emulator_seed(zlib.crc32(request.node.name.encode()))
    emulated.library.emulator_concurrent_blocks(os.environ.get("ICSD_EMULATOR_BLOCKS") == "concurrent")


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
