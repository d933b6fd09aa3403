"""Derivatives, torch.library and torch.compile on the backends of a GPU."""

from conformance.autograd import *  # noqa: F403
