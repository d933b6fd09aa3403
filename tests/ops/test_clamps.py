"""Clamps and margins on the CPU, and values of them that make no sense."""

import pytest
import torch
from conformance.clamps import *  # noqa: F403

import icsd
from icsd.losses import MSE, SmoothL1, make_loss


@pytest.mark.parametrize("loss", [MSE("both"), MSE("teacher", include_diagonal=False), SmoothL1(0, 0.25)])
def test_kernel_parameters_tell_the_loss(loss):
    assert type(loss).from_kernel_parameters(loss.kernel_parameters()) == loss


@pytest.mark.parametrize(
    ("name", "parameters", "match"),
    [
        ("mse", {"clamp": "student"}, "mse: clamp must be 'none' or 'both' or 'teacher', got 'student'"),
        ("mse", {"clamp": True}, "mse: clamp must be 'none' or 'both' or 'teacher', got True"),
        ("smooth_l1", {"margin": -0.1}, r"smooth_l1: margin must be in \[0, 2\), got -0.1"),
        ("smooth_l1", {"margin": 2.0}, "no two similarities differ by more than 2"),
        ("smooth_l1", {"margin": float("nan")}, r"margin must be in \[0, 2\), got nan"),
        ("smooth_l1", {"beta": -1.0}, "smooth_l1: beta must be a finite number >= 0, got -1.0"),
    ],
)
def test_values_out_of_range(name, parameters, match):
    with pytest.raises(ValueError, match=match):
        make_loss(name, **parameters)


def test_compiled_and_mapped():
    x, y = torch.randn(3, 6, 5), torch.randn(3, 6, 4)
    expected = icsd.similarity_distillation_loss(x, y, MSE("teacher"), reduction="none")
    compiled = torch.compile(
        lambda x, y: icsd.similarity_distillation_loss(x, y, MSE("teacher"), reduction="none"),
        fullgraph=True,
        backend="aot_eager",
    )
    torch.testing.assert_close(compiled(x, y), expected)
    mapped = torch.vmap(lambda x, y: icsd.similarity_distillation_loss(x, y, MSE("teacher")))(x, y)
    torch.testing.assert_close(mapped, expected)


def test_banks_are_clamped_too():
    x, y, bank = torch.randn(5, 4), torch.randn(5, 4), torch.randn(9, 4)
    s, t = (icsd.cross_sample_similarity(z, bank) for z in (x, y))
    loss = icsd.similarity_distillation_loss(x, y, MSE("both"), student_bank=bank, teacher_bank=bank)
    torch.testing.assert_close(loss, (s.relu() - t.relu()).square().mean())
