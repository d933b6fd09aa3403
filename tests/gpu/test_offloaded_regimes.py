"""The regimes on the backends of a GPU."""

from conformance.regimes import *  # noqa: F403
