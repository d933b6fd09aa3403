"""The base class of the backends with fused kernels."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from icsd.losses import BUILT_IN, CKA, MSE, Loss, distill_grams
from icsd.losses.gram import centered
from icsd.ops import alignment, registry
from icsd.ops.autograd import Distill, Gram
from icsd.ops.contract import Launcher, Spec, saved_shape
from icsd.ops.library import is_ordinary, is_transformed, recorder
from icsd.ops.regimes import Regime, choose_regime, cka_in_feature_space, feature_space_cka, without_diagonal


class FusedBackend(registry.Backend):
    """A backend that a launcher makes.

    Attributes:
        launcher: The kernels.
        regimes: The regimes of each loss that there is a kernel for, by name. `"sample"` is always among them.
        device_type: The type of the device of its tensors.
        centers: True if the launcher centers samples, in the regime `"sample"`.
        traced: The regimes whose launches `torch.compile` can trace, because they consist of operations it knows.
    """

    launcher: Launcher
    regimes: Mapping[str, Collection[Regime]]
    device_type: str
    centers: bool = False
    traced: Collection[Regime] = ()

    @property
    def key(self) -> str:
        """The name of the backend for operators, then all else that decides what is traced: compilers cache by it."""
        return self.name

    def saved_shape(self, inputs: Sequence[Tensor], spec: Spec) -> tuple[int, ...]:
        """Return the shape of what `Launcher.distill` saves.

        In the regime `"sample"` it is `(stages, *B, N, pitch)`, and rows begin with those of the N x N matrices.
        """
        return saved_shape(inputs, spec)

    def unsupported(self, tensors: Sequence[Tensor]) -> str | None:
        for tensor in tensors:
            if tensor.device.type != self.device_type:
                return f"it takes {self.device_type} tensors, got {tensor.device.type}"
        return None

    def gram(self, x: Tensor) -> Tensor:
        if is_ordinary(x):
            return Gram.apply(self, x)
        return torch.ops.icsd.gram(x, self.key)

    def distill(
        self, stages: Sequence[Tensor], weights: Sequence[float], loss: Loss, eps: float, center: bool = False
    ) -> Tensor:
        is_alignment = type(loss) is CKA
        if is_alignment and cka_in_feature_space(stages):
            return feature_space_cka(stages[:-1], stages[-1], weights)
        parameters = loss.kernel_parameters() if type(loss) in BUILT_IN else None
        in_plain_pytorch = parameters is None or loss.name not in self.regimes or is_transformed(stages)
        regime = "sample" if in_plain_pytorch else choose_regime(self.regimes[loss.name], stages)
        if regime == "feature" and not loss.in_feature_space:
            regime = choose_regime([other for other in self.regimes[loss.name] if other != regime], stages)
        centers_before = center and (in_plain_pytorch or regime != "sample" or not self.centers)
        if centers_before:
            stages, center = [centered(stage) for stage in stages], False
        if is_alignment and is_ordinary(*stages) and not is_transformed(stages):
            return alignment.distill(self, stages, weights, loss, eps, centers_before)
        if in_plain_pytorch:
            return distill_grams([self.gram(stage) for stage in stages], weights, loss, eps)
        if regime == "feature" and not loss.include_diagonal:
            with_diagonal = self.distill(stages, weights, MSE(), eps)
            return without_diagonal(with_diagonal, stages, weights, eps)
        save = torch.is_grad_enabled() and True in [stage.requires_grad for stage in stages]
        teacher_gradient = save and stages[-1].requires_grad
        spec = Spec(loss.name, parameters, tuple(weights), eps, teacher_gradient, regime, center)
        is_traced = torch.compiler.is_dynamo_compiling() or recorder() is not None
        if is_traced or not self.launcher.reads(stages):
            return torch.ops.icsd.distill(stages, save, *spec, self.key)[0]
        if not save:
            return self.launcher.distill(stages, spec, False)[0]
        return Distill.apply((self, spec, loss), *stages)
