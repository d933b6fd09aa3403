"""The transforms of torch.func on the CPU backend."""

from conformance.transforms import *  # noqa: F403
