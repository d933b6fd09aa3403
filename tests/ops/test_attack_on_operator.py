"""Attacks on the operator: many threads at once, very many calls, and forks in the middle of a call.

Run with ``make attack``. Every test prints its counts.
"""

import gc
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

import icsd

pytestmark = [pytest.mark.attack, pytest.mark.timeout(3600)]

LOSSES = ["mse", "kl", "smooth_l1", "pkt", "rkd_angle", icsd.losses.CKA()]
SHAPES = [(1, 3), (7, 65), (16, 1024), (33, 20), (130, 40), (600, 8)]


def work(number):
    """Return the loss and the gradients of one call, which differs by its number."""
    draw = random.Random(number)
    loss, (samples, dim) = draw.choice(LOSSES), draw.choice(SHAPES)
    generator = torch.Generator().manual_seed(number)
    dtype = draw.choice([torch.float32, torch.float64, torch.bfloat16])
    stages = [torch.randn(samples, width, generator=generator).to(dtype) for width in (dim, dim + 3, 2 * dim)]
    stages = [stage.requires_grad_() for stage in stages]
    value = icsd.interstage_distillation_loss(stages, loss)
    value.sum().backward()
    return [value.detach(), *(stage.grad for stage in stages if stage.grad is not None)]


def equal(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


def test_concurrent_calls_are_equal_bit_for_bit():
    expected = [work(number) for number in range(96)]
    counts = dict.fromkeys(range(8), 0)
    differing = []

    def repeat(thread):
        draw = random.Random(thread)
        for _ in range(1250):
            number = draw.randrange(len(expected))
            counts[thread] += 1
            if not equal(work(number), expected[number]):
                differing.append(number)

    threads = [threading.Thread(target=repeat, args=(thread,)) for thread in counts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"concurrent calls: {sum(counts.values())} in {len(threads)} threads, {len(differing)} differ")
    assert sum(counts.values()) == 10_000
    assert not differing


def resident():
    """Return the memory of this process in bytes."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("loss", ["mse", "kl", "rkd_angle"])
def test_calls_leak_nothing(loss):
    inputs = torch.randn(8, 24), torch.randn(8, 31)

    def calls(number):
        for _ in range(number):
            student = inputs[0].clone().requires_grad_()
            icsd.similarity_distillation_loss(student, inputs[1], loss).backward()
            icsd.similarity_distillation_loss(student.detach(), inputs[1], loss)

    calls(2000)
    before = resident()
    calls(20_000)
    grown = resident() - before
    print(f"leaks: {loss}, 40,000 calls, {grown:,} bytes more")
    assert grown < 2 << 20  # 52 bytes a call


def test_errors_leak_nothing():
    student, teacher = torch.randn(8, 24), torch.randn(7, 31)

    def calls(number):
        for _ in range(number):
            with pytest.raises(ValueError, match="samples"):
                icsd.similarity_distillation_loss(student, teacher)

    calls(500)
    before = resident()
    calls(10_000)
    grown = resident() - before
    print(f"leaks: 10,000 refused calls, {grown:,} bytes more")
    assert grown < 2 << 20


def test_forks_inside_the_operator_finish():
    expected = work(5)
    stopped = threading.Event()

    def repeat():
        while not stopped.is_set():
            icsd.similarity_distillation_loss(torch.randn(300, 200), torch.randn(300, 100), "kl")

    torch.set_num_threads(2)
    threads = [threading.Thread(target=repeat) for _ in range(2)]
    for thread in threads:
        thread.start()
    ends = []
    try:
        for number in range(40):
            time.sleep(random.Random(number).random() / 50)
            child = os.fork()
            if not child:
                signal.alarm(60)
                os._exit(0 if equal(work(5), expected) else 3)
            ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    finally:
        stopped.set()
        for thread in threads:
            thread.join()
        torch.set_num_threads(1)
    print(f"forks: {len(ends)}, of which {ends.count(0)} computed the same and ended")
    assert ends == [0] * 40
