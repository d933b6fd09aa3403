"""Clamped similarities and margins by the Triton backend in the interpreter."""

import pytest

pytest.importorskip("triton")

from conformance.clamps import test_equal_features_cost_nothing_and_nan_costs_all, test_formula  # noqa: F401
