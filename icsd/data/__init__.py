"""Captioned images: sources, captions and vocabulary."""

from icsd.data.captions import Vocabulary, tokenize
from icsd.data.dataset import CaptionedImages, DataConfig
from icsd.data.folder import write_folder
from icsd.data.sources import open_dataset

__all__ = ["CaptionedImages", "DataConfig", "Vocabulary", "open_dataset", "tokenize", "write_folder"]
