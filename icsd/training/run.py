"""A training run: its folder, its progress, its checkpoints and what it tells at the end.

A run folder such as ``runs/emoji-busts`` holds

* ``config.yaml``, the configuration with every value resolved;
* ``metrics.jsonl``, one line every ``log_every`` steps, and ``tensorboard/`` with the same and the images;
* ``images/``, a grid every ``sample_every`` steps: held-out captions, all stages, the real image beside;
* ``checkpoints/``, the newest ones, and the best one by the score on held-out captions where ``evaluate_every`` is
  given; see `icsd.training.checkpoint`.
"""

from __future__ import annotations

import itertools
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from icsd.data import CaptionedImages, open_dataset
from icsd.errors import InputError
from icsd.evaluation import (
    AttributeClassifier,
    AttributeScore,
    evaluate_attributes,
    format_scores,
    train_classifier,
)
from icsd.models import build_text_encoder, restore_text_encoder
from icsd.ops.registry import select
from icsd.training import checkpoint, run_folder
from icsd.training.batches import Batch, SampledDataset
from icsd.training.config import TrainConfig
from icsd.training.interruption import finishing_steps
from icsd.training.memory import peak_memory
from icsd.training.monitor import TrainingMonitor, diversity
from icsd.training.pretrain import load_damsm
from icsd.training.profile import Profile, profile_training
from icsd.training.trainer import Trainer
from icsd.visualization import caption_grid

CHECKPOINTS_KEPT = 3
IMAGES_PER_GRID = 12
CAPTIONS_PER_R_PRECISION = 64

# What a resumed run may change: how long, where and how often, and the remedies for loss.
FREE_ON_RESUME = (
    *(
        "steps",
        "output",
        "data.root",
        "damsm.checkpoint",
        "device",
        "threads",
        "channels_last",
        "compile",
        "workers",
        "evaluate",
    ),
    *("log_every", "sample_every", "checkpoint_every", "evaluate_every"),
    *("precision", "optimizer.generator_lr", "optimizer.discriminator_lr", "optimizer.clip"),
)


def train(config: TrainConfig, resume: Path | None = None) -> Path:
    """Train a model in a run folder of its own, or continue one.

    Ctrl-C (SIGINT) and SIGTERM end the run after the step in progress, with a checkpoint. On one machine an interrupted
    and resumed run ends in the very weights of an uninterrupted one on the CPU, whatever ended it.

    Args:
        config: The configuration.
        resume: Run folder to continue from its newest checkpoint; a new one below ``config.output`` by default.

    Returns:
        The run folder.

    Raises:
        InputError: Configuration, data or checkpoint cannot be used, or the losses are no longer finite.
        KeyboardInterrupt: A signal ended the run; the message says how to resume.
    """
    trainer, train_set, test_set = _build(config, resume)
    backend = _backend(trainer.device)
    folder = resume or run_folder.new_folder(config.output, train_set.name)
    print(f"run          {folder}")
    _announce(trainer, train_set, test_set, backend)
    run = Run(folder, config, trainer, train_set, test_set)
    run.train()
    run.report()
    return folder


def dry_run(config: TrainConfig, resume: Path | None = None) -> None:
    """Build everything, take two steps, the first to warm up, and print what a run would take. Writes nothing.

    Args:
        config: The configuration.
        resume: Run folder whose newest checkpoint to begin from.

    Raises:
        InputError: Configuration, data or checkpoint cannot be used.
    """
    trainer, train_set, test_set = _build(config, resume)
    _announce(trainer, train_set, test_set, _backend(trainer.device))
    start = trainer.step_count
    for batches in _steps_of_batches(trainer, train_set, start, start + 2):
        since = time.perf_counter()
        losses = {name: loss.item() for name, loss in trainer.step(batches).items()}
        seconds = time.perf_counter() - since
    images = config.batch_size * config.accumulate
    hours = (config.steps - start) * seconds / 3600
    size = sum(each.nbytes for each in _tensors(trainer.state_dict()))
    print(f"losses       {', '.join(f'{name} {value:.3f}' for name, value in losses.items())}")
    print(f"speed        {1 / seconds:.3g} steps/s, {images / seconds:.3g} images/s, from one step")
    print(f"whole run    {config.steps - start} steps, {hours:.2g} h, without data that is slow to load and images")
    print(f"memory       {peak_memory(trainer.device) / 2**20:,.0f} MiB at most so far")
    print(f"checkpoint   {size / 2**20:,.0f} MiB each, {CHECKPOINTS_KEPT} kept")
    print("nothing was written")


def profile(config: TrainConfig, steps: int) -> Profile:
    """Build everything, train for a few steps, and find out where their time goes. Writes nothing.

    Args:
        config: The configuration.
        steps: Steps timed, and as many looked into.

    Returns:
        Shares of time and peak memory.

    Raises:
        InputError: Configuration or data cannot be used.
    """
    trainer, train_set, test_set = _build(config, None)
    _announce(trainer, train_set, test_set, _backend(trainer.device))
    return profile_training(trainer, _steps_of_batches(trainer, train_set, 0, 2 * steps + 1), steps)


def _build(config: TrainConfig, resume: Path | None) -> tuple[Trainer, CaptionedImages, CaptionedImages]:
    """The trainer, new or restored, and both splits."""
    if config.threads:
        torch.set_num_threads(config.threads)
    resolution = config.generator.resolutions[-1]
    train_set = open_dataset(config.data, "train", resolution)
    test_set = open_dataset(config.data, "test", resolution)
    if resume is not None:
        return _restore(config, resume), train_set, test_set
    torch.manual_seed(config.seed)
    if config.damsm.checkpoint is not None:
        return _guided(config), train_set, test_set
    captions = [caption for captions in train_set.captions for caption in captions]
    return Trainer(config, build_text_encoder(config.text, captions, train_set.vocabulary)), train_set, test_set


def _guided(config: TrainConfig) -> Trainer:
    """A trainer whose text encoder is pretrained, and the image encoder beside it that judges."""
    damsm, config.text = load_damsm(config.damsm.checkpoint, config.generator.resolutions[-1])
    return Trainer(config, damsm.text_encoder, damsm)


def _announce(trainer: Trainer, train_set: CaptionedImages, test_set: CaptionedImages, backend: str) -> None:
    """Say what is about to be trained on what."""
    config = trainer.config
    networks = {"text encoder": trainer.model.text_encoder, "generator": trainer.model.generator}
    networks |= {
        f"discriminator {side}": discriminator
        for side, discriminator in zip(trainer.resolutions, trainer.discriminators, strict=True)
    }
    sizes = ", ".join(
        f"{name} {sum(weight.numel() for weight in network.parameters()) / 1e6:.2f} M"
        for name, network in networks.items()
    )
    threads = f", threads: {torch.get_num_threads()}" if trainer.device.type == "cpu" else ""
    print(f"data         {train_set.name}: {len(train_set)} images, {len(test_set)} more held out")
    if train_set.attribution:
        print(f"             {train_set.attribution}")
    print(f"weights      {sizes}")
    accumulated = f" in {config.accumulate} batches" if config.accumulate > 1 else ""
    print(f"step         {config.batch_size * config.accumulate} images{accumulated}, {config.precision}")
    print(f"device       {trainer.device}{threads}; operator: {backend}", flush=True)


def _steps_of_batches(
    trainer: Trainer, train_set: CaptionedImages, start: int, stop: int
) -> Iterator[tuple[Batch, ...]]:
    """Yield the batches of each step from ``start`` to ``stop``."""
    config = trainer.config
    draws = SampledDataset(train_set, trainer.model.text_encoder.tokenizer, config.batch_size, config.seed)
    loader = draws.loader(
        start * config.accumulate,
        stop * config.accumulate,
        config.workers,
        pin_memory=trainer.device.type == "cuda",
    )
    return zip(*[iter(loader)] * config.accumulate, strict=True)


class Run:
    """One run in progress.

    Args:
        folder: The run folder, which exists.
        config: The configuration.
        trainer: Networks and optimizers, new or restored.
        train_set: What to train on.
        test_set: Held-out images; their captions are generated.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        trainer: Trainer,
        train_set: CaptionedImages,
        test_set: CaptionedImages,
    ) -> None:
        self.folder = folder
        self.config = config
        self.trainer = trainer
        self.train_set = train_set
        self.test_set = test_set
        self.images = folder / "images"
        self.monitor = TrainingMonitor(config.generator.resolutions)
        self.best: float | None = None

    def train(self) -> None:
        """Take the remaining steps."""
        config, trainer = self.config, self.trainer
        start, stop, images = trainer.step_count, config.steps, config.batch_size * config.accumulate
        self._begin()
        progress = tqdm(
            desc=f"step {start}",
            total=stop * images,
            initial=start * images,
            unit="image",
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )
        writer = SummaryWriter(self.folder / "tensorboard", purge_step=start + 1)
        with progress, writer, finishing_steps() as interruption:
            recent, since = [], time.perf_counter()
            for batches in _steps_of_batches(trainer, self.train_set, start, stop):
                recent.append(trainer.step(batches))
                step = trainer.step_count
                progress.set_description(f"step {step}", refresh=False)
                progress.update(images)
                if step % config.log_every == 0 or step == stop:
                    losses = {name: torch.stack([each[name] for each in recent]).mean().item() for name in recent[0]}
                    self._check_finite(losses)
                    now = time.perf_counter()
                    rate = len(recent) * images / (now - since)
                    self._log(writer, {"images_per_second": round(rate, 2), **losses})
                    self._warn(self.monitor.losses(losses))
                    progress.set_postfix(_summary(losses), refresh=False)
                    recent, since = [], now
                if step % config.sample_every == 0 or step == stop:
                    self._draw(writer)
                if config.evaluate_every and (step % config.evaluate_every == 0 or step == stop):
                    self._evaluate(writer)
                if step % config.checkpoint_every == 0 or step == stop or interruption.signal:
                    self._save(checkpoint.step_path(self.folder, step))
                    checkpoint.prune(self.folder, CHECKPOINTS_KEPT)
                if interruption.signal and step < stop:
                    raise KeyboardInterrupt(
                        f"stopped at step {step} of {stop}; continue with\n"
                        f"  icsd train --resume {shlex.quote(str(self.folder))}"
                    )

    def report(self) -> None:
        """Score the model where the data has attributes, and say where everything is and what to try next."""
        print()
        if self.config.evaluate and self.test_set.attributes:
            print("scoring: training a classifier of the attributes on real images ...", flush=True)
            scores = self._score_attributes()
            print("attributes a classifier reads: in real unseen images (ceiling), in images generated from unseen")
            print("captions (result), and had those captions been shuffled (floor)\n")
            print(f"{format_scores(scores)}\n")
            run_folder.append_metrics(
                self.folder, {"step": self.trainer.step_count, "attributes": [asdict(score) for score in scores]}
            )
        folder = shlex.quote(str(self.folder))
        sentence = shlex.quote(self.test_set.captions[0][0])
        print(f"image      {self._grid_path()}")
        print(f"checkpoint   {checkpoint.latest(self.folder)}")
        if self.best is not None:
            print(f"best         {checkpoint.best_path(self.folder)}, score {self.best:.3f}")
        print(f"metrics      {run_folder.metrics_path(self.folder)}   (curves: tensorboard --logdir {folder})")
        print(f"try next     icsd sample {sentence} --checkpoint {folder}")

    def _begin(self) -> None:
        """Lay out the folder."""
        self.images.mkdir(exist_ok=True)
        run_folder.begin(self.folder, self.config, self.trainer.step_count)
        if self.train_set.attribution:
            (self.images / "ATTRIBUTION").write_text(f"{self.train_set.attribution}\n", encoding="utf-8")
        best = checkpoint.best_path(self.folder)
        if best.exists():
            state = checkpoint.load(best, ["step", "score"])
            if state["step"] <= self.trainer.step_count:  # else it is of steps that are to be taken again
                self.best = state["score"]

    def _log(self, writer: SummaryWriter, values: dict[str, float]) -> None:
        step = self.trainer.step_count
        run_folder.append_metrics(self.folder, {"step": step, **values})
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    def _warn(self, warnings: list[str]) -> None:
        for warning in warnings:
            tqdm.write(f"warning      step {self.trainer.step_count}: {warning}")

    def _evaluate(self, writer: SummaryWriter) -> None:
        """Score the averaged model on held-out captions, and keep it if there was none better.

        The score is what a classifier reads of the attributes, where the data has them; else `Trainer.r_precision`.
        """
        if self.test_set.attributes:
            results = [score.result for score in self._score_attributes()]
            score = sum(results) / len(results)
        else:
            captions = list(dict.fromkeys(captions[0] for captions in self.test_set.captions))
            score = self.trainer.r_precision(captions[:CAPTIONS_PER_R_PRECISION], self.config.seed)
        self._log(writer, {"score": score})
        if self.best is None or score > self.best:
            self._save(checkpoint.best_path(self.folder), score=score)
            self.best = score

    @cached_property
    def _classifier(self) -> AttributeClassifier:
        return train_classifier(self.train_set)

    def _score_attributes(self) -> list[AttributeScore]:
        return evaluate_attributes(
            lambda captions, seed: self.trainer.generate(captions, seed)[-1], self._classifier, self.test_set
        )

    def _draw(self, writer: SummaryWriter) -> None:
        """Generate held-out captions, always the same with the same noise, beside the real images."""
        count = min(IMAGES_PER_GRID, len(self.test_set))
        chosen = [index * len(self.test_set) // count for index in range(count)]
        captions = [self.test_set.captions[index][0] for index in chosen]
        real = torch.stack([self.test_set[index]["image"] for index in chosen])
        generated = self.trainer.generate(captions, self.config.seed)
        if count > 1:
            share = diversity(generated[-1]) / max(diversity(real), 1e-6)
            self._log(writer, {"diversity": share})
            self._warn(self.monitor.diversity(share))
        step = self.trainer.step_count
        grid = caption_grid(
            [*generated, real],
            captions,
            headers=[*(f"{side} px" for side in self.config.generator.resolutions), "real, unseen"],
            title=f"{self.train_set.name}, step {step}",
            footer=self.train_set.attribution,
        )
        grid.save(self._grid_path())
        writer.add_image("held-out captions", np.asarray(grid), step, dataformats="HWC")

    def _grid_path(self) -> Path:
        return self.images / f"step-{self.trainer.step_count:08d}.png"

    def _save(self, path: Path, **extra: float) -> None:
        self._check_finite({})
        state = {
            "config": run_folder.plain(self.config),
            "attribution": self.train_set.attribution,
            **extra,
            **self.trainer.state_dict(),
        }
        try:
            checkpoint.save(path, state)
        except OSError as error:
            raise OSError(f"{error}; free some space: {self._last_good()}") from error

    def _last_good(self, *options: str) -> str:
        """How to go on from what there is."""
        try:
            good = checkpoint.latest(self.folder)
        except InputError:
            return f"there is no checkpoint yet; start again {' '.join(options)}".rstrip()
        command = " ".join(["icsd train --resume", shlex.quote(str(self.folder)), *options])
        return f"{good} is still good; continue from it with\n  {command}"

    def _check_finite(self, losses: dict[str, float]) -> None:
        """Raise when training has diverged, before a checkpoint of it replaces a good one."""
        values = [
            *((name, torch.tensor(value)) for name, value in losses.items()),
            *self.trainer.model.named_parameters(),
            *self.trainer.discriminators.named_parameters(),
        ]
        bad = next((name for name, value in values if not value.isfinite().all()), None)
        if bad is None:
            return
        options = self.config.optimizer
        advice = self._last_good(
            f"--optimizer.generator-lr {options.generator_lr / 2:g}",
            f"--optimizer.discriminator-lr {options.discriminator_lr / 2:g}",
        )
        raise InputError(f"training diverged by step {self.trainer.step_count}, {bad} is not finite: {advice}")


def _backend(device: torch.device) -> str:
    """Name the operator's backend for this device, before a run begins that could not use it."""
    try:
        return select(None, [torch.empty(2, 1, device=device)]).name
    except (ValueError, RuntimeError) as error:
        raise InputError(f"ICSD_BACKEND cannot be used: {error}") from error


def _restore(config: TrainConfig, folder: Path) -> Trainer:
    """Make the trainer that wrote the newest checkpoint of a run folder."""
    path = checkpoint.find(folder, checkpoint.MODEL)
    state = checkpoint.load(path)
    with checkpoint.restoring(path):
        checkpoint.check_config(path, state["config"], run_folder.plain(config), FREE_ON_RESUME)
        if state["step"] >= config.steps:
            raise InputError(f"{folder} has taken its {state['step']} steps: give a larger `--steps` to train on")
        if config.damsm.checkpoint is not None:
            trainer = _guided(config)
        else:
            trainer = Trainer(config, restore_text_encoder(config.text, state["text"]))
        trainer.load_state_dict(state)
    return trainer


def _summary(losses: dict[str, float]) -> dict[str, str]:
    """Return the losses for the progress bar: those of the discriminators, the generator and the distillation."""
    groups = {"D": 0.0, "G": 0.0, "distillation": 0.0}
    for name, value in losses.items():
        groups["distillation" if name.endswith("/distillation") else name[0].upper()] += value
    return {name: f"{value:.3f}" for name, value in groups.items()}


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    """The tensors in a nested state."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        yield from itertools.chain.from_iterable(map(_tensors, state.values()))
