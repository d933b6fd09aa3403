"""Losses of similarities to banks on the backends of a GPU."""

from conformance.banks import *  # noqa: F403
