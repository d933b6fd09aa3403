"""The regimes of the CUDA backend in the emulator."""

import platform

import pytest
from conformance.regimes import (  # noqa: F401
    test_boundaries_agree,
    test_cancellation_is_found_for_every_group_and_student,
    test_clamped_norms,
    test_collapsed_features,
    test_degenerate_shapes,
    test_feature_space_does_not_cancel,
    test_groups_and_weights,
    test_identical_features,
    test_many_gradients_at_once,
    test_nan_and_inf_are_not_hidden,
)

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator is written for x86-64")
EVERY_ARCHITECTURE = ["test_boundaries_agree", "test_feature_space_does_not_cancel", "test_groups_and_weights"]
FEATURE_SPACE_ONLY = [
    "test_boundaries_agree",
    "test_collapsed_features",
    "test_identical_features",
    "test_nan_and_inf_are_not_hidden",
]
