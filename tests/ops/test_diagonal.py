"""The diagonal on the CPU, and who cannot leave it out."""

import pytest
import torch
from conformance.diagonal import *  # noqa: F403

import icsd
from icsd.losses import CC, DIST, KL, LOSSES, MSE, PKT, SP, SmoothL1, make_loss


@pytest.mark.parametrize("loss", [MSE, SmoothL1, KL, DIST])
def test_banks_have_no_diagonal(loss):
    x, bank = torch.randn(3, 4), torch.randn(5, 4)
    with pytest.raises(ValueError, match="include_diagonal must be True with banks, got False"):
        icsd.similarity_distillation_loss(x, x, loss(include_diagonal=False), student_bank=bank, teacher_bank=bank)


def test_every_loss_of_elements_or_rows_has_the_option():
    for name in LOSSES:
        if name in ("cka", "rkd_distance", "rkd_angle"):
            with pytest.raises(ValueError, match="no parameter 'include_diagonal'"):
                make_loss(name, include_diagonal=False)
        else:
            assert not make_loss(name, include_diagonal=False).include_diagonal
            with pytest.raises(ValueError, match=f"{name}: include_diagonal must be True or False, got 'false'"):
                make_loss(name, include_diagonal="false")
            assert make_loss(name).include_diagonal == (name != "pkt")


def test_codes_without_the_diagonal():
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    loss = icsd.similarity_distillation_loss(x, y, CC("bilinear", mode="code", include_diagonal=False))
    difference = (x @ x.mT - y @ y.mT) * (1 - torch.eye(6))
    torch.testing.assert_close(loss, difference.norm() / 30)
    assert PKT(mode="code").include_diagonal
    assert not PKT().include_diagonal


@pytest.mark.parametrize("loss", [MSE(), SP(), DIST(), CC("bilinear", order=3), KL(0.3, include_diagonal=False), PKT()])
def test_kernel_parameters_tell_the_loss(loss):
    assert type(loss).from_kernel_parameters(loss.kernel_parameters()) == loss
