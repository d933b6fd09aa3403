"""`mse` by the D x D moments of normalized samples: |S - T|² = |X̂ᵀX̂|² - 2|X̂ᵀŶ|² + |ŶᵀŶ|²."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from icsd.losses.gram import compute_dtype
from icsd.ops.fused import Distillation, saved_dtype, saved_shape
from icsd.ops.triton import launch
from icsd.ops.triton.launch import Stage


def distill(stages: Sequence[Tensor], how: Distillation, saved: Tensor | None) -> Tensor:
    """The loss `(groups,)` of stages `(groups, samples, features)`; fills `saved` of `saved_shape`, if any."""
    samples = stages[-1].shape[1]
    if saved is None:
        saved = stages[-1].new_empty(saved_shape(stages, how), dtype=saved_dtype(stages, how))
    *students, teacher = _with_norms(stages, how.eps)
    *pairs, yy = _parts(saved, stages)
    launch.moments(teacher, teacher, yy)
    loss = sum(how.weights) * _squared(yy)
    for student, (xx, xy), weight in zip(students, pairs, how.weights, strict=True):
        launch.moments(student, student, xx)
        launch.moments(student, teacher, xy)
        loss += weight * (_squared(xx) - 2 * _squared(xy))
    return (loss / max(1, samples * samples)).to(compute_dtype(*stages))


def distill_backward(
    grad: Tensor, saved: Tensor, stages: Sequence[Tensor], outs: Sequence[Tensor | None], how: Distillation
) -> None:
    """Writes the gradients of the stages whose `outs` are not None: dL/dX̂ = 4/N² (X̂ X̂ᵀX̂ - Ŷ ŶᵀX̂)."""
    samples = stages[-1].shape[1]
    *students, teacher = _with_norms(stages, how.eps)
    *pairs, yy = _parts(saved, stages)
    factors = [4 * weight / (samples * samples) for weight in how.weights]
    sums = [
        [(student, factor * xx), (teacher, -factor * xy.mT)]
        for student, (xx, xy), factor in zip(students, pairs, factors, strict=True)
    ]
    of_students = zip(students, pairs, factors, strict=True)
    sums.append([(teacher, sum(factors) * yy), *((student, -factor * xy) for student, (_, xy), factor in of_students)])
    for stage, terms, out in zip([*students, teacher], sums, outs, strict=True):
        if out is None:
            continue
        product = stage.norms.new_empty(out.shape)
        for number, (left, right) in enumerate(terms):
            right = right.to(product.dtype).contiguous()
            launch.combine(left.features, right, product, left.norms, add=number > 0)
        launch.project(product, stage, grad, out, how.eps)


def _with_norms(stages: Sequence[Tensor], eps: float) -> list[Stage]:
    dtype = compute_dtype(*stages)
    found = [Stage(stage, stage.new_empty(stage.shape[:2], dtype=dtype)) for stage in stages]
    for stage in found:
        launch.inverse_norms(*stage, eps)
    return found


def _squared(moments: Tensor) -> Tensor:
    """|.|² of every group, in float64."""
    return moments.square().sum((-2, -1))


def _parts(saved: Tensor, stages: Sequence[Tensor]) -> list:
    """The moments X̂ᵀX̂ and X̂ᵀŶ of every student, then ŶᵀŶ of the teacher, as views."""
    *widths, width = [stage.shape[2] for stage in stages]
    shapes = [shape for x in widths for shape in ((x, x), (x, width))] + [(width, width)]
    flat = saved.view(stages[-1].shape[0], -1).split([x * y for x, y in shapes], dim=1)
    parts = [part.unflatten(1, shape) for part, shape in zip(flat, shapes, strict=True)]
    return [*zip(parts[:-1:2], parts[1::2], strict=True), parts[-1]]
