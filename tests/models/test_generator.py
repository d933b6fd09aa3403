import pytest
import torch

from icsd.errors import InputError
from icsd.models import Generator, GeneratorConfig, TextFeatures, image_pyramid

TEXT_DIM = 6


def text_of(batch, words=4):
    mask = torch.arange(words) < torch.arange(1, batch + 1).clamp(max=words).unsqueeze(1)
    return TextFeatures(torch.randn(batch, TEXT_DIM, words), torch.randn(batch, TEXT_DIM), mask)


@pytest.mark.parametrize("resolutions", [[8], [16, 32], [8, 16, 32], [32, 64]])
@pytest.mark.parametrize("blocks", [0, 2])
def test_shapes(resolutions, blocks):
    torch.manual_seed(0)
    config = GeneratorConfig(resolutions, width=4, noise_dim=3, condition_dim=5, residual_blocks=blocks)
    out = Generator(config, TEXT_DIM)(torch.randn(2, 3), text_of(2))
    assert [tuple(image.shape) for image in out.images] == [(2, 3, side, side) for side in resolutions]
    assert [tuple(hidden.shape) for hidden in out.hidden] == [(2, 4, side, side) for side in resolutions]
    assert [tuple(attention.shape) for attention in out.attention] == [(2, r, r, 4) for r in resolutions[:-1]]
    assert out.mu.shape == out.logvar.shape == (2, 5)
    assert all(image.abs().max() <= 1 for image in out.images)


def test_parameters_at_the_scale_of_birds():
    config = GeneratorConfig([64, 128, 256], width=32, noise_dim=100, condition_dim=100, residual_blocks=2)
    with torch.device("meta"):
        generator = Generator(config, text_dim=256)
    assert sum(p.numel() for p in generator.parameters()) / 1e6 == pytest.approx(7.08, abs=0.005)


def test_padding_of_another_sample_changes_nothing():
    torch.manual_seed(0)
    generator = Generator(GeneratorConfig([8, 16], width=4, noise_dim=3, condition_dim=5), TEXT_DIM).eval()
    z, text = torch.randn(3, 3), text_of(3)
    torch.manual_seed(1)
    images = generator(z, text).images
    garbage = text._replace(words=text.words.masked_fill(~text.mask.unsqueeze(1), 1e4))
    torch.manual_seed(1)
    for image, other in zip(images, generator(z, garbage).images, strict=True):
        torch.testing.assert_close(image, other, rtol=0, atol=0)


@pytest.mark.parametrize("resolutions", [[], [4], [24, 48], [16, 64], [32, 16]])
def test_resolutions_that_do_not_double_are_refused(resolutions):
    with pytest.raises(InputError, match=r"generator\.resolutions"):
        GeneratorConfig(resolutions)


@pytest.mark.parametrize("key", ["width", "noise_dim", "condition_dim"])
def test_sizes_below_one_are_refused(key):
    with pytest.raises(InputError, match=rf"generator\.{key}"):
        GeneratorConfig(**{key: 0})


def test_pyramid_averages_areas():
    images = torch.arange(2 * 3 * 4 * 4.0).reshape(2, 3, 4, 4)
    coarse, fine = image_pyramid(images, [2, 4])
    assert fine is images
    torch.testing.assert_close(coarse[0, 0, 0, 0], images[0, 0, :2, :2].mean())
