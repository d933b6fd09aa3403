import json
from dataclasses import replace

import pytest
import torch

from icsd.data import DataConfig
from icsd.errors import InputError
from icsd.models import DiscriminatorConfig, GeneratorConfig
from icsd.models.damsm import DAMSMConfig
from icsd.models.image_encoder import ImageEncoderConfig
from icsd.models.text import TextConfig
from icsd.sampling import Sampler
from icsd.training import checkpoint, run
from icsd.training.config import GuidanceConfig, TrainConfig
from icsd.training.pretrain import PretrainConfig, Pretrainer, load_damsm, pretrain

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
        evaluate_every=3,
    )


def test_a_run_leaves_metrics_and_encoders(config, capsys):
    folder = pretrain(config)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "damsm/words" in line] == [2, 4, 6]
    assert [line["step"] for line in lines if "r_precision" in line] == [3, 6]
    assert f"icsd train --damsm.checkpoint {folder}" in capsys.readouterr().out

    damsm, text = load_damsm(folder, 16)
    assert text == config.text
    assert not damsm.training
    assert not damsm.text_encoder.train().training
    assert not any(weight.requires_grad for weight in damsm.parameters())
    assert damsm.config == config.damsm
    saved = checkpoint.load(checkpoint.latest(folder))["damsm"]
    assert all(torch.equal(saved[name], value) for name, value in damsm.state_dict().items())


def test_the_loss_falls(config):
    folder = pretrain(replace(config, steps=60, log_every=20, evaluate_every=60))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["damsm/sentence"] for line in lines if "damsm/sentence" in line]
    assert losses[-1] < losses[0]


def test_resuming_ends_in_the_same_weights(config):
    whole = checkpoint.load(checkpoint.latest(pretrain(config)))
    part = pretrain(replace(config, steps=3))
    pretrain(config, resume=part)
    resumed = checkpoint.load(checkpoint.latest(part))
    assert all(torch.equal(resumed["damsm"][name], value) for name, value in whole["damsm"].items())
    with pytest.raises(InputError, match="has taken its 6 steps"):
        pretrain(config, resume=part)
    with pytest.raises(InputError, match=r"text\.dim"):
        pretrain(replace(config, text=TextConfig(dim=10, embedding_dim=8), steps=9), resume=part)


def test_divergence_leaves_the_last_good_checkpoint(config, monkeypatch):
    plain = Pretrainer.step

    def step(pretrainer, batch):
        losses = plain(pretrainer, batch)
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

    monkeypatch.setattr(Pretrainer, "step", lambda pretrainer, batch: plain(pretrainer, batch) | NAN)
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
    with pytest.raises(InputError, match="holds something else, where DAMSM encoders"):
        load_damsm(tmp_path / "step-1.safetensors", 16)


@pytest.mark.parametrize("resolution", [8, 32])
def test_encoders_of_another_resolution_are_refused(config, resolution):
    folder = pretrain(replace(config, steps=1))
    with pytest.raises(InputError, match=rf"takes images of 16 pixels a side, but .* is {resolution}"):
        load_damsm(folder, resolution)


def test_training_is_guided_and_resumed(config, tmp_path):
    encoders = pretrain(replace(config, steps=3))
    guided = TrainConfig(
        data=config.data,
        generator=GeneratorConfig(resolutions=[8, 16], width=4, noise_dim=4, condition_dim=4),
        discriminator=DiscriminatorConfig(width=4),
        damsm=GuidanceConfig(encoders),
        output=tmp_path / "runs",
        steps=4,
        batch_size=4,
        log_every=2,
        sample_every=4,
        evaluate=False,
    )
    whole = checkpoint.load(checkpoint.latest(run.train(replace(guided))))
    assert whole["config"]["text"]["dim"] == 8
    part = run.train(replace(guided, steps=2))
    run.train(replace(guided, text=config.text), part)
    resumed = checkpoint.load(checkpoint.latest(part))
    assert all(torch.equal(resumed["ema"][name], value) for name, value in whole["ema"].items())
    assert Sampler.load(part).sample(["this flower has blue petals"])[0].images[-1].shape == (1, 3, 16, 16)
    with pytest.raises(InputError, match="no checkpoint at"):
        run.train(replace(guided, damsm=GuidanceConfig(tmp_path / "missing")))
