"""The queue of samples against a list of them."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import icsd
from icsd import SampleQueue


def numbered(start, stop):
    """Return samples that tell their number."""
    return torch.arange(start, stop).float().unsqueeze(1).expand(-1, 3)


def test_against_a_list():
    queue, expected, number = SampleQueue(7, 3), [], 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        if torch.rand((), generator=generator) < 0.3:
            count = int(torch.randint(len(expected) + 1, (), generator=generator))
            assert queue.dequeue(count)[:, 0].tolist() == expected[:count]
            expected = expected[count:]
        else:
            count = int(torch.randint(10, (), generator=generator))
            queue.enqueue(numbered(number, number + count))
            expected = [*expected, *range(number, number + count)][-7:]
            number += count
        assert len(queue) == len(expected)
        assert queue.bank.shape == (len(expected), 3)
        assert sorted(queue.bank[:, 1].tolist()) == expected


@pytest.mark.parametrize("again", [copy.deepcopy, None], ids=["copy", "state"])
def test_state(again):
    queue = SampleQueue(4, 3)
    queue.enqueue(numbered(0, 6))
    queue.dequeue(1)
    if again is None:
        other = SampleQueue(4, 3)
        other.load_state_dict(queue.state_dict())
    else:
        other = again(queue)
    for q in (queue, other):
        q.enqueue(numbered(6, 7))
        assert q.dequeue(4)[:, 0].tolist() == [3, 4, 5, 6]


@pytest.mark.parametrize("shape", [(9, 3), (4, 5)], ids=["size", "dim"])
def test_the_state_of_another_queue_changes_nothing(shape):
    queue, other = SampleQueue(4, 3), SampleQueue(*shape)
    queue.enqueue(numbered(0, 2))
    other.enqueue(torch.ones(3, shape[1]))
    with pytest.raises(RuntimeError, match="size mismatch for samples"):
        queue.load_state_dict(other.state_dict())
    assert queue.bank.tolist() == numbered(0, 2).tolist()


def test_a_state_without_a_shape_is_read():
    queue = SampleQueue(4, 3)
    queue.load_state_dict({"samples": torch.ones(4, 3), "_extra_state": {"start": 0, "count": 3}})
    assert len(queue) == 3


def test_compiled_steps_are_not_compiled_for_each_number_of_samples():
    queue, graphs = SampleQueue(50, 3), CompileCounter()
    queue.enqueue(numbered(0, 3))

    @torch.compile(backend=graphs)
    def step(x):
        value = icsd.similarity_distillation_loss(2 * x, x, student_bank=queue.bank, teacher_bank=queue.bank) * 3
        queue.enqueue(2 * x)
        return value

    for _ in range(12):
        step(numbered(0, 4))
    assert len(queue) == 50
    assert graphs.frame_count < 6  # for each number of samples it would be 8, the limit


def test_as_a_bank():
    queue = SampleQueue(20, 4, dtype=torch.bfloat16)
    queue.enqueue(torch.randn(15, 4))
    x, y = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
    loss = icsd.similarity_distillation_loss(x, y, "kl", student_bank=queue.bank, teacher_bank=queue.bank)
    loss.backward()
    expected = icsd.similarity_distillation_loss(
        x.detach(), y, "kl", student_bank=queue.samples[:15], teacher_bank=queue.samples[:15]
    )
    torch.testing.assert_close(loss.detach(), expected)


@pytest.mark.parametrize(
    ("match", "call"),
    [
        (r"x must have the shape \(n, 3\), got \(2, 4\)", lambda queue: queue.enqueue(torch.zeros(2, 4))),
        (r"x must have the shape \(n, 3\), got \(3,\)", lambda queue: queue.enqueue(torch.zeros(3))),
        ("n must be from 0 to the 2 samples in the queue, got 3", lambda queue: queue.dequeue(3)),
        ("size and dim must be at least 1, got 0 and 3", lambda _: SampleQueue(0, 3)),
        (
            "enqueue some samples before the first loss",
            lambda _: icsd.similarity_distillation_loss(
                torch.ones(2, 3),
                torch.ones(2, 3),
                student_bank=SampleQueue(4, 3).bank,
                teacher_bank=SampleQueue(4, 3).bank,
            ),
        ),
    ],
)
def test_bad_input(match, call):
    queue = SampleQueue(5, 3)
    queue.enqueue(numbered(0, 2))
    with pytest.raises(ValueError, match=match):
        call(queue)
