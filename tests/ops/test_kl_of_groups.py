"""The CPU's `kl` takes other exponentials for groups of usual samples than for the rest: both are the definition."""

import pytest
import torch

import icsd
from icsd.losses import KL

LEAST_SHIFTED = 1 / 32  # kMostInverse of csrc/cpu/kernels/shifted_kl.h


def features(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def results(student, teacher, loss, backend):
    student, teacher = (x.clone().requires_grad_() for x in (student, teacher))
    values = icsd.similarity_distillation_loss(
        student, teacher, loss, reduction="none", detach_teacher=False, backend=backend
    )
    return values, *torch.autograd.grad(values.sum(), (student, teacher))


@pytest.mark.parametrize("samples", [1, 2, 15, 16, 37])
@pytest.mark.parametrize("student_temperature", [1.0, LEAST_SHIFTED, 0.9 * LEAST_SHIFTED])
@pytest.mark.parametrize("teacher_temperature", [0.3, LEAST_SHIFTED, 0.9 * LEAST_SHIFTED])
def test_kl_is_the_definition_at_any_temperature(samples, student_temperature, teacher_temperature):
    student, teacher = features(2, samples, 40, seed=samples), features(2, samples, 30, seed=samples + 1)
    teacher = teacher + 2 * features(2, 1, 30, seed=5)  # rows of unequal sums
    loss = KL(student_temperature, teacher_temperature)
    found, expected = (results(student, teacher, loss, backend) for backend in ("cpu", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rare", [0.0, 1e-11, float("nan")], ids=["zero", "shorter than eps", "NaN"])
@pytest.mark.parametrize("of_teacher", [False, True])
def test_rare_samples_of_one_group_leave_the_others_as_they_are(rare, of_teacher):
    student, teacher = features(5, 21, 40, seed=1).float(), features(5, 21, 30, seed=2).float()
    usual = results(student, teacher, KL(), "cpu")
    (teacher if of_teacher else student)[3, 8] *= rare
    found, expected = (
        results(x, y, KL(), backend)
        for x, y, backend in ((student, teacher, "cpu"), (student.double(), teacher.double(), "reference"))
    )
    others = [0, 1, 2, 4]
    for one, other, true in zip(found, usual, expected, strict=True):
        assert torch.equal(one[others], other[others])
        torch.testing.assert_close(one[3].double(), true[3], rtol=1e-4, atol=1e-6, equal_nan=True)
