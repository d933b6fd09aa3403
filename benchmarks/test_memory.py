"""Peak memory of forward + backward, the gradient it returns included."""

from functools import cache

import pytest

from benchmarks.memory import PROCESS, frugal_process, peak_extra_bytes
from benchmarks.workloads import Case, Workload

CASES = [Case(16, 65536), Case(64, 65536), Case(128, 32768)]
# Not the composite: it keeps its gradient from one call to the next.
IMPLEMENTATIONS = ["icsd", "plain", "compile"]

workload = cache(Workload)


def peak(case, implementation):
    return peak_extra_bytes(lambda: workload(case).forward_backward(implementation))


@pytest.fixture(scope="module")
def process():
    with frugal_process() as executor:
        yield executor


@pytest.mark.skipif(not (PROCESS / "clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_peak_memory(case, implementation, process, benchmark, label):
    label(benchmark="memory", work="forward+backward", implementation=implementation, unit="B", **vars(case))
    measured = benchmark.pedantic(process.submit(peak, case, implementation).result)
    benchmark.extra_info["values"] = [measured]
