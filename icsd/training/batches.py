"""The order of the data."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


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
