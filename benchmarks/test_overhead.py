"""The cost of a call, on features so small that there is almost nothing to compute."""

import pytest

from benchmarks.peers import IMPLEMENTATIONS
from benchmarks.workloads import Case, in_turns

pytestmark = pytest.mark.parametrize("workload", [Case(4, 16), Case(16, 256)], indirect=True, scope="module", ids=str)
# A composite prepares its gradient in the forward pass, wanted or not.
FORWARD = [name for name in IMPLEMENTATIONS if not name.startswith("composite")]


@pytest.mark.parametrize(("turn", "implementation"), in_turns(FORWARD))
def test_forward_overhead(workload, turn, implementation, measure):
    measure(
        lambda: workload.forward(implementation),
        benchmark="overhead",
        work="forward",
        implementation=implementation,
        **vars(workload.case),
    )


@pytest.mark.parametrize(("turn", "implementation"), in_turns(IMPLEMENTATIONS))
def test_forward_backward_overhead(workload, turn, implementation, measure):
    measure(
        lambda: workload.forward_backward(implementation),
        benchmark="overhead",
        work="forward+backward",
        implementation=implementation,
        **vars(workload.case),
    )
