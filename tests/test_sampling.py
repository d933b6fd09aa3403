import pytest
import torch

from icsd.data import Vocabulary
from icsd.errors import InputError
from icsd.models import GeneratorConfig, TextConfig, TextToImage, restore_text_encoder
from icsd.sampling import Painter
from icsd.training import checkpoint


@pytest.fixture
def path(tmp_path):
    """A checkpoint of a small untrained model, without any data set."""
    torch.manual_seed(0)
    config = {
        "text": {"encoder": "bilstm", "dim": 8, "embedding_dim": 8, "dropout": 0.5, "max_words": 18},
        "generator": {"resolutions": [8, 16], "width": 4, "noise_dim": 4, "condition_dim": 4, "residual_blocks": 1},
    }
    vocabulary = Vocabulary.build(["a woman with dark skin", "a red flower"])
    text = {"vocabulary": vocabulary.words}
    encoder = restore_text_encoder(TextConfig(**config["text"]), text)
    model = TextToImage(encoder, GeneratorConfig(**config["generator"]))
    path = checkpoint.step_path(tmp_path / "run", 3)
    checkpoint.save(
        path, {"config": config, "attribution": "by someone", "text": text, "ema": model.state_dict(), "step": 3}
    )
    return path


def test_one_seed_gives_one_picture_whatever_else_is_painted(path):
    painter = Painter.load(path)
    assert painter.attribution == "by someone"
    alone = painter.paint(["a red flower"], seed=7)
    assert [tuple(stage.shape) for stage in alone] == [(1, 3, 8, 8), (1, 3, 16, 16)]
    torch.rand(1)
    among = Painter.load(path).paint(["a woman", "a red flower"], seed=5, count=3)
    for one, several in zip(alone, among, strict=True):
        assert len(several) == 6
        assert torch.equal(one[0], several[5])
        assert not torch.equal(several[4], several[5])


def test_sampling_leaves_the_global_random_state(path):
    painter = Painter.load(path)
    before = torch.get_rng_state()
    painter.paint(["a red flower"])
    assert torch.equal(before, torch.get_rng_state())


def test_the_sentence_matters(path):
    painter = Painter.load(path)
    assert not torch.equal(painter.paint(["a woman"])[-1], painter.paint(["a red flower"])[-1])


def test_unknown_words_are_named(path):
    assert Painter.load(path).unknown("A green woman with zebra skin") == ["green", "zebra"]


def test_a_run_folder_stands_for_its_newest_checkpoint(path):
    assert Painter.load(path.parent.parent).paint(["a woman"])[-1].shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sentences": []}, "no sentence"),
        ({"sentences": ["a woman", "  "]}, "no sentence"),
        ({"sentences": ["a woman"], "seed": -1}, "seed is -1"),
        ({"sentences": ["a woman"], "seed": 2**64}, "seed is"),
        ({"sentences": ["a woman"], "count": 0}, "count is 0"),
    ],
)
def test_what_cannot_be_painted_is_refused(path, arguments, message):
    with pytest.raises(InputError, match=message):
        Painter.load(path).paint(**arguments)
