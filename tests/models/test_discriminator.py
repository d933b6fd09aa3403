import pytest
import torch
from torch import nn

from icsd.errors import InputError
from icsd.models import DiscriminatorConfig, build_discriminators


@pytest.mark.parametrize("resolution", [8, 16, 32, 64, 128, 256])
def test_all_end_in_the_same_map(resolution):
    torch.manual_seed(0)
    (discriminator,) = build_discriminators(DiscriminatorConfig(width=2), [resolution], 5)
    features = discriminator.features(torch.randn(2, 3, resolution, resolution))
    assert features.shape == (2, 16, 4, 4)
    assert discriminator.unconditional(features).shape == (2,)
    assert discriminator.conditional(features, torch.randn(2, 5)).shape == (2,)


def test_parameters_at_the_scale_of_birds():
    with torch.device("meta"):
        discriminators = build_discriminators(DiscriminatorConfig(width=64), [64, 128, 256], 256)
    counts = [sum(p.numel() for p in d.parameters()) / 1e6 for d in discriminators]
    assert counts == pytest.approx([6.3, 19.4, 71.9], abs=0.05)


@pytest.mark.parametrize("normalization", ["batch", "spectral", "none"])
def test_parts_have_the_logits_that_they_have_alone(normalization):
    torch.manual_seed(0)
    (discriminator,) = build_discriminators(DiscriminatorConfig(width=2, normalization=normalization), [32], 5)
    discriminator.requires_grad_(False)
    images, sentences = torch.randn(6, 3, 32, 32), torch.randn(6, 5)
    for _ in range(60):  # the power iteration of spectral normalization converges
        discriminator.conditional(discriminator.features(images), sentences)
    together = discriminator.features(images, parts=2)
    alone = [discriminator.features(part) for part in images.chunk(2)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-3, atol=1e-4)
    logits = [discriminator.conditional(*pair) for pair in zip(alone, sentences.chunk(2), strict=True)]
    torch.testing.assert_close(
        discriminator.conditional(together, sentences, parts=2), torch.cat(logits), rtol=1e-3, atol=1e-4
    )


def test_the_first_images_may_have_a_second_caption():
    torch.manual_seed(0)
    (discriminator,) = build_discriminators(DiscriminatorConfig(width=2), [16], 5)
    features, captions = discriminator.features(torch.randn(4, 3, 16, 16)), torch.randn(6, 5)
    repeated = torch.cat((features, features[:2]))
    torch.testing.assert_close(
        discriminator.conditional(features, captions, parts=3), discriminator.conditional(repeated, captions, parts=3)
    )


def test_spectral_normalization_holds_every_weight_to_norm_one():
    torch.manual_seed(0)
    (discriminator,) = build_discriminators(DiscriminatorConfig(width=4, normalization="spectral"), [32], 5)
    for _ in range(30):
        features = discriminator.features(torch.randn(2, 3, 32, 32))
        discriminator.unconditional(features)
        discriminator.conditional(features, torch.randn(2, 5))
    discriminator.eval()
    weights = [layer.weight for layer in discriminator.modules() if isinstance(layer, nn.Conv2d)]
    assert len(weights) == 3 + 1 + 2
    for weight in weights:
        assert torch.linalg.matrix_norm(weight.flatten(1), 2).item() == pytest.approx(1, abs=0.05)


def test_only_conditional_logits_depend_on_the_sentence():
    torch.manual_seed(0)
    (discriminator,) = build_discriminators(DiscriminatorConfig(width=2), [16], 5)
    features = discriminator.features(torch.randn(2, 3, 16, 16))
    first, second = torch.randn(2, 2, 5)
    assert (discriminator.conditional(features, first) != discriminator.conditional(features, second)).all()


def test_width_below_one_is_refused():
    with pytest.raises(InputError, match=r"discriminator\.width"):
        DiscriminatorConfig(width=0)
