from types import SimpleNamespace

import pytest
import torch
from torch import nn

from icsd.evaluation import extractors


def test_features_do_not_depend_on_the_images_beside_them(monkeypatch):
    pytest.importorskip("efficientnet_lite_pytorch")
    extractor = extractors.lite0(torch.device("cpu"))
    images = torch.randint(0, 256, (5, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    together = extractor(images)["features"]
    assert together.shape == (5, 1280)
    monkeypatch.setattr(extractors, "LITE0_BATCH", 2)
    torch.testing.assert_close(extractor(images)["features"], together, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=0.1)


def test_clip_reads_images_of_the_size_that_its_positions_fit(tmp_path):
    class Vision(nn.Linear):
        config = SimpleNamespace(image_size=336)

        def forward(self, pixel_values):
            return SimpleNamespace(pooler_output=pixel_values[..., -1])

    (tmp_path / "model.safetensors").write_bytes(b"made")
    network = SimpleNamespace(vision_model=Vision(1, 1), visual_projection=nn.Identity())
    extractor = extractors.clip_images(network, tmp_path)
    assert extractor(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))["features"].shape == (2, 3, 336)
    assert extractor.resize == "bicubic, antialiased, to 336"
