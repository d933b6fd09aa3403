"""`mse` in feature space, by the D x D covariances of normalized samples.

|S - T|² = |X̂ᵀX̂|² - 2|X̂ᵀŶ|² + |ŶᵀŶ|²
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from icsd.losses.gram import compute_dtype
from icsd.ops.contract import Spec, saved_dtype, saved_shape
from icsd.ops.triton.kernels.combine import combine
from icsd.ops.triton.kernels.covariance import covariance
from icsd.ops.triton.kernels.features import Features
from icsd.ops.triton.kernels.norms import compute_inverse_norms, normalize_backward

# The terms of the loss are computed again in float64 where less of them remains (kLeastRemainder in csrc).
LEAST_REMAINDER = 1e-2


def distill(stages: Sequence[Tensor], spec: Spec, saved: Tensor | None) -> Tensor:
    """Return the loss `(groups,)` of stages `(groups, samples, dim)`, and fill `saved` (`saved_shape`) if given."""
    samples = stages[-1].shape[1]
    if saved is None:
        saved = stages[-1].new_empty(saved_shape(stages, spec), dtype=saved_dtype(stages, spec))
    *pairs, yy = parts = _parts(saved, stages)
    for (*students, teacher), only in _passes(stages, parts, spec):
        covariance(teacher, teacher, yy, only)
        for student, (xx, xy) in zip(students, pairs, strict=True):
            covariance(student, student, xx, only)
            covariance(student, teacher, xy, only)
    remainders = [remainder.clamp(min=0) for remainder, _ in _remainders(parts)]
    loss = sum(weight * remainder for weight, remainder in zip(spec.weights, remainders, strict=True))
    return (loss / max(1, samples * samples)).to(compute_dtype(*stages))


def distill_backward(
    grad: Tensor, saved: Tensor, stages: Sequence[Tensor], outs: Sequence[Tensor | None], spec: Spec
) -> None:
    """Write the gradients of the stages whose `outs` are not None: dL/dX̂ = 4/N² (X̂ X̂ᵀX̂ - Ŷ ŶᵀX̂)."""
    samples = stages[-1].shape[1]
    *pairs, yy = parts = _parts(saved, stages)
    factors = [4 * weight / (samples * samples) for weight in spec.weights]
    for (*students, teacher), only in _passes(stages, parts, spec):
        sums = [
            [(student, factor * xx), (teacher, -factor * xy.mT)]
            for student, (xx, xy), factor in zip(students, pairs, factors, strict=True)
        ]
        of_students = zip(students, pairs, factors, strict=True)
        sums.append(
            [(teacher, sum(factors) * yy), *((student, -factor * xy) for student, (_, xy), factor in of_students)]
        )
        for features, terms, out in zip([*students, teacher], sums, outs, strict=True):
            if out is None:
                continue
            product = features.inverse_norms.new_empty(out.shape)
            for number, (left, right) in enumerate(terms):
                right = right.to(product.dtype).contiguous()
                combine(left.x, right, product, left.inverse_norms, add=number > 0, only=only)
            normalize_backward(product, features, grad, out, spec.eps, only)


def _passes(stages: Sequence[Tensor], parts: list, spec: Spec) -> Iterator[tuple[list[Features], Tensor | None]]:
    """Yield features with norms in compute dtype, for all groups, then in float64, for those that cancel in `parts`.

    Products have the dtype of the norms. Only the device knows which groups cancel, so the second pass is always
    launched; the programs of all other groups return at once.

    Yields:
        The features, and the groups that are computed, `(groups,)`: those where it is not 0, or all if it is None.
    """
    dtype = compute_dtype(*stages)
    yield _with_norms(stages, spec.eps, dtype, None), None
    if dtype is not torch.float64:
        cancel = [fraction < LEAST_REMAINDER for _, fraction in _remainders(parts)]
        only = torch.stack(cancel).any(0).to(torch.int32)
        yield _with_norms(stages, spec.eps, torch.float64, only), only


def _with_norms(stages: Sequence[Tensor], eps: float, dtype: torch.dtype, only: Tensor | None) -> list[Features]:
    found = [Features.of(stage, stage.new_empty(stage.shape[:2], dtype=dtype)) for stage in stages]
    compute_inverse_norms(found, eps, only)
    return found


def _remainders(parts: list) -> list[tuple[Tensor, Tensor]]:
    """Return |S - T|² of every student, and what part it is of |S|² + |T|², `(groups,)` each."""
    *pairs, yy = parts
    teacher, found = _squared(yy), []
    for xx, xy in pairs:
        own, both = _squared(xx), _squared(xy)
        remainder = (own - both) + (teacher - both)
        found.append((remainder, remainder / (own + teacher)))
    return found


def _squared(covariances: Tensor) -> Tensor:
    """Return the squared Frobenius norm of every group, in float64."""
    return covariances.square().sum((-2, -1))


def _parts(saved: Tensor, stages: Sequence[Tensor]) -> list:
    """Return views of X̂ᵀX̂ and X̂ᵀŶ for every student, then of the teacher's ŶᵀŶ."""
    *dims, dim = [stage.shape[2] for stage in stages]
    shapes = [shape for x in dims for shape in ((x, x), (x, dim))] + [(dim, dim)]
    flat = saved.view(stages[-1].shape[0], -1).split([x * y for x, y in shapes], dim=1)
    parts = [part.unflatten(1, shape) for part, shape in zip(flat, shapes, strict=True)]
    return [*zip(parts[:-1:2], parts[1::2], strict=True), parts[-1]]
