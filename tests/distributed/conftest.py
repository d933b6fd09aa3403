"""Ranks that stay for all tests of this folder in a process."""

import pytest
from ranks import pool


@pytest.fixture(scope="session")
def ranks():
    """Return a pool of 4 processes."""
    with pool(4) as processes:
        yield processes
