import importlib
import importlib.util
import sys

import pytest
import torch


@pytest.fixture(scope="session")
def fidelity():
    """Skip a test where torch-fidelity is not installed.

    Beside a CPU build of torch, the extension of PyPI's torchvision cannot be loaded, and torchvision fails for want of
    two operators, which torch-fidelity does not use.
    """
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not installed")
    library = None
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
