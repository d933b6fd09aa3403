import random

import numpy as np
import torch

from icsd.training.batches import SampledDataset, batch_indices
from icsd.training.randomness import random_state, restore_random_state, seeded


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item(), random.gauss(0, 1), np.random.randn()  # noqa: NPY002


def test_a_restored_state_gives_the_same_draws():
    cpu = torch.device("cpu")
    draw()  # leaves a spare Gaussian number in two of the generators
    state = random_state(cpu)
    first = [draw() for _ in range(3)]
    restore_random_state(state, cpu)
    assert [draw() for _ in range(3)] == first


def test_seeded_draws_depend_on_the_numbers_alone_and_disturb_nobody():
    state = random_state(torch.device("cpu"))
    expected = draw()
    restore_random_state(state, torch.device("cpu"))
    with seeded(3, 4):
        first = draw()
    assert draw() == expected
    with seeded(3, 4):
        assert draw() == first
    with seeded(4, 3):
        assert draw() != first


def test_choices_depend_on_the_place_alone():
    class Dataset:
        def __len__(self):
            return 5

        def __getitem__(self, index):
            return {"caption": str(index), "chance": torch.rand(()).item()}

    def tokenizer(captions, sample):
        return [torch.tensor([int(caption)]) for caption in captions], None

    draws = SampledDataset(Dataset(), tokenizer, batch_size=3, seed=1)
    batches = list(draws.batches(0, 6))
    assert [[index for _, index in batch] for batch in batches] == list(batch_indices(5, 3, 1, 0, 6))
    assert list(draws.batches(2, 6)) == batches[2:]
    items = [draws[key] for batch in batches for key in batch]
    torch.rand(7)
    assert [draws[key] for batch in batches[2:] for key in batch] == items[6:]
    assert len({item["chance"] for item in items}) == len(items)
