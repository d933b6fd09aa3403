"""Losses of similarities to banks of other samples.

`distill` computes them piece by piece: the similarities to a few samples of the banks are made, used and discarded. The
forward pass leaves the gradients for a gradient 1 of the loss, so no similarity is computed again in the backward pass.

* A loss of elements makes its gradient with each piece: one pass over the banks.
* `kl` needs sums over whole rows first. The gradient of the student is (Σ_j p_ij b_j - Σ_j q_ij b_j) / (N τ), and both
  sums over the bank are added up with those of the loss: one pass, too. The gradients of banks and of the teacher take
  a second pass.

The products are PyTorch's on every device: there is no symmetry that a kernel of our own could use. For `kl` on the
CPU, native passes make everything else of a piece (`icsd.ops.row_sums`). A backend with `bank_kernels`, as those of
GPUs, computes the loss and its gradients on its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from icsd.losses import KL, MSE, SimilarityLoss, SmoothL1, distill_to_banks
from icsd.losses.gram import compute_dtype, inverse_of_norms, no_autocast, savable, similarity_to, unit_samples
from icsd.ops import registry
from icsd.ops.autograd import multiples, wanted_gradients, widened
from icsd.ops.contract import BankKernels, BankPasses, is_same, unit_dtype
from icsd.ops.library import is_batched, is_ordinary, is_transformed
from icsd.ops.row_sums import Buffers, RowSums, add_product, row_sums

# The elements of a piece of the similarities: on a CPU it stays in the cache, on a GPU it fills the device.
PIECE = {"cpu": 2**17}
_PIECE_ELSEWHERE = 2**24


class _Call(NamedTuple):
    """The arguments of a loss, and the parts of the backend that compute it, where it has them.

    `wanted` is True for each of the features that gets a gradient.
    """

    loss: SimilarityLoss
    eps: float
    wanted: Sequence[bool]
    passes: BankPasses | None
    kernels: BankKernels | None


def backend_for(requested: str | None, features: Sequence[Tensor]) -> registry.Backend:
    """Return the backend for these inputs: the one that is asked for, or on a GPU the preferred one with bank kernels.

    Raises:
        ValueError: The name is unknown.
        RuntimeError: The backend does not take the inputs. The message lists all backends and why they do not.
    """
    chosen = registry.select(requested, features)
    if registry.name_of(requested) is not None or features[0].device.type == "cpu":
        return chosen
    with_kernels = [backend for backend in registry.applicable(features) if backend.has_bank_kernels]
    return min(with_kernels, key=lambda backend: backend.bank_order, default=chosen)


def distill(
    student: Tensor,
    teacher: Tensor,
    student_bank: Tensor,
    teacher_bank: Tensor,
    loss: SimilarityLoss,
    eps: float,
    backend: registry.Backend,
) -> Tensor:
    """Return the mean loss of each group, `(*B)`, of `(*B, N, D)` and banks `(*B, M, D)`."""
    features = (student, teacher, student_bank, teacher_bank)
    if type(loss) in (KL, MSE, SmoothL1) and loss.include_diagonal and _is_ordinary(features):
        wanted = wanted_gradients(features)
        kernels = _kernels_for(backend, features, wanted)
        if kernels is not None or student_bank.shape[-2] > _columns(student):
            return _Streamed.apply(_Call(loss, eps, wanted, backend.bank_passes, kernels), *features)
    return _in_memory(features, loss, eps)


def _is_ordinary(features: Sequence[Tensor]) -> bool:
    """Return whether there are samples, and nothing is traced or transformed."""
    return features[0].numel() > 0 and is_ordinary(*features) and not is_transformed(features)


def _kernels_for(backend: registry.Backend, features: Sequence[Tensor], wanted: Sequence[bool]) -> BankKernels | None:
    """Return the kernels of the backend if they take these features."""
    if not backend.has_bank_kernels:
        return None
    return backend.bank_kernels if backend.bank_kernels.takes(features, wanted) else None


def _columns(student: Tensor) -> int:
    """Return the samples of the banks in a piece."""
    rows = max(1, math.prod(student.shape[:-1]))
    return max(64, PIECE.get(student.device.type, _PIECE_ELSEWHERE) // rows)


def _in_memory(features: Sequence[Tensor], loss: SimilarityLoss, eps: float) -> Tensor:
    """Return the same from whole matrices. It has derivatives of any order."""
    student, teacher, student_bank, teacher_bank = features
    similarity, target = similarity_to(student, student_bank, eps), similarity_to(teacher, teacher_bank, eps)
    return distill_to_banks(similarity, target, loss)


class _Streamed(torch.autograd.Function):
    """The loss by pieces of the banks."""

    @staticmethod
    def forward(ctx, call: _Call, *features: Tensor) -> Tensor:
        ctx.call = loss, eps, wanted, passes, kernels = call
        with torch.no_grad(), no_autocast(features[0]):
            if kernels is not None:
                value, grads = kernels.distill(features, wanted, loss, eps)
            else:
                pass_over = _Pass(features, wanted, loss, eps)
                value = pass_over.kl(passes) if isinstance(loss, KL) else pass_over.of_elements()
                grads = pass_over.gradients()
        if any(wanted):
            ctx.save_for_backward(*savable(*features), *grads)
        return value

    @staticmethod
    def backward(ctx, grad: Tensor):
        wanted, saved = ctx.call.wanted, ctx.saved_tensors
        features, units = saved[:4], iter(saved[4:])
        if torch.is_grad_enabled() and not is_batched(grad):
            return None, *_differentiable_backward(ctx.call, grad, features, wanted)
        if torch.is_grad_enabled():
            ones = torch.ones_like(features[0][..., 0, 0])
            units = _differentiable_backward(ctx.call, ones, widened(features), wanted)
        else:
            units = [next(units) if want else None for want in wanted]
        return None, *multiples(units, grad, features)


def _differentiable_backward(
    call: _Call, grad: Tensor, features: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients as functions of `grad` and the features, for `create_graph=True`."""
    features = [x.view_as(x) for x in features]  # one input each, though a tensor may be given twice
    inputs = [x for x, want in zip(features, wanted, strict=True) if want]
    value = _in_memory(features, call.loss, call.eps)
    grads = iter(torch.autograd.grad(value, inputs, grad.to(value.dtype), create_graph=True))
    return [next(grads) if want else None for want in wanted]


class _Piece(NamedTuple):
    """A piece of the banks.

    Attributes:
        columns: The samples.
        banks: The features of their samples at norm 1, of the student's and of the teacher's bank.
        inverses: The inverse norms, `(*B, C, 1)`.
        similarities: S and T of these columns, `(*B, N, C)`, or what the queries make of them.
    """

    columns: slice
    banks: Sequence[Tensor]
    inverses: Sequence[Tensor]
    similarities: Sequence[Tensor]


class _Pass:
    """The passes over the banks for one loss.

    Args:
        features: Student, teacher, bank of the student and bank of the teacher.
        wanted: The features whose gradients are wanted.
        loss: The loss.
        eps: The least norm of a sample.
    """

    def __init__(self, features: Sequence[Tensor], wanted: Sequence[bool], loss: SimilarityLoss, eps: float) -> None:
        self.features, self.wanted, self.loss, self.eps = features, wanted, loss, eps
        self.dtype = compute_dtype(*features)
        self.units, self.inverses = zip(*(unit_samples(x.to(self.dtype), eps) for x in features[:2]), strict=True)
        self.sums = [torch.zeros_like(x) if want else None for x, want in zip(self.units, wanted[:2], strict=True)]
        self.bank_grads = [
            torch.empty_like(x, dtype=unit_dtype(x), memory_format=torch.contiguous_format) if want else None
            for x, want in zip(features[2:], wanted[2:], strict=True)
        ]
        self.scale = 1 / loss.terms(features[0].shape[-2], features[2].shape[-2])
        self.buffers = Buffers(self.units[0])
        self.one_bank = is_same(*features[2:])
        self.bank_inverses = [self._inverse_norms(features[2])]
        self.bank_inverses.append(self.bank_inverses[0] if self.one_bank else self._inverse_norms(features[3]))

    def _inverse_norms(self, bank: Tensor) -> Tensor:
        """Return the inverse norms of all samples of a bank, `(*B, M, 1)`."""
        norms = torch.linalg.vector_norm(bank, dim=-1, keepdim=True, dtype=self.dtype)
        return inverse_of_norms(norms, self.eps)

    def pieces(self, queries: Sequence[Tensor]) -> Iterator[_Piece]:
        """Yield the pieces, with the products of queries and banks as similarities. The next piece overwrites them."""
        columns, samples = _columns(self.features[0]), self.features[2].shape[-2]
        for start in range(0, samples, columns):
            piece = slice(start, min(start + columns, samples))
            inverses = [inverse[..., piece, :] for inverse in self.bank_inverses]
            units = [self._units_of_bank(0, piece)]
            units.append(units[0] if self.one_bank else self._units_of_bank(1, piece))
            similarities = [
                torch.matmul(x, unit.mT, out=self.buffers.get(name, *x.shape[:-1], unit.shape[-2]))
                for name, x, unit in zip(("S", "T"), queries, units, strict=True)
            ]
            yield _Piece(piece, units, inverses, similarities)

    def _units_of_bank(self, k: int, piece: slice) -> Tensor:
        """Return samples of a bank at norm 1, in a buffer."""
        bank, inverse = (x[..., piece, :] for x in (self.features[2 + k], self.bank_inverses[k]))
        return torch.mul(bank, inverse, out=self.buffers.get(f"bank {k}", *bank.shape))

    def of_elements(self) -> Tensor:
        """Return the loss, a mean over elements, and add up the gradients."""
        value = 0
        for piece in self.pieces(self.units):
            matrices = [
                matrix.detach().requires_grad_(self.wanted[k] or self.wanted[k + 2])
                for k, matrix in enumerate(piece.similarities)
            ]
            inputs = [matrix for matrix in matrices if matrix.requires_grad]
            with torch.enable_grad():
                losses = self.loss.of_elements(*matrices).sum((-2, -1))
                grads = iter(torch.autograd.grad(losses.sum() * self.scale, inputs) if inputs else ())
            value = value + losses.detach()
            self.add(piece, [next(grads) if matrix.requires_grad else None for matrix in matrices])
        return value * self.scale

    def kl(self, passes: BankPasses | None) -> Tensor:
        """Return the divergence, and add up the gradients. `passes` are those of a backend, if it has any."""
        temperatures = self.loss.student_temperature, self.loss.teacher_temperature
        only_student = self.wanted[0] and not any(self.wanted[1:])
        queries = [unit / t for unit, t in zip(self.units, temperatures, strict=True)]  # whose products are exponents
        sums = row_sums(queries, temperatures, only_student, self.buffers, passes)
        for piece in self.pieces(queries):
            sums.add(piece.similarities, piece.banks[0])
        if only_student:
            student, teacher = (x / total for x, total in zip(sums.of_bank, sums.totals, strict=True))
            self.sums[0] = (student - teacher) * (self.scale / temperatures[0])
        elif any(self.wanted):
            self._kl_again(queries, sums, temperatures)
        rows = (
            sums.weighted.double() / sums.totals[1].double() + (sums.totals[0].double() / sums.totals[1].double()).log()
        )
        return (rows.sum((-2, -1)) * self.scale).to(self.dtype)

    def _kl_again(self, queries: Sequence[Tensor], sums: RowSums, temperatures: Sequence[float]) -> None:
        """Add up the gradients in a second pass, from the sums over whole rows."""
        factors = [self.scale / t for t in temperatures]
        for piece in self.pieces(queries):
            self.add(piece, sums.gradients(piece.similarities, factors))

    def add(self, piece: _Piece, grads: Sequence[Tensor | None]) -> None:
        """Add to the gradients with respect to samples of norm 1, and write those of the piece of the banks."""
        for k, grad in enumerate(grads):
            if grad is None:
                continue
            if self.sums[k] is not None:
                add_product(self.sums[k], grad, piece.banks[k])
            if self.bank_grads[k] is not None:
                of_bank = grad.mT @ self.units[k]
                finished = _projected(of_bank, piece.banks[k], piece.inverses[k], self.eps)
                self.bank_grads[k][..., piece.columns, :] = finished.to(self.bank_grads[k].dtype)

    def gradients(self) -> list[Tensor]:
        """Return the gradients that are wanted, in the order of the features."""
        found = [
            None if total is None else _projected(total, unit, inverse, self.eps).to(unit_dtype(x))
            for total, unit, inverse, x in zip(self.sums, self.units, self.inverses, self.features, strict=False)
        ]
        return [grad for grad in (*found, *self.bank_grads) if grad is not None]


def _projected(grad: Tensor, unit: Tensor, inverse: Tensor, eps: float) -> Tensor:
    """Return the gradient of samples from that of their forms of norm 1. Where eps replaces a norm, it is constant."""
    projection = (grad * unit).sum(-1, keepdim=True)
    projection = projection.masked_fill(inverse * eps > 1 - 1e-6, 0)
    return torch.addcmul(grad, projection, unit, value=-1).mul_(inverse)
