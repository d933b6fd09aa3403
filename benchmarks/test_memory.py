"""Peak memory of forward + backward, the gradient it returns included."""

from functools import cache

import pytest

from benchmarks.memory import PROCESS, frugal_process, peak_extra_bytes
from benchmarks.workloads import Case, Workload

CASES = [
    Case(16, 65536),
    Case(64, 65536),
    Case(128, 32768),
    Case(1024, 768, loss="gram_anchoring", groups=4),
]
MANY = [Case(2**20, 128), Case(65536, 256, loss="kl")]  # their N x N matrices would take 4 TB and 17 GB
# The composite is left out: it keeps its gradient from one call to the next.
IMPLEMENTATIONS = ["icsd", "plain", "compile"]

workload = cache(Workload)


def peak(case, implementation):
    of = workload(case, ("icsd",)) if case in MANY else workload(case)
    return peak_extra_bytes(lambda: of.forward_backward(implementation))


@pytest.fixture(scope="module")
def process():
    with frugal_process() as executor:
        yield executor


@pytest.mark.skipif(not (PROCESS / "clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize(
    ("case", "implementation"),
    [
        *(pytest.param(case, name, id=f"{case}-{name}") for case in CASES for name in IMPLEMENTATIONS),
        *(pytest.param(case, "icsd", id=f"{case}-icsd") for case in MANY),
    ],
)
def test_peak_memory(case, implementation, process, benchmark, label):
    label(benchmark="memory", work="forward+backward", implementation=implementation, unit="B", **vars(case))
    measured = benchmark.pedantic(process.submit(peak, case, implementation).result)
    benchmark.extra_info["values"] = [measured]
