from functools import partial

import pytest
import torch

from benchmarks.banks import BankCase, BankWorkload
from benchmarks.peers import (
    IMPLEMENTATIONS,
    OF_GROUPS,
    TORCHDISTILL,
    implementations,
    mean_of_groups,
    plain_loss,
    public_loss,
)
from benchmarks.workloads import Case, Workload
from icsd import similarity_distillation_loss
from icsd.losses import MSE, make_loss


def loss_and_gradient(loss, student, teacher):
    student = student.clone().requires_grad_()
    value = loss(student, teacher)
    return value.detach(), torch.autograd.grad(3 * value, student)[0]


@pytest.mark.parametrize("loss", TORCHDISTILL)
def test_torchdistill_computes_the_code_mode(loss):
    pytest.importorskip("torchdistill")
    torch.manual_seed(0)
    student, teacher = torch.randn(9, 50, dtype=torch.float64), torch.randn(9, 70, dtype=torch.float64)
    ours, theirs = implementations(Case(9, 50, loss=loss).definition).values()
    for got, want in zip(
        loss_and_gradient(ours, student, teacher), loss_and_gradient(theirs, student, teacher), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-9)


def check_peer(implementation, loss, *shape):
    torch.manual_seed(0)
    student, teacher = torch.randn(*shape, 50) + 1, torch.randn(*shape, 70) - 1

    def definition(s, t):
        return similarity_distillation_loss(s, t, loss, backend="reference")

    true_loss, true_gradient = loss_and_gradient(definition, student.double(), teacher.double())
    with torch.compiler.set_stance("force_eager"):
        peer = implementations(loss, groups=len(student) if len(shape) > 1 else 1)[implementation]
        for _ in range(2):  # the second time with whatever the first one kept
            value, gradient = loss_and_gradient(peer, student, teacher)
            torch.testing.assert_close(value.double(), true_loss, rtol=1e-4, atol=1e-7)
            torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("loss", ["mse", "kl"])
@pytest.mark.parametrize("n", [1, 16, 65])
def test_every_peer_computes_the_loss(n, loss, implementation):
    check_peer(implementation, make_loss(loss), n)


@pytest.mark.parametrize("implementation", OF_GROUPS)
@pytest.mark.parametrize("loss", ["gram_anchoring", "kl", "cka"])
@pytest.mark.parametrize("n", [9, 65])
def test_every_peer_of_patch_tokens_computes_the_loss(n, loss, implementation):
    check_peer(implementation, Case(n, 50, loss=loss).definition, 3, n)


@pytest.mark.parametrize("loss", ["gram_anchoring", "kl", "cka"])
def test_peers_of_patch_tokens_in_bfloat16(loss):
    with torch.compiler.set_stance("force_eager"):
        Workload(Case(65, 20, torch.bfloat16, loss, groups=3))  # checks them against each other


def test_one_group_after_the_other():
    student, teacher = torch.randn(3, 5, 4), torch.randn(3, 5, 6)
    loss = partial(public_loss, loss=MSE())
    torch.testing.assert_close(
        mean_of_groups(partial(plain_loss, loss=MSE()), student, teacher), loss(student, teacher)
    )


@pytest.mark.parametrize("one_bank", [False, True])
def test_formulas_of_banks(one_bank):
    BankWorkload(BankCase(7, 300, 8, one_bank=one_bank), ("icsd", "plain"))  # checks them against each other
