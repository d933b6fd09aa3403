"""Limits on what is read from files that may be broken or hostile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO

from icsd.errors import InputError


@dataclass(frozen=True)
class Limits:
    """The largest files and images that are read. Raise a limit if your files are larger and you trust them."""

    max_file_mb: int = 256
    """Largest size of a file, and of a file in an archive after decompression, in MiB; also of a page of a Parquet file
    that expands to more than four times its size."""

    max_pixels: int = 178_956_970
    """Largest number of pixels of an image: 13,377 x 13,377."""

    def __post_init__(self) -> None:
        for key in ("max_file_mb", "max_pixels"):
            if getattr(self, key) < 1:
                raise InputError(f"{key} is {getattr(self, key)}: give at least 1")

    @property
    def max_bytes(self) -> int:
        """The largest size of a file in bytes."""
        return self.max_file_mb * 2**20

    def check_size(self, name: str, size: int) -> None:
        """Raise InputError if the file ``name`` of ``size`` bytes is too large."""
        if size > self.max_bytes:
            raise InputError(
                f"{name} has {size:,} bytes, more than max_file_mb={self.max_file_mb} allows; "
                "raise max_file_mb if the file is right"
            )

    def read(self, name: str, file: BinaryIO) -> bytes:
        """Read a file to its end, but never more than the limit."""
        data = file.read(self.max_bytes + 1)
        self.check_size(name, len(data))
        return data
