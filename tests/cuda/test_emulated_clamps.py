"""Clamped similarities and margins by the CUDA backend in the emulator."""

import platform

import pytest
from conformance.clamps import *  # noqa: F403

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator is written for x86-64")
