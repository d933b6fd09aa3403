"""Centered similarities on the CPU."""

from conformance.centering import *  # noqa: F403
