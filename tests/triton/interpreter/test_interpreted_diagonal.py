"""Losses without the diagonal by the Triton backend in the interpreter."""

import pytest

pytest.importorskip("triton")

from conformance.diagonal import test_definition  # noqa: F401
