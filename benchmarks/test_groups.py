"""Forward + backward of losses of patch tokens: many groups of medium-sized matrices."""

from importlib.util import find_spec

import torch

from benchmarks.ceilings import floor_seconds
from benchmarks.peers import OF_GROUPS
from benchmarks.workloads import DTYPES, TOKENS, Case, in_turns

LOSSES = ("gram_anchoring", "kl", "cka")
QUICK = TOKENS[1::4]
# torchdistill's losses of one batch, in a loop over the images. It computes in the dtype of its input.
OF_TORCHDISTILL = ("cc", "pkt") if find_spec("torchdistill") else ()


def pytest_generate_tests(metafunc):
    shapes = QUICK if metafunc.config.getoption("--quick") else TOKENS
    cases = [Case(n, d, dtype, loss, b) for b, n, d in shapes for dtype in DTYPES for loss in LOSSES]
    theirs = [Case(n, d, torch.float32, loss, b) for b, n, d in shapes for loss in OF_TORCHDISTILL]
    measured = [
        (case, turn, name)
        for some, implementations in ((cases, OF_GROUPS), (theirs, ["icsd", "torchdistill"]))
        for case in some
        for turn, name in in_turns(implementations)
    ]
    metafunc.parametrize(
        ("workload", "turn", "implementation"),
        measured,
        indirect=["workload"],
        scope="module",
        ids=lambda value: str(value) if isinstance(value, Case) else None,
    )


def test_forward_backward(workload, turn, implementation, measure, ceilings):
    case = workload.case
    measure(
        lambda: workload.forward_backward(implementation),
        benchmark="groups",
        work="forward+backward",
        implementation=implementation,
        floor=floor_seconds(case.samples, case.dim, case.dim, case.dtype, case.loss, ceilings, case.groups),
        **vars(case),
    )
