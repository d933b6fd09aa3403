"""Losses of similarities to banks: sums over rows, then gradients, each in one pass over the banks.

A loss of elements makes the sums together with the student's gradient; `kl` needs the sums before any gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from icsd.losses import SimilarityLoss
from icsd.losses.gram import compute_dtype
from icsd.ops.contract import Spec, is_same, unit_dtype
from icsd.ops.triton.kernels.banks import (
    LARGEST_DIM,
    Operands,
    bank_gradients,
    bank_summaries,
    merge_summaries,
)
from icsd.ops.triton.kernels.features import Features
from icsd.ops.triton.kernels.norms import compute_inverse_norms, normalize_backward
from icsd.ops.triton.runtime import as_groups


def takes(features: Sequence[Tensor], wanted: Sequence[bool]) -> bool:
    """Return whether the kernels hold the gradients that are wanted: those of features of at most `LARGEST_DIM`."""
    largest = LARGEST_DIM[compute_dtype(*features)]
    return all(x.shape[-1] <= largest for x, want in zip(features, wanted, strict=True) if want)


def distill(
    features: Sequence[Tensor], wanted: Sequence[bool], loss: SimilarityLoss, eps: float
) -> tuple[Tensor, list[Tensor]]:
    """Return the mean loss of each group, `(*B)`, and its gradients with respect to the features that are wanted.

    Args:
        features: Student, teacher, bank of the student and bank of the teacher.
        wanted: The features whose gradients are wanted.
        loss: The loss: `kl`, `mse` or `smooth_l1`.
        eps: The least norm of a sample.
    """
    dtype = compute_dtype(*features)
    spec = Spec(loss.name, loss.kernel_parameters(), (1.0,), eps, any(wanted), "streamed")
    student, teacher, *of_banks = [as_groups(x) for x in features]
    queries, banks = _operands([student, teacher], dtype, eps), _operands(of_banks, dtype, eps)
    grads = [
        x.new_empty(x.shape, dtype=unit_dtype(x)) if want else None for x, want in zip(features, wanted, strict=True)
    ]
    outs = [None if grad is None else as_groups(grad) for grad in grads]
    at_once = outs[0] is not None and spec.loss != "kl"
    statistics = None
    if not at_once:
        values, statistics = merge_summaries(bank_summaries(queries, banks, spec, dtype), banks.samples, spec)
    for number, out in enumerate(outs):
        if out is None:
            continue
        of_bank, of_teacher = number >= 2, number % 2 == 1
        own, other = (banks, queries) if of_bank else (queries, banks)
        product, summaries = bank_gradients(
            own,
            other,
            statistics,
            spec,
            dtype,
            of_bank=of_bank,
            of_teacher=of_teacher,
            with_summaries=at_once and number == 0,
            out=out,
        )
        normalize_backward(product, own[of_teacher], None, out, eps)
        if summaries is not None:
            values, _ = merge_summaries(summaries, banks.samples, spec)
    return values.sum(-1).view(features[0].shape[:-2]), [grad for grad in grads if grad is not None]


def _operands(pair: Sequence[Tensor], dtype, eps: float) -> Operands:
    """Return the features of student and teacher with their inverse norms, made once if both are the same tensor."""
    student, teacher = [Features.of(x, x.new_empty(x.shape[:2], dtype=dtype)) for x in pair]
    if is_same(*pair):
        teacher = student
    compute_inverse_norms([student] if teacher is student else [student, teacher], eps)
    return Operands(student, teacher)
