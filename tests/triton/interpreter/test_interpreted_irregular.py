"""Irregular inputs of the Triton backend in the interpreter."""

import pytest

pytest.importorskip("triton")

from conformance.irregular import test_gradients_of_irregular_inputs  # noqa: F401
