"""Centered similarities of the Triton backend in the interpreter."""

import pytest

pytest.importorskip("triton")

from conformance.centering import (  # noqa: F401
    test_batches_without_variation,
    test_definition,
    test_means_that_dominate,
    test_nan_makes_its_group_nan,
)
