"""The schedule `ring`: the samples of each rank visit all others, which compare their own samples with them.

Each rank has the rows of its samples. The forward pass keeps a few sums for each row; the backward pass sends the
samples round again, together with the derivatives with respect to these sums. S is symmetric, so a rank that has the
derivatives of both rows and columns has the whole gradient of its samples: no gradient travels. The next samples are on
their way while a rank works on those before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from icsd.losses.gram import compute_dtype, inverse_norms, no_autocast, savable
from icsd.ops.autograd import wanted_gradients
from icsd.ops.distributed import slices
from icsd.ops.distributed.call import Call
from icsd.ops.distributed.collectives import Shares, centered_over_ranks
from icsd.ops.distributed.row_losses import RowLoss, row_loss

# The bytes of a tile of S. A few such tiles are in memory at a time.
TILE_BYTES = 1 << 24

_LEAST = -1e30  # below all references, and finite


class _Ring(NamedTuple):
    """A call over the ranks of a ring.

    Attributes:
        shares: The shares of the ranks in the batch.
        call: The call, with centered features if it asks for them.
        rows: Its loss by rows.
        wanted: True for each stage that gets a gradient.
    """

    shares: Shares
    call: Call
    rows: RowLoss
    wanted: Sequence[bool]

    @property
    def columns(self) -> int:
        """The length of the rows."""
        return self.shares.total - (not self.call.loss.include_diagonal)


def distill(shares: Shares, call: Call) -> Tensor:
    """Return the loss of the samples of all ranks, `(*B)` and replicated."""
    if call.center:
        call = call._replace(tensors=[centered_over_ranks(shares, stage) for stage in call.tensors], center=False)
    ring = _Ring(
        shares, call, row_loss(call.loss, call.eps, compute_dtype(*call.tensors)), wanted_gradients(call.tensors)
    )
    return _Distill.apply(ring, *call.tensors)


class _Distill(torch.autograd.Function):
    """Distributed features to the replicated loss."""

    @staticmethod
    def forward(ctx, ring: _Ring, *stages: Tensor) -> Tensor:
        sums, references = _row_sums(ring, stages)
        trains = any(ring.wanted)
        with torch.set_grad_enabled(trains):
            value = _value_of_rows(ring, sums.requires_grad_(trains), references)
            derivatives = torch.autograd.grad(value.sum(), sums) if trains else ()
        if trains:
            ctx.ring = ring
            ctx.save_for_backward(references, *derivatives, *savable(*stages))
        total = value.detach().clone()
        dist.all_reduce(total, group=ring.shares.ranks.group)
        return total.to(compute_dtype(*stages))

    @staticmethod
    def backward(ctx, grad: Tensor):
        references, derivatives, *stages = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, *_differentiable_gradients(ctx.ring, stages, grad)
        derivatives = derivatives * grad.double()[..., None, None]
        return None, *_gradients(ctx.ring, stages, references, derivatives)


def _differentiable_gradients(ring: _Ring, stages: Sequence[Tensor], grad: Tensor) -> list[Tensor | None]:
    """Return the gradients as functions of `grad` and the stages. They take the N x N matrices."""
    stages = [stage.view_as(stage) for stage in stages]
    value = slices.distill(ring.shares, ring.call._replace(tensors=stages))
    inputs = [stage for stage, want in zip(stages, ring.wanted, strict=True) if want]
    grads = iter(torch.autograd.grad(value, inputs, grad, create_graph=True))
    return [next(grads) if want else None for want in ring.wanted]


def _row_sums(ring: _Ring, stages: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the sums and the references of the rows of each student.

    Returns:
        `(students, count, *B, n, 1)` in float64, and `(students, R, *B, n, 1)`.
    """
    rows, students = ring.rows, len(stages) - 1
    own = _comparable(ring, stages)
    shape = (*own[-1].shape[:-1], 1)
    sums = own[-1].new_zeros((students, rows.count, *shape), dtype=torch.float64)
    references = own[-1].new_full((students, 2 if rows.references else 0, *shape), _LEAST)
    for source, visitors in visits(ring.shares, stages):
        others = _comparable(ring, visitors)
        for part in _tiles(own[-1], others[-1]):
            diagonal = _diagonal(ring, part, others[-1], source)
            target = _products(ring, own[-1], others[-1], part, diagonal)
            for k in range(students):
                similarity = _products(ring, own[k], others[k], part, diagonal)
                place = (k, ..., part, slice(None))
                _accumulate(rows, similarity, target, diagonal, sums[place], references[place])
    return sums, references


def _accumulate(
    rows: RowLoss, similarity: Tensor, target: Tensor, diagonal: Tensor | None, sums: Tensor, references: Tensor
) -> None:
    """Add the terms of a tile to the sums of its rows, `(count, *B, n, 1)`, and bring the references up to date."""
    if rows.references:
        newer = torch.maximum(references, rows.references(*_excluded(-torch.inf, diagonal, similarity, target)))
        if rows.rescaled:
            for own, factor in zip(sums, rows.rescaled(references - newer), strict=True):
                own *= factor
        else:
            newer = torch.where(references > _LEAST, references, newer)
        references.copy_(newer)
    for own, term in zip(sums, rows.terms(similarity, target, references), strict=True):
        (term,) = _excluded(0, diagonal, term)
        own += term.sum(-1, keepdim=True, dtype=torch.float64)


def _value_of_rows(ring: _Ring, sums: Tensor, references: Tensor) -> Tensor:
    """Return the part of the rows of this rank in the loss, `(*B)`."""
    if not ring.columns:
        return sums.sum((0, 1, -2, -1)) * 0
    values = [
        weight * ring.rows.value(own.unbind(0), reference.double().unbind(0), ring.columns).sum((-2, -1))
        for weight, own, reference in zip(ring.call.weights, sums, references, strict=True)
    ]
    return torch.stack(values).sum(0) / ring.call.loss.terms(ring.shares.total, ring.columns)


def _gradients(ring: _Ring, stages: Sequence[Tensor], references: Tensor, derivatives: Tensor) -> list[Tensor | None]:
    """Return the gradients of the samples of this rank, from the derivatives with respect to the sums of all rows."""
    own, wanted = _comparable(ring, stages), ring.wanted
    grads = [torch.zeros_like(x) if want else None for x, want in zip(own, wanted, strict=True)]
    students = [k for k in range(len(stages) - 1) if wanted[k] or wanted[-1]]
    for source, visitors in visits(ring.shares, [*stages, references, derivatives]):
        *visitors, their_references, their_derivatives = visitors
        others = _comparable(ring, visitors)
        for part in _tiles(own[-1], others[-1]):
            diagonal = _diagonal(ring, part, others[-1], source)
            target = _products(ring, own[-1], others[-1], part, diagonal)
            for k in students:
                similarity = _products(ring, own[k], others[k], part, diagonal)
                place = (k, ..., part, slice(None))
                by_row = derivatives[place], references[place]
                by_column = their_derivatives[k].mT, their_references[k].mT
                matrices = _derive(ring.rows, similarity, target, diagonal, by_row, by_column, (wanted[k], wanted[-1]))
                for stage, matrix in zip((k, -1), matrices, strict=True):
                    if matrix is not None:
                        grads[stage][..., part, :] += _product(matrix, others[stage])
    return _through_norms(ring, stages, grads)


def _derive(
    rows: RowLoss,
    similarity: Tensor,
    target: Tensor,
    diagonal: Tensor | None,
    by_row: tuple[Tensor, Tensor],
    by_column: tuple[Tensor, Tensor],
    wanted: tuple[bool, bool],
) -> list[Tensor | None]:
    """Return the derivatives of a tile of S and T, as elements of rows of this rank and of columns of another.

    Args:
        rows: The loss.
        similarity: The tile of S.
        target: The tile of T.
        diagonal: The elements that are left out, if any are.
        by_row: The derivatives and the references of the sums of the rows, `(count, *B, n, 1)` and `(R, *B, n, 1)`.
        by_column: Those of the rows that the columns are, `(count, *B, 1, m)` and `(R, *B, 1, m)`.
        wanted: True for S and for T if their derivatives are.
    """
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_(want) for x, want in zip((similarity, target), wanted, strict=True)]
        if rows.references:
            pairs = [
                *zip(rows.terms(*leaves, by_row[1]), by_row[0], strict=True),
                *zip(rows.terms(*leaves, by_column[1]), by_column[0], strict=True),
            ]
        else:
            pairs = [*zip(rows.terms(*leaves, by_row[1]), by_row[0] + by_column[0], strict=True)]
        total = sum((_excluded(0, diagonal, term)[0] * weight.to(term.dtype)).sum() for term, weight in pairs)
        inputs = [leaf for leaf in leaves if leaf.requires_grad]
        grads = iter(torch.autograd.grad(total, inputs, allow_unused=True))
    return [next(grads) if want else None for want in wanted]


def _comparable(ring: _Ring, stages: Sequence[Tensor]) -> list[Tensor]:
    """Return the samples whose products the loss compares: divided by their norms, unless it compares raw products."""
    dtype = compute_dtype(*stages)
    stages = [stage.to(dtype) for stage in stages]
    if ring.rows.raw:
        return stages
    return [x * inverse_norms(x.square().sum(-1), ring.call.eps).unsqueeze(-1) for x in stages]


def _through_norms(ring: _Ring, stages: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the gradients of the stages from those of the samples that the loss compares."""
    with torch.enable_grad():
        leaves = [stage.detach().requires_grad_() for stage in stages]
        compared = _comparable(ring, leaves)
    return [
        None if grad is None else torch.autograd.grad(x, leaf, grad)[0]
        for x, leaf, grad in zip(compared, leaves, grads, strict=True)
    ]


def _tiles(own: Tensor, others: Tensor) -> Iterator[slice]:
    """Return the rows of this rank that are compared with samples of another at a time."""
    rows, columns = own.shape[-2], others.shape[-2]
    if columns == 0:
        return
    groups = math.prod(own.shape[:-2])
    step = max(1, TILE_BYTES // max(1, groups * columns * own.element_size()))
    for first in range(0, rows, step):
        yield slice(first, first + step)


def _diagonal(ring: _Ring, part: slice, others: Tensor, source: int) -> Tensor | None:
    """Return where a tile compares samples with themselves, if the loss leaves that out: `(rows, columns)` or None."""
    if ring.call.loss.include_diagonal or source != ring.shares.ranks.rank:
        return None
    samples = torch.arange(others.shape[-2], device=others.device)
    return samples[part].unsqueeze(-1) == samples


def _products(ring: _Ring, own: Tensor, others: Tensor, part: slice, diagonal: Tensor | None) -> Tensor:
    """Return a tile of S or T. What is left out becomes -1, so that no exponential overflows."""
    products = _product(own[..., part, :], others.mT)
    (products,) = _excluded(-1, diagonal, products)
    return products.double() if ring.rows.wide else products


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return A B in the dtype of B, under autocast too."""
    with no_autocast(b):
        return a.to(b.dtype) @ b


def _excluded(value: float, diagonal: Tensor | None, *matrices: Tensor) -> Sequence[Tensor]:
    """Return matrices with a value on the diagonal, or as they are if it is not left out."""
    return matrices if diagonal is None else [matrix.masked_fill(diagonal, value) for matrix in matrices]


def visits(shares: Shares, tensors: Sequence[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
    """Return the tensors `(..., n, D)` of each rank, beginning with this one, together with its number.

    Each rank passes on what it has to the next one while its caller uses it.
    """
    ranks = shares.ranks
    after, before = (dist.get_global_rank(ranks.group, (ranks.rank + step) % ranks.size) for step in (1, -1))
    block, source = [tensor.contiguous() for tensor in tensors], ranks.rank
    while True:
        following = (source - 1) % ranks.size
        work = []
        if following != ranks.rank:
            arriving = [x.new_empty((*x.shape[:-2], shares.samples[following], x.shape[-1])) for x in block]
            operations = [dist.P2POp(dist.isend, x, after, ranks.group) for x in block if x.numel()]
            operations += [dist.P2POp(dist.irecv, x, before, ranks.group) for x in arriving if x.numel()]
            work = dist.batch_isend_irecv(operations) if operations else []
        yield source, block
        if following == ranks.rank:
            return
        for each in work:
            each.wait()
        block, source = arriving, following
