"""Forward + backward of kl to banks: time and peak memory."""

from functools import cache

import pytest

from benchmarks.banks import BankCase, BankWorkload
from benchmarks.memory import PROCESS, frugal_process, peak_extra_bytes
from benchmarks.workloads import in_turns

CASES = [BankCase(256, 65536, 256, one_bank) for one_bank in (False, True)]
IMPLEMENTATIONS = ["icsd", "plain", "compile"]

cached_workload = cache(BankWorkload)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("turn", "implementation"), in_turns(IMPLEMENTATIONS))
def test_forward_backward(case, turn, implementation, measure, ceilings):
    workload = cached_workload(case)
    measure(
        lambda: workload.forward_backward(implementation),
        benchmark="banks",
        implementation=implementation,
        floor=case.floor_seconds(ceilings),
        **case.labels,
    )


def peak(case, implementation):
    return peak_extra_bytes(lambda: cached_workload(case, (implementation,)).forward_backward(implementation))


@pytest.fixture(scope="module")
def process():
    with frugal_process() as executor:
        yield executor


@pytest.mark.skipif(not (PROCESS / "clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_peak_memory(case, implementation, process, benchmark, label):
    label(benchmark="banks-memory", implementation=implementation, unit="B", **case.labels)
    benchmark.extra_info["values"] = [benchmark.pedantic(process.submit(peak, case, implementation).result)]
