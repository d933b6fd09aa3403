import pytest
import torch

from benchmarks import ceilings
from benchmarks.ceilings import Ceilings, floor_seconds, measure_ceilings

MEMORY_BOUND = Ceilings(copy_bandwidth=1e9, gemm_rate={torch.float32: 1e15, torch.bfloat16: 1e15})
COMPUTE_BOUND = Ceilings(copy_bandwidth=1e15, gemm_rate={torch.float32: 1e9, torch.bfloat16: 4e9})


def test_bytes_of_a_memory_bound_case():
    # float32: 4 N (2 D_s + D_t) read, 4 N D_s written
    assert floor_seconds(16, 100, 1000, torch.float32, "kl", MEMORY_BOUND) == pytest.approx(
        4 * 16 * (200 + 1000 + 100) / 1e9
    )
    assert floor_seconds(16, 100, 1000, torch.bfloat16, "mse", MEMORY_BOUND) == pytest.approx(2 * 16 * 1300 / 1e9)


def test_flops_of_a_compute_bound_case():
    # N² D_s + N² D_t + 2 N² D_s
    assert floor_seconds(16, 100, 1000, torch.float32, "mse", COMPUTE_BOUND) == pytest.approx(
        256 * (100 + 1000 + 200) / 1e9
    )
    assert floor_seconds(16, 100, 1000, torch.bfloat16, "kl", COMPUTE_BOUND) == pytest.approx(256 * 1300 / 4e9)


def test_many_samples_cost_less_in_feature_space():
    # N (D_t² + 3 D_s² + 4 D_s D_t), for mse alone
    flops = 1000 * (20**2 + 3 * 10**2 + 4 * 10 * 20)
    assert floor_seconds(1000, 10, 20, torch.float32, "mse", COMPUTE_BOUND) == pytest.approx(flops / 1e9)
    assert floor_seconds(1000, 10, 20, torch.float32, "kl", COMPUTE_BOUND) == pytest.approx(1000**2 * 50 / 1e9)


def test_figures_of_the_specification():
    # 2 cores with AVX-512: copy 26 GB/s, sgemm 337 GFLOP/s
    machine = Ceilings(26e9, {torch.float32: 337e9})
    floors = {(16, 65536): 0.6e-3, (64, 65536): 3.2e-3, (64, 131072): 6.4e-3, (128, 32768): 6.4e-3}
    for (n, d), floor in floors.items():
        assert floor_seconds(n, d, d, torch.float32, "mse", machine) == pytest.approx(floor, rel=0.1)


class Clock:
    """A clock that tells the time of calls which take the given seconds."""

    def __init__(self, durations):
        self.now, self.durations = 0, iter(durations)

    def __call__(self):
        return self.now

    def call(self):
        self.now += next(self.durations)


def test_the_best_of_the_counted_calls_is_the_time(monkeypatch):
    clock = Clock([1, 3, 2, 4, 1])
    monkeypatch.setattr(ceilings, "clock", clock)
    assert ceilings._best_time(clock.call, seconds=8) == 2  # the first warms up, the last would come too late


def test_ceilings_are_work_divided_by_time(monkeypatch):
    def half_a_second(call, seconds):
        call()
        return 0.5

    monkeypatch.setattr(ceilings, "COPIED_BYTES", 1000)
    monkeypatch.setattr(ceilings, "GEMM_SIZES", (32, 64))
    monkeypatch.setattr(ceilings, "_best_time", half_a_second)
    measured = measure_ceilings([torch.float32, torch.bfloat16])
    assert measured.copy_bandwidth == 2 * 1000 / 0.5
    assert measured.gemm_rate == {torch.float32: 2 * 64**3 / 0.5, torch.bfloat16: 2 * 64**3 / 0.5}


def test_contention_compares_equal_work(monkeypatch):
    monkeypatch.setattr(ceilings, "_median_time", lambda elements: elements / 1e6)
    assert ceilings.contention() == 1
