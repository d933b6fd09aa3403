"""Losses of similarities to banks, whose rows are on all ranks.

Each rank compares its own samples with a bank that is the same on all ranks, so no features travel.
"""

from __future__ import annotations

from torch import Tensor

from icsd.losses import CustomLoss, distill_to_banks
from icsd.losses.gram import centered
from icsd.ops.banks import distill as distill_on_one_rank
from icsd.ops.distributed.call import Call
from icsd.ops.distributed.collectives import Shares, centered_over_ranks, gather_samples, sum_over_ranks


def distill(shares: Shares, call: Call) -> Tensor:
    """Return the loss of the samples of all ranks, `(*B)` and replicated.

    Args:
        shares: The shares of the ranks in the batch.
        call: The call, with student, teacher, bank of the student and bank of the teacher.
    """
    student, teacher, *banks = call.tensors
    if call.center:
        student, teacher = (centered_over_ranks(shares, x) for x in (student, teacher))
        banks = map(centered, banks)
    student_bank, teacher_bank = banks
    if isinstance(call.loss, CustomLoss):  # a function of whole matrices
        similarity = call.backend.similarity_to(student, student_bank, call.eps)
        target = call.backend.similarity_to(teacher, teacher_bank, call.eps)
        return distill_to_banks(gather_samples(shares, similarity), gather_samples(shares, target), call.loss)
    columns = student_bank.shape[-2]
    own = distill_on_one_rank(student, teacher, student_bank, teacher_bank, call.loss, call.eps, call.backend)
    own = own * call.loss.terms(student.shape[-2], columns)
    return sum_over_ranks(shares.ranks, own) / max(1, call.loss.terms(shares.total, columns))
