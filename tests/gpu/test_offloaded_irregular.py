"""Irregular inputs on the backends of a GPU."""

from conformance.irregular import *  # noqa: F403
