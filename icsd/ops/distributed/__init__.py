"""The operator over the ranks of a process group, on `torch.distributed`."""

from icsd.ops.distributed.call import Call
from icsd.ops.distributed.operator import distill, similarity
from icsd.ops.distributed.ranks import ProcessGroupLike, gathered, ranks_of
from icsd.ops.distributed.schedules import Cost, Problem, Schedule, choose_schedule, force_schedule

__all__ = [
    "Call",
    "Cost",
    "Problem",
    "ProcessGroupLike",
    "Schedule",
    "choose_schedule",
    "distill",
    "force_schedule",
    "gathered",
    "ranks_of",
    "similarity",
]
