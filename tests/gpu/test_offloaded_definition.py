"""The definitions of the losses on the backends of a GPU."""

from conformance.definition import *  # noqa: F403
