"""Forward + backward of losses of patch tokens: many groups of medium-sized matrices."""

from benchmarks.ceilings import floor_seconds
from benchmarks.workloads import DTYPES, TOKENS, Case, in_turns

LOSSES = ("gram_anchoring", "kl")
QUICK = TOKENS[1::4]


def pytest_generate_tests(metafunc):
    shapes = QUICK if metafunc.config.getoption("--quick") else TOKENS
    cases = [Case(n, d, dtype, loss, b) for b, n, d in shapes for dtype in DTYPES for loss in LOSSES]
    metafunc.parametrize("workload", cases, indirect=True, scope="module", ids=str)
    metafunc.parametrize(("turn", "implementation"), in_turns(["icsd", "plain", "compile"]))


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
