"""The tests that every backend of the operator passes.

The folder of a backend has a test file for each module of this package that the backend is to pass:

    from conformance.accuracy import *  # noqa: F403

So each test of each backend has a name by which it can be run alone. The conftest.py of the folder has three fixtures:
`backend` is the name of a registered backend, `fused_backend` the name of one with kernels, and `limits` are the
largest inputs that do not take a slow backend too long.
"""

import pkgutil
from typing import NamedTuple

import pytest

pytest.register_assert_rewrite(*(f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__)))


class Limits(NamedTuple):
    """The largest inputs of a backend.

    Attributes:
        samples: The most samples N of a group.
        groups: The most groups B.
    """

    samples: int = 1000
    groups: int = 64


def skip_above(limits: Limits, samples: int) -> None:
    """Skip a test of more samples than a slow backend takes."""
    if samples > limits.samples:
        pytest.skip(f"{samples} samples take this backend too long")
