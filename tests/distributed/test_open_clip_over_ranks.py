"""The loss of open_clip over ranks, against the same of all samples in one process."""

import pytest
import torch
import torch.distributed as dist
from inputs import normal
from torch.nn import functional as F

from icsd.compat.open_clip import DistillClipLoss

RANKS, EACH = 4, 3


def features():
    """Return images and texts of a student and of a teacher, of all ranks."""
    return [
        F.normalize(normal(RANKS * EACH, dim, seed=k, dtype=torch.float64), dim=-1)
        for k, dim in enumerate((5, 5, 7, 7))
    ]


def losses_of(criterion, tensors):
    """Return the losses, and the gradients of images and texts of the student."""
    student = [x.clone().requires_grad_() for x in tensors[:2]]
    losses = criterion(*student, 3.0, *tensors[2:], 5.0)
    return torch.stack(losses).detach(), torch.autograd.grad(losses[0] + 2 * losses[1], student)


def of_rows(rank):
    """Return the losses of the rows of one rank by the public formula, and their gradients; all columns are constants.

    This is what open_clip computes with `local_loss=True, gather_with_grad=False`.
    """
    images, texts, *teacher = features()
    rows = slice(rank * EACH, (rank + 1) * EACH)
    student = [x[rows].clone().requires_grad_() for x in (images, texts)]
    labels = torch.arange(rows.start, rows.stop)
    contrastive = distill = 0
    for own, columns, taught, targets in ((0, texts, *teacher), (1, images, *teacher[::-1])):
        # icsd normalizes once more, which leaves out the gradient along a sample.
        logits = 3 * F.normalize(student[own], dim=-1) @ columns.T
        taught_logits = 5 * taught[rows] @ targets.T
        contrastive = contrastive + F.cross_entropy(logits, labels) / 2
        distill = distill + F.cross_entropy(logits, taught_logits.softmax(-1)) / 2
    return torch.stack((contrastive, distill)).detach(), torch.autograd.grad(contrastive + 2 * distill, student)


def of_rank(group, arguments):
    rank = dist.get_rank(group)
    own = [x[rank * EACH : (rank + 1) * EACH] for x in features()]
    return losses_of(DistillClipLoss(**arguments, rank=rank, world_size=RANKS), own)


@pytest.mark.parametrize("gather_with_grad", [False, True])
@pytest.mark.parametrize("local_loss", [False, True])
def test_images_and_texts_over_ranks(local_loss, gather_with_grad, ranks):
    expected, gradients = losses_of(DistillClipLoss(), features())
    arguments = {"local_loss": local_loss, "gather_with_grad": gather_with_grad}
    results = ranks.run(RANKS, of_rank, arguments)
    if local_loss:
        torch.testing.assert_close(sum(losses for losses, _ in results) / RANKS, expected)
    else:
        torch.testing.assert_close([losses for losses, _ in results], [expected] * RANKS)
    if local_loss and not gather_with_grad:  # a part of the gradient is missing, as in the original
        torch.testing.assert_close(results, [of_rows(rank) for rank in range(RANKS)])
        return
    for k, gradient in enumerate(gradients):
        found = torch.cat([own[k] for _, own in results])
        torch.testing.assert_close(found / (RANKS if gather_with_grad else 1), gradient)
