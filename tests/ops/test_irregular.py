"""Irregular inputs of the CPU backend, and of the definitions."""

import pytest
import torch
from conformance.irregular import *  # noqa: F403
from conformance.irregular import LOSSES, Case, check


@pytest.mark.parametrize("loss", LOSSES)
def test_definitions_are_accurate_in_float32(loss):
    check(Case("sample", loss, torch.float32), "reference")
