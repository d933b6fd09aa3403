"""Ranks that stay for all tests of this folder in a process."""

import pytest
from ranks import pool


@pytest.fixture(scope="session")
def ranks():
    """Return a pool of 4 processes, which have imported what the tests of this folder need."""
    with pool(4, ["icsd.training.train", "torch._dynamo"]) as processes:
        yield processes
