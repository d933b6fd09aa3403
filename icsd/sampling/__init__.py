"""Pictures from a checkpoint: one at a time, between two, by the thousand, or by another runtime."""

from icsd.sampling.painter import Noise, Painter

__all__ = ["Noise", "Painter"]
