"""The operator on a batch whose samples are spread over the ranks of a process group.

The value is that of the whole batch, on every rank. The backward passes of all ranks together differentiate the sum of
what the ranks make of it. So where each rank adds the loss to its own and gradients are averaged over ranks, as
`DistributedDataParallel` does, the weights get the gradient that one process would give them for the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from icsd.losses import CustomLoss, Loss
from icsd.ops.autograd import wanted_gradients
from icsd.ops.distributed import banks, gather, moments, ring, slices
from icsd.ops.distributed.call import Call
from icsd.ops.distributed.collectives import Shares, leave
from icsd.ops.distributed.ranks import ProcessGroupLike, Ranks, agree, ranks_of
from icsd.ops.distributed.schedules import Problem, choose_schedule, forced_schedule
from icsd.ops.library import is_transformed
from icsd.ops.registry import Backend

_SCHEDULES = {"slices": slices.distill, "moments": moments.distill, "ring": ring.distill, "gather": gather.distill}


def distill(
    process_group: ProcessGroupLike, prepare: Callable[[], Call], reduction: str
) -> tuple[Tensor, Loss, tuple[int, int]]:
    """Compute a loss of the samples of all ranks.

    Args:
        process_group: The process group, or "world".
        prepare: Checks the arguments of this rank.
        reduction: The reduction, for the check that all ranks agree.

    Returns:
        The mean of each group, `(*B)`, the loss, and the shape of the matrices that it compares.

    Raises:
        TypeError: A rank was given another type of argument.
        ValueError: There is no such group, the arguments of a rank are not valid, or the ranks disagree.
        RuntimeError: A backend does not take the inputs of a rank.
    """
    ranks = _ranks_of(process_group)

    def facts() -> tuple[Call, int, Mapping[str, object]]:
        call = prepare()
        return call, call.tensors[0].shape[-2], {"reduction": reduction, **_facts(call)}

    call, samples = agree(ranks, facts)
    shares = Shares(ranks, samples)
    if call.weights is None:
        value = banks.distill(shares, call)
        shape = (shares.total, call.tensors[2].shape[-2])
    else:
        value = _distill(shares, call)
        shape = (shares.total, shares.total - (not call.loss.include_diagonal))
    return leave(ranks, value), call.loss, shape


def similarity(
    process_group: ProcessGroupLike, prepare: Callable[[], tuple[Backend, Tensor]], center: bool, eps: float
) -> Tensor:
    """Return the Gram matrices of the samples of all ranks, `(*B, N, N)`.

    Args:
        process_group: The process group, or "world".
        prepare: Checks the arguments of this rank and returns backend and features.
        center: True if the mean sample is subtracted.
        eps: The least norm of a sample, for the check that all ranks agree.
    """
    ranks = _ranks_of(process_group)

    def facts() -> tuple[tuple[Backend, Tensor], int, Mapping[str, object]]:
        backend, x = prepare()
        return (backend, x), x.shape[-2], {"center": center, "eps": eps, **_facts_of("x", x)}

    (backend, x), samples = agree(ranks, facts)
    if sum(samples) * math.prod(x.shape[:-2]) == 0:
        return backend.gram(x)
    (gram,) = slices.grams(Shares(ranks, samples), backend, [x], center)
    return leave(ranks, gram)


def _ranks_of(process_group: ProcessGroupLike) -> Ranks:
    """Return the ranks of a process group, unless a transform is at work, under which nothing can be sent."""
    if is_transformed(()):
        raise RuntimeError(
            "process_group must be None within the transforms of torch.func, which cannot trace collectives"
        )
    return ranks_of(process_group)


def _distill(shares: Shares, call: Call) -> Tensor:
    """Return the loss of the samples of all ranks by the schedule of least cost, `(*B)` and replicated."""
    stages = call.tensors
    groups = math.prod(stages[-1].shape[:-2])
    if shares.ranks.size == 1 or shares.total * groups == 0:
        return call.backend.distill(stages, call.weights, call.loss, call.eps, call.center)
    problem = Problem(
        call.loss,
        shares.samples,
        [stage.shape[-1] for stage in stages],
        groups,
        [stage.element_size() for stage in stages],
        wanted_gradients(stages),
    )
    return _SCHEDULES[choose_schedule(problem)](shares, call)


def _facts(call: Call) -> dict[str, object]:
    """Return all that must agree between ranks, by name."""
    loss = call.loss
    if isinstance(loss, CustomLoss):  # an object that can be called has no name of its own
        loss = getattr(loss.function, "__qualname__", type(loss.function).__qualname__)
    facts = {"loss": loss, "weights": call.weights and [float(weight) for weight in call.weights]}
    facts |= {"center": call.center, "eps": call.eps, "the forced schedule": forced_schedule()}
    for name, tensor in zip(call.names, call.tensors, strict=True):
        facts |= _facts_of(name, tensor)
        if name.endswith("_bank"):
            facts[f"the number of samples of {name}"] = tensor.shape[-2]
    return facts


def _facts_of(name: str, x: Tensor) -> dict[str, object]:
    return {
        f"the groups of {name}": tuple(x.shape[:-2]),
        f"the dim of {name}": x.shape[-1],
        f"the dtype of {name}": x.dtype,
        f"the device of {name}": x.device.type,
        f"requires_grad of {name}": torch.is_grad_enabled() and x.requires_grad,
    }
