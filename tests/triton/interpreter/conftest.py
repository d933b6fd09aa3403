"""The Triton kernels in Triton's interpreter, which is switched on when they are defined: in a process of their own."""

from pathlib import Path

import pytest
from conformance import Limits
from own_process import OwnProcess

process = OwnProcess(__file__, TRITON_INTERPRET="1")
pytest_runtest_protocol, pytest_sessionfinish = process.run_test, process.stop

FOLDER = Path(__file__).parent
TRUNCATES = "the interpreter truncates where it stores bfloat16, which a GPU rounds"
XFAILS = {
    **{
        f"test_bfloat16_gradients_of_samples_much_alike[{shape}-{shift}]": TRUNCATES
        for shape in ("(5, 100)", "(33, 513)", "(64, 2048)")
        for shift in (1, 30)
    },
    **{
        f"test_gradients_of_irregular_inputs[{regime}-bfloat16]": TRUNCATES
        for regime in ("sample-kl", "streamed-kl", "feature-mse")
    },
}


def pytest_collection_modifyitems(items):
    for item in items:
        if FOLDER not in item.path.parents:
            continue
        if item.name in XFAILS:
            item.add_marker(pytest.mark.xfail(reason=XFAILS[item.name], strict=True))
        if item.name == "test_channels_last_maps_are_not_copied":
            item.add_marker(pytest.mark.skip(reason="it takes minutes in the interpreter"))


@pytest.fixture
def backend():
    """The name of the backend under test."""
    return "triton"


@pytest.fixture
def fused_backend():
    """The name of the backend under test, which has kernels."""
    return "triton"


@pytest.fixture
def limits():
    """The largest inputs that are not too slow."""
    return Limits(samples=40, groups=8)
