"""Reader and writer of the pickles in AttnGAN's data folders (Xu et al. 2018). No code in a pickle is ever run.

* ``train|test/filenames.pickle``: list of image names without suffix, ``001.Black_footed_Albatross/..._0001_796111``;
* ``train|test/class_info.pickle``: list of their class numbers;
* ``captions.pickle``: [captions of train, captions of test, word of each index, index of each word]. A caption is a
  list of indices, and every image has ten. A released text encoder needs the indices of its own file.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any

from icsd.data.captions import Vocabulary
from icsd.data.dataset import Split
from icsd.data.files import File, printable
from icsd.data.records import Record
from icsd.errors import InputError

CAPTIONS_PER_IMAGE = 10

_END = "<end>"


class _PlainUnpickler(pickle._Unpickler):
    """An unpickler that builds only lists, dicts, strings and numbers.

    It is the one in Python: the one in C reserves as much memory as a hostile pickle asks for.
    """

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}; only lists, dicts, strings and numbers are read")


def read_pickle(file: File, data: bytes) -> Any:
    """Read a pickle of Python 2 or 3 that holds plain values; no code in it is run.

    Raises:
        InputError: The pickle holds anything else, or is broken.
    """
    try:
        return _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()
    except Exception as error:  # a broken pickle may raise anything
        reason = printable(str(error))
        raise InputError(f"{file} cannot be read as a pickle ({reason}); get it from its publisher again") from error


def read_filenames(file: File, data: bytes) -> list[str]:
    """Read a ``filenames.pickle``.

    Raises:
        InputError: The pickle is not a list of names.
    """
    names = read_pickle(file, data)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"{file} must hold a list of image names; get it from its publisher again")
    return names


def read_vocabulary(file: File, data: bytes) -> Vocabulary:
    """Read the vocabulary of a ``captions.pickle``.

    Raises:
        InputError: The pickle has another form, or holds no word (AttnGAN writes such a file for a wrong path).
    """
    content = read_pickle(file, data)
    try:
        words, indices = content[2:4]
        ordered = [words[index] for index in range(len(words))]
        if ordered[0] == _END and len(ordered) > 1 and all(indices[word] == i for i, word in enumerate(ordered)):
            return Vocabulary(ordered[1:])
    except (TypeError, ValueError, LookupError):
        pass
    raise InputError(f"{file} must hold [captions, captions, words, indices] with words; get or make it again")


def make_pickles(records: dict[Split, Sequence[Record]], vocabulary: Vocabulary) -> dict[str, bytes]:
    """Return the pickles of a set.

    AttnGAN expects ten captions per image, so images with fewer repeat theirs, and only the first ten are kept of more.
    Words that the vocabulary lacks are left out.

    Args:
        records: The images of both splits.
        vocabulary: The words of ``captions.pickle``.

    Returns:
        The content of each file by its path.
    """
    classes = sorted({record.label for split in records.values() for record in split})
    number = {name: index for index, name in enumerate(classes, start=1)}
    contents: dict[str, Any] = {}
    captions = []
    for split in ("train", "test"):
        contents[f"{split}/filenames.pickle"] = [record.name.rpartition(".")[0] for record in records[split]]
        contents[f"{split}/class_info.pickle"] = [number[record.label] for record in records[split]]
        captions.append(
            [
                vocabulary.indices(record.captions[place % len(record.captions)])
                for record in records[split]
                for place in range(CAPTIONS_PER_IMAGE)
            ]
        )
    words = dict(enumerate([_END, *vocabulary.words]))
    contents["captions.pickle"] = [*captions, words, {word: index for index, word in words.items()}]
    return {path: pickle.dumps(content, protocol=2) for path, content in contents.items()}
