"""DAMSM pretraining: a text and an image encoder learn to find each other's images and sentences.

A run folder such as ``runs/damsm-emoji-busts`` holds ``config.yaml``, ``metrics.jsonl`` and ``checkpoints/`` as those
of `icsd.training.train` do; `icsd train --damsm.checkpoint` takes it.
"""

from __future__ import annotations

import contextlib
import math
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icsd.data import CaptionedImages, DataConfig, Vocabulary, open_dataset
from icsd.errors import InputError
from icsd.evaluation.retrieval import r_precision
from icsd.models.attngan import find_release, load_release
from icsd.models.batch_norm import normalize_over_ranks
from icsd.models.damsm import DAMSM, DAMSMConfig
from icsd.models.image_encoder import ImageEncoderConfig, build_image_encoder, restore_image_encoder
from icsd.models.text import TextConfig, build_text_encoder, restore_text_encoder
from icsd.team import Team
from icsd.training import checkpoint, run_folder
from icsd.training.batches import Batch, SampledDataset
from icsd.training.captions import check_captions, describe_data, differences
from icsd.training.config import PretrainConfig
from icsd.training.launch import check_share, folder_to_resume, launched
from icsd.training.loggers import require_wandb
from icsd.training.loop import Command, Event, Loop
from icsd.training.randomness import random_state, restore_random_state, seed_everything
from icsd.training.renamed import leaves
from icsd.training.run_folder import RunFolder
from icsd.training.trainer import choose_device

CHECKPOINTS_KEPT = 2

FREE_ON_RESUME = (
    *("steps", "output", "name", "data.root", "image.weights", "device", "threads", "workers", "loggers"),
    *("log_every", "checkpoint_every", "evaluate_every", "lr", "clip"),
)
"""Keys that a resumed run may change: length, place and intervals, and the remedies for divergence."""


class Pretrainer:
    """The encoders, their optimizer, and the step that trains them.

    Args:
        config: The whole configuration.
        damsm: New or restored encoders.
        steps_per_epoch: Steps of a pass over the data, after each of which the learning rate falls.
        team: The ranks that train together; by default, this process alone.
    """

    def __init__(self, config: PretrainConfig, damsm: DAMSM, steps_per_epoch: int, team: Team | None = None) -> None:
        self.config = config
        self.team = team or Team()
        check_share(config, self.team)
        self.device = choose_device(config.device)
        self.damsm = damsm.to(self.device).train()
        if config.sync_batch_norm and self.team.size > 1:
            normalize_over_ranks(self.damsm, self.team.ranks)
        self.weights = [weight for weight in damsm.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.Adam(self.weights, config.lr, (0.5, 0.999))
        self.steps_per_epoch = steps_per_epoch
        self.step_count = 0

    def step(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Update the encoders.

        Args:
            batches: One batch.

        Returns:
            Weighted losses by name: scalars without graph.
        """
        (batch,) = batches
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * self.config.lr_decay ** (self.step_count // self.steps_per_epoch)
        text = self.damsm.text_encoder(batch.ids, batch.lengths)
        inputs = (each.to(self.device) for each in (batch.images, batch.class_ids, batch.caption_ids))
        images, class_ids, caption_ids = inputs
        values = self.damsm(images, text, class_ids, caption_ids, self.team.samples)
        weights = {"words": self.config.losses.words, "sentence": self.config.losses.sentence}
        losses = {name: weight * getattr(values, name) for name, weight in weights.items() if weight}
        self.optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        self.team.average([weight.grad for weight in self.weights if weight.grad is not None])
        torch.nn.utils.clip_grad_norm_(self.damsm.text_encoder.parameters(), self.config.clip)
        self.optimizer.step()
        self.team.average([buffer for buffer in self.damsm.buffers() if buffer.is_floating_point()])
        self.step_count += 1
        return {f"damsm/{name}": loss.detach() for name, loss in losses.items()}

    @torch.no_grad()
    def r_precision(self, dataset: CaptionedImages, batch_size: int = 64) -> float:
        """Return the R-precision of held-out images with their first captions, NaN where no caption is a wrong one.

        The ranks share the batches, and all get the result.
        """
        self.damsm.eval()
        captions = [sentences[0] for sentences in dataset.captions]
        own = []
        for start in range(0, len(dataset), batch_size)[self.team.rank :: self.team.size]:
            places = range(start, min(start + batch_size, len(dataset)))
            images = torch.stack([dataset[place]["image"] for place in places]).to(self.device)
            sentences = self.damsm.text_encoder.encode([captions[place] for place in places]).sentence
            own.append((self.damsm.image_encoder(images).whole.cpu(), sentences.cpu()))
        self.damsm.train()
        features = self.team.collect(own)
        class_ids = None if self.config.damsm.same_class_is_wrong else dataset.class_ids
        return self.team.first(
            lambda: r_precision(*map(torch.cat, zip(*features, strict=True)), class_ids, captions=captions)
        )

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        """Return the weights of both encoders with their names."""
        return self.damsm.named_parameters()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on except configuration and data."""
        return {
            "step": self.step_count,
            "text": self.damsm.text_encoder.description(),
            "damsm": self.damsm.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
            "random": random_state(self.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, on a pretrainer of the same configuration and vocabulary."""
        self.step_count = state["step"]
        checkpoint.load_module(self.damsm, state["damsm"], "damsm")
        checkpoint.load_adam(self.optimizer, state["optimizer"], "optimizer")
        restore_random_state(state["random"], self.device)


def pretrain(config: PretrainConfig, resume: Path | None = None) -> Path:
    """Pretrain the encoders in a run folder of their own, or continue a run.

    SIGINT (Ctrl-C), SIGTERM and SIGHUP end the run after the step in progress, with a checkpoint.

    Args:
        config: The configuration.
        resume: Run folder to continue from its newest checkpoint; a new one below ``config.output`` by default.

    Returns:
        The run folder.

    Raises:
        InputError: Configuration, data, weights or checkpoint cannot be used, or the loss is no longer finite.
        KeyboardInterrupt: A signal ended the run; the message says how to resume.
    """
    resume = folder_to_resume(config, resume)
    with launched(config, resume) as team, contextlib.ExitStack() as stack:
        if resume is not None:
            folder = RunFolder(resume)
            team.first(lambda: stack.enter_context(folder.locked()))
        pretrainer, train_set, test_set, notes = prepare(config, resume, team)
        if resume is None:
            name = f"damsm-{train_set.name}"
            folder = RunFolder(team.first(lambda: RunFolder.create(config.output, config.name, name).path))
            team.first(lambda: stack.enter_context(folder.locked()))
        print(f"run          {folder.path}")
        print(f"data         {train_set.name}: {len(train_set)} images, {len(test_set)} more held out")
        for note in notes:
            print(f"note         {note}")
        learned = sum(weight.numel() for weight in pretrainer.weights)
        ranks = f", {team.size} ranks" if team.size > 1 else ""
        print(f"networks     {learned / 1e6:.2f} M weights to learn{ranks}", flush=True)
        _run(folder, pretrainer, train_set, test_set)
    return folder.path


def prepare(
    config: PretrainConfig, resume: Path | None, team: Team
) -> tuple[Pretrainer, CaptionedImages, CaptionedImages, list[str]]:
    """Open the data and build the pretrainer, new or restored.

    Returns:
        The pretrainer, both splits, and notes for the user.

    Raises:
        InputError: Configuration, data, weights or checkpoint cannot be used.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    if "wandb" in config.loggers and team.leads:
        require_wandb()
    train_set, test_set = (open_dataset(config.data, split, config.resolution) for split in ("train", "test"))
    resume, notes = run_folder.check_start(resume)
    notes += [*_check_wrong_answers(config, train_set), *train_set.notes]
    steps_per_epoch = max(1, len(train_set) // config.batch_size)
    seed_everything(config.seed)
    if resume is None:
        captions = [caption for captions in train_set.captions for caption in captions]
        text_encoder = build_text_encoder(config.text, captions, train_set.vocabulary)
        image_encoder = build_image_encoder(config.image, config.text.dim, config.resolution)
        pretrainer = Pretrainer(config, DAMSM(text_encoder, image_encoder, config.damsm), steps_per_epoch, team)
    else:
        path = checkpoint.find(resume, checkpoint.ENCODERS)
        state = checkpoint.load(path)
        with checkpoint.restoring(path):
            wanted, defaults = run_folder.plain(config), run_folder.plain(PretrainConfig())
            checkpoint.check_config(path, state["config"], wanted, FREE_ON_RESUME, defaults)
            if state["step"] >= config.steps and checkpoint.EVENTS_DUE not in state:
                raise InputError(
                    f"{resume} is already trained for {state['step']} steps: give a larger `--steps` to continue"
                )
            pretrainer = Pretrainer(config, _restore(config, state), steps_per_epoch, team)
            pretrainer.load_state_dict(state)
        notes += differences(state.get("data"), describe_data(train_set))
    notes += check_captions(pretrainer.damsm.text_encoder.tokenizer, train_set, test_set)
    return pretrainer, train_set, test_set, notes


def _check_wrong_answers(config: PretrainConfig, train_set: CaptionedImages) -> list[str]:
    """Refuse data of one class, on which every loss is 0 and every score perfect; return a note on one caption."""
    captions = {caption for captions in train_set.captions for caption in captions}
    if not config.damsm.same_class_is_wrong and len(set(map(int, train_set.class_ids))) < 2:
        raise InputError(
            f"all {len(train_set)} images of {train_set.name} are of one class, so no caption is a wrong one for them "
            "and nothing can be learned: give --damsm.same-class-is-wrong if captions tell the images of a class apart"
        )
    return ["all images have one caption: every loss is 0, and nothing is learned"] if len(captions) < 2 else []


def load_damsm(path: Path, resolution: int, vocabulary: Vocabulary | None = None) -> tuple[DAMSM, TextConfig]:
    """Return pretrained encoders, frozen, and the configuration of their text encoder.

    Args:
        path: Checkpoint, or run folder for its newest one; or AttnGAN's encoders, see `icsd.models.attngan`.
        resolution: Side of the images that the image encoder will see.
        vocabulary: The words of the data set, which AttnGAN's text encoder may need.

    Raises:
        InputError: There are no encoders at ``path``, or they take images of another resolution.
    """
    release = find_release(path)
    if release is not None:
        damsm, text_config = load_release(release, vocabulary)
    else:
        path = checkpoint.find(path, checkpoint.ENCODERS)
        state = checkpoint.load(path, ["config", "text", "damsm"])
        with checkpoint.restoring(path):
            damsm, text_config = _saved_damsm(path, state, resolution)
    damsm.text_encoder.freeze()
    return damsm.requires_grad_(False).eval(), text_config


def _saved_damsm(path: Path, state: dict[str, Any], resolution: int) -> tuple[DAMSM, TextConfig]:
    saved = state["config"]
    if saved["image"]["encoder"] == "cnn" and saved["resolution"] != resolution:
        raise InputError(
            f"damsm.checkpoint is {path}, whose image encoder takes images of {saved['resolution']} pixels a side, but "
            f"the last of generator.resolutions is {resolution}: give encoders of `icsd pretrain --resolution "
            f"{resolution}`, or other generator.resolutions"
        )
    config = PretrainConfig(
        text=TextConfig(**saved["text"]),
        image=ImageEncoderConfig(encoder=saved["image"]["encoder"], width=saved["image"]["width"]),
        damsm=DAMSMConfig(**saved["damsm"]),
        resolution=saved["resolution"],
    )
    damsm = _restore(config, state)
    checkpoint.load_module(damsm, state["damsm"], "damsm")
    return damsm, config.text


def _restore(config: PretrainConfig, state: dict[str, Any]) -> DAMSM:
    """Return encoders of a checkpoint's configuration, ready for `load_state_dict`."""
    text_encoder = restore_text_encoder(config.text, state["text"])
    return DAMSM(text_encoder, restore_image_encoder(config.image, config.text.dim, config.resolution), config.damsm)


def _run(folder: RunFolder, pretrainer: Pretrainer, train_set: CaptionedImages, test_set: CaptionedImages) -> None:
    """Take the steps and print what to try next."""
    config = pretrainer.config

    def batches(start: int, stop: int) -> Iterator[tuple[Batch]]:
        tokenizer = pretrainer.damsm.text_encoder.tokenizer
        draws = SampledDataset(train_set, tokenizer, config.batch_size, config.seed, team=pretrainer.team)
        return zip(draws.batches_of(start, stop, config.workers))

    def evaluate() -> None:
        precision = pretrainer.r_precision(test_set)
        if math.isnan(precision):
            loop.write(f"step {loop.step}: no R-precision, since no held-out image has a wrong caption")
        else:
            loop.log({"r_precision": precision})
            loop.write(f"step {loop.step}: R-precision {precision:.3f} of {len(test_set)} held-out images")

    loop = Loop(
        config,
        pretrainer,
        folder,
        batches,
        Command("pretrain", "pair", (f"--lr {config.lr / 2:g}",)),
        CHECKPOINTS_KEPT,
        extra_state={"data": describe_data(train_set)},
        events=[Event(config.evaluate_every, evaluate, everyone=True)],
        team=pretrainer.team,
    )
    loop.run()
    if pretrainer.team.leads:
        print(f"checkpoint   {checkpoint.latest(folder.path)}")
        print(f"try next     {shlex.join(_next_command(config, folder.path))}")


def _next_command(config: PretrainConfig, folder: Path) -> list[str]:
    """Return the command that trains a model with the encoders, on the same data at the same resolution."""
    options = []
    default = dict(leaves(run_folder.plain(DataConfig())))
    for key, value in leaves(run_folder.plain(config.data)):
        if value != default[key]:
            options += [f"--data.{key.replace('_', '-')}", str(value)]
    if config.image.encoder == "cnn":
        resolutions = [size for size in (config.resolution // 2, config.resolution) if size >= 8]
        options += ["--generator.resolutions", str(resolutions).replace(" ", "")]
    return ["icsd", "train", *options, "--damsm.checkpoint", str(folder)]
