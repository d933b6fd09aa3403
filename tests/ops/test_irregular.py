"""Irregular inputs: strides, weights, upstream gradients and norms that regular ones do not have."""

import irregular
import pytest
import torch
from backends import FUSED


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("case", irregular.CASES, ids=str)
def test_gradients_of_irregular_inputs(case, backend):
    # Matrices are rounded to bfloat16, too, where the processor multiplies that type.
    irregular.check(case, backend, roundings=2 if case.dtype == torch.bfloat16 else 1)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("case", irregular.CASES, ids=str)
def test_rows_beyond_32_bits(case, backend):
    irregular.check_far_apart(case, backend)
