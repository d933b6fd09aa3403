"""Captions to words: the tokenizer and the vocabulary."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from icsd.errors import InputError

_WORD = re.compile(r"\w+")


def tokenize(caption: str) -> list[str]:
    r"""Split a caption into lower-case ``\w+`` words, after Unicode composition (NFC) so that accents stay in words."""
    return _WORD.findall(unicodedata.normalize("NFC", caption).lower())


def with_article(text: str) -> str:
    """Turn "a" into "an" before a vowel, for captions written from templates."""
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


class Vocabulary:
    """The words that a text encoder knows. Index 0 is both the end of a caption and its padding; words start at 1.

    ``Vocabulary(vocabulary.words)`` restores a saved vocabulary: ``words`` is a plain list that JSON can hold.

    Args:
        words: Distinct words, in the order of their indices.

    Raises:
        InputError: If ``words`` is not a sequence of distinct strings.
    """

    def __init__(self, words: Sequence[str]):
        self.words = list(words)
        if not all(isinstance(word, str) for word in self.words) or len(set(self.words)) != len(self.words):
            raise InputError("a vocabulary must be a list of distinct words; rebuild it from the training captions")
        self._index = {word: index for index, word in enumerate(self.words, start=1)}

    @classmethod
    def build(cls, captions: Iterable[str]) -> Vocabulary:
        """Collect the words of ``captions``, sorted, so that the same captions give the same indices."""
        return cls(sorted({word for caption in captions for word in tokenize(caption)}))

    def __len__(self) -> int:
        """Return the number of indices including the padding: the rows of an embedding table."""
        return len(self.words) + 1

    def unknown(self, caption: str) -> list[str]:
        """Return the words of ``caption`` that `encode` will skip, each once, in order of appearance."""
        return list(dict.fromkeys(word for word in tokenize(caption) if word not in self._index))

    def indices(self, caption: str) -> list[int]:
        """Return the indices of the known words of ``caption``, in order."""
        return [self._index[word] for word in tokenize(caption) if word in self._index]

    def encode(self, captions: Sequence[str], max_words: int = 18, *, training: bool = False) -> tuple[Tensor, Tensor]:
        """Turn captions into padded indices.

        Unknown words are skipped; `unknown` returns them, so that a caller can report them. A caption without a known
        word becomes the end token, so that every length is at least 1 and no softmax over words is empty.

        Args:
            captions: B sentences.
            max_words: The largest number of words kept.
            training: Cut longer captions to a random subset of their words, in order (torch's global generator);
                otherwise to their first ``max_words`` words.

        Returns:
            Tokens, int64 (B, T) with T the longest length, padded with 0; lengths, int64 (B,). Both on the CPU.
        """
        rows = []
        for caption in captions:
            row = torch.tensor(self.indices(caption) or [0])
            if len(row) > max_words:
                row = row[torch.randperm(len(row))[:max_words].sort().values] if training else row[:max_words]
            rows.append(row)
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        if not rows:
            return torch.zeros(0, 0, dtype=torch.int64), lengths
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths
