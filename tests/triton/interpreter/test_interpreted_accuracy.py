"""Accuracy and special inputs of the Triton backend in the interpreter."""

import pytest

pytest.importorskip("triton")

from conformance.accuracy import *  # noqa: F403
