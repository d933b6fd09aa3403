import pytest
import torch

from icsd.errors import InputError
from icsd.models.image_encoder import (
    ImageEncoderConfig,
    InceptionEncoder,
    build_image_encoder,
    restore_image_encoder,
)
from icsd.models.inception import InceptionV3, load_inception


@pytest.mark.parametrize("resolution", [8, 16, 64])
def test_cnn_sees_64_regions(resolution):
    encoder = build_image_encoder(ImageEncoderConfig("cnn", width=4), dim=6, resolution=resolution)
    features = encoder(torch.randn(3, 3, resolution, resolution))
    assert features.regions.shape == (3, 6, 64)
    assert features.whole.shape == (3, 6)


@pytest.mark.parametrize("resolution", [4, 24, 100])
def test_cnn_refuses_other_resolutions(resolution):
    with pytest.raises(InputError, match=f"got {resolution}"):
        build_image_encoder(ImageEncoderConfig("cnn"), dim=6, resolution=resolution)


def test_inception_needs_its_weights(tmp_path):
    with pytest.raises(InputError, match=r"image\.weights is missing"):
        build_image_encoder(ImageEncoderConfig(), 6, 299)
    with pytest.raises(InputError, match="no Inception-v3 weights at"):
        load_inception(tmp_path / "missing.pth")
    (tmp_path / "other.pth").write_bytes(b"not weights")
    with pytest.raises(InputError, match=r"other\.pth does not hold"):
        load_inception(tmp_path / "other.pth")
    torch.save({"conv": torch.zeros(1)}, tmp_path / "wrong.pth")
    with pytest.raises(InputError, match=r"wrong\.pth does not hold"):
        load_inception(tmp_path / "wrong.pth")


def test_inception_is_frozen_but_passes_gradients(tmp_path):
    torch.manual_seed(0)
    published = InceptionV3().state_dict() | {"fc.weight": torch.zeros(1000, 2048), "AuxLogits.fc.bias": torch.zeros(1)}
    torch.save(published, tmp_path / "inception.pth")
    encoder = build_image_encoder(ImageEncoderConfig(weights=tmp_path / "inception.pth"), dim=6, resolution=64).train()
    before = {name: value.clone() for name, value in encoder.network.state_dict().items()}
    images = torch.rand(1, 3, 64, 64, requires_grad=True)
    features = encoder(images)
    assert features.regions.shape == (1, 6, 17 * 17)
    assert features.whole.shape == (1, 6)
    (features.regions.sum() + features.whole.sum()).backward()
    assert images.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in encoder.network.parameters())
    assert encoder.regions.weight.grad is not None
    assert all(torch.equal(before[name], value) for name, value in encoder.network.state_dict().items())

    restored = restore_image_encoder(ImageEncoderConfig(), 6, 64)
    assert isinstance(restored, InceptionEncoder)
    restored.load_state_dict(encoder.state_dict())


def test_inception_is_torchvisions():
    try:
        from torchvision.models import inception_v3
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision does not import beside this torch: {error}")
    torch.manual_seed(0)
    theirs = inception_v3(weights=None, init_weights=False, transform_input=False).eval()
    ours = InceptionV3().eval()
    state = {name: value for name, value in theirs.state_dict().items() if not name.startswith(("fc.", "AuxLogits."))}
    ours.load_state_dict(state)
    seen = {}
    theirs.Mixed_6e.register_forward_hook(lambda module, inputs, output: seen.update(regions=output))
    theirs.avgpool.register_forward_hook(lambda module, inputs, output: seen.update(whole=output.flatten(1)))
    images = torch.rand(1, 3, 299, 299) * 2 - 1
    with torch.no_grad():
        theirs(images)
        regions, whole = ours(images)
    torch.testing.assert_close(regions, seen["regions"])
    torch.testing.assert_close(whole, seen["whole"])
