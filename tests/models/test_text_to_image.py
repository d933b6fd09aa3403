import pytest
import torch

from icsd.models import GeneratorConfig, TextConfig, TextToImage, build_text_encoder

CAPTIONS = ["a red bird", "a blue bird with a long beak", "a cat"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    encoder = build_text_encoder(TextConfig(dim=8, embedding_dim=6), CAPTIONS)
    return TextToImage(encoder, GeneratorConfig([8, 16], width=4, noise_dim=3, condition_dim=5))


def test_the_same_seed_generates_the_same(model):
    coarse, fine = model.generate(CAPTIONS, seed=1)
    assert coarse.shape == (3, 3, 8, 8)
    assert fine.shape == (3, 3, 16, 16)
    torch.testing.assert_close(model.generate(CAPTIONS, seed=1)[1], fine, rtol=0, atol=0)
    assert not torch.allclose(model.generate(CAPTIONS, seed=2)[1], fine)


def test_generating_leaves_mode_statistics_and_random_state_alone(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    model.generate(CAPTIONS)
    assert model.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_any_number_of_captions_is_generated(model):
    assert [len(stage) for stage in model.generate(CAPTIONS * 3, batch_size=4)] == [9, 9]
