"""The order of the data, the random choices made with each image, and the batches that the networks take."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from icsd.data import tokenize
from icsd.errors import InputError
from icsd.models.tokens import Tokenizer, Tokens
from icsd.team import Team
from icsd.training.randomness import seeded


@dataclass
class Batch:
    """Images with their captions."""

    images: Tensor
    """`(B, 3, r, r)` in [-1, 1]; of several ranks, those of this one alone, while all else is that of all ranks."""
    captions: list[str]
    """B sentences."""
    ids: Tensor
    """Token ids of the captions, `(B, T)` int64, padded with 0."""
    lengths: Tensor
    """Tokens of each caption, `(B,)` int64."""
    class_ids: Tensor
    """Classes of the images, `(B,)` int64."""
    caption_ids: Tensor
    """`(B,)` int64, equal for captions of the same words in the same order."""
    mismatched: Tensor
    """Index of the image whose caption is a wrong one for each image, `(B,)` int64; see `mismatched_captions`."""

    @classmethod
    def of(
        cls,
        images: Tensor,
        captions: Sequence[str],
        class_ids: Sequence[int],
        tokens: Tokens,
        *,
        similar: bool = False,
    ) -> Batch:
        """Make a batch, with its wrong captions, of images, their captions and classes, and the captions' tokens.

        Args:
            images: `(B, 3, r, r)`.
            captions: B sentences.
            class_ids: Classes of the images.
            tokens: Tokens of the captions.
            similar: Choose wrong captions that are similar to the right ones; see `mismatched_captions`.
        """
        rows = zip(tokens.ids.tolist(), tokens.lengths.tolist(), strict=True)
        words = [set(row[:length]) for row, length in rows] if similar else None
        first: dict[tuple[str, ...], int] = {}
        caption_ids = [first.setdefault(tuple(tokenize(caption)), len(first)) for caption in captions]
        return cls(
            images=images,
            captions=list(captions),
            ids=tokens.ids,
            lengths=tokens.lengths,
            class_ids=torch.tensor(class_ids),
            caption_ids=torch.tensor(caption_ids),
            mismatched=mismatched_captions(class_ids, caption_ids, words),
        )

    def of_all_ranks(self, team: Team, similar: bool) -> Batch:
        """Join the captions of all ranks, in the order of the ranks, and choose the wrong ones among all of them.

        Args:
            team: The ranks, each of which has such a batch.
            similar: See `of`.
        """
        rows = [row[:length].tolist() for row, length in zip(self.ids, self.lengths, strict=True)]
        everyone = team.gather((self.captions, self.class_ids.tolist(), rows))
        captions, class_ids, rows = (list(itertools.chain(*part)) for part in zip(*everyone, strict=True))
        return Batch.of(self.images, captions, class_ids, _tokens(rows), similar=similar)

    def pin_memory(self) -> Batch:
        """Move the tensors that go to a GPU to page-locked memory; called by the data loader."""
        for name in ("images", "ids", "class_ids", "caption_ids", "mismatched"):
            setattr(self, name, getattr(self, name).pin_memory())
        return self


def collate(items: Sequence[dict[str, Any] | InputError], similar: bool = False) -> Batch | InputError:
    """Join items of `SampledDataset` into a batch; an error among them takes its place."""
    error = next((item for item in items if isinstance(item, InputError)), None)
    if error is not None:
        return error
    images, captions, class_ids, rows = (
        [item[key] for item in items] for key in ("image", "caption", "class_id", "ids")
    )
    return Batch.of(torch.stack(images), captions, class_ids, _tokens(rows), similar=similar)


def _tokens(rows: Sequence[Sequence[int] | Tensor]) -> Tokens:
    """Return the token ids of captions as they are padded."""
    rows = [torch.as_tensor(row) for row in rows]
    return Tokens(pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows]))


def mismatched_captions(
    class_ids: Sequence[int], caption_ids: Sequence[int], words: Sequence[set[int]] | None = None
) -> Tensor:
    """Choose a wrong caption for each image of a batch: that of the first image before it of another class and caption.

    Args:
        class_ids: Classes of B images.
        caption_ids: B numbers, equal for equal captions.
        words: The words of B captions, at least one each. Of the wrong captions, the one with the largest share of
            common words among all words of both captions is chosen then, and the first of several.

    Returns:
        Indices, `(B,)` int64; an image's own index where the batch holds no wrong caption for it.
    """
    count = len(class_ids)
    chosen = []
    for own in range(count):
        others = ((own - step) % count for step in range(1, count))
        wrong = (k for k in others if class_ids[k] != class_ids[own] and caption_ids[k] != caption_ids[own])
        if words is None:
            chosen.append(next(wrong, own))
        else:
            chosen.append(max(wrong, key=lambda k: _similarity(words[own], words[k]), default=own))
    return torch.tensor(chosen, dtype=torch.int64)


def _similarity(a: set[int], b: set[int]) -> float:
    """Return Jaccard's index of two sets of words."""
    return len(a & b) / len(a | b)


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
    """A data set whose random choices (caption, crop, flip, words) depend only on the place of the draw in the run.

    So it does not matter which process makes a draw, nor what was drawn before: resuming needs no state.

    Args:
        dataset: The data set whose items are drawn.
        tokenizer: The tokenizer of the captions.
        batch_size: Items per batch.
        seed: Seed of the order and of the choices.
        similar: Choose wrong captions that are similar to the right ones.
        team: The ranks that share each batch. Each loads its own part.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: Tokenizer,
        batch_size: int,
        seed: int,
        *,
        similar: bool = False,
        team: Team | None = None,
    ) -> None:
        self.similar = similar
        self.team = team or Team()
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.seed = seed

    def batches(self, start: int, stop: int) -> Iterator[list[tuple[int, int]]]:
        """Yield the keys of batches ``start`` to ``stop``, each the place of a draw and the index of its item."""
        drawn = batch_indices(len(self.dataset), self.batch_size, self.seed, start, stop)
        for number, indices in enumerate(drawn, start):
            yield list(enumerate(indices, number * self.batch_size))[self.team.own(self.batch_size)]

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any] | InputError:
        """Return the item of a key, with the token ids of its caption.

        An error is returned, not raised: the data loader would wrap the traceback of its process around it.
        """
        place, index = key
        with seeded(self.seed, place):
            try:
                item = self.dataset[index]
            except InputError as error:
                return error
            ids, _ = self.tokenizer([item["caption"]], sample=True)
        return {**item, "ids": ids[0]}

    def batches_of(self, start: int, stop: int, workers: int, *, pin_memory: bool = False) -> Iterator[Batch]:
        """Yield batches ``start`` to ``stop``.

        Args:
            start: Number of the first batch.
            stop: Number after that of the last batch.
            workers: Processes that load data; 0 loads in the calling process.
            pin_memory: Copy tensors to page-locked memory, for a GPU.

        Raises:
            InputError: An image cannot be read.
        """
        loader = DataLoader(
            self,
            batch_sampler=self.batches(start, stop),
            num_workers=workers,
            collate_fn=functools.partial(collate, similar=self.similar),
            generator=torch.Generator(),  # the global one belongs to the networks
            pin_memory=pin_memory,
        )
        for batch in loader:
            self._raise_errors(batch)
            yield batch if self.team.size == 1 else batch.of_all_ranks(self.team, self.similar)

    def _raise_errors(self, batch: Batch | InputError) -> None:
        """Raise an error that took the place of a batch, on all ranks if it is that of one."""
        error = batch if isinstance(batch, InputError) else None
        if self.team.size > 1:
            errors = self.team.gather(error and str(error))
            rank = next((rank for rank, each in enumerate(errors) if each), None)
            error = error if rank is None else InputError(f"rank {rank}: {errors[rank]}")
        if error is not None:
            raise error
