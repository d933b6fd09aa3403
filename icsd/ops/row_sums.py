"""The sums of `kl` over the columns of banks, which come piece by piece.

On the CPU, native kernels read and write each piece once. Elsewhere, PyTorch's operations take their place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from icsd.ops.contract import BankPasses

# exp(60), multiplied by 120 and summed over a billion samples, is below the largest float32, exp(88).
_LARGE_EXPONENT = 60


class Buffers:
    """Memory that every piece writes anew. Fresh memory for every piece would take a CPU as long as its exponentials.

    Args:
        like: A tensor of the dtype and device of the buffers.
    """

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.kept: dict[str, Tensor] = {}

    def get(self, name: str, *shape: int) -> Tensor:
        """Return the buffer of a name; its first shape is the largest."""
        size = math.prod(shape)
        if name not in self.kept:
            self.kept[name] = self.like.new_empty(size)
        return self.kept[name][:size].view(shape)


class RowSums:
    """Sums over the columns of the banks so far, for each row of student and teacher.

    Large exponents are taken relative to the largest ones so far. Smaller ones need no such passes over a piece: they
    are similarities divided by temperatures, whose exponentials and sums float32 holds.

    Args:
        queries: The samples of student and teacher, `(*B, N, D)`, whose products with those of banks are exponents.
        temperatures: The temperatures of both.
        with_bank: True if `of_bank` is asked for.
        buffers: The memory for pieces.

    Attributes:
        rows: The sums in the order of `BankPasses`, of which the next three are views.
        top: The exponents of student and teacher that the sums are relative to, `(*B, N, 1)`; 0 if all are small.
        totals: The sums of exponentials.
        weighted: The sum of the teacher's exponentials times the differences of both exponents.
        of_bank: The sums of exponentials times samples of the student's bank, `(*B, N, D)`, if they are asked for.
    """

    def __init__(
        self, queries: Sequence[Tensor], temperatures: Sequence[float], with_bank: bool, buffers: Buffers
    ) -> None:
        self.buffers = buffers
        self.rows = queries[0].new_zeros(*queries[0].shape[:-1], 5)
        *self.top, total_s, total_t, self.weighted = self.rows.split(1, -1)
        self.totals = [total_s, total_t]
        self.rising = 1 / min(temperatures) > _LARGE_EXPONENT
        if self.rising:
            for top, temperature in zip(self.top, temperatures, strict=True):
                top.fill_(-2 / temperature)
        self.of_bank = [torch.zeros_like(queries[0]) for _ in queries] if with_bank else []

    def add(self, exponents: Sequence[Tensor], bank: Tensor) -> None:
        """Add a piece, whose exponents are overwritten."""
        before = self.rows[..., :2].clone() if self.rising else None
        self._add_exponentials(exponents)
        for k, total in enumerate(self.of_bank):
            if before is not None:
                total *= (before[..., k : k + 1] - self.top[k]).exp()
            add_product(total, exponents[k], bank)

    def _add_exponentials(self, exponents: Sequence[Tensor]) -> None:
        """Replace exponents by exponentials, and add these to the rows."""
        if self.rising:
            self._raise_top(exponents)
        difference = self._below_top(exponents)
        for total, x in zip(self.totals, exponents, strict=True):
            total += x.exp_().sum(-1, keepdim=True)
        self.weighted += difference.mul_(exponents[1]).sum(-1, keepdim=True)

    def _below_top(self, exponents: Sequence[Tensor]) -> Tensor:
        """Take exponents relative to the largest ones, and return the differences of both."""
        if self.rising:
            for x, top in zip(exponents, self.top, strict=True):
                x.sub_(top)
        return torch.sub(exponents[1], exponents[0], out=self.buffers.get("T - S", *exponents[0].shape))

    def _raise_top(self, exponents: Sequence[Tensor]) -> None:
        """Take the sums relative to the largest exponents of this piece and those before it."""
        raised = [torch.maximum(old, x.amax(-1, keepdim=True)) for old, x in zip(self.top, exponents, strict=True)]
        rises = [new - old for new, old in zip(raised, self.top, strict=True)]
        self.weighted += self.totals[1] * (rises[0] - rises[1])
        self.weighted *= (-rises[1]).exp()
        for top, total, new, rise in zip(self.top, self.totals, raised, rises, strict=True):
            total *= (-rise).exp()
            top.copy_(new)

    def gradients(self, exponents: Sequence[Tensor], factors: Sequence[float]) -> Sequence[Tensor]:
        """Return the derivatives of the rows' losses with respect to exponents, which they replace, times factors."""
        difference = self._below_top(exponents)
        p, q = (x.exp_().div_(total) for x, total in zip(exponents, self.totals, strict=True))
        teacher = difference.sub_(self.weighted / self.totals[1]).mul_(q).mul_(factors[1])
        return p.sub_(q).mul_(factors[0]), teacher


class _NativeRowSums(RowSums):
    """The same by native passes."""

    def __init__(self, passes: BankPasses, *arguments) -> None:
        super().__init__(*arguments)
        self.passes = passes

    def _add_exponentials(self, exponents: Sequence[Tensor]) -> None:
        self.passes.add_exponentials(*exponents, self.rows, self.rising)

    def gradients(self, exponents: Sequence[Tensor], factors: Sequence[float]) -> Sequence[Tensor]:
        self.passes.exponent_gradients(*exponents, self.rows, *factors)
        return exponents


def row_sums(
    queries: Sequence[Tensor],
    temperatures: Sequence[float],
    with_bank: bool,
    buffers: Buffers,
    passes: BankPasses | None,
) -> RowSums:
    """Return sums without columns, see `RowSums`. They are computed by `passes`, if there are any."""
    if passes is None:
        return RowSums(queries, temperatures, with_bank, buffers)
    return _NativeRowSums(passes, queries, temperatures, with_bank, buffers)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add A B to `total`."""
    if total.dim() == 2:
        total.addmm_(a, b)
    else:
        total += a @ b
