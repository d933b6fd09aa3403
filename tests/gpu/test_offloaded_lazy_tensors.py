"""Lazy tensors and subclasses on the backends of a GPU."""

from conformance.lazy_tensors import *  # noqa: F403
