"""Captioned images: sources, captions and vocabulary."""

from icsd.data.captions import Vocabulary, tokenise
from icsd.data.dataset import CaptionedImages, DataConfig, open_dataset

__all__ = ["CaptionedImages", "DataConfig", "Vocabulary", "open_dataset", "tokenise"]
