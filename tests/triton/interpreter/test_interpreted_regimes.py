"""Feature space near the teacher in the interpreter."""

import pytest

pytest.importorskip("triton")

from conformance.regimes import test_cancellation_is_found_for_every_group_and_student  # noqa: F401
