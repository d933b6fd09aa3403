"""The backends that run in this process."""

import pytest
from conformance import Limits


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """The name of the backend under test."""
    return request.param


@pytest.fixture(params=["cpu"])
def fused_backend(request):
    """The name of the backend under test, which has kernels."""
    return request.param


@pytest.fixture
def limits():
    """The largest inputs."""
    return Limits()
