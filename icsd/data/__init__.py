"""Captioned images: sources, captions and vocabulary."""

from icsd.data.captions import Vocabulary, tokenise
from icsd.data.dataset import CaptionedImages, DataConfig, open_dataset
from icsd.data.folder import write_folder

__all__ = ["CaptionedImages", "DataConfig", "Vocabulary", "open_dataset", "tokenise", "write_folder"]
