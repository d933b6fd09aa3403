"""The definitions of the losses on the reference and the CPU backend."""

from conformance.definition import *  # noqa: F403
