"""A training run: its folder, its progress, its checkpoints and what it tells at the end.

A run folder such as ``runs/emoji-busts`` holds

* ``config.yaml``, the configuration with every value resolved;
* ``metrics.jsonl``, one line every ``log_every`` steps, and ``tensorboard/`` with the same and the pictures;
* ``pictures/``, a grid every ``sample_every`` steps: held-out captions, all stages, the real picture beside;
* ``checkpoints/``, the newest ones; see `icsd.training.checkpoint`.
"""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from icsd.data import CaptionedImages, open_dataset
from icsd.errors import InputError
from icsd.evaluation import evaluate_attributes, format_scores
from icsd.models import build_text_encoder, restore_text_encoder
from icsd.ops.registry import select
from icsd.pictures import caption_grid
from icsd.training import checkpoint, run_folder
from icsd.training.batches import batch_indices
from icsd.training.config import TrainConfig
from icsd.training.interruption import finishing_steps
from icsd.training.trainer import Trainer

CHECKPOINTS_KEPT = 3
PICTURES_PER_GRID = 12

# What a resumed run may change: how long, where and how often, and the learning rates, the remedy for divergence.
FREE_ON_RESUME = (
    *("steps", "out", "data.root", "device", "threads", "channels_last", "workers", "evaluate"),
    *("log_every", "sample_every", "checkpoint_every", "optimiser.generator_lr", "optimiser.discriminator_lr"),
)


def train(config: TrainConfig, resume: Path | None = None) -> Path:
    """Train a model in a run folder of its own, or continue one.

    Ctrl-C (SIGINT) and SIGTERM end the run after the step in progress, with a checkpoint. On one machine, with
    ``workers=0``, an interrupted and resumed run ends in the very weights of an uninterrupted one on the CPU.

    Args:
        config: The configuration.
        resume: Run folder to continue from its newest checkpoint; a new one below ``config.out`` by default.

    Returns:
        The run folder.

    Raises:
        InputError: Configuration, data or checkpoint cannot be used, or the losses are no longer finite.
        KeyboardInterrupt: A signal ended the run; the message says how to resume.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    resolution = config.generator.resolutions[-1]
    train_set = open_dataset(config.data, "train", resolution)
    test_set = open_dataset(config.data, "test", resolution)
    if resume is None:
        torch.manual_seed(config.seed)
        captions = [caption for captions in train_set.captions for caption in captions]
        trainer = Trainer(config, build_text_encoder(config.text, captions, train_set.vocabulary))
    else:
        trainer = _restore(config, resume)
    backend = _backend(trainer.device)
    folder = resume or run_folder.new_folder(config.out, train_set.name)
    run = Run(folder, config, trainer, train_set, test_set)
    run.announce(backend)
    run.train()
    run.report()
    return folder


class Run:
    """One run in progress.

    Args:
        folder: The run folder, which exists.
        config: The configuration.
        trainer: Networks and optimisers, new or restored.
        train_set: What to train on.
        test_set: Held-out pictures; their captions are painted.
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
        self.pictures = folder / "pictures"

    def announce(self, backend: str) -> None:
        """Say what is about to happen."""
        networks = {"model": self.trainer.model, "discriminators": self.trainer.discriminators}
        sizes = ", ".join(
            f"{name} {sum(weight.numel() for weight in network.parameters()) / 1e6:.2f} M weights"
            for name, network in networks.items()
        )
        threads = f", threads: {torch.get_num_threads()}" if self.trainer.device.type == "cpu" else ""
        print(f"run          {self.folder}")
        print(f"data         {self.train_set.name}: {len(self.train_set)} pictures, {len(self.test_set)} more held out")
        if self.train_set.attribution:
            print(f"             {self.train_set.attribution}")
        print(f"networks     {sizes}")
        print(f"device       {self.trainer.device}{threads}; operator: {backend}", flush=True)

    def train(self) -> None:
        """Take the remaining steps."""
        start, stop, batch_size = self.trainer.step_count, self.config.steps, self.config.batch_size
        self._begin()
        loader = DataLoader(
            self.train_set,
            batch_sampler=batch_indices(len(self.train_set), batch_size, self.config.seed, start, stop),
            num_workers=self.config.workers,
            generator=torch.Generator().manual_seed(self.config.seed + start),  # the global one is the trainer's
        )
        progress = tqdm(
            desc=f"step {start}",
            total=stop * batch_size,
            initial=start * batch_size,
            unit="image",
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )
        writer = SummaryWriter(self.folder / "tensorboard", purge_step=start + 1)
        with progress, writer, finishing_steps() as interruption:
            recent, since = [], time.perf_counter()
            for batch in loader:
                recent.append(self.trainer.step(batch))
                step = self.trainer.step_count
                progress.set_description(f"step {step}", refresh=False)
                progress.update(batch_size)
                if step % self.config.log_every == 0 or step == stop:
                    losses = {name: torch.stack([each[name] for each in recent]).mean().item() for name in recent[0]}
                    self._check_finite(losses)
                    now = time.perf_counter()
                    self._log(writer, losses, len(recent) * batch_size / (now - since))
                    progress.set_postfix(_summary(losses), refresh=False)
                    recent, since = [], now
                if step % self.config.sample_every == 0 or step == stop:
                    self._draw(writer)
                if step % self.config.checkpoint_every == 0 or step == stop or interruption.signal:
                    self._save()
                if interruption.signal and step < stop:
                    raise KeyboardInterrupt(
                        f"stopped at step {step} of {stop}; continue with\n"
                        f"  icsd train --resume {shlex.quote(str(self.folder))}"
                    )

    def report(self) -> None:
        """Score the model where the data has attributes, and say where everything is and what to try next."""
        print()
        if self.config.evaluate and self.test_set.attributes:
            print("scoring: training a classifier of the attributes on real pictures ...", flush=True)
            scores = evaluate_attributes(
                lambda captions, seed: self.trainer.paint(captions, seed)[-1], self.train_set, self.test_set
            )
            print("attributes a classifier reads: in real unseen pictures (ceiling), in pictures painted from unseen")
            print("captions (result), and had those captions been shuffled (floor)\n")
            print(f"{format_scores(scores)}\n")
            run_folder.append_metrics(
                self.folder, {"step": self.trainer.step_count, "attributes": [asdict(score) for score in scores]}
            )
        folder = shlex.quote(str(self.folder))
        sentence = shlex.quote(self.test_set.captions[0][0])
        print(f"picture      {self._picture_path()}")
        print(f"checkpoint   {checkpoint.latest(self.folder)}")
        print(f"metrics      {run_folder.metrics_path(self.folder)}   (curves: tensorboard --logdir {folder})")
        print(f"try next     icsd sample {sentence} --checkpoint {folder}")

    def _begin(self) -> None:
        """Lay out the folder."""
        self.pictures.mkdir(exist_ok=True)
        run_folder.begin(self.folder, self.config, self.trainer.step_count)
        if self.train_set.attribution:
            (self.pictures / "ATTRIBUTION").write_text(f"{self.train_set.attribution}\n", encoding="utf-8")

    def _log(self, writer: SummaryWriter, losses: dict[str, float], images_per_second: float) -> None:
        step = self.trainer.step_count
        run_folder.append_metrics(
            self.folder, {"step": step, "images_per_second": round(images_per_second, 2), **losses}
        )
        for name, value in losses.items():
            writer.add_scalar(name, value, step)
        writer.add_scalar("images_per_second", images_per_second, step)

    def _draw(self, writer: SummaryWriter) -> None:
        """Paint held-out captions, always the same with the same noise, beside the real pictures."""
        count = min(PICTURES_PER_GRID, len(self.test_set))
        chosen = [index * len(self.test_set) // count for index in range(count)]
        captions = [self.test_set.captions[index][0] for index in chosen]
        real = torch.stack([self.test_set[index]["image"] for index in chosen])
        step = self.trainer.step_count
        grid = caption_grid(
            [*self.trainer.paint(captions, self.config.seed), real],
            captions,
            headers=[*(f"{side} px" for side in self.config.generator.resolutions), "real, unseen"],
            title=f"{self.train_set.name}, step {step}",
            footer=self.train_set.attribution,
        )
        grid.save(self._picture_path())
        writer.add_image("held-out captions", np.asarray(grid), step, dataformats="HWC")

    def _picture_path(self) -> Path:
        return self.pictures / f"step-{self.trainer.step_count:08d}.png"

    def _save(self) -> None:
        self._check_finite({})
        state = {
            "config": run_folder.plain(self.config),
            "attribution": self.train_set.attribution,
            **self.trainer.state_dict(),
        }
        checkpoint.save(checkpoint.step_path(self.folder, self.trainer.step_count), state)
        checkpoint.prune(self.folder, CHECKPOINTS_KEPT)

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
        options = self.config.optimiser
        remedy = (
            f"--optimiser.generator_lr {options.generator_lr / 2:g} "
            f"--optimiser.discriminator_lr {options.discriminator_lr / 2:g}"
        )
        try:
            good = checkpoint.latest(self.folder)
            advice = f"{good} is still good; continue from it with\n  icsd train --resume {self.folder} {remedy}"
        except InputError:
            advice = f"there is no checkpoint yet; start again with smaller steps: {remedy}"
        raise InputError(f"training diverged by step {self.trainer.step_count}, {bad} is not finite: {advice}")


def _backend(device: torch.device) -> str:
    """Name the operator's backend for this device, before a run begins that could not use it."""
    try:
        return select(None, [torch.empty(2, 1, device=device)]).name
    except (ValueError, RuntimeError) as error:
        raise InputError(f"ICSD_BACKEND cannot be used: {error}") from error


def _restore(config: TrainConfig, folder: Path) -> Trainer:
    """Make the trainer that wrote the newest checkpoint of a run folder."""
    path = checkpoint.latest(folder)
    state = checkpoint.load(path)
    checkpoint.check_config(path, state["config"], run_folder.plain(config), FREE_ON_RESUME)
    if state["step"] >= config.steps:
        raise InputError(f"{folder} has taken its {state['step']} steps: give a larger `--steps` to train on")
    trainer = Trainer(config, restore_text_encoder(config.text, state["text"]))
    trainer.load_state_dict(state)
    return trainer


def _summary(losses: dict[str, float]) -> dict[str, str]:
    """Losses for the progress bar: the discriminators', the generator's and the distillation's."""
    groups = {"D": 0.0, "G": 0.0, "CSD": 0.0}
    for name, value in losses.items():
        groups["CSD" if name.endswith("/csd") else name[0].upper()] += value
    return {name: f"{value:.3f}" for name, value in groups.items()}
