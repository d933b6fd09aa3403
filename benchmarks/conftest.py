"""Options and fixtures of the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from functools import lru_cache
from time import perf_counter, process_time

import pytest
import torch

from benchmarks import ceilings as ceilings_module
from benchmarks.ceilings import Ceilings, contention, measure_ceilings
from benchmarks.results import environment
from benchmarks.workloads import DTYPES, Workload

MOST_ROUNDS = 1000
SHORTEST_ROUND = 100e-6


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="measure a few shapes instead of the whole grid")
    parser.addoption("--seconds", type=float, default=0.2, help="time of each turn of each implementation")


def pytest_configure(config):
    timer = config.getoption("benchmark_timer", None)
    if getattr(timer, "target", timer) is process_time:
        ceilings_module.clock = process_time


def pytest_benchmark_update_machine_info(machine_info):
    del machine_info["node"]  # a result file names no host


@lru_cache(maxsize=1)
def _ceilings_at(turn: tuple) -> Ceilings:
    """Return the rates for one turn of a case, the same for all implementations."""
    return measure_ceilings(DTYPES, seconds=0.2)


@pytest.fixture
def ceilings(request) -> Ceilings:
    """Return the machine's rates, measured for every turn of a case: on a shared machine they change."""
    parameters = request.node.callspec.params.items()
    return _ceilings_at(tuple((name, value) for name, value in parameters if name != "implementation"))


@pytest.fixture(scope="session")
def surroundings() -> dict[str, str | int]:
    """Return the columns of the results that are the same in a whole run."""
    return {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), **environment()}


@pytest.fixture(scope="module")
def workload(request) -> Workload:
    """Return the workload of a case, which is given by indirect parametrization."""
    return Workload(request.param)


@pytest.fixture
def label(benchmark, surroundings, ceilings) -> Callable[..., None]:
    """Return a function that writes the columns of `benchmarks.results` to pytest-benchmark's extra info."""

    def label(dtype: torch.dtype, unit: str = "s", floor: float | None = None, **labels: str | int) -> None:
        labels["dtype"] = str(dtype).removeprefix("torch.")
        benchmark.group = "{benchmark} {work} {groups} x {samples} x {dim} {dtype} {loss}".format(**labels)
        benchmark.extra_info.update(
            surroundings,
            **labels,
            unit=unit,
            floor=floor,
            copy_gb_s=round(ceilings.copy_bandwidth / 1e9, 2),
            gemm_gflop_s=round(ceilings.gemm_rate[dtype] / 1e9, 1),
            contention=round(contention(), 2),
        )

    return label


@pytest.fixture
def measure(benchmark, label, pytestconfig) -> Callable[..., None]:
    """Return a function that times a call for as long as a turn lasts and labels the result."""

    def measure(call: Callable[[], object], floor: float | None = None, **labels: str | int | torch.dtype) -> None:
        label(floor=floor, **labels)
        start = perf_counter()
        call()
        once = perf_counter() - start
        iterations = max(1, round(SHORTEST_ROUND / once))
        rounds = round(pytestconfig.getoption("--seconds") / (iterations * once))
        benchmark.pedantic(call, iterations=iterations, rounds=min(max(rounds, 3), MOST_ROUNDS))
        if floor:
            benchmark.extra_info["ratio_to_floor"] = benchmark.stats["median"] / floor

    return measure
