"""The losses of the literature on the backends of a GPU."""

from conformance.family import *  # noqa: F403
