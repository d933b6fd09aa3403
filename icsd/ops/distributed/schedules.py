"""The four ways to compute a loss of a batch whose samples are spread over ranks, and the choice between them by cost.

* `slices`: an all-to-all gives each rank all samples of a slice of the features. The Gram matrices of the slices add up
  to those of the batch, and gradients go home the same way. Each rank sends about 2 n D numbers, however many ranks
  there are, and none holds the batch. This is a GAN's case: few samples, many features.
* `moments`: `mse` from the D x D matrices of all samples, which add up over ranks. Their size does not depend on N.
* `ring`: the samples of each rank visit all others, in both passes. The N x N matrices are never whole.
* `gather`: each rank receives all samples and computes the same loss as the others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch

from icsd.losses import MSE, Loss
from icsd.ops.distributed.row_losses import row_loss
from icsd.ops.regimes import KEPT_BYTES, feature_flops, sample_flops

Schedule = Literal["slices", "moments", "ring", "gather"]

# One byte on the wire takes as long as this many operations: 67 TFLOP/s in float32 at 50 GB/s, an H100 between nodes.
OPERATIONS_PER_BYTE = 1000
# Operations on each element of an N x N matrix for its part of the loss and its gradient.
_OPERATIONS_PER_ELEMENT = 20

_forced: Schedule | None = None


@contextmanager
def force_schedule(schedule: Schedule) -> Iterator[None]:
    """Choose one schedule within the `with` block wherever the loss has it. All ranks must force the same one."""
    global _forced
    before, _forced = _forced, schedule
    try:
        yield
    finally:
        _forced = before


def forced_schedule() -> Schedule | None:
    """Return the schedule that a `with` block of `force_schedule` asks for."""
    return _forced


class Cost(NamedTuple):
    """The cost of the forward and the backward pass for the busiest rank.

    Attributes:
        received: The bytes that it receives.
        operations: Its floating-point operations.
        memory: The bytes that it holds beside its features and their gradients.
    """

    received: int
    operations: int
    memory: int


@dataclasses.dataclass(frozen=True)
class Problem:
    """The sizes of a call over several ranks.

    Attributes:
        loss: The loss.
        samples: The number of samples of each rank.
        dims: The dim of each student, then of the teacher.
        groups: The number of groups.
        itemsizes: The bytes of an element of each stage. By default, 4 each.
        differentiated: True for each stage that gets a gradient. By default, all do but the teacher.
    """

    loss: Loss
    samples: Sequence[int]
    dims: Sequence[int]
    groups: int = 1
    itemsizes: Sequence[int] | None = None
    differentiated: Sequence[bool] | None = None

    def costs(self) -> dict[Schedule, Cost]:
        """Return the cost of every schedule that the loss has."""
        costs: dict[Schedule, Cost] = {"slices": self._slices(), "gather": self._gather()}
        if type(self.loss) is MSE and self.loss.in_feature_space:
            costs["moments"] = self._moments()
        if row_loss(self.loss, 0.0, torch.float32) is not None:  # with any eps and dtype
            costs["ring"] = self._ring()
        return costs

    @property
    def _ranks(self) -> int:
        return len(self.samples)

    @property
    def _item(self) -> int:
        """The bytes of an element in compute dtype."""
        return max(4, *self._itemsizes)

    @property
    def _itemsizes(self) -> Sequence[int]:
        return [4] * len(self.dims) if self.itemsizes is None else self.itemsizes

    @property
    def _matrices(self) -> int:
        """The bytes of the N x N matrices."""
        return len(self.dims) * self.groups * sum(self.samples) ** 2 * self._item

    def _sample_bytes(self, gradients: bool) -> int:
        """The bytes of one sample of all stages, or of its gradients."""
        sizes = [dim * size for dim, size in zip(self.dims, self._itemsizes, strict=True)]
        if gradients:
            differentiated = self.differentiated or [*[True] * (len(sizes) - 1), False]
            sizes = [size for size, included in zip(sizes, differentiated, strict=True) if included]
        return self.groups * sum(sizes)

    def _slices(self) -> Cost:
        ranks, samples = self._ranks, sum(self.samples)
        # The first rank has the largest slice. It receives all samples but its own, then the gradients of its own.
        share = max(samples - own for own in self.samples) / ranks
        home = max(self.samples) * (ranks - 1) / ranks
        received = self._sample_bytes(False) * share + self._sample_bytes(True) * home
        received += 2 * self._matrices * (ranks - 1) / ranks
        work = self.groups * sample_flops(samples, self.dims) / ranks + self._elementwise
        slices = samples / ranks * (self._sample_bytes(False) + self._sample_bytes(True))
        return Cost(math.ceil(received), math.ceil(work), math.ceil(slices + 4 * self._matrices))

    def _moments(self) -> Cost:
        *students, teacher = self.dims
        elements = teacher**2 + sum(dim * (dim + teacher) for dim in students)
        size = 8 * self.groups * elements
        work = self.groups * feature_flops(max(self.samples), self.dims)
        double = 8 * self.groups * max(self.samples) * sum(self.dims)
        return Cost(math.ceil(2 * size * (self._ranks - 1) / self._ranks), work, double + 2 * size)

    def _ring(self) -> Cost:
        rounds = 1 + bool(self._sample_bytes(True))  # forward, and backward if there is a gradient
        others = sum(self.samples) - min(self.samples)
        work = (
            self.groups * sum(self.samples) * max(self.samples) * sum(self.dims) * 6 + self._elementwise / self._ranks
        )
        return Cost(
            rounds * others * self._sample_bytes(False),
            math.ceil(work),
            3 * max(self.samples) * self._sample_bytes(False),
        )

    def _gather(self) -> Cost:
        samples = sum(self.samples)
        others = samples - min(self.samples)
        work = self.groups * sample_flops(samples, self.dims) + self._elementwise
        if type(self.loss) is MSE and self.loss.in_feature_space:
            work = min(work, self.groups * feature_flops(samples, self.dims))
        batch = samples * (self._sample_bytes(False) + self._sample_bytes(True))
        return Cost(others * self._sample_bytes(False), work, batch + min(4 * self._matrices, KEPT_BYTES))

    @property
    def _elementwise(self) -> int:
        return _OPERATIONS_PER_ELEMENT * len(self.dims) * self.groups * sum(self.samples) ** 2


def choose_schedule(problem: Problem) -> Schedule:
    """Return the schedule that takes least time by the model of this file, or the forced one if the loss has it.

    `slices` keeps the N x N matrices, so it is chosen for large ones only if the loss has no ring.
    """
    costs = problem.costs()
    if _forced in costs:
        return _forced
    if "ring" in costs and costs["slices"].memory > costs["ring"].memory + KEPT_BYTES:
        del costs["slices"]
    return min(costs, key=lambda name: costs[name].received * OPERATIONS_PER_BYTE + costs[name].operations)
