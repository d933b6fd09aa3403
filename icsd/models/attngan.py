"""AttnGAN's released DAMSM encoders (Xu et al. 2018): state dicts in ``text_encoder*.pth`` and ``image_encoder*.pth``.

Their folder, such as ``DAMSMencoders/bird``, holds one of each. The words of the text encoder are in the
``captions.pickle`` of the data set that they were trained on. No code in these files is run.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from icsd.data.attngan import read_vocabulary
from icsd.data.captions import Vocabulary
from icsd.data.files import File
from icsd.data.limits import Limits
from icsd.errors import InputError
from icsd.models.damsm import DAMSM, DAMSMConfig
from icsd.models.image_encoder import ImageEncoder, InceptionEncoder
from icsd.models.text import BiLSTMEncoder, TextConfig
from icsd.models.weights import read_weights

# Parts of the released names and of the names here.
_TEXT_NAMES = {"encoder.": "embedding.", "rnn.": "lstm."}
_IMAGE_NAMES = {"emb_features.": "regions.", "emb_cnn_code.": "whole."}


class Release(NamedTuple):
    """The files of released encoders."""

    text: Path
    image: Path
    captions: Path
    """The pickle of words beside them, which may be missing."""


def find_release(place: Path) -> Release | None:
    """Return the files of released encoders.

    Args:
        place: The file of the text encoder, or the folder of both encoders.

    Returns:
        The files, or None where ``place`` is something else.

    Raises:
        InputError: One of the two encoders is missing, or there are several text encoders.
    """
    if place.is_dir():
        found = sorted(place.glob("text_encoder*.pth"))
        if not found:
            return None
        if len(found) > 1:
            raise InputError(f"{place} holds {', '.join(path.name for path in found)}: give one of these files")
        place = found[0]
    elif place.suffix != ".pth":
        return None
    if not place.name.startswith("text_encoder"):
        raise InputError(f"{place} has the suffix of AttnGAN's encoders: give their text encoder, text_encoder*.pth")
    image = place.with_name(place.name.replace("text_encoder", "image_encoder", 1))
    for path in (place, image):
        if not path.is_file():
            raise InputError(f"no encoder at {path}: both encoders of AttnGAN's release are needed, in one folder")
    return Release(place, image, place.with_name("captions.pickle"))


def load_release(release: Release, vocabulary: Vocabulary | None) -> tuple[DAMSM, TextConfig]:
    """Read released encoders.

    Args:
        release: The files of the encoders.
        vocabulary: The words of the data set, for a release without its ``captions.pickle``.

    Returns:
        The encoders with the matching of the published code, and the configuration of the text encoder.

    Raises:
        InputError: A file cannot be read as AttnGAN's, or the words are missing or do not fit.
    """
    if release.captions.is_file():
        with release.captions.open("rb") as file:
            data = Limits().read(str(release.captions), file)
        vocabulary = read_vocabulary(File(str(release.captions.parent), release.captions.name), data)
    if vocabulary is None:
        raise InputError(
            f"the words of {release.text} are missing: put the captions.pickle of its data set beside it, or train on "
            "a set that `icsd data prepare cub` made with AttnGAN's birds.zip"
        )
    text, config = _text_encoder(release.text, vocabulary)
    return DAMSM(text, _image_encoder(release.image, config.dim), DAMSMConfig(mode="code")), config


def _text_encoder(path: Path, vocabulary: Vocabulary) -> tuple[BiLSTMEncoder, TextConfig]:
    state = _read(path, _TEXT_NAMES)
    try:
        rows, embedding_dim = state["embedding.weight"].shape
        width = state["lstm.weight_hh_l0"].shape[1]
    except (KeyError, ValueError, IndexError) as error:
        raise _unlike(path, "text", error) from error
    if rows != len(vocabulary):
        raise InputError(
            f"{path} knows {rows - 1} words, but the vocabulary has {len(vocabulary) - 1}: put the captions.pickle of "
            "the data set that it was trained on beside it"
        )
    config = TextConfig(dim=2 * width, embedding_dim=embedding_dim, normalize=False)
    encoder = BiLSTMEncoder(config, vocabulary)
    _load(encoder, state, path, "text")
    return encoder, config


def _image_encoder(path: Path, dim: int) -> ImageEncoder:
    state = _read(path, _IMAGE_NAMES)
    encoder = InceptionEncoder(dim)
    _load(
        encoder,
        {
            name if name.startswith(("regions.", "whole.")) else f"network.{name}": value
            for name, value in state.items()
        },
        path,
        "image",
    )
    return encoder


def _read(path: Path, names: dict[str, str]) -> dict[str, Tensor]:
    """Read a state dict, with the names of its parts replaced."""
    try:
        state = read_weights(path)
    except ValueError as error:
        raise InputError(
            f"{path} cannot be read as weights of AttnGAN ({error}): get it from its publisher again"
        ) from error
    for old, new in names.items():
        state = {new + name.removeprefix(old) if name.startswith(old) else name: value for name, value in state.items()}
    return state


def _load(module: nn.Module, state: dict[str, Tensor], path: Path, kind: str) -> None:
    """Load weights of the release; batch normalization of PyTorch before 0.4.1 counts no batches."""
    expected = module.state_dict()
    for name, value in state.items():
        if name in expected and value.dtype != expected[name].dtype:
            raise _unlike(path, kind, f"{name} is {value.dtype}")
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise _unlike(path, kind, error) from error


def _unlike(path: Path, kind: str, reason: object) -> InputError:
    return InputError(
        f"{path} is not AttnGAN's {kind} encoder ({' '.join(str(reason).split())[:200]}): give the files of its release"
    )
