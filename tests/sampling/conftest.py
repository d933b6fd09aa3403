import pytest
import torch

from icsd.data import Vocabulary
from icsd.models import (
    DiscriminatorConfig,
    GeneratorConfig,
    TextConfig,
    TextToImage,
    build_discriminators,
    restore_text_encoder,
)
from icsd.training import checkpoint


@pytest.fixture
def path(tmp_path):
    """A checkpoint of a small untrained model, without any data set."""
    torch.manual_seed(0)
    config = {
        "distillation": {"generator": {"source": "discriminator"}},
        "discriminator": {"width": 4},
        "text": {"encoder": "bilstm", "dim": 8, "embedding_dim": 8, "dropout": 0.5, "max_words": 18},
        "generator": {"resolutions": [8, 16], "width": 4, "noise_dim": 4, "condition_dim": 4, "residual_blocks": 1},
    }
    vocabulary = Vocabulary.build(["a woman with dark skin", "a red flower"])
    text = {"vocabulary": vocabulary.words}
    encoder = restore_text_encoder(TextConfig(**config["text"]), text)
    model = TextToImage(encoder, GeneratorConfig(**config["generator"]))
    discriminators = build_discriminators(DiscriminatorConfig(width=4), [8, 16], 8)
    path = checkpoint.step_path(tmp_path / "run", 3)
    state = {
        "config": config,
        "attribution": "by someone",
        "text": text,
        "ema": model.state_dict(),
        "discriminators": discriminators.state_dict(),
        "step": 3,
    }
    checkpoint.save(path, state)
    return path
