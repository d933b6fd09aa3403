"""Images from a checkpoint: one at a time, between two, by the thousand, or by another runtime."""

from icsd.sampling.sampler import Noise, Sampler

__all__ = ["Noise", "Sampler"]
