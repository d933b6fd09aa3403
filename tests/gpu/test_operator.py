"""Every kernel under compute-sanitizer."""

import compute_sanitizer
import pytest


@pytest.mark.timeout(3600)
@pytest.mark.skipif(compute_sanitizer.find() is None, reason="compute-sanitizer (of the CUDA toolkit) is not on PATH")
@pytest.mark.parametrize("tool", compute_sanitizer.TOOLS)
def test_compute_sanitizer(tool):
    done = compute_sanitizer.run(tool, "-k", "every_kernel", "tests/gpu/test_device.py")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
