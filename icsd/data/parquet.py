"""Parquet files of Hugging Face data sets: images with their captions, or a list of captions of image files."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from icsd.data.archives import ByteRange
from icsd.data.limits import Limits
from icsd.data.lists import CAPTION_KEYS, FILE_KEYS
from icsd.errors import InputError

_IMAGE_KEYS = ("image", "img", "jpg", "png", "webp")
_ROWS = 64  # read at a time


class ParquetFile:
    """A Parquet file. If it has a column of images, it is a source of files, one for each row.

    Args:
        name: Its name in messages.
        file: Its path, or its bytes.
        limits: The largest files that are read.

    Raises:
        InputError: The package pyarrow is missing, or the file is broken.

    Attributes:
        image_key: The column of images, or None.
        columns: The names of all columns.
        paths: A name for each image: the number of its row.
    """

    def __init__(self, name: str, file: Path | io.BytesIO, limits: Limits) -> None:
        self.name, self.limits = name, limits
        parquet = _pyarrow_parquet(name)
        try:
            self.file = parquet.ParquetFile(file)
        except Exception as error:  # pyarrow raises its own errors and OSError
            raise self._broken(error) from error
        self.columns = list(self.file.schema_arrow.names)
        self.image_key = next((key for key in _IMAGE_KEYS if key in self.columns and self._holds_bytes(key)), None)
        self.paths = [f"{row:08d}" for row in range(self.file.metadata.num_rows)] if self.image_key else []
        self.problems: list[str] = []

    @property
    def is_list(self) -> bool:
        """True if the rows name image files and hold captions."""
        return self.image_key is None and bool({*FILE_KEYS} & {*self.columns} and {*CAPTION_KEYS} & {*self.columns})

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Return the place and the values of each row, without the images."""
        keys = [key for key in (*FILE_KEYS, *CAPTION_KEYS, "class", "split") if key in self.columns]
        keys = [key for key in keys if key != self.image_key]
        number = 0
        for batch in self._batches(keys):
            for values in batch:
                number += 1
                yield f"{self.name}, row {number},", values

    def read(self, paths: set[str]) -> Iterator[tuple[str, bytes | InputError]]:
        number = 0
        for batch in self._batches([self.image_key]):
            for values in batch:
                path = f"{number:08d}"
                number += 1
                if path in paths:
                    yield path, self._bytes(path, values[self.image_key])

    def byte_range(self, path: str) -> ByteRange | None:
        return None

    def _batches(self, keys: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
        try:
            for batch in self.file.iter_batches(batch_size=_ROWS, columns=list(keys)):
                yield batch.to_pylist()
        except Exception as error:  # pyarrow raises its own errors and OSError
            raise self._broken(error) from error

    def _bytes(self, path: str, value: Any) -> bytes | InputError:
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            return InputError(f"{self.name}/{path} holds no image; embed it when the data set is saved")
        try:
            self.limits.check_size(f"{self.name}/{path}", len(data))
        except InputError as error:
            return error
        return data

    def _holds_bytes(self, key: str) -> bool:
        kind = str(self.file.schema_arrow.field(key).type)
        return kind in ("binary", "large_binary") or (kind.startswith("struct<") and "bytes: binary" in kind)

    def _broken(self, error: Exception) -> InputError:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return InputError(f"{self.name} cannot be read as Parquet ({reason}); download or make it again")


def _pyarrow_parquet(name: str) -> ModuleType:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f'{name} needs the package {error.name!r}; pip install "icsd[parquet]"') from None
    return pyarrow.parquet
