"""The order of the data, and the random choices made with each image."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from icsd.training.randomness import seeded


def batch_indices(length: int, batch_size: int, seed: int, start: int, stop: int) -> Iterator[list[int]]:
    """Draw the batches of steps ``start`` to ``stop``: a new order every epoch, no sample left out.

    Epochs follow each other without a gap, so a batch may hold the end of one and the beginning of the next. Every
    batch depends on seed and step alone: resuming needs no state.
    """
    epoch, order = -1, []
    for step in range(start, stop):
        batch = []
        for place in range(step * batch_size, (step + 1) * batch_size):
            if place // length != epoch:
                epoch = place // length
                order = np.random.default_rng((seed, epoch)).permutation(length).tolist()
            batch.append(order[place % length])
        yield batch


class SampledDataset(Dataset):
    """A data set whose random choices (caption, crop, flip, ...) depend on the place of the draw in the run alone.

    So it does not matter which process makes a draw, nor what was drawn before: resuming needs no state.

    Args:
        dataset: Whose items are drawn.
        batch_size: Items per batch.
        seed: Of the order and of the choices.
    """

    def __init__(self, dataset: Dataset, batch_size: int, seed: int) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed

    def batches(self, start: int, stop: int) -> Iterator[list[tuple[int, int]]]:
        """The keys of batches ``start`` to ``stop``, each the place of a draw and the index of what is drawn."""
        drawn = batch_indices(len(self.dataset), self.batch_size, self.seed, start, stop)
        for number, indices in enumerate(drawn, start):
            yield list(enumerate(indices, number * self.batch_size))

    def __getitem__(self, key: tuple[int, int]) -> Any:
        """The item of a key."""
        place, index = key
        with seeded(self.seed, place):
            return self.dataset[index]
