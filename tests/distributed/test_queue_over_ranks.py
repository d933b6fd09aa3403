"""Queues that hold the samples of all ranks."""

import torch
import torch.distributed as dist
from ranks import RankError

from icsd import SampleQueue


def queue_of(group, counts):
    """Enqueue some samples on each rank, and return the queue's order in time."""
    rank, queue = dist.get_rank(group), SampleQueue(5, 2, process_group=group)
    for step, count in enumerate(counts[rank]):
        queue.enqueue(torch.full((count, 2), 10.0 * step + rank))
    return queue.dequeue(len(queue))[:, 0].tolist()


def test_queues_are_equal(ranks):
    expected = [1.0, 10.0, 10.0, 11.0, 11.0]  # the second step of two samples a rank, after the last of the first step
    assert ranks.run(2, queue_of, [[1, 2], [1, 2]]) == [expected, expected]


def misshapen_on_one_rank(group):
    SampleQueue(5, 2, process_group=group).enqueue(torch.zeros(1, 2 + dist.get_rank(group)))


def test_a_bad_shape_on_one_rank_is_refused_on_all(ranks):
    for outcome in ranks.outcomes(2, misshapen_on_one_rank):
        assert isinstance(outcome, RankError)
        assert "x must have the shape (n, 2), got (1, 3): the queue was made for dim=2 on rank 1" in str(outcome)


def test_ranks_that_disagree_do_not_hang(ranks):
    for outcome in ranks.outcomes(2, queue_of, [[1], [2]]):
        assert isinstance(outcome, RankError)
        assert "shape of x is (1, 2) on rank 0, (2, 2) on rank 1" in str(outcome)
