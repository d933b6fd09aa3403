"""Irregular inputs of the CUDA backend in the emulator."""

import platform

import pytest
from conformance.irregular import test_gradients_of_irregular_inputs  # noqa: F401

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator is written for x86-64")
