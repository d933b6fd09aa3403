import dataclasses

import pytest

from icsd.errors import InputError
from icsd.evaluation.protocol import Protocol, require_one_protocol

PROTOCOL = Protocol("lite0", "a" * 64, "bilinear", 32, "emoji, test split", "b" * 64, 94, 400, "c" * 64, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [("extractor_sha256", "d" * 64), ("resolution", 64), ("generated_images", 401), ("first_seed", 1)],
)
def test_different_protocols_have_different_identifiers_and_are_not_compared(field, value):
    other = dataclasses.replace(PROTOCOL, **{field: value})
    assert other.identifier != PROTOCOL.identifier
    with pytest.raises(InputError, match=f"a and b cannot be compared: {field} is "):
        require_one_protocol({"a": PROTOCOL, "b": other})


def test_equal_protocols_are_one():
    assert require_one_protocol({"a": PROTOCOL, "b": dataclasses.replace(PROTOCOL)}) == PROTOCOL
    assert "lite0 aaaaaaaa" in PROTOCOL.name
