"""What the operator is held against: the same losses in PyTorch, each in its best honest form; the tests' peers too."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from icsd.ops.divergences import Divergence


def plain_similarity(x: Tensor) -> Tensor:
    """What one writes first: normalised copies and their product."""
    x = F.normalize(x, dim=-1, eps=1e-8)
    return x @ x.mT


def plain_loss(student: Tensor, teacher: Tensor, divergence: Divergence) -> Tensor:
    """The divergence of normalised copies' products."""
    s, t = plain_similarity(student), plain_similarity(teacher)
    if divergence.name == "mse":
        return F.mse_loss(s, t)
    if divergence.name == "smooth_l1":
        return F.smooth_l1_loss(s, t, beta=divergence.beta)
    log_p = F.log_softmax(s / divergence.student_temperature, dim=-1)
    log_q = F.log_softmax(t / divergence.teacher_temperature, dim=-1)
    return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


class CompositeMSE(torch.autograd.Function):
    """The Gram trick in PyTorch: no normalised copy, an analytic backward of one product, for `mse`."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor) -> Tensor:
        gram = student @ student.mT
        inverse = gram.diagonal().rsqrt()
        target = teacher @ teacher.mT
        target_inverse = target.diagonal().rsqrt()
        similarity = gram.mul_(inverse[:, None]).mul_(inverse)
        difference = similarity - target.mul_(target_inverse[:, None]).mul_(target_inverse)
        n = len(student)
        coefficients = difference * (4 / (n * n))
        coefficients.fill_diagonal_(0)
        projection = (coefficients * similarity).sum(1)
        coefficients.mul_(inverse[:, None]).mul_(inverse)
        coefficients.diagonal().sub_(projection * inverse.square())
        ctx.save_for_backward(student, coefficients)
        return difference.square_().mean()

    @staticmethod
    def backward(ctx, grad: Tensor):
        student, coefficients = ctx.saved_tensors
        return torch.mm(coefficients * grad, student, out=torch.empty_like(student)), None
