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
from icsd.data.parquet_pages import read_pages
from icsd.errors import InputError

_IMAGE_KEYS = ("image", "img", "jpg", "png", "webp")
_ROWS = 64  # read at a time
_EXPANSION = 4  # factor from which a page is held to the limit; images hardly expand, and may fill a large page
_LONGEST_PAGE = 1 << 20  # values of a page of lists; a dictionary and run lengths store any number in a few bytes


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
        self.place = file
        self._check_rows()
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
            rows = self._rows_at_once({*keys})
            for batch in self.file.iter_batches(batch_size=rows, columns=list(keys)):
                yield batch.to_pylist()
        except InputError:
            raise
        except Exception as error:  # pyarrow raises its own errors and OSError
            raise self._broken(error) from error

    def _check_rows(self) -> None:
        """Refuse a number of rows that the file has no room for."""
        rows = self.file.metadata.num_rows
        size = self.place.stat().st_size if isinstance(self.place, Path) else len(self.place.getvalue())
        if not 0 <= rows <= size:
            raise self._broken(ValueError(f"it claims {rows:,} rows in {size:,} bytes"))

    def _rows_at_once(self, keys: set[str]) -> int:
        """Return how many rows fit into the limit, by the largest page: every row may repeat a value of a dictionary.

        Raises:
            InputError: A page expands beyond the limit.
            ValueError: The pages are broken.
        """
        largest = 1
        with self.place.open("rb") if isinstance(self.place, Path) else io.BytesIO(self.place.getvalue()) as file:
            for column, is_list in self._chunks(keys):
                offsets = (column.dictionary_page_offset, column.data_page_offset)
                start = min(offset for offset in offsets if offset is not None)
                for page in read_pages(file, start, start + column.total_compressed_size):
                    if page.size > _EXPANSION * page.stored:
                        self.limits.check_size(f"{self.name}, a page of {column.path_in_schema},", page.size)
                    if is_list and page.values > _LONGEST_PAGE:
                        raise ValueError(f"a page of {column.path_in_schema} claims {page.values:,} values")
                    largest = max(largest, page.size)
        return min(_ROWS, max(1, self.limits.max_bytes // largest))

    def _chunks(self, keys: set[str]) -> Iterator[tuple[Any, bool]]:
        """Yield pyarrow's description of the parts of columns, one for each row group, and whether it holds lists."""
        for group in range(self.file.metadata.num_row_groups):
            part = self.file.metadata.row_group(group)
            for index in range(part.num_columns):
                column = part.column(index)
                if column.path_in_schema.split(".")[0] in keys:
                    yield column, self.file.schema.column(index).max_repetition_level > 0

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
        column = self.file.schema_arrow.field(key).type
        kind = str(getattr(column, "value_type", column))  # of a dictionary's values
        return kind in ("binary", "large_binary") or (kind.startswith("struct<") and "bytes: binary" in kind)

    def _broken(self, error: Exception) -> InputError:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return InputError(f"{self.name} cannot be read as Parquet ({reason}); download or make it again")


def _pyarrow_parquet(name: str) -> ModuleType:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(
            f'{name} needs the package {error.name!r}: pip install -e ".[parquet]" in the checkout'
        ) from None
    return pyarrow.parquet
