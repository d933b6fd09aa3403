"""Derivatives and torch.library on the Triton backend in the interpreter."""

import pytest

pytest.importorskip("triton")

from conformance.autograd import (  # noqa: F401
    test_autocast_keeps_wide_accumulation,
    test_clamped_norms_gradcheck,
    test_deterministic,
    test_gradient_penalty_trains_through_the_gradient,
    test_one_tensor_in_two_places,
    test_opcheck,
    test_similarity_gradcheck,
)
