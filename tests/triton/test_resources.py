"""Every kernel compiles for every architecture, to machine code no worse than resources.json pins, without a GPU."""

import json
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from benchmarks.kernels import TARGETS, compile_for  # noqa: E402
from icsd.ops.triton.kernels.tuning import SHARED_BYTES  # noqa: E402

VERSION, *PINNED = json.loads((Path(__file__).parent / "resources.json").read_text())
MATRIX = {
    "80": "mma.sync",
    "86": "mma.sync",
    "89": "mma.sync",
    "90": "wgmma.mma_async",
    "100": "tcgen05.mma",
    "120": "mma.sync",
    "gfx90a": "v_mfma_f32",
    "gfx942": "v_mfma_f32",
    "gfx950": "v_mfma_f32",
}
PRODUCTS = ("gram", "combine", "moments", "measure_streamed", "differentiate_streamed")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))
def test_resources(target):
    found = compile_for(target)
    pinned = {row["kernel"]: row for row in PINNED if row["architecture"] == str(target.arch)}
    assert found.keys() == pinned.keys()
    for kernel, resources in found.items():
        assert resources.stack == 0, (kernel, resources)
        assert resources.shared <= SHARED_BYTES, (kernel, resources)
        if triton.__version__ == VERSION["triton"]:  # other compilers take other amounts
            assert resources.shared <= pinned[kernel]["shared"], (kernel, resources)
            assert resources.registers <= pinned[kernel]["registers"], (kernel, resources)
        assert resources.instruction == pinned[kernel]["instruction"], (kernel, resources)
        if kernel in PRODUCTS and str(target.arch) in MATRIX:
            assert resources.instruction == MATRIX[str(target.arch)], (kernel, resources)
