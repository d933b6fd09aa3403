"""Centered similarities of the CUDA backend in the emulator."""

import platform

import pytest
from conformance.centering import *  # noqa: F403

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator is written for x86-64")
