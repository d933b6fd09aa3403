"""Sizes of the pages of a Parquet file after decompression, which pyarrow does not tell before it allocates them.

Each page begins with a header in Thrift's compact protocol (https://github.com/apache/parquet-format). A page that
says less than it holds is refused by pyarrow.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

_LARGEST_HEADER = 16 << 20  # as in pyarrow
_UNCOMPRESSED, _COMPRESSED = 2, 3  # fields of a page's header
_DATA, _DICTIONARY, _DATA_V2 = 5, 7, 8  # fields with a header of the kind of page, whose first field counts the values


class Page(NamedTuple):
    """One page of a column."""

    size: int
    """Bytes after decompression."""
    stored: int
    """Bytes in the file."""
    values: int
    """Number of values, nulls included."""


def read_pages(file: BinaryIO, start: int, stop: int) -> Iterator[Page]:
    """Yield the pages of the part of a column that lies between two places of a file.

    Raises:
        ValueError: The headers are broken.
    """
    while start < stop:
        header, length = _read_header(file, start, stop)
        kind = next((header[field] for field in (_DATA, _DICTIONARY, _DATA_V2) if field in header), {})
        size, compressed, values = header.get(_UNCOMPRESSED), header.get(_COMPRESSED), kind.get(1, 0)
        if not all(isinstance(number, int) and number >= 0 for number in (size, compressed, values)):
            raise ValueError("the header of a page has no sizes")
        yield Page(size, compressed, values)
        start += length + compressed


def _read_header(file: BinaryIO, start: int, stop: int) -> tuple[dict[int, Any], int]:
    """Return the fields of the header at a place, and its length."""
    size = 1 << 10
    while True:
        file.seek(start)
        data = file.read(min(size, stop - start))
        try:
            return _Compact(data).struct()
        except IndexError as error:  # the header goes on behind what was read
            if len(data) < size or size >= _LARGEST_HEADER:
                raise ValueError("the header of a page does not end") from error
        size *= 4


class _Compact:
    """A reader of Thrift's compact protocol that keeps the numbers and structs, and passes over the rest."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def struct(self, depth: int = 0) -> tuple[dict[int, Any], int]:
        """Return the fields by number, and the place behind the struct."""
        fields, field = {}, 0
        while head := self._byte():
            field = field + (head >> 4) if head >> 4 else self._number()
            fields[field] = self._value(head & 15, depth)
        return fields, self.place

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind in (4, 5, 6):
            return self._number()
        if kind == 12 and depth < 8:
            return self.struct(depth + 1)[0]
        if kind not in (3, 7, 8):
            raise ValueError(f"the header of a page has a field of kind {kind}")
        length = {3: 1, 7: 8}.get(kind) or self._varint()
        self.place += length
        return None

    def _number(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("the header of a page has a number of more than 64 bits")

    def _byte(self) -> int:
        self.place += 1
        return self.data[self.place - 1]
