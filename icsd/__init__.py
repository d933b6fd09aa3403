"""Interstage cross-sample similarity distillation: fused kernels and a coarse-to-fine text-to-image GAN."""

from importlib.metadata import version

from icsd import losses
from icsd.modules import InterstageDistillationLoss, SimilarityDistillationLoss
from icsd.ops import (
    BackendStatus,
    backends,
    cross_sample_similarity,
    flatten_samples,
    interstage_distillation_loss,
    similarity_distillation_loss,
    use_backend,
)

__version__ = version("icsd")

__all__ = [
    "BackendStatus",
    "InterstageDistillationLoss",
    "SimilarityDistillationLoss",
    "backends",
    "cross_sample_similarity",
    "flatten_samples",
    "interstage_distillation_loss",
    "losses",
    "similarity_distillation_loss",
    "use_backend",
]
