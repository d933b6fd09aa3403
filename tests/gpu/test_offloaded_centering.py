"""Centered similarities on the backends of a GPU."""

from conformance.centering import *  # noqa: F403
