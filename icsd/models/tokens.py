"""Tokenizers, which turn captions into the token ids that a text encoder reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from icsd.data.captions import Vocabulary
from icsd.models.minilm import BEGIN, UNKNOWN, load_minilm


class Tokens(NamedTuple):
    """Token ids of B captions of up to T tokens, on the CPU."""

    ids: Tensor
    """`(B, T)` int64, padded with 0."""
    lengths: Tensor
    """`(B,)` int64, at least 1."""


class Tokenizer(ABC):
    """An object that turns captions into the token ids of one text encoder.

    Attributes:
        max_words: Words read of each caption.
    """

    max_words: int

    @abstractmethod
    def __call__(self, captions: Sequence[str], *, sample: bool = False) -> Tokens:
        """Return the token ids of B captions.

        Args:
            captions: Sentences.
            sample: Read a random subset of the words of a longer caption, in order, drawn from PyTorch's global
                generator, if the encoder learns from such subsets; by default its first `max_words` words.
        """

    @abstractmethod
    def unknown(self, caption: str) -> list[str]:
        """Return the words of a caption that the encoder does not know and leaves out."""

    @abstractmethod
    def read(self, caption: str) -> list[str]:
        """Return the words of a caption that its word features stand for, one each."""

    @abstractmethod
    def beyond(self, caption: str) -> list[str]:
        """Return the known words of a caption past `max_words`, which are not read in generation."""

    @abstractmethod
    def reads(self, caption: str) -> bool:
        """Return whether a word of a caption is known; without one the encoder reads the empty caption."""


class WordTokenizer(Tokenizer):
    """A tokenizer of whole words that stand in a vocabulary.

    Args:
        vocabulary: The words it knows.
        max_words: Words read of each caption.
    """

    def __init__(self, vocabulary: Vocabulary, max_words: int) -> None:
        self.vocabulary = vocabulary
        self.max_words = max_words

    def __call__(self, captions: Sequence[str], *, sample: bool = False) -> Tokens:
        return Tokens(*self.vocabulary.encode(captions, self.max_words, training=sample))

    def unknown(self, caption: str) -> list[str]:
        return self.vocabulary.unknown(caption)

    def read(self, caption: str) -> list[str]:
        ids, _ = self([caption])
        return [self.vocabulary.words[index - 1] if index else "" for index in ids[0].tolist()]

    def beyond(self, caption: str) -> list[str]:
        return [self.vocabulary.words[index - 1] for index in self.vocabulary.indices(caption)[self.max_words :]]

    def reads(self, caption: str) -> bool:
        return bool(self.vocabulary.indices(caption))


class SentenceTokenizer(Tokenizer):
    """The tokenizer of all-MiniLM-L6-v2: pieces of words between the marks of begin and end.

    It never samples: the network was trained on sentences, not on subsets of their words.

    Args:
        max_words: Pieces read of each caption, the marks not counted.
    """

    def __init__(self, max_words: int) -> None:
        self.max_words = max_words

    def __call__(self, captions: Sequence[str], *, sample: bool = False) -> Tokens:
        rows = [torch.tensor(row) for row in load_minilm().ids(captions, self.max_words)]
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        return Tokens(pad_sequence(rows, batch_first=True), lengths)

    def unknown(self, caption: str) -> list[str]:
        """See `Tokenizer`; every word is made of known pieces, but emoji and rare characters are unknown."""
        return load_minilm().unknown(caption)

    def read(self, caption: str) -> list[str]:
        """See `Tokenizer`; pieces that continue a word begin with ##."""
        return load_minilm().pieces(caption, self.max_words)

    def beyond(self, caption: str) -> list[str]:
        return load_minilm().pieces(caption)[self.max_words :]

    def reads(self, caption: str) -> bool:
        pieces = set(load_minilm().pieces(caption)) - {UNKNOWN, BEGIN}
        return any(letter.isalnum() for piece in pieces for letter in piece)
