"""Losses of similarities to banks, whose rows are on all ranks.

Each rank compares its own samples with a bank that is the same on all ranks, so no features travel.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from icsd.losses import CustomLoss, SimilarityLoss, distill_to_banks
from icsd.losses.gram import centered
from icsd.ops.banks import distill as distill_on_one_rank
from icsd.ops.distributed.collectives import Shares, centered_over_ranks, gather_samples, sum_over_ranks
from icsd.ops.registry import Backend


def distill(
    shares: Shares, backend: Backend, features: Sequence[Tensor], loss: SimilarityLoss, eps: float, center: bool
) -> Tensor:
    """Return the loss of the samples of all ranks, `(*B)` and replicated.

    Args:
        shares: The shares of the ranks in the batch.
        backend: The backend.
        features: Student, teacher, bank of the student and bank of the teacher.
        loss: The loss.
        eps: The least norm of a sample.
        center: Whether the means of all samples and of each bank are subtracted.
    """
    student, teacher, *banks = features
    if center:
        student, teacher = (centered_over_ranks(shares, x) for x in (student, teacher))
        banks = map(centered, banks)
    student_bank, teacher_bank = banks
    if isinstance(loss, CustomLoss):  # a function of whole matrices
        similarity = backend.similarity_to(student, student_bank, eps)
        target = backend.similarity_to(teacher, teacher_bank, eps)
        return distill_to_banks(gather_samples(shares, similarity), gather_samples(shares, target), loss)
    columns = student_bank.shape[-2]
    own = distill_on_one_rank(student, teacher, student_bank, teacher_bank, loss, eps)
    own = own * loss.terms(student.shape[-2], columns)
    return sum_over_ranks(shares.ranks, own) / max(1, loss.terms(shares.total, columns))
