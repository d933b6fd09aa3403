"""Lazy tensors and subclasses on the reference and the CPU backend."""

from conformance.lazy_tensors import *  # noqa: F403
