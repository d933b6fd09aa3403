"""Lazy tensors and subclasses on the Triton backend in the interpreter."""

import pytest

pytest.importorskip("triton")

from conformance.lazy_tensors import *  # noqa: F403
