"""Pairs of encoders that rank captions for an image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from icsd.errors import InputError
from icsd.evaluation.extractors import FEATURES, clip_images, first_line, import_extra, pretrained

CLIP = "clip"


@dataclass(frozen=True)
class Encoder:
    """An image encoder and a sentence encoder of one feature space.

    Attributes:
        label: Label of its metrics: "training_encoder" if it guided the model, "independent_encoder", or "clip".
        identity: Name and hash of its weights. Values by different encoders are never compared.
        images: uint8 images `(B, 3, r, r)` to features `(B, E)`.
        sentences: Captions to features `(B, E)`.
    """

    label: str
    identity: str
    images: Callable[[Tensor], Tensor]
    sentences: Callable[[list[str]], Tensor]


def clip_encoder(folder: Path, device: torch.device) -> Encoder:
    """Return both encoders of a CLIP model, which rank captions and give the CLIP score.

    Args:
        folder: A local folder with `config.json`, `model.safetensors` and the files of the tokenizer.
        device: Device of the networks.

    Raises:
        InputError: The folder holds no such model, or transformers cannot be imported.
    """
    network = pretrained("CLIPModel", folder, device)
    tokenizer = _pretrained_tokenizer(folder)
    extractor = clip_images(network, folder)
    length = network.config.text_config.max_position_embeddings

    def sentences(captions: list[str]) -> Tensor:
        tokens = tokenizer(captions, padding=True, truncation=True, max_length=length, return_tensors="pt").to(device)
        return network.text_projection(network.text_model(**tokens).pooler_output)

    return Encoder(CLIP, f"CLIP {extractor.sha256[:12]}", lambda images: extractor(images)[FEATURES], sentences)


def _pretrained_tokenizer(folder: Path) -> Callable:
    try:
        return import_extra("transformers").AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{folder} holds no tokenizer of transformers: {first_line(error)}") from error
