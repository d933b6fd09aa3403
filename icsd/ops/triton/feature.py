"""`mse` in feature space, by the D x D covariances of normalized samples.

|S - T|² = |X̂ᵀX̂|² - 2|X̂ᵀŶ|² + |ŶᵀŶ|²
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from icsd.losses.gram import compute_dtype
from icsd.ops.contract import Spec, saved_dtype, saved_shape
from icsd.ops.triton.kernels.combine import combine
from icsd.ops.triton.kernels.covariance import covariance
from icsd.ops.triton.kernels.features import Features
from icsd.ops.triton.kernels.norms import compute_inverse_norms, normalize_backward


def distill(stages: Sequence[Tensor], spec: Spec, saved: Tensor | None) -> Tensor:
    """Return the loss `(groups,)` of stages `(groups, samples, dim)`, and fill `saved` (`saved_shape`) if given."""
    samples = stages[-1].shape[1]
    if saved is None:
        saved = stages[-1].new_empty(saved_shape(stages, spec), dtype=saved_dtype(stages, spec))
    *students, teacher = _with_norms(stages, spec.eps)
    *pairs, yy = _parts(saved, stages)
    covariance(teacher, teacher, yy)
    loss = sum(spec.weights) * _squared(yy)
    for student, (xx, xy), weight in zip(students, pairs, spec.weights, strict=True):
        covariance(student, student, xx)
        covariance(student, teacher, xy)
        loss += weight * (_squared(xx) - 2 * _squared(xy))
    return (loss / max(1, samples * samples)).to(compute_dtype(*stages))


def distill_backward(
    grad: Tensor, saved: Tensor, stages: Sequence[Tensor], outs: Sequence[Tensor | None], spec: Spec
) -> None:
    """Write the gradients of the stages whose `outs` are not None: dL/dX̂ = 4/N² (X̂ X̂ᵀX̂ - Ŷ ŶᵀX̂)."""
    samples = stages[-1].shape[1]
    *students, teacher = _with_norms(stages, spec.eps)
    *pairs, yy = _parts(saved, stages)
    factors = [4 * weight / (samples * samples) for weight in spec.weights]
    sums = [
        [(student, factor * xx), (teacher, -factor * xy.mT)]
        for student, (xx, xy), factor in zip(students, pairs, factors, strict=True)
    ]
    of_students = zip(students, pairs, factors, strict=True)
    sums.append([(teacher, sum(factors) * yy), *((student, -factor * xy) for student, (_, xy), factor in of_students)])
    for features, terms, out in zip([*students, teacher], sums, outs, strict=True):
        if out is None:
            continue
        product = features.inverse_norms.new_empty(out.shape)
        for number, (left, right) in enumerate(terms):
            right = right.to(product.dtype).contiguous()
            combine(left.x, right, product, left.inverse_norms, add=number > 0)
        normalize_backward(product, features, grad, out, spec.eps)


def _with_norms(stages: Sequence[Tensor], eps: float) -> list[Features]:
    dtype = compute_dtype(*stages)
    found = [Features.of(stage, stage.new_empty(stage.shape[:2], dtype=dtype)) for stage in stages]
    compute_inverse_norms(found, eps)
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
