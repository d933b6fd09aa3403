"""Accuracy and special inputs on the backends of a GPU."""

from conformance.accuracy import *  # noqa: F403
