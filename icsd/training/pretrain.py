"""DAMSM pretraining: a text and an image encoder learn to find each other's images and sentences.

A run folder such as ``runs/damsm-emoji-busts`` holds ``config.yaml``, ``metrics.jsonl`` and ``checkpoints/`` as those
of `icsd.training.run` do; `icsd train --damsm.checkpoint` takes it.
"""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from icsd.data import CaptionedImages, DataConfig, open_dataset
from icsd.errors import InputError
from icsd.evaluation.retrieval import r_precision
from icsd.models.damsm import DAMSM, DAMSMConfig
from icsd.models.image_encoder import ImageEncoderConfig, build_image_encoder, restore_image_encoder
from icsd.models.text import TextConfig, build_text_encoder, restore_text_encoder
from icsd.training import checkpoint, run_folder
from icsd.training.batches import Batch, SampledDataset
from icsd.training.interruption import finishing_steps
from icsd.training.randomness import random_state, restore_random_state
from icsd.training.trainer import choose_device

CHECKPOINTS_KEPT = 2
FREE_ON_RESUME = (
    *("steps", "output", "data.root", "image.weights", "device", "threads", "workers", "log_every", "evaluate_every"),
    *("lr", "clip"),  # the remedies for loss
)


@dataclass
class PretrainConfig:
    """A pretraining run. Its defaults are those of AttnGAN (Xu et al. 2018), but for the number of steps."""

    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=lambda: TextConfig(dim=256, embedding_dim=300, dropout=0.5))
    image: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)
    damsm: DAMSMConfig = field(default_factory=DAMSMConfig)

    output: Path = Path("runs")
    """Folder that gets the run's folder."""

    seed: int = 0
    """Seed of initial weights and of the order of the data."""

    resolution: int = 299
    """Side of the images in pixels."""

    steps: int = 40000
    """Training steps."""

    batch_size: int = 48
    """Pairs per step: each image's wrong answers are the others' sentences."""

    lr: float = 0.002
    """Adam's learning rate at the beginning."""

    lr_decay: float = 0.98
    """Factor on the learning rate after each pass over the data."""

    clip: float = 0.25
    """Largest norm of the text encoder's gradient."""

    device: str = "auto"
    """cpu, cuda, cuda:1, ... or auto: cuda where there is one."""

    threads: int | None = None
    """CPU threads; null takes all cores."""

    workers: int = 0
    """Processes that load data."""

    log_every: int = 20
    """Steps between two lines in the metrics file."""

    evaluate_every: int = 500
    """Steps between two measurements of R-precision on held-out pairs, each with a checkpoint."""

    def __post_init__(self) -> None:
        if self.batch_size < 2:
            raise InputError(f"batch_size is {self.batch_size}: give at least 2, a match needs a wrong answer")
        for key in ("steps", "resolution", "log_every", "evaluate_every"):
            if getattr(self, key) < 1:
                raise InputError(f"{key} is {getattr(self, key)}: give at least 1")
        for key in ("lr", "lr_decay", "clip"):
            if not getattr(self, key) > 0:
                raise InputError(f"{key} is {getattr(self, key)}: give a positive number")
        if self.threads is not None and self.threads < 1:
            raise InputError(f"threads is {self.threads}: give at least 1, or leave it out")


class Pretrainer:
    """The encoders, their optimizer, and the step that trains them.

    Args:
        config: The whole configuration.
        damsm: New or restored encoders.
        steps_per_epoch: Steps of a pass over the data, after each of which the learning rate falls.
    """

    def __init__(self, config: PretrainConfig, damsm: DAMSM, steps_per_epoch: int) -> None:
        self.config = config
        self.device = choose_device(config.device)
        self.damsm = damsm.to(self.device).train()
        self.weights = [weight for weight in damsm.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.Adam(self.weights, config.lr, (0.5, 0.999))
        self.steps_per_epoch = steps_per_epoch
        self.step_count = 0

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Update the encoders.

        Args:
            batch: Images with their captions.

        Returns:
            Losses by name: scalars without graph.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * self.config.lr_decay ** (self.step_count // self.steps_per_epoch)
        text = self.damsm.text_encoder(batch.ids, batch.lengths)
        images, class_ids, caption_ids = (
            each.to(self.device) for each in (batch.images, batch.class_ids, batch.caption_ids)
        )
        losses = self.damsm(images, text, class_ids, caption_ids)
        self.optimizer.zero_grad(set_to_none=True)
        sum(losses).backward()
        torch.nn.utils.clip_grad_norm_(self.damsm.text_encoder.parameters(), self.config.clip)
        self.optimizer.step()
        self.step_count += 1
        return {f"damsm/{name}": loss.detach() for name, loss in losses._asdict().items()}

    @torch.no_grad()
    def r_precision(self, dataset: CaptionedImages, batch_size: int = 64) -> float:
        """R-precision of held-out images with their first captions."""
        self.damsm.eval()
        image_features, sentences = [], []
        for start in range(0, len(dataset), batch_size):
            places = range(start, min(start + batch_size, len(dataset)))
            images = torch.stack([dataset[place]["image"] for place in places]).to(self.device)
            image_features.append(self.damsm.image_encoder(images).whole)
            sentences.append(self.damsm.text_encoder.encode([dataset.captions[place][0] for place in places]).sentence)
        self.damsm.train()
        class_ids = None if self.config.damsm.same_class_is_wrong else dataset.class_ids
        return r_precision(torch.cat(image_features), torch.cat(sentences), class_ids)

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on but configuration and data."""
        return {
            "step": self.step_count,
            "text": self.damsm.text_encoder.description(),
            "damsm": self.damsm.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
            "random": random_state(self.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken, on a pretrainer of the same configuration and vocabulary."""
        self.step_count = state["step"]
        checkpoint.load_module(self.damsm, state["damsm"], "damsm")
        checkpoint.load_adam(self.optimizer, state["optimizer"], "optimizer")
        restore_random_state(state["random"], self.device)


def pretrain(config: PretrainConfig, resume: Path | None = None) -> Path:
    """Pretrain the encoders in a run folder of their own, or continue a run.

    Ctrl-C (SIGINT) and SIGTERM end the run after the step in progress, with a checkpoint.

    Args:
        config: The configuration.
        resume: Run folder to continue from its newest checkpoint; a new one below ``config.output`` by default.

    Returns:
        The run folder.

    Raises:
        InputError: Configuration, data, weights or checkpoint cannot be used, or the loss is no longer finite.
        KeyboardInterrupt: A signal ended the run; the message says how to resume.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    train_set = open_dataset(config.data, "train", config.resolution)
    test_set = open_dataset(config.data, "test", config.resolution)
    steps_per_epoch = max(1, len(train_set) // config.batch_size)
    if resume is None:
        torch.manual_seed(config.seed)
        captions = [caption for captions in train_set.captions for caption in captions]
        text_encoder = build_text_encoder(config.text, captions, train_set.vocabulary)
        image_encoder = build_image_encoder(config.image, config.text.dim, config.resolution)
        pretrainer = Pretrainer(config, DAMSM(text_encoder, image_encoder, config.damsm), steps_per_epoch)
        folder = run_folder.new_folder(config.output, f"damsm-{train_set.name}")
    else:
        folder, path = resume, checkpoint.find(resume, checkpoint.ENCODERS)
        state = checkpoint.load(path)
        with checkpoint.restoring(path):
            checkpoint.check_config(path, state["config"], run_folder.plain(config), FREE_ON_RESUME)
            if state["step"] >= config.steps:
                raise InputError(f"{folder} has taken its {state['step']} steps: give a larger `--steps` to train on")
            pretrainer = Pretrainer(config, _restore(config, state), steps_per_epoch)
            pretrainer.load_state_dict(state)
    _run(folder, config, pretrainer, train_set, test_set)
    return folder


def load_damsm(path: Path, resolution: int) -> tuple[DAMSM, TextConfig]:
    """Return the encoders of a pretraining run, frozen, and the configuration of its text encoder.

    Args:
        path: Checkpoint, or run folder for its newest one.
        resolution: Side of the images that the image encoder will see.

    Raises:
        InputError: There is no checkpoint of `icsd pretrain` at ``path``, or it takes images of another resolution.
    """
    path = checkpoint.find(path, checkpoint.ENCODERS)
    state = checkpoint.load(path, ["config", "text", "damsm"])
    with checkpoint.restoring(path):
        return _frozen_damsm(path, state, resolution)


def _frozen_damsm(path: Path, state: dict[str, Any], resolution: int) -> tuple[DAMSM, TextConfig]:
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
    damsm.text_encoder.freeze()
    return damsm.requires_grad_(False).eval(), config.text


def _restore(config: PretrainConfig, state: dict[str, Any]) -> DAMSM:
    text_encoder = restore_text_encoder(config.text, state["text"])
    return DAMSM(text_encoder, restore_image_encoder(config.image, config.text.dim, config.resolution), config.damsm)


def _run(
    folder: Path, config: PretrainConfig, pretrainer: Pretrainer, train_set: CaptionedImages, test_set: CaptionedImages
) -> None:
    start, stop = pretrainer.step_count, config.steps
    run_folder.begin(folder, config, start)
    print(f"run          {folder}")
    print(f"data         {train_set.name}: {len(train_set)} images, {len(test_set)} more held out")
    print(
        f"networks     {sum(weight.numel() for weight in pretrainer.weights) / 1e6:.2f} M weights to learn", flush=True
    )
    draws = SampledDataset(train_set, pretrainer.damsm.text_encoder.tokenizer, config.batch_size, config.seed)
    loader = draws.loader(start, stop, config.workers)
    interval = 0.5 if sys.stderr.isatty() else 30
    progress = tqdm(
        total=stop * config.batch_size, initial=start * config.batch_size, unit="pair", mininterval=interval
    )
    with progress, finishing_steps() as interruption:
        recent, since = [], time.perf_counter()
        for batch in loader:
            recent.append(pretrainer.step(batch))
            step = pretrainer.step_count
            progress.set_description(f"step {step}", refresh=False)
            progress.update(config.batch_size)
            if step % config.log_every == 0 or step == stop:
                losses = {name: torch.stack([each[name] for each in recent]).mean().item() for name in recent[0]}
                _check_finite(folder, pretrainer, losses)
                now = time.perf_counter()
                speed = round(len(recent) * config.batch_size / (now - since), 2)
                run_folder.append_metrics(folder, {"step": step, "pairs_per_second": speed, **losses})
                progress.set_postfix({name: f"{value:.3f}" for name, value in losses.items()}, refresh=False)
                recent, since = [], now
            if step % config.evaluate_every == 0 or step == stop or interruption.signal:
                _check_finite(folder, pretrainer, {})
                state = {"config": run_folder.plain(config), **pretrainer.state_dict()}
                checkpoint.save(checkpoint.step_path(folder, step), state)
                checkpoint.prune(folder, CHECKPOINTS_KEPT)
            if step % config.evaluate_every == 0 or step == stop:
                precision = pretrainer.r_precision(test_set)
                run_folder.append_metrics(folder, {"step": step, "r_precision": precision})
                progress.write(f"step {step}: R-precision {precision:.3f} of {len(test_set)} held-out images")
            if interruption.signal and step < stop:
                command = f"icsd pretrain --resume {shlex.quote(str(folder))}"
                raise KeyboardInterrupt(f"stopped at step {step} of {stop}; continue with\n  {command}")
    print(f"checkpoint   {checkpoint.latest(folder)}")
    print(f"try next     icsd train --damsm.checkpoint {shlex.quote(str(folder))}")


def _check_finite(folder: Path, pretrainer: Pretrainer, losses: dict[str, float]) -> None:
    """Raise when pretraining has diverged, before a checkpoint of it replaces a good one."""
    values = [*((name, torch.tensor(value)) for name, value in losses.items()), *pretrainer.damsm.named_parameters()]
    bad = next((name for name, value in values if not value.isfinite().all()), None)
    if bad is None:
        return
    remedy = f"--lr {pretrainer.config.lr / 2:g}"
    try:
        good = checkpoint.latest(folder)
        advice = f"{good} is still good; continue from it with\n  icsd pretrain --resume {folder} {remedy}"
    except InputError:
        advice = f"there is no checkpoint yet; start again with smaller steps: {remedy}"
    raise InputError(f"pretraining diverged by step {pretrainer.step_count}, {bad} is not finite: {advice}")
