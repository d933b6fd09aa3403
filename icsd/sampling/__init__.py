"""Generation from a checkpoint: single images, interpolations, large folders, and export to other runtimes."""

from icsd.sampling.plan import Plan, Request
from icsd.sampling.sampler import Noise, Sampler

__all__ = ["Noise", "Plan", "Request", "Sampler"]
