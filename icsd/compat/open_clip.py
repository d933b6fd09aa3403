"""The distillation loss of open_clip: images and texts of a student against those of a teacher.

Both losses follow from `KL` of the logits s_ij = scale · <x_i, y_j>, which the operator streams. With u, the
uniform distribution over M texts, which is the softmax of zeros:

* the cross-entropy of p and q is KL(p || q) + log M - KL(p || u),
* the contrastive loss of a row is log Σ_j exp(s_ij) - s_ii, and KL(u || q) = log Σ_j exp(s_ij) - log M - mean_j s_ij.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from icsd import ops
from icsd.compat.tokens import NORMALIZE_EPS
from icsd.losses import KL
from icsd.losses.gram import compute_dtype

Pair = tuple[Tensor, Tensor]  # of what makes the rows of logits and of what makes the columns

# The part of the student's similarities that the operator gets, below 1 so that a coordinate is left for the rest.
_HALF = 0.5


class DistillClipLoss(nn.Module):
    """The contrastive loss of a student, and its cross-entropy with a teacher, as `open_clip.loss.DistillClipLoss`.

    Large batches are taken piece by piece: no N x N matrix of logits is held. The teacher is a constant.

    All features are expected to be normalized, as the models of open_clip return them. They are normalized here, too,
    which changes neither the losses nor the gradients of the features before they were normalized.

    Args:
        local_loss: True if a rank takes the rows of its own samples only.
        gather_with_grad: True if gradients pass to the features of other ranks.
        cache_labels: It has no effect, since there are no labels to keep.
        rank: The rank of this process in the default process group.
        world_size: The number of ranks that the batch is spread over.
        use_horovod: It must be False: ranks are those of `torch.distributed`.

    Raises:
        ValueError: `use_horovod` is True.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod must be False, got True: start the processes by torchrun")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """Return the contrastive loss and the distillation loss.

        Args:
            image_features: Images of the student, `(N, D)`.
            text_features: Texts of the images, `(N, D)`.
            logit_scale: The factor of the student's similarities. A tensor gets a gradient if it requires one.
            dist_image_features: Images of the teacher, `(N, E)`.
            dist_text_features: Texts of the images, `(N, E)`.
            dist_logit_scale: The factor of the teacher's similarities.
            output_dict: True to return a dictionary with the keys `"contrastive_loss"` and `"distill_loss"`.

        Raises:
            ValueError: The shapes do not fit, or a factor is not one positive and finite number.
        """
        features = {
            "image_features": image_features,
            "text_features": text_features,
            "dist_image_features": dist_image_features,
            "dist_text_features": dist_text_features,
        }
        count = len(image_features)
        for name, x in features.items():
            if x.dim() != 2 or len(x) != count:
                raise ValueError(
                    f"{name} must have the shape ({count}, D), one row for each row of image_features, got "
                    f"{tuple(x.shape)}"
                )
        scale, teacher_scale = _number("logit_scale", logit_scale), _number("dist_logit_scale", dist_logit_scale)
        if isinstance(logit_scale, Tensor):
            logit_scale = logit_scale.reshape(())  # as losses, whatever number of dimensions the parameter has
        images, texts = self._sides(image_features), self._sides(text_features)
        taught = _scaled(images, texts, logit_scale, scale)
        teacher = self._sides(dist_image_features.detach()), self._sides(dist_text_features.detach())
        first = self.rank * count if self.local_loss and self.world_size > 1 else 0  # column that matches the first row
        contrastive, distill = [], []
        for rows, columns in ((0, 1), (1, 0)):
            student = taught[rows].rows, taught[columns].columns
            own, others = (images, texts)[rows].rows, (images, texts)[columns].columns
            mean = (own.mean(0) * others.mean(0)).sum()
            matched = (own * others[first : first + len(own)]).sum(-1).mean()
            contrastive.append(_log_sum_exp(student, _HALF / scale, mean * logit_scale) - matched * logit_scale)
            targets = teacher[rows].rows, teacher[columns].columns
            distill.append(_cross_entropy(student, _HALF / scale, targets, 1 / teacher_scale))
        losses = {"contrastive_loss": sum(contrastive) / 2, "distill_loss": sum(distill) / 2}
        return losses if output_dict else tuple(losses.values())

    def _sides(self, x: Tensor) -> _Sides:
        """Return the normalized features that make the rows and the columns of logits."""
        x = F.normalize(x.to(compute_dtype(x)), dim=-1, eps=NORMALIZE_EPS)
        if self.world_size == 1:
            return _Sides(x, x)
        everyone = self._gathered(x)
        return _Sides(x if self.local_loss else everyone, everyone)

    def _gathered(self, x: Tensor) -> Tensor:
        """Return the features of all ranks, of which those that the arguments say get gradients."""
        from torch import distributed

        if self.gather_with_grad:
            from torch.distributed.nn import all_gather

            return torch.cat(all_gather(x))
        parts = [torch.empty_like(x) for _ in range(self.world_size)]
        distributed.all_gather(parts, x.detach())
        if not self.local_loss:
            parts[self.rank] = x
        return torch.cat(parts)


class _Sides(NamedTuple):
    """The features of norm 1 of images or texts.

    Attributes:
        rows: Those that make the rows of logits, where they are compared with others.
        columns: Those that make the columns, where others are compared with them.
    """

    rows: Tensor
    columns: Tensor


def _number(name: str, scale: Tensor | float) -> float:
    """Return the value of a factor of similarities."""
    if isinstance(scale, Tensor) and scale.numel() != 1:
        raise ValueError(f"{name} must be one number, got a tensor of the shape {tuple(scale.shape)}")
    value = float(scale.detach() if isinstance(scale, Tensor) else scale)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive finite number, got {value}")
    return value


def _scaled(images: _Sides, texts: _Sides, scale: Tensor | float, value: float) -> tuple[_Sides, _Sides]:
    """Return features of norm 1 whose similarities are `_HALF` of those of images and texts.

    The factor `_HALF` is a function of the scale, divided by its value, so that the scale gets its gradient.
    """
    factor = torch.as_tensor(scale / value * _HALF).to(images.rows)
    rest = (1 - factor.square()).sqrt()

    def with_rest(x: Tensor) -> Tensor:
        return torch.cat((factor * x, rest.expand(len(x), 1)), 1)

    def with_zero(y: Tensor) -> Tensor:
        return F.pad(y, (0, 1))

    return _Sides(*map(with_rest, images)), _Sides(*map(with_zero, texts))


def _uniform(rows: Tensor, columns: Tensor) -> Pair:
    """Return features all of whose similarities are 0."""
    return rows.new_zeros(len(rows), 1), columns.new_zeros(len(columns), 1)


def _divergence(student: Pair, temperature: float, teacher: Pair, teacher_temperature: float) -> Tensor:
    """Return the mean of KL(teacher || student) over rows, each a distribution over columns."""
    return ops.similarity_distillation_loss(
        student[0],
        teacher[0],
        KL(temperature, teacher_temperature),
        student_bank=student[1],
        teacher_bank=teacher[1],
        eps=NORMALIZE_EPS,
    )


def _log_sum_exp(student: Pair, temperature: float, mean: Tensor) -> Tensor:
    """Return the mean of log Σ_j exp(s_ij) over rows; `mean` is that of all logits."""
    return _divergence(student, temperature, _uniform(*student), 1.0) + math.log(len(student[1])) + mean


def _cross_entropy(student: Pair, temperature: float, teacher: Pair, teacher_temperature: float) -> Tensor:
    """Return the mean cross-entropy of the teacher and the student over rows."""
    divergence = _divergence(student, temperature, teacher, teacher_temperature)
    return divergence + math.log(len(teacher[1])) - _divergence(_uniform(*teacher), 1.0, teacher, teacher_temperature)
