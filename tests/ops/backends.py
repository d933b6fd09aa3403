"""The backends under test. The environment names others for those that need a process or a device of their own."""

import os

BACKENDS = os.environ.get("ICSD_TEST_BACKENDS", "reference cpu").split()
FUSED = [backend for backend in BACKENDS if backend != "reference"]
MOST_SAMPLES = int(os.environ.get("ICSD_TEST_MOST_SAMPLES", "1000"))  # where a backend is slow
MOST_GROUPS = int(os.environ.get("ICSD_TEST_MOST_GROUPS", "64"))  # likewise
