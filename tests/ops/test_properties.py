"""Laws that hold whatever the inputs; see `conformance.properties`."""

from conformance.properties import *  # noqa: F403
