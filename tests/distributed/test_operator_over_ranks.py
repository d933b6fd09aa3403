"""The operator over several ranks against one process with the whole batch: loss, gradients, second derivatives."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import icsd
from icsd.losses import CC, DIST, KL, LOSSES, MSE, PKT, SP, RKDAngle, SmoothL1
from icsd.ops.distributed import Problem, choose_schedule, force_schedule

# The samples of each rank. Some have none.
SHARES = {1: [7], 2: [5, 2], 3: [1, 4, 2], 4: [2, 0, 4, 1]}
DIMS = [5, 13, 6]  # fewer than 4 features a rank, and not divisible


def features(n, dims=DIMS, groups=(), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(*groups, n, dim) for dim in dims]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def own(group, tensors):
    """Return the samples of this rank."""
    shares = SHARES[dist.get_world_size(group)]
    rank = dist.get_rank(group)
    return [tensor.split(shares, -2)[rank].clone() for tensor in tensors]


def loss_and_gradients(stages, group=None, schedule=None, banks=(), **options):
    """Return the loss and its gradients, as they are after the average over ranks."""
    leaves = [stage.requires_grad_() for stage in stages]
    with force_schedule(schedule):
        if banks:
            names = ("student_bank", "teacher_bank")
            banks = dict(zip(names, banks, strict=True))
            loss = icsd.similarity_distillation_loss(*leaves, process_group=group, **banks, **options)
        else:
            loss = icsd.interstage_distillation_loss(leaves, process_group=group, **options)
        size = dist.get_world_size(group) if group else 1
        grads = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
    return loss.detach(), [None if grad is None else grad / size for grad in grads]


def on_ranks(group, stages, **options):
    return loss_and_gradients(own(group, stages), group, **options)


def call_on_ranks(group, stages, options):
    return on_ranks(group, stages, **options)


def check(ranks, size, stages, tolerance=1e-12, banks=(), **options):
    """Compare all ranks with one process."""
    results = ranks.run(size, call_on_ranks, stages, {**options, "banks": banks})
    alone = {name: value for name, value in options.items() if name != "schedule"}
    loss, grads = loss_and_gradients([stage.clone() for stage in stages], banks=banks, **alone)
    for value, _ in results:
        torch.testing.assert_close(value, loss, rtol=tolerance, atol=tolerance)
    for k, grad in enumerate(grads):
        parts = [own[k] for _, own in results]
        if grad is None:
            assert parts == [None] * size
        else:
            assert {part.dtype for part in parts} == {stages[k].dtype}
            torch.testing.assert_close(
                torch.cat(parts, -2), grad, rtol=tolerance, atol=tolerance * grad.abs().max().item()
            )


ALL = [
    *LOSSES,
    CC("bilinear"),
    PKT("code"),
    MSE(include_diagonal=False),
    KL(0.05, 0.02, False),
    RKDAngle("code"),
    CC(mode="code"),
]
BY_ROWS = [
    "mse",
    MSE("teacher"),
    "kl",
    SmoothL1(0.2, 0.1),
    SP(False),
    CC(),
    "pkt",
    "dist",
    MSE(include_diagonal=False),
    KL(0.05, 0.02, False),
    DIST(False),
]


@pytest.mark.parametrize("loss", ALL, ids=str)
def test_slices_of_every_loss(loss, ranks):
    check(ranks, 3, features(7), loss=loss, schedule="slices", weights=[0.5, 2.0])


@pytest.mark.parametrize("loss", BY_ROWS, ids=str)
@pytest.mark.parametrize("size", [2, 4])
def test_ring_of_losses_by_rows(loss, size, ranks):
    check(ranks, size, features(7), loss=loss, schedule="ring", weights=[0.5, 2.0], detach_teacher=False)


@pytest.mark.parametrize("loss", ["dist", DIST(False)], ids=str)
def test_ring_of_correlations_of_crowded_similarities(loss, ranks):
    stages = [1 + 3e-4 * stage for stage in features(7)]  # similarities that differ by 1e-7
    check(ranks, 4, stages, tolerance=1e-6, loss=loss, schedule="ring", detach_teacher=False)


def test_ring_of_samples_shorter_than_eps(ranks):
    stages = features(7)
    stages[0][2] *= 0.01
    stages[2][:3] *= 0.01
    check(ranks, 2, stages, loss="sp", schedule="ring", weights=[0.5, 2.0], eps=0.9)


@pytest.mark.parametrize(
    ("schedule", "loss"), [("moments", "mse"), ("moments", MSE(include_diagonal=False)), ("gather", "kl")], ids=str
)
def test_moments_and_gather(schedule, loss, ranks):
    check(ranks, 4, features(7), loss=loss, schedule=schedule, weights=[0.5, 2.0], detach_teacher=False)


@pytest.mark.parametrize("schedule", ["slices", "moments", "ring", "gather"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_groups_centering_and_reduction(schedule, size, ranks):
    stages = features(7, groups=(2, 3))
    stages[0][1, 2, 3] = 0
    stages[1] += 3
    check(ranks, size, stages, schedule=schedule, center=True, reduction="sum", teacher=0)
    check(ranks, size, stages, schedule=schedule, reduction="none", detach_teacher=False)


@pytest.mark.parametrize("center", [False, True])
def test_banks_that_are_the_same_on_all_ranks(center, ranks):
    stages, banks = features(7, (5, 3), (2,)), features(4, (5, 3), (2,), seed=1)
    for loss in ("kl", "mse", PKT(), squared):
        check(ranks, 3, stages, banks=banks, loss=loss, center=center, reduction="sum")


def squared(similarity, target):
    """Return a loss of whole matrices that is no mean over rows."""
    return (similarity - target).square().sum((-2, -1)).sqrt()


def test_a_function_as_a_loss(ranks):
    check(ranks, 2, features(7), loss=squared)


@pytest.mark.parametrize("schedule", ["slices", "ring", "moments", "gather"])
def test_float32_has_at_most_twice_the_error_of_one_process(schedule, ranks):
    exact = features(7, (40, 700))
    rounded = [stage.float() for stage in exact]
    _, truth = loss_and_gradients([stage.double() for stage in rounded])
    _, alone = loss_and_gradients([stage.clone() for stage in rounded])
    parts = ranks.run(4, call_on_ranks, rounded, {"schedule": schedule})
    mine = torch.cat([grads[0] for _, grads in parts])
    assert (mine - truth[0]).norm() <= 2 * (alone[0] - truth[0]).norm() + 1e-9 * truth[0].norm()


@pytest.mark.parametrize("schedule", ["slices", "ring", "moments", "gather"])
def test_mixed_half_precision(schedule, ranks):
    stages = features(7, (40, 33, 50))
    stages = [
        stage.to(dtype) for stage, dtype in zip(stages, (torch.bfloat16, torch.float32, torch.float16), strict=True)
    ]
    check(ranks, 3, stages, tolerance=1e-2, schedule=schedule)


def with_constants_of_inference_mode(group, stages, schedule):
    """Return the loss in inference mode, and the gradient of the first stage beside others that were made there."""
    with torch.inference_mode():
        made = own(group, stages)
        with force_schedule(schedule):
            value = icsd.interstage_distillation_loss(made, process_group=group)
    first = own(group, stages)[0].requires_grad_()
    with force_schedule(schedule):
        loss = icsd.interstage_distillation_loss([first, *made[1:]], process_group=group)
    return value.clone(), torch.autograd.grad(loss, first)[0] / dist.get_world_size(group)


@pytest.mark.parametrize("schedule", ["slices", "ring", "moments", "gather"])
def test_inference_mode(schedule, ranks):
    stages = features(7)
    loss, (gradient, *_) = loss_and_gradients([stage.clone() for stage in stages])
    parts = ranks.run(2, with_constants_of_inference_mode, stages, schedule)
    for value, _ in parts:
        torch.testing.assert_close(value, loss)
    torch.testing.assert_close(torch.cat([part for _, part in parts]), gradient)


def second_derivatives(stages, group=None, schedule=None, **options):
    """Return the gradients of the squared norm of the gradients, which is a sum over ranks."""
    size = dist.get_world_size(group) if group else 1
    leaves = [stage.requires_grad_() for stage in stages]
    with force_schedule(schedule):
        loss = icsd.interstage_distillation_loss(leaves, process_group=group, detach_teacher=False, **options)
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        return torch.autograd.grad(sum((grad / size).square().sum() for grad in grads), leaves)


def second_derivatives_on_ranks(group, stages, options):
    return second_derivatives(own(group, stages), group, **options)


@pytest.mark.parametrize(
    ("schedule", "loss"), [("slices", "kl"), ("ring", "kl"), ("moments", "mse"), ("gather", "dist")], ids=str
)
@pytest.mark.parametrize("center", [False, True])
def test_second_derivatives(schedule, loss, center, ranks):
    stages = features(7)
    truth = second_derivatives([stage.clone() for stage in stages], loss=loss, center=center)
    parts = ranks.run(4, second_derivatives_on_ranks, stages, {"schedule": schedule, "loss": loss, "center": center})
    for k, gradient in enumerate(truth):
        torch.testing.assert_close(torch.cat([own[k] for own in parts], -2), gradient, rtol=1e-11, atol=1e-12)


def network():
    torch.manual_seed(0)
    return torch.nn.ModuleList([torch.nn.Linear(6, 31), torch.nn.Linear(6, 20)]).double()


class TwoStages(torch.nn.Module):
    """A network with two outputs."""

    def __init__(self):
        super().__init__()
        self.stages = network()

    def forward(self, x):
        return [stage(x).tanh() for stage in self.stages]


def weights_under_ddp(group, x, criterion):
    """Return the gradients of weights that `DistributedDataParallel` averages."""
    criterion = copy.deepcopy(criterion)
    criterion.process_group = group
    model = DistributedDataParallel(TwoStages(), process_group=group)
    criterion(model(own(group, [x])[0])).backward()
    return [weight.grad for weight in model.parameters()]


@pytest.mark.parametrize("size", [2, 3])
def test_weights_under_ddp_get_the_gradient_of_one_process(size, ranks):
    (x,) = features(7, [6])
    criterion = icsd.InterstageDistillationLoss("kl", detach_teacher=False)
    model = TwoStages()
    criterion(model(x)).backward()
    for grads in ranks.run(size, weights_under_ddp, x, criterion):
        torch.testing.assert_close(grads, [weight.grad for weight in model.parameters()], rtol=1e-12, atol=1e-14)


def similarity_on_ranks(group, x):
    (x,) = own(group, [x])
    similarity = icsd.cross_sample_similarity(x.requires_grad_(), center=True, process_group=group)
    (gradient,) = torch.autograd.grad(similarity.pow(3).sum(), x)
    return similarity.detach(), gradient / dist.get_world_size(group)


def test_similarities_of_all_ranks(ranks):
    (x,) = features(7, [5], (2,))
    similarity = icsd.cross_sample_similarity(x.requires_grad_(), center=True)
    (gradient,) = torch.autograd.grad(similarity.pow(3).sum(), x)
    results = ranks.run(3, similarity_on_ranks, x.detach())
    for value, _ in results:
        torch.testing.assert_close(value, similarity, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([part for _, part in results], -2), gradient, rtol=1e-11, atol=1e-12)


def test_empty_batches_and_features(ranks):
    results = ranks.run(2, call_on_ranks, features(7, [0, 3]), {"schedule": "slices"})
    assert [value.isfinite().item() for value, _ in results] == [True, True]
    for value, (gradient, _) in ranks.run(2, no_samples):
        assert (value.item(), gradient.shape) == (0, (0, 5))


def no_samples(group):
    return loss_and_gradients(features(0, [5, 3]), group)


def compiled_on_ranks(group, stages):
    torch._dynamo.reset()
    stages = own(group, stages)

    @torch.compile(backend="eager")
    def step(stages):
        return 2 * icsd.interstage_distillation_loss([2 * stage for stage in stages], "kl", process_group=group)

    grads = [stage.requires_grad_() for stage in stages]
    return [grad / dist.get_world_size(group) for grad in torch.autograd.grad(step(stages), grads[:-1])]


def test_torch_compile_breaks_the_graph_at_the_call(ranks):
    stages = features(7)
    _, truth = loss_and_gradients([stage.clone() for stage in stages], loss="kl")
    parts = ranks.run(2, compiled_on_ranks, stages)
    for k in range(2):
        torch.testing.assert_close(torch.cat([part[k] for part in parts]), 2 * truth[k], rtol=1e-11, atol=1e-13)


def test_the_schedule_is_that_of_least_cost():
    few = Problem(KL(), [8] * 8, [65536, 262144])
    assert choose_schedule(few) == "slices"
    assert choose_schedule(Problem(MSE(), [8192] * 8, [128, 256])) == "moments"
    assert choose_schedule(Problem(KL(), [65536] * 8, [128, 256])) == "ring"
    assert choose_schedule(Problem(KL(), [64, 64], [16, 16])) == "gather"
    assert choose_schedule(Problem(RKDAngle(), [65536] * 8, [128, 256])) == "gather"
    with force_schedule("ring"):
        assert choose_schedule(few) == "ring"
        assert choose_schedule(Problem(RKDAngle(), [8] * 8, [65536, 262144])) == "slices"


def test_the_examples_of_the_documentation_run():
    text = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
    try:
        exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), {})
    finally:
        dist.destroy_process_group()
