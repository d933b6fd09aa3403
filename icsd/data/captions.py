"""Captions to words: the tokenizer and the vocabulary."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

import regex
import torch
from torch import Tensor

from icsd.errors import InputError

# Scripts that put no spaces between words: Chinese, Japanese, Thai, Lao, Khmer, Burmese and others. Unicode says that
# their words can only be found with a dictionary (Line_Break=SA, and UAX 29 for the ideographs).
_UNSPACED = r"[\p{Line_Break=SA}\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}\p{scx=Bopomofo}]"
_WORD = regex.compile(
    rf"(?=[{_UNSPACED}&&\w])\X"  # a character with its marks
    rf"|[\w--{_UNSPACED}--\p{{M}}--\p{{Join_Control}}][\w--{_UNSPACED}]*",
    regex.V1,
)
_ASCII_WORD = re.compile(r"\w+", re.ASCII)
_UNSPACED_WORD = regex.compile(rf"[{_UNSPACED}&&\w]", regex.V1)
_INVISIBLE = regex.compile(r"[\p{Cf}--\p{Join_Control}--\u200b]", regex.V1)  # a soft hyphen does not end a word


def tokenize(caption: str) -> list[str]:
    r"""Split a caption into lower-case words.

    A word is a run of letters, marks, digits and ``_``, the ``\w+`` of Unicode. Words of English are those of AttnGAN.
    In scripts without spaces between words, every character is a word. Unicode composition (NFC) comes first, so that
    the two forms of an accented letter are equal.
    """
    if caption.isascii():
        return _ASCII_WORD.findall(caption.lower())  # the same words, four times as fast
    return _WORD.findall(_INVISIBLE.sub("", unicodedata.normalize("NFC", caption)).lower())


def unspaced_note(captions: Sequence[str]) -> list[str]:
    """Return a line about captions in scripts without spaces between words, if there are any."""
    found = [caption for caption in captions if _UNSPACED_WORD.search(caption)]
    if not found:
        return []
    longest = max(map(len, map(tokenize, found)))
    return [
        f"{len(found)} of {len(captions)} captions are in a script without spaces between words, such as {found[0]!r}; "
        f"each character counts as a word, so text.max_words should be {longest} to read the longest of them"
    ]


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
