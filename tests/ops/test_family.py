"""The losses of the literature on the reference and the CPU backend, their parameters and their documentation."""

import re
from pathlib import Path

import pytest
from conformance.family import *  # noqa: F403

from icsd.losses import LOSSES, make_loss


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("pkt", {"mode": "official"}, "pkt: mode must be 'paper' or 'code', got 'official'"),
        ("rkd_distance", {"mode": None}, "rkd_distance: mode must be 'paper' or 'code', got None"),
        ("rkd_angle", {"mode": 1}, "rkd_angle: mode must be 'paper' or 'code', got 1"),
        ("cc", {"mode": ""}, "cc: mode must be 'paper' or 'code', got ''"),
        ("cc", {"kernel": "gauss"}, "cc: kernel must be 'rbf' or 'bilinear', got 'gauss'"),
        ("cc", {"gamma": -1.0}, "cc: gamma must be a positive finite number, got -1.0"),
        ("cc", {"order": 0}, "cc: order must be a positive finite number, got 0"),
        ("kl", {"student_temperature": "1e-1"}, "kl: student_temperature must be a positive finite number, got '1e-1'"),
        ("smooth_l1", {"beta": "1"}, "smooth_l1: beta must be a finite number >= 0, got '1'"),
        ("cc", {"order": 1.5}, "cc: order must be a whole number, got 1.5"),
        ("cka", {"mode": "code"}, "loss 'cka' has no parameter 'mode'; it takes none"),
        ("sp", {"mode": "code"}, "loss 'sp' has no parameter 'mode'; it takes include_diagonal"),
        ("pkt", {"gamma": 1.0}, "loss 'pkt' has no parameter 'gamma'; it takes mode, include_diagonal"),
    ],
)
def test_bad_parameters(name, parameters, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_loss(name, **parameters)


def test_documentation():
    text = (Path(__file__).parents[2] / "docs" / "losses.md").read_text()
    assert re.findall(r"^\| `\"(\w+)\"`", text, re.MULTILINE) == list(LOSSES)
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert examples
    namespace = {}
    for example in examples:
        exec(example, namespace)
