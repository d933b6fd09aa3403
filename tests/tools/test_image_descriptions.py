"""The images of the documentation show what their tools would draw now."""

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from PIL import Image

from tools import bytes_over_ranks, draw_algorithm, draw_roofline, evidence
from tools.descriptions import read_description, write_description

IMAGES = Path(__file__).parents[2] / "docs" / "images"
DRAWN = {
    "roofline": (draw_roofline.describe, "tools.draw_roofline --output docs/images/roofline.png"),
    "bytes-over-ranks": (bytes_over_ranks.describe, "tools.bytes_over_ranks --plot docs/images/bytes-over-ranks.png"),
    "algorithm": (lambda: draw_algorithm.describe(draw_algorithm.draw()), "tools.draw_algorithm"),
}


@pytest.mark.parametrize("name", DRAWN)
def test_images_are_up_to_date(name):
    text, command = DRAWN[name]
    assert read_description(IMAGES / f"{name}.png") == text(), f"run: python -m {command}"


@pytest.mark.parametrize("sweep", sorted(evidence.FOLDER.glob("*.csv")), ids=lambda path: path.stem)
def test_images_of_the_evidence_are_up_to_date(sweep):
    text = evidence.text_of(evidence.read_rows(sweep))
    assert read_description(sweep.with_suffix(".png")) == text, "run: python -m tools.evidence --write docs/evidence.md"


def test_a_description_changes_nothing_else(tmp_path):
    image = Image.effect_noise((7, 5), 50).convert("RGBA")
    image.save(tmp_path / "a.png", dpi=(110, 110))
    assert read_description(tmp_path / "a.png") is None
    for text in ("K = X Xᵀ", "one line\nanother line\n"):
        write_description(tmp_path / "a.png", text)
        assert read_description(tmp_path / "a.png") == text
    with Image.open(tmp_path / "a.png") as found:
        assert found.tobytes() == image.tobytes()
        assert found.info["dpi"] == pytest.approx((110, 110), rel=1e-3)
