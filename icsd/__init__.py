"""Interstage cross-sample similarity distillation: fused kernels and a coarse-to-fine text-to-image GAN."""

from importlib.metadata import PackageNotFoundError, version

from icsd import losses
from icsd.modules import InterstageDistillationLoss, SampleQueue, SimilarityDistillationLoss
from icsd.ops import (
    BackendStatus,
    backends,
    cross_sample_similarity,
    flatten_samples,
    interstage_distillation_loss,
    similarity_distillation_loss,
    use_backend,
)

try:
    __version__ = version("icsd")
except PackageNotFoundError:  # used from a checkout, without being installed
    __version__ = "unknown"

__all__ = [
    "BackendStatus",
    "InterstageDistillationLoss",
    "SampleQueue",
    "SimilarityDistillationLoss",
    "backends",
    "cross_sample_similarity",
    "flatten_samples",
    "interstage_distillation_loss",
    "losses",
    "similarity_distillation_loss",
    "use_backend",
]
