"""Plans of images to generate: a sentence and a seed for each image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from icsd.errors import InputError

LARGEST = 10**7  # images of a plan


class Request(NamedTuple):
    """One image to generate."""

    sentence: str
    seed: int

    def __str__(self) -> str:
        return f"{self.sentence} (seed {self.seed})"


@dataclass(frozen=True)
class Plan:
    """A sequence of requests.

    Without ``count``, the images of a sentence follow each other, and all sentences share the same seeds. With
    ``count``, image k has sentence k, going round the sentences, and a seed of its own.

    Raises:
        InputError: There is no sentence, a sentence is blank, a number is too small or too large, or both numbers are
            given.
    """

    sentences: Sequence[str]
    """The sentences."""

    seed: int = 0
    """Seed of the first image, or of the first image of each sentence; the next ones count up."""

    per_sentence: int | None = None
    """Images of each sentence; one where neither number is given."""

    count: int | None = None
    """Images in all."""

    def __post_init__(self) -> None:
        if isinstance(self.sentences, str):
            raise InputError(f"sentences is {self.sentences!r}: give a list of sentences")
        if not self.sentences or not all(sentence.strip() for sentence in self.sentences):
            raise InputError('no sentence to generate: give one or more, as in "a woman with dark skin, firefighter"')
        for name in ("per_sentence", "count"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}: give at least 1")
        if self.per_sentence is not None and self.count is not None:
            raise InputError(f"per_sentence is {self.per_sentence} and count is {self.count}: give one of them")
        if self._number() > LARGEST:
            raise InputError(f"{self._number()} images are more than {LARGEST}: give fewer, or make several plans")

    def _number(self) -> int:
        """Return the number of images; `len` would fail for numbers beyond 2**63."""
        return self.count if self.count is not None else len(self.sentences) * (self.per_sentence or 1)

    def __len__(self) -> int:
        return self._number()

    def __getitem__(self, index: int) -> Request:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self.count is not None:
            return Request(self.sentences[index % len(self.sentences)], self.seed + index)
        sentence, image = divmod(index, self.per_sentence or 1)
        return Request(self.sentences[sentence], self.seed + image)

    def __iter__(self) -> Iterator[Request]:
        return (self[index] for index in range(len(self)))
