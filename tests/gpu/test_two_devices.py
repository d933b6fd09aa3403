"""Losses and training steps of two devices over NCCL, against one device with the whole batch."""

import pytest
import torch
import torch.distributed as dist
from ranks import pool

import icsd
from icsd.ops.distributed import force_schedule
from icsd.team import Team

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are fewer than two CUDA devices")

N, DIMS = 7, [130, 70, 200]
SHARES = [4, 3]


@pytest.fixture(scope="module", params=["cpu:gloo,cuda:nccl", "nccl"])
def ranks(request):
    """Return a pool of two processes with a device each."""
    with pool(2, backend=request.param) as processes:
        yield processes


def device_of(group):
    return torch.device("cuda", dist.get_rank(group)) if torch.cuda.is_available() else torch.device("cpu")


def stages_of():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(N, dim, generator=generator, dtype=torch.float64) for dim in DIMS]


def loss_and_gradients(stages, schedule, loss, group=None):
    """Return the loss and its gradients as they are after the average over ranks, on the CPU."""
    leaves = [stage.requires_grad_() for stage in stages]
    with force_schedule(schedule):
        value = icsd.interstage_distillation_loss(leaves, loss, detach_teacher=False, process_group=group)
        gradients = torch.autograd.grad(value, leaves)
    size = 1 if group is None else dist.get_world_size(group)
    return value.detach().cpu(), [gradient.cpu() / size for gradient in gradients]


def on_a_rank(group, schedule, loss):
    own = [stage.split(SHARES)[dist.get_rank(group)].to(device_of(group)) for stage in stages_of()]
    return loss_and_gradients(own, schedule, loss, group)


@pytest.mark.parametrize(
    ("schedule", "loss"),
    [("slices", "kl"), ("slices", "rkd_angle"), ("ring", "kl"), ("ring", "dist"), ("moments", "mse"), ("gather", "sp")],
)
def test_every_schedule_has_the_gradients_of_one_device(ranks, schedule, loss):
    truth, gradients = loss_and_gradients(stages_of(), None, loss)
    results = ranks.run(2, on_a_rank, schedule, loss)
    for value, _ in results:
        torch.testing.assert_close(value, truth, rtol=1e-11, atol=1e-11)
    for k, gradient in enumerate(gradients):
        together = torch.cat([own[k] for _, own in results])
        torch.testing.assert_close(together, gradient, rtol=1e-11, atol=1e-11 * gradient.abs().max().item())


def disagreement(group):
    own = torch.ones(2, 8 + dist.get_rank(group), device=device_of(group))
    try:
        icsd.cross_sample_similarity(own, process_group=group)
    except ValueError as error:
        return str(error)


def test_ranks_that_disagree_raise_the_same_error(ranks):
    first, second = ranks.run(2, disagreement)
    assert first == second
    assert "process_group: all ranks must make the same call" in first


def helped(group):
    team, device = Team(group), device_of(group)
    mean = torch.full((3,), 2.0 * team.rank, device=device)
    team.average([mean])
    x = torch.full((2, 1), float(team.rank), device=device, requires_grad=True)
    joined = team.samples(x)
    joined.square().sum().backward()
    return mean.tolist(), joined.flatten().tolist(), x.grad.flatten().tolist(), team.any(team.rank == 1)


def test_the_team_averages_joins_and_agrees(ranks):
    for rank, (mean, joined, gradient, some) in enumerate(ranks.run(2, helped)):
        assert mean == [1.0] * 3
        assert joined == [0.0, 0.0, 1.0, 1.0]
        assert gradient == [4.0 * rank] * 2  # of both ranks
        assert some
