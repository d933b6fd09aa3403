"""Which module opens which images."""

from icsd.data.dataset import CaptionedImages, DataConfig, Split
from icsd.data.emoji import open_emoji
from icsd.data.folder import open_folder
from icsd.data.procedural import open_procedural
from icsd.errors import InputError

SOURCES = {
    "emoji": open_emoji,
    "procedural-flowers": open_procedural,
    "procedural-birds": open_procedural,
    "folder": open_folder,
}


def open_dataset(config: DataConfig, split: Split, resolution: int) -> CaptionedImages:
    """Open one split of the configured images.

    Args:
        config: Which images.
        split: "train" or "test"; no image is in both.
        resolution: Side R of the images, in pixels.

    Returns:
        The images, deterministic in ``config`` and ``resolution``.

    Raises:
        InputError: If the configuration, a file or a needed package cannot be used; the message says what to do.
    """
    if (config.root is None) == (config.name == "folder"):
        remedy = "give the folder of images" if config.root is None else "leave it out or set data.name=folder"
        raise InputError(f"data.root={config.root} does not go with data.name={config.name}; {remedy}")
    return SOURCES[config.name](config, split, resolution)
