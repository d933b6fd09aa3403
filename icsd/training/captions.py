"""Checks that a text encoder and the captions of a data set fit each other."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import Any

from icsd.data import CaptionedImages
from icsd.errors import InputError
from icsd.models.tokens import Tokenizer

_SHOWN = 8


def check_captions(tokenizer: Tokenizer, train_set: CaptionedImages, test_set: CaptionedImages) -> list[str]:
    """Count the words that a text encoder does not know.

    Args:
        tokenizer: The tokenizer of the encoder.
        train_set: Images to train on.
        test_set: Held-out images.

    Returns:
        Notes about unknown words and about held-out captions without any known word, one line each.

    Raises:
        InputError: Captions to train on have no known word.
    """
    notes = []
    for part, dataset in (("training", train_set), ("held-out", test_set)):
        captions = list(dict.fromkeys(caption for captions in dataset.captions for caption in captions))
        unknown = Counter(word for caption in captions for word in tokenizer.unknown(caption))
        empty = [caption for caption in captions if not tokenizer.reads(caption)]
        if empty and dataset is train_set:
            raise InputError(
                f"the text encoder does not know any word of {len(empty)} of {len(captions)} captions, such as "
                f"{empty[0]!r}: leave them out, give encoders that were trained on such captions, or train the text "
                "encoder with the model"
            )
        if unknown:
            shown = ", ".join(word for word, _ in unknown.most_common(_SHOWN))
            more = ", ..." if len(unknown) > _SHOWN else ""
            words = "a word" if len(unknown) == 1 else f"{len(unknown)} words"
            notes.append(f"the text encoder does not know {words} of the {part} captions, left out: {shown}{more}")
        if empty:
            notes.append(f"it does not know any word of {len(empty)} {part} captions, such as {empty[0]!r}")
    return notes


def describe_data(dataset: CaptionedImages) -> dict[str, Any]:
    """Return what a checkpoint says of the data that it was trained on: JSON values."""
    content = json.dumps([dataset.captions, list(map(int, dataset.class_ids))]).encode()
    return {"name": dataset.name, "images": len(dataset), "digest": hashlib.sha256(content).hexdigest()}


def differences(saved: dict[str, Any] | None, now: dict[str, Any]) -> list[str]:
    """Return a note if the data of a checkpoint is not that of now; see `describe_data`."""
    if saved is None or saved == now:
        return []
    return [
        f"the data has changed since the checkpoint: it was {saved['name']} with {saved['images']} images, now it is "
        f"{now['name']} with {now['images']}{'' if saved['images'] != now['images'] else ' and other captions'}; the "
        "resumed run differs from an uninterrupted one"
    ]
