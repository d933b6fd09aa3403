"""Forward + backward of the literature's losses beside torchdistill's modules of them."""

import pytest

from benchmarks.ceilings import floor_seconds
from benchmarks.peers import TORCHDISTILL
from benchmarks.workloads import Case, in_turns

pytest.importorskip("torchdistill", reason="pip install --no-deps torchdistill")

SHAPES = [(16, 8192), (64, 8192), (64, 65536)]
# torchdistill's rkd_angle makes N x N x D differences: some 4 GiB at 64 x 65,536.
CASES = [
    Case(*shape, loss=loss) for loss in TORCHDISTILL for shape in SHAPES if (loss, *shape) != ("rkd_angle", 64, 65536)
]


@pytest.mark.parametrize("workload", CASES, indirect=True, scope="module", ids=str)
@pytest.mark.parametrize(("turn", "implementation"), in_turns(["icsd", "torchdistill"]))
def test_forward_backward(workload, turn, implementation, measure, ceilings):
    case = workload.case
    measure(
        lambda: workload.forward_backward(implementation),
        benchmark="family",
        work="forward+backward",
        implementation=implementation,
        floor=floor_seconds(case.samples, case.dim, case.dim, case.dtype, case.loss, ceilings),
        **vars(case),
    )
