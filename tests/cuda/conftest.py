"""The emulated backend is held to what the others are held to: the tests in tests/ops can be imported."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "ops"))
