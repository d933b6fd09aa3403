import pytest
import torch

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


def test_only_the_conditional_judgement_reads_the_sentence():
    torch.manual_seed(0)
    (discriminator,) = build_discriminators(DiscriminatorConfig(width=2), [16], 5)
    features = discriminator.features(torch.randn(2, 3, 16, 16))
    first, second = torch.randn(2, 2, 5)
    assert (discriminator.conditional(features, first) != discriminator.conditional(features, second)).all()


def test_width_below_one_is_refused():
    with pytest.raises(InputError, match=r"discriminator\.width"):
        DiscriminatorConfig(width=0)
