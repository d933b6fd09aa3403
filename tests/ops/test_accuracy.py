"""Accuracy and special inputs of the reference and the CPU backend."""

from conformance.accuracy import *  # noqa: F403
