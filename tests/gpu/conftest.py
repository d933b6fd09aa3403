"""All tests here are marked `gpu` and skipped, with the reason, where the CUDA backend does not run."""

from pathlib import Path

import pytest

from icsd.ops.cuda import CUDABackend


def pytest_collection_modifyitems(items):
    reason = CUDABackend().unavailable()
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
