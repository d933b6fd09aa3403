"""Clamped similarities and margins on the backends of a GPU."""

from conformance.clamps import *  # noqa: F403
