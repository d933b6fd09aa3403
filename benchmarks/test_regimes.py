"""Forward + backward with many samples: mse in the feature regime, kl in the streamed one."""

import pytest

from benchmarks.ceilings import floor_seconds
from benchmarks.workloads import Case, Workload, in_turns
from icsd.ops import registry

FEATURE = [Case(4096, 256), *(Case(n, 128) for n in (1024, 8192, 65536, 2**20))]
STREAMED = [Case(n, d, loss="kl") for n, d in ((2048, 1024), (4096, 256), (4096, 512), (16384, 256))]
# Beyond this, the peers' N x N matrices are out of proportion to the rest of the suite, or to memory.
MOST_OF_PEERS = 8192


def implementations(case):
    return ["icsd", "plain", "compile"] if case.samples <= MOST_OF_PEERS else ["icsd"]


def cases():
    regimes = registry.get("cpu").regimes
    for case, regime in [*((case, "feature") for case in FEATURE), *((case, "streamed") for case in STREAMED)]:
        if case.samples <= MOST_OF_PEERS or regime in regimes[case.loss]:
            for turn, name in in_turns(implementations(case)):
                yield pytest.param(case, turn, name, id=f"{turn}-{name}-{case}")


@pytest.fixture(scope="module")
def workload(request):
    return Workload(request.param, implementations(request.param))


@pytest.mark.parametrize(("workload", "turn", "implementation"), list(cases()), indirect=["workload"])
def test_forward_backward(workload, turn, implementation, measure, ceilings):
    case = workload.case
    measure(
        lambda: workload.forward_backward(implementation),
        benchmark="regimes",
        work="forward+backward",
        implementation=implementation,
        floor=floor_seconds(case.samples, case.dim, case.dim, case.dtype, case.loss, ceilings),
        **vars(case),
    )
