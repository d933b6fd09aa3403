"""Fixtures that several folders of tests share. It imports nothing that the operator's tests do not need."""

import os
import shutil
import signal
from importlib.util import find_spec

import pytest
import torch

# The tests of training and of the command line, and the libraries that they need.
TRAINING = [
    *["cli", "data", "evaluation", "models", "sampling", "training", "benchmarks/test_attngan_step.py"],
    *[f"distributed/test_{name}_over_ranks.py" for name in ("commands", "pretraining", "training")],
    *["test_heat_maps.py", "test_visualization.py"],
]
LIBRARIES = ["hypothesis", "jsonargparse", "matplotlib", "PIL", "regex", "safetensors", "tqdm", "yaml"]
MISSING = [name for name in LIBRARIES if find_spec(name) is None]
collect_ignore = TRAINING if MISSING else []


LEFT_OUT = f"left out: {', '.join(TRAINING)}, because of missing libraries: {', '.join(MISSING)}" if MISSING else ""


def pytest_configure():
    none_is_left_out = os.environ.pop("ICSD_ALL_TESTS", "")  # processes that tests start may leave some out
    if MISSING and none_is_left_out:
        raise pytest.UsageError(f'{LEFT_OUT}; run pip install -e ".[emoji,test]", or unset ICSD_ALL_TESTS')


def pytest_terminal_summary(terminalreporter):
    if LEFT_OUT:
        terminalreporter.line(LEFT_OUT, yellow=True)


# On a busy machine, the threads of small operations wait for each other. A test may set more.
torch.set_num_threads(1)

# A shell starts what it runs in the background without SIGINT. Some tests send it to themselves and to their children.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Draw the same numbers in a test, whichever tests ran before it in its process."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """Keep what evaluations save for later out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ICSD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """Return a folder of drawn sets as the real ones are published, and the names of their images; do not change it."""
    from layouts import write_cub, write_oxford

    root = tmp_path_factory.mktemp("published")
    return root, {"cub": write_cub(root / "cub"), "oxford": write_oxford(root / "oxford")}


@pytest.fixture
def cub(published, tmp_path):
    """Return a copy of the drawn CUB-200-2011 that a test may change."""
    return shutil.copytree(published[0] / "cub", tmp_path / "cub")


@pytest.fixture
def oxford(published, tmp_path):
    """Return a copy of the drawn Oxford-102 that a test may change."""
    return shutil.copytree(published[0] / "oxford", tmp_path / "oxford")
