"""Losses with and without the diagonal on the backends of a GPU."""

from conformance.diagonal import *  # noqa: F403
