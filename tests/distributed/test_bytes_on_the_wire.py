"""The bytes that a rank sends in each pass, as the kernel of the system counts them, against the formulas."""

import time

import pytest
import torch
import torch.distributed as dist

import icsd
from icsd.losses import MSE
from icsd.ops.distributed import Problem, force_schedule

N, DIM, MANY = 3, 1 << 16, 1 << 17  # bytes of headers and small messages do not count beside these


def written():
    """Return the bytes that this process has written, to sockets too."""
    with open("/proc/self/io") as file:
        return int(next(line.split()[1] for line in file if line.startswith("wchar")))


def settled(group):
    """Return the bytes written once all ranks are here and their threads have written all."""
    dist.barrier(group)
    time.sleep(0.05)
    return written()


def sent_by_each_pass(group, schedule, n, dims, dtype):
    generator = torch.Generator().manual_seed(dist.get_rank(group))
    stages = [torch.randn(n, dim, generator=generator).to(dtype).requires_grad_() for dim in dims]
    with force_schedule(schedule):
        before = settled(group)
        loss = icsd.interstage_distillation_loss(stages, process_group=group)
        between = settled(group)
        loss.backward()
        return between - before, settled(group) - between


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [2, 4])
def test_slices_send_about_two_batches_of_a_rank_however_many_ranks(size, dtype, ranks):
    dims = [DIM, MANY]
    own = N * sum(dims) * dtype.itemsize
    for forward, backward in ranks.run(size, sent_by_each_pass, "slices", N, dims, dtype):
        assert forward == pytest.approx(own * (size - 1) / size, rel=0.02)
        assert backward == pytest.approx(N * DIM * dtype.itemsize * (size - 1) / size, rel=0.02)
        assert forward + backward <= 2.2 * own  # the goal for any number of ranks


@pytest.mark.parametrize(("schedule", "rounds"), [("gather", 0), ("ring", 1)])
def test_gathering_and_the_ring_send_the_batches_of_the_other_ranks(schedule, rounds, ranks):
    own = N * (DIM + MANY) * 4
    for forward, backward in ranks.run(4, sent_by_each_pass, schedule, N, [DIM, MANY], torch.float32):
        assert forward == pytest.approx(3 * own, rel=0.02)
        assert backward == pytest.approx(3 * own * rounds, rel=0.02, abs=5000)


def test_moments_do_not_depend_on_the_number_of_samples(ranks):
    dims = (200, 300)
    moments = 8 * (dims[0] * sum(dims) + dims[1] ** 2)
    for n in (100, 1000):
        for forward, backward in ranks.run(4, sent_by_each_pass, "moments", n, dims, torch.float32):
            assert forward == pytest.approx(2 * moments * 3 / 4, rel=0.05)
            assert backward < 5000


@pytest.mark.parametrize("schedule", ["slices", "moments", "ring", "gather"])
def test_the_model_of_costs_tells_what_is_received(schedule, ranks):
    n, dims = (N, [DIM, MANY]) if schedule != "moments" else (100, [200, 300])
    cost = Problem(MSE(), [n] * 4, dims).costs()[schedule]
    sent = [sum(passes) for passes in ranks.run(4, sent_by_each_pass, schedule, n, dims, torch.float32)]
    assert max(sent) == pytest.approx(cost.received, rel=0.05)


def resident(name):
    with open("/proc/self/status") as file:
        return int(next(line.split()[1] for line in file if line.startswith(f"{name}:"))) * 1024


def peak_of_a_step(group, schedule, n, dim):
    """Return the bytes that a step of the loss takes beside features and gradient."""
    student = torch.randn(n, dim, requires_grad=True)
    student.grad = torch.zeros_like(student)
    teacher = torch.randn(n, dim)
    icsd.ops.empty_cache()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before = resident("VmRSS")
    with force_schedule(schedule):
        icsd.similarity_distillation_loss(student, teacher, process_group=group).backward()
    return resident("VmHWM") - before


def test_a_rank_takes_a_third_of_the_memory_of_gathering(ranks):
    slices, gather = (max(ranks.run(4, peak_of_a_step, schedule, 16, 1 << 18)) for schedule in ("slices", "gather"))
    batch = 64 * (1 << 18) * 4
    assert gather > 2 * batch  # all samples of both stages
    assert slices <= gather / 3
