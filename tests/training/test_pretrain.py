import json
import pickle
import shlex
from dataclasses import replace

import pytest
import torch
from PIL import Image

from icsd.data import DataConfig, open_dataset, tokenize
from icsd.data.limits import Limits
from icsd.errors import InputError
from icsd.models import DiscriminatorConfig, GeneratorConfig
from icsd.models.damsm import DAMSMConfig
from icsd.models.image_encoder import ImageEncoderConfig
from icsd.models.inception import InceptionV3
from icsd.models.text import TextConfig
from icsd.sampling import Sampler
from icsd.training import checkpoint, train
from icsd.training.config import GuidanceConfig, PretrainConfig, PretrainLosses, TrainConfig
from icsd.training.pretrain import Pretrainer, load_damsm, pretrain

NAN = {"damsm/words": torch.tensor(torch.nan)}


@pytest.fixture
def config(tmp_path):
    return PretrainConfig(
        data=DataConfig(name="procedural-flowers", size=40),
        text=TextConfig(dim=8, embedding_dim=8),
        image=ImageEncoderConfig("cnn", width=4),
        damsm=DAMSMConfig(same_class_is_wrong=True),
        output=tmp_path / "runs",
        resolution=16,
        steps=6,
        batch_size=8,
        threads=1,
        log_every=2,
        checkpoint_every=3,
        evaluate_every=3,
    )


def test_a_run_leaves_metrics_and_encoders(config, capsys):
    folder = pretrain(config)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "damsm/words" in line] == [2, 4, 6]
    assert [line["step"] for line in lines if "r_precision" in line] == [3, 6]
    printed = capsys.readouterr().out
    assert "icsd train --data.name procedural-flowers --data.size 40 --generator.resolutions '[8,16]'" in printed
    assert f"--damsm.checkpoint {folder}" in printed

    damsm, text = load_damsm(folder, 16)
    assert text == config.text
    assert not damsm.training
    assert not damsm.text_encoder.train().training
    assert not any(weight.requires_grad for weight in damsm.parameters())
    assert damsm.config == config.damsm
    saved = checkpoint.load(checkpoint.latest(folder))["damsm"]
    assert all(torch.equal(saved[name], value) for name, value in damsm.state_dict().items())


def test_the_loss_falls(config):
    folder = pretrain(replace(config, steps=60, log_every=20, checkpoint_every=60, evaluate_every=60))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["damsm/sentence"] for line in lines if "damsm/sentence" in line]
    assert losses[-1] < losses[0]


def test_resuming_ends_in_the_same_weights(config):
    whole = checkpoint.load(checkpoint.latest(pretrain(config)))
    part = pretrain(replace(config, steps=3))
    assert pretrain(config, resume=part / "checkpoints") == part
    resumed = checkpoint.load(checkpoint.latest(part))
    assert all(torch.equal(resumed["damsm"][name], value) for name, value in whole["damsm"].items())
    with pytest.raises(InputError, match="is already trained for 6 steps"):
        pretrain(config, resume=part)
    with pytest.raises(InputError, match=r"text\.dim"):
        pretrain(replace(config, text=TextConfig(dim=10, embedding_dim=8), steps=9), resume=part)


def test_a_run_that_ended_before_its_first_checkpoint_starts_again(config, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(Pretrainer, "step", lambda pretrainer, batches: NAN)
        with pytest.raises(InputError, match=r"start again with\n  icsd pretrain --resume"):
            pretrain(config)
    folder = config.output / "damsm-procedural-flowers"
    pretrain(config, resume=folder)
    assert "holds no checkpoint, since its training" in capsys.readouterr().out
    whole = pretrain(config)
    assert checkpoint.latest(whole).read_bytes() == checkpoint.latest(folder).read_bytes()


def test_divergence_leaves_the_last_good_checkpoint(config, monkeypatch):
    plain = Pretrainer.step

    def step(pretrainer, batches):
        losses = plain(pretrainer, batches)
        if pretrainer.step_count == 5:  # between two lines of metrics, before the checkpoint of step 6
            pretrainer.weights[0].data.fill_(torch.nan)
        return losses

    with monkeypatch.context() as patch:
        patch.setattr(Pretrainer, "step", step)
        with pytest.raises(
            InputError, match=r"(?s)by step 6, .* is not finite: .*step-00000003.* --lr 0\.001"
        ) as raised:
            pretrain(replace(config, log_every=100, steps=9))
    folder = config.output / "damsm-procedural-flowers"
    assert str(folder) in str(raised.value)
    pretrain(replace(config, lr=config.lr / 2), resume=folder)

    monkeypatch.setattr(Pretrainer, "step", lambda pretrainer, batches: plain(pretrainer, batches) | NAN)
    with pytest.raises(InputError, match=r"damsm/words is not finite: there is no checkpoint yet"):
        pretrain(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 1}, "batch_size is 1"),
        ({"steps": 0}, "steps is 0"),
        ({"lr": -1.0}, r"lr is -1\.0"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_bad_configuration(config, change, message):
    with pytest.raises(InputError, match=message):
        replace(config, **change)


def test_a_training_checkpoint_is_refused(tmp_path):
    checkpoint.save(tmp_path / "step-1.safetensors", {"config": {}, "text": {}})
    with pytest.raises(InputError, match="holds something else, not DAMSM encoders"):
        load_damsm(tmp_path / "step-1.safetensors", 16)


@pytest.mark.parametrize("resolution", [8, 32])
def test_encoders_of_another_resolution_are_refused(config, resolution):
    folder = pretrain(replace(config, steps=1))
    with pytest.raises(InputError, match=rf"takes images of 16 pixels a side, but .* is {resolution}"):
        load_damsm(folder, resolution)


def guided_by(encoders, config, output, **options):
    """Return a small configuration of training with pretrained encoders, on the data of their configuration."""
    return TrainConfig(
        data=config.data,
        generator=GeneratorConfig(resolutions=[8, 16], width=4, noise_dim=4, condition_dim=4),
        discriminator=DiscriminatorConfig(width=4),
        damsm=GuidanceConfig(encoders),
        output=output,
        evaluate=False,
        **options,
    )


def test_training_is_guided_and_resumed(config, tmp_path):
    encoders = pretrain(replace(config, steps=3))
    guided = guided_by(encoders, config, tmp_path / "runs", steps=4, batch_size=4, log_every=2, sample_every=4)
    whole = checkpoint.load(checkpoint.latest(train.train(replace(guided))))
    assert whole["config"]["text"]["dim"] == 8
    part = train.train(replace(guided, steps=2))
    train.train(replace(guided, text=config.text), part)
    resumed = checkpoint.load(checkpoint.latest(part))
    assert all(torch.equal(resumed["ema"][name], value) for name, value in whole["ema"].items())
    assert Sampler.load(part).sample(["this flower has blue petals"])[0].images[-1].shape == (1, 3, 16, 16)
    with pytest.raises(InputError, match="no checkpoint at"):
        train.train(replace(guided, damsm=GuidanceConfig(tmp_path / "missing")))


def test_a_run_is_not_resumed_with_another_image_encoder(config, tmp_path, capsys):
    encoders = pretrain(replace(config, steps=1))
    first = checkpoint.latest(encoders)
    guided = guided_by(encoders, config, tmp_path / "runs", steps=1, batch_size=4)
    folder = train.train(replace(guided))
    pretrain(replace(config, steps=2), resume=encoders)
    again = replace(guided, steps=2, text=config.text)
    with pytest.raises(InputError, match=r"whose image encoder is not the one that guided the run up to step 1: give"):
        train.train(again, folder)
    train.train(replace(again, damsm=GuidanceConfig(first)), folder)
    capsys.readouterr()
    state = checkpoint.load(checkpoint.latest(folder))
    del state["image_encoder"]
    checkpoint.save(checkpoint.latest(folder), state)
    train.train(replace(again, steps=3), folder)
    assert "does not tell which image encoder guided it" in capsys.readouterr().out


def release(folder, words):
    """Write encoders in the layout of AttnGAN's release, with small made-up weights, and the words of the text."""
    torch.manual_seed(1)
    text = {"encoder": torch.nn.Embedding(len(words) + 1, 5), "rnn": torch.nn.LSTM(5, 4, bidirectional=True)}
    heads = {"emb_features.weight": (8, 768, 1, 1), "emb_cnn_code.weight": (8, 2048), "emb_cnn_code.bias": (8,)}
    image = InceptionV3().state_dict() | {name: torch.randn(shape) / 50 for name, shape in heads.items()}
    folder.mkdir()
    torch.save(torch.nn.ModuleDict(text).state_dict(), folder / "text_encoder200.pth")
    torch.save(image, folder / "image_encoder200.pth")
    by_index = dict(enumerate(["<end>", *words]))
    pickled = pickle.dumps([[[1]], [[1]], by_index, {word: index for index, word in by_index.items()}], 2)
    (folder / "captions.pickle").write_bytes(pickled)
    return folder


def test_training_is_guided_by_encoders_of_attngans_release(config, tmp_path, capsys):
    words = sorted(
        {word for captions in open_dataset(config.data, "train", 16).captions for word in tokenize(captions[0])}
    )
    encoders = release(tmp_path / "bird", words)
    guided = guided_by(encoders, config, tmp_path / "runs", steps=1, batch_size=2)
    folder = train.train(replace(guided))
    text_config = TextConfig(**checkpoint.load(checkpoint.latest(folder))["config"]["text"])
    train.train(replace(guided, steps=2, text=text_config), folder)
    sampler = Sampler.load(folder)
    text = torch.load(encoders / "text_encoder200.pth", weights_only=True)
    assert torch.equal(sampler.model.text_encoder.embedding.weight, text["encoder.weight"])
    assert not sampler.model.text_encoder.normalize
    assert sampler.sample([" ".join(words[:3])])[0].images[-1].shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("same_class_is_wrong", "captions", "message"),
    [
        (False, ["a red square", "a blue square"], "are of one class"),
    ],
)
def test_data_without_wrong_captions_is_refused(config, tmp_path, same_class_is_wrong, captions, message):
    data = one_class(tmp_path / "photos", captions)
    damsm = DAMSMConfig(same_class_is_wrong=same_class_is_wrong)
    with pytest.raises(InputError, match=message):
        pretrain(replace(config, data=data, damsm=damsm))
    assert not config.output.exists()


def test_one_caption_is_reported_and_has_no_loss_and_no_score(config, tmp_path, capsys):
    folder = pretrain(replace(config, data=one_class(tmp_path / "photos", ["a square"]), steps=1))
    assert "note         all images have one caption: every loss is 0" in capsys.readouterr().out
    assert "r_precision" not in (folder / "metrics.jsonl").read_text()


def test_one_class_can_be_learned_where_captions_tell_its_images_apart(config, tmp_path):
    data = one_class(tmp_path / "photos", ["a red square", "a blue square", "a green one"])
    folder = pretrain(replace(config, data=data, steps=2))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line["damsm/words"] > 0 for line in lines if "damsm/words" in line)


def one_class(root, captions):
    root.mkdir()
    for index in range(24):
        Image.new("RGB", (20, 20), (10 * index, 0, 0)).save(root / f"{index}.png")
    rows = [{"file": f"{i}.png", "caption": captions[i % len(captions)], "class": "square"} for i in range(24)]
    (root / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig("folder", root)


def test_no_r_precision_is_reported_without_wrong_captions(config, tmp_path, capsys):
    data = one_class(tmp_path / "photos", ["a red square", "a blue square"])
    folder = pretrain(replace(config, data=replace(data, test_fraction=0.05), steps=3))
    assert "r_precision" not in (folder / "metrics.jsonl").read_text()
    assert "no R-precision" in capsys.readouterr().out


@pytest.mark.parametrize("weights", [{"words": 0.0}, {"sentence": 0.0}])
def test_a_weight_of_0_leaves_a_loss_out(config, weights):
    folder = pretrain(replace(config, losses=PretrainLosses(**weights), steps=2))
    (line,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if "damsm" in line]
    (left_out,) = weights
    assert [name for name in line if name.startswith("damsm/")] == [
        f"damsm/{name}" for name in ("words", "sentence") if name != left_out
    ]


def test_encoders_that_know_no_word_are_refused(config, tmp_path):
    encoders = pretrain(replace(config, steps=1))
    data = one_class(tmp_path / "photos", ["un carré rouge", "une forêt"])
    guided = TrainConfig(
        data=data,
        generator=GeneratorConfig(resolutions=[8, 16], width=4, noise_dim=4, condition_dim=4),
        damsm=GuidanceConfig(encoders),
        output=tmp_path / "runs",
        steps=1,
    )
    with pytest.raises(InputError, match="does not know any word of 2 of 2 captions"):
        train.train(guided)


def test_the_command_that_is_printed_at_the_end_trains_on_the_same_data(config, tmp_path, capsys):
    from icsd.cli.main import main

    data = one_class(tmp_path / "my photos", ["a red square", "a blue square"])
    data = replace(data, test_fraction=0.2, margin=0.1, flip=True, limits=Limits(max_file_mb=300))
    pretrain(replace(config, data=data, steps=1))
    printed = capsys.readouterr().out
    command = shlex.split(printed.split("try next     ")[1])
    assert command[:2] == ["icsd", "train"]
    assert main([*command[1:], "--dry-run", "--batch-size", "2", "--generator.width", "2"]) == 0
    out = capsys.readouterr().out
    assert "data         my photos: 19 images, 5 more held out" in out
