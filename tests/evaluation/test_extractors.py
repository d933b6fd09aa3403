import pytest
import torch

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
