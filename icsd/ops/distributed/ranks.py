"""The ranks of a process group, and the check that all of them make the same call.

A collective operation waits for every rank. If one rank refused its arguments or made another call, the others would
wait until the group times out. So before any features travel, each rank tells the others whether its arguments are
valid and a digest of all that must agree. If something does not fit, every rank raises the same error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import torch
import torch.distributed as dist

ProcessGroupLike: TypeAlias = "dist.ProcessGroup | str"
"""A process group of `torch.distributed`, or "world" for the default one."""

T = TypeVar("T")

_ERRORS = {error.__name__: error for error in (TypeError, ValueError, RuntimeError)}


class Ranks(NamedTuple):
    """A process group as this rank sees it.

    Attributes:
        group: The process group.
        rank: The rank of this process in the group.
        size: The number of ranks.
    """

    group: dist.ProcessGroup
    rank: int
    size: int


def ranks_of(process_group: ProcessGroupLike) -> Ranks:
    """Return the ranks of a process group.

    Raises:
        ValueError: There is no process group, or this process is not in it.
        TypeError: It is something else.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            f"process_group is {process_group!r}, but this process has not joined any: call "
            "torch.distributed.init_process_group() in every process that torchrun starts, or leave process_group out"
        )
    if process_group == "world":
        process_group = dist.group.WORLD
    if process_group == dist.GroupMember.NON_GROUP_MEMBER or (
        isinstance(process_group, dist.ProcessGroup) and dist.get_rank(process_group) < 0
    ):
        raise ValueError(
            f"process_group does not contain this process, which is rank {dist.get_rank()} of {dist.get_world_size()}: "
            "call the loss only on the ranks that torch.distributed.new_group() was given"
        )
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(f"process_group must be a process group of torch.distributed or 'world', got {process_group!r}")
    return Ranks(process_group, dist.get_rank(process_group), dist.get_world_size(process_group))


def agree(ranks: Ranks, prepare: Callable[[], tuple[T, int, Mapping[str, object]]]) -> tuple[T, list[int]]:
    """Prepare a call on every rank, and check that all ranks make the same one.

    Args:
        ranks: The ranks.
        prepare: Checks the arguments of this rank. It returns the call, the number of samples of this rank, and all
            that must be the same on every rank, by name.

    Returns:
        The call, and the number of samples of every rank.

    Raises:
        TypeError: A rank was given another type of argument.
        ValueError: The arguments of a rank are not valid, or the ranks disagree. The message names ranks and values.
        RuntimeError: A backend does not take the inputs of a rank, or a rank had an error of another kind.
    """
    try:
        call, samples, facts = prepare()
        facts = {name: str(value) for name, value in facts.items()}
        error = None
    except Exception as raised:  # of any kind: the other ranks wait for this one
        call, samples, facts, error = None, 0, {}, raised
    digest = hashlib.sha256(repr(sorted(facts.items())).encode()).digest()
    own = torch.tensor([error is not None, int.from_bytes(digest[:8], "big", signed=True), samples])
    own = own.to(small_tensor_device(ranks))
    everyone = torch.empty(ranks.size * len(own), dtype=own.dtype, device=own.device)
    all_gather(everyone, own, ranks)
    failed, digests, counts = everyone.view(ranks.size, -1).T.tolist()
    if any(failed) or len(set(digests)) > 1:
        _raise_on_every_rank(ranks, facts, error)
    return call, counts


def all_gather(everyone: torch.Tensor, own: torch.Tensor, ranks: Ranks) -> None:
    """Fill a tensor with the tensors of all ranks, of one size each, one after the other."""
    # PyTorch 2.13 gave the function another name.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(everyone, own, group=ranks.group)


def gathered(
    process_group: ProcessGroupLike, x: torch.Tensor, check: Callable[[torch.Tensor], None] = lambda x: None
) -> torch.Tensor:
    """Return tensors `(n, D)` of all ranks, one after the other, without derivatives.

    Args:
        process_group: The process group, or "world".
        x: The tensor of this rank.
        check: Raises an error if `x` is not valid. Then all ranks raise it.

    Raises:
        ValueError: The shapes or dtypes of the ranks differ.
    """
    ranks = ranks_of(process_group)

    def facts() -> tuple[None, int, Mapping[str, object]]:
        check(x)
        return None, len(x), {"shape of x": tuple(x.shape), "dtype of x": x.dtype}

    agree(ranks, facts)
    everyone = x.new_empty((ranks.size * len(x), *x.shape[1:]))
    all_gather(everyone, x.contiguous(), ranks)
    return everyone


def small_tensor_device(ranks: Ranks) -> torch.device:
    """Return the device of small tensors: the CPU where the group has a backend for it, which waits for no GPU."""
    config = dist.get_backend_config(ranks.group)
    if "cpu:" in config or config in ("gloo", "mpi"):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _raise_on_every_rank(ranks: Ranks, facts: Mapping[str, str], error: Exception | None) -> None:
    """Raise the error that names the values of all ranks."""
    everyone = [None] * ranks.size
    mine = error if error is None else _described(error)
    dist.all_gather_object(everyone, (mine, facts), group=ranks.group)
    errors = [error for error, _ in everyone]
    if any(errors):
        kind = next(error[0] for error in errors if error)
        raise _ERRORS[kind](f"process_group: {_by_rank([error and error[1] for error in errors])}") from error
    differences = []
    for name in dict.fromkeys(name for _, facts in everyone for name in facts):
        values = [facts.get(name, "missing") for _, facts in everyone]
        if len(set(values)) > 1:
            differences.append(f"{name} is {_by_rank(values)}")
    raise ValueError(
        f"process_group: all ranks must make the same call, but {'; '.join(differences)}: give them the same"
    )


def _described(error: Exception) -> tuple[str, str]:
    """Return the name of the error that every rank raises for the error of one rank, and its message."""
    for name, kind in _ERRORS.items():
        if isinstance(error, kind):
            return name, str(error)
    return "RuntimeError", f"{type(error).__name__}: {error}"


def _by_rank(values: Sequence[str | None]) -> str:
    """Return each value with the ranks that have it. None is left out."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        if value is not None:
            ranks.setdefault(value, []).append(rank)
    return ", ".join(
        f"{value} on rank{'s' * (len(those) > 1)} {', '.join(map(str, those))}" for value, those in ranks.items()
    )
