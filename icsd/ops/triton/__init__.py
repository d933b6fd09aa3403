"""The operator as Triton kernels."""

from icsd.ops.triton.backend import TritonBackend

__all__ = ["TritonBackend"]
