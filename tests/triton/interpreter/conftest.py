"""The Triton kernels in Triton's interpreter, which is switched on when they are defined: in a process of their own."""

import pytest
from conformance import Limits
from own_process import OwnProcess

process = OwnProcess(__file__, TRITON_INTERPRET="1")
pytest_runtest_protocol, pytest_sessionfinish = process.run_test, process.stop


@pytest.fixture
def backend():
    """The name of the backend under test."""
    return "triton"


@pytest.fixture
def fused_backend():
    """The name of the backend under test, which has kernels."""
    return "triton"


@pytest.fixture
def limits():
    """The largest inputs that are not too slow."""
    return Limits(samples=40, groups=8)
