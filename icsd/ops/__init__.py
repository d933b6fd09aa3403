"""The operator: cross-sample similarities and their distillation, on interchangeable backends."""

from icsd.ops.composite import CompositeBackend
from icsd.ops.cpu import CPUBackend, empty_cache
from icsd.ops.cuda import CUDABackend
from icsd.ops.functional import (
    cross_sample_similarity,
    flatten_samples,
    interstage_distillation_loss,
    similarity_distillation_loss,
)
from icsd.ops.reference import ReferenceBackend
from icsd.ops.registry import BackendStatus, backends, register, use_backend
from icsd.ops.triton import TritonBackend

register(CPUBackend())  # first, so that calls on CPU tensors do not look for a GPU
register(CUDABackend())
register(TritonBackend())
register(CompositeBackend())
register(ReferenceBackend())

__all__ = [
    "BackendStatus",
    "backends",
    "cross_sample_similarity",
    "empty_cache",
    "flatten_samples",
    "interstage_distillation_loss",
    "similarity_distillation_loss",
    "use_backend",
]
