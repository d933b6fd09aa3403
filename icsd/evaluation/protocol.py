"""The conditions under which a metric was measured. Values of different protocols are never compared."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping

from icsd.errors import InputError

VERSION = 4
"""Version of the metrics, the probes and the files of results. Files of other versions are not read."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Everything besides the model that a metric depends on.

    Attributes:
        extractor: Name of the network that gives the features.
        extractor_sha256: Hash of its weights.
        resize: The way in which images reach the input resolution of the network.
        resolution: Pixels of the side of the compared images.
        real_set: Name and split of the real images.
        real_sha256: Hash of the pixels of the real images at that resolution.
        real_images: Number of real images.
        generated_images: Number of generated images.
        captions_sha256: Hash of the captions, in order; image k has caption k, modulo their number.
        first_seed: Seed of the first image; image k has the seed `first_seed + k`.
    """

    extractor: str
    extractor_sha256: str
    resize: str
    resolution: int
    real_set: str
    real_sha256: str
    real_images: int
    generated_images: int
    captions_sha256: str
    first_seed: int

    @property
    def identifier(self) -> str:
        """The first digits of the hash of all fields: equal for equal protocols."""
        return hash_of(dataclasses.asdict(self))[:12]

    @property
    def name(self) -> str:
        """A line that a table shows beside its metrics."""
        return (
            f"{self.extractor} {self.extractor_sha256[:8]} ({self.resize}), {self.resolution} px, {self.real_images:,} "
            f"real images of {self.real_set} ({self.real_sha256[:8]}), {self.generated_images:,} generated images from "
            f"seed {self.first_seed} (captions {self.captions_sha256[:8]})"
        )


def hash_of(value: object) -> str:
    """Return the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def require_one_protocol(protocols: Mapping[str, Protocol]) -> Protocol:
    """Return the one protocol of several results.

    Args:
        protocols: The protocol of each result by the name of the result.

    Raises:
        InputError: Two results have different protocols; the message names the first field that differs.
    """
    (first, expected), *others = protocols.items()
    for name, protocol in others:
        for field in dataclasses.fields(Protocol):
            a, b = getattr(expected, field.name), getattr(protocol, field.name)
            if a != b:
                raise InputError(
                    f"{first} and {name} cannot be compared: {field.name} is {a!r} and {b!r}. Evaluate both again with "
                    "the same options"
                )
    return expected
