"""Irregular inputs of the CPU backend."""

from conformance.irregular import *  # noqa: F403
