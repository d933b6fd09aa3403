import pytest
import torch
from torch.nn import functional as F

from icsd.sampling import Sampler
from icsd.sampling.sampler import stages_of
from icsd.sampling.similarity import similarities
from icsd.training import checkpoint

SENTENCES = ["a woman", "a red flower", "a woman with dark skin"]


def cosines(features):
    flat = torch.stack([feature.flatten() for feature in features])
    return F.cosine_similarity(flat[:, None], flat[None], dim=2)


@pytest.mark.parametrize("source", ["rgb", "hidden", "discriminator"])
def test_the_features_that_distillation_compared_are_compared(path, source):
    state = checkpoint.load(path)
    state["config"]["distillation"]["generator"]["source"] = source
    checkpoint.save(path, state)
    sampler = Sampler.load(path)
    outputs = sampler.sample(SENTENCES)
    found = similarities(sampler, outputs)
    assert found.source == source
    if source == "discriminator":
        from icsd.models import DiscriminatorConfig, build_discriminators

        networks = build_discriminators(DiscriminatorConfig(width=4), [8, 16], 8).eval()
        networks.load_state_dict(state["discriminators"])
        with torch.no_grad():
            features = [net.features(images) for net, images in zip(networks, stages_of(outputs), strict=True)]
    else:
        maps = [output.images if source == "rgb" else output.hidden for output in outputs]
        features = [torch.cat(stage) for stage in zip(*maps, strict=True)]
    for matrix, stage in zip(found.matrices, features, strict=True):
        torch.testing.assert_close(matrix, cosines(stage), rtol=1e-4, atol=1e-5)


def test_a_similarity_depends_on_its_two_images_only(path):
    sampler = Sampler.load(path)
    outputs = sampler.sample(SENTENCES)
    few, all_of_them = similarities(sampler, outputs[:2]), similarities(sampler, outputs)
    for small, large in zip(few.matrices, all_of_them.matrices, strict=True):
        torch.testing.assert_close(small, large[:2, :2])
