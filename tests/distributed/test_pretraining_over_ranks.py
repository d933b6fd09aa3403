"""DAMSM pretraining on several ranks, against one process with the whole batch."""

import json

import pytest
import torch

from icsd.data import CaptionedImages, DataConfig
from icsd.errors import InputError
from icsd.models import TextConfig, build_text_encoder
from icsd.models.damsm import DAMSM, DAMSMConfig
from icsd.models.image_encoder import CNNEncoder, ImageEncoderConfig
from icsd.team import Team
from icsd.training import pretrain
from icsd.training.batches import Batch
from icsd.training.config import PretrainConfig

CAPTIONS = ["a red square", "a blue square", "one red disc", "one blue disc that is large"]
BATCH, STEPS = 6, 3


def batch_of(pretrainer, step):
    """Return the part of this rank in a batch, with captions of several lengths and two equal ones."""
    generator = torch.Generator().manual_seed(step)
    places = [*torch.randperm(4, generator=generator).tolist(), 1, 3]
    images = torch.rand(BATCH, 3, 16, 16, generator=generator, dtype=torch.float64) * 2 - 1
    own = pretrainer.team.own(BATCH)
    captions = [CAPTIONS[place] for place in places][own]
    batch = Batch.of(images[own], captions, places[own], pretrainer.damsm.text_encoder.tokenizer(captions))
    return batch.of_all_ranks(pretrainer.team, False)


def held_out():
    images = torch.randint(0, 256, (10, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return CaptionedImages("made", "test", images, [[CAPTIONS[k % 4]] for k in range(10)], [k % 4 for k in range(10)])


def pretrained(group):
    """Return losses, state and R-precision after some steps, all in float64."""
    torch.set_default_dtype(torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        try:
            config = PretrainConfig(
                text=TextConfig(dim=8, embedding_dim=6, dropout=0.3),
                image=ImageEncoderConfig("cnn", width=4),
                batch_size=BATCH,
                resolution=16,
                sync_batch_norm=True,
                device="cpu",
            )
            torch.manual_seed(0)
            damsm = DAMSM(build_text_encoder(config.text, CAPTIONS), CNNEncoder(8, 4, 16), DAMSMConfig())
            pretrainer = pretrain.Pretrainer(config, damsm, 2, Team(group))
            steps = [pretrainer.step([batch_of(pretrainer, step)]) for step in range(STEPS)]
            losses = [{name: loss.item() for name, loss in step.items()} for step in steps]
            return losses, pretrainer.state_dict(), pretrainer.r_precision(held_out(), batch_size=3)
        finally:
            torch.set_default_dtype(torch.float32)


def test_ranks_reach_the_encoders_of_one_process(ranks):
    losses, state, precision = pretrained(None)
    for other_losses, other, other_precision in ranks.run(3, pretrained):
        for part in ("damsm", "optimizer"):
            torch.testing.assert_close(other[part], state[part], rtol=1e-7, atol=1e-10)
        assert torch.equal(other["random"]["torch"], state["random"]["torch"])
        for mine, truth in zip(other_losses, losses, strict=True):
            assert mine == pytest.approx(truth, rel=1e-9)
        assert other_precision == precision


def run_of(output, **options):
    return PretrainConfig(
        data=DataConfig(name="procedural-flowers", size=24, flip=True),
        text=TextConfig(dim=8, embedding_dim=8),
        image=ImageEncoderConfig("cnn", width=4),
        damsm=DAMSMConfig(same_class_is_wrong=True),
        resolution=16,
        output=output,
        sync_batch_norm=True,
        log_every=1,
        evaluate_every=1,
        loggers=[],
        device="cpu",
        **options,
    )


def pretrain_on_ranks(group, config):
    return pretrain.pretrain(config)


def numbers_of(folder):
    """Return the losses and the R-precision of every step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], name, line[name]) for line in lines for name in line if name.startswith(("damsm", "r_"))]


def test_a_run_on_ranks_is_resumed_by_one_process(ranks, tmp_path, capsys):
    alone = pretrain.pretrain(run_of(tmp_path, name="alone", steps=3, batch_size=8))
    together = ranks.run(4, pretrain_on_ranks, run_of(tmp_path, name="together", steps=2, batch_size=8))
    assert together == [tmp_path / "together"] * 4
    pretrain.pretrain(run_of(tmp_path, name="together", steps=3, batch_size=8), resume=together[0])
    assert len(numbers_of(alone)) == 9
    for mine, truth in zip(numbers_of(together[0]), numbers_of(alone), strict=True):
        assert mine[:2] == truth[:2]
        assert mine[2] == pytest.approx(truth[2], rel=1e-3, abs=0.02)


def test_ranks_that_cannot_share_a_batch(ranks, tmp_path):
    for outcome in ranks.outcomes(4, pretrain_on_ranks, run_of(tmp_path, steps=1, batch_size=6)):
        assert outcome.kind is InputError
        assert "batch_size is 6, which 4 ranks cannot share evenly: give a multiple of 4" in str(outcome)
