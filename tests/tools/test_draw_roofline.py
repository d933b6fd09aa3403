import pytest
import torch

pytest.importorskip("matplotlib")

from tools import draw_roofline


def test_intensity_is_a_quarter_of_the_samples_in_float32():
    assert [draw_roofline.intensity(samples, torch.float32) for samples in (8, 128)] == [2, 32]
    assert draw_roofline.intensity(8, torch.bfloat16) == 4


def test_memory_binds_few_samples_and_arithmetic_many(tmp_path):
    rows = {line.split(" | ")[0]: line for line in draw_roofline.table().splitlines() if "float32" in line}
    assert "*" not in rows["| 16 x 65,536"]
    assert rows["| 512 x 65,536"].count("*") == 3
    # 16 samples of 65,536 float32 four times over: 16.8 MB at 2.04 TB/s.
    assert "8 µs" in rows["| 16 x 65,536"]
    draw_roofline.draw(tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 10_000
