"""GAN training: a run from its configuration to its last checkpoint.

A run folder such as ``runs/emoji-busts`` holds

* ``config.yaml``, the configuration with every value resolved;
* ``metrics.jsonl``, one line every ``log_every`` steps, and ``tensorboard/`` with the same and the images;
* ``images/``, a grid every ``sample_every`` steps: held-out captions, all stages, the real image beside;
* ``checkpoints/``, the newest ones, and the best one by the score on held-out captions where ``evaluate_every`` is
  given; see `icsd.training.checkpoint`.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import shlex
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from icsd.data import CaptionedImages, Vocabulary, open_dataset
from icsd.errors import InputError
from icsd.evaluation import (
    AttributeClassifier,
    AttributeScore,
    attribute_classifier,
    evaluate_attributes,
    format_scores,
)
from icsd.evaluation.evaluate import require_two_images
from icsd.evaluation.extractors import lite0_files
from icsd.models import build_text_encoder, restore_text_encoder
from icsd.ops import cross_sample_similarity
from icsd.ops.registry import select
from icsd.team import Team
from icsd.training import checkpoint, run_folder
from icsd.training.batches import Batch, SampledDataset
from icsd.training.captions import check_captions, describe_data, differences
from icsd.training.config import TrainConfig
from icsd.training.evaluation import TrainingEvaluation, flat, score_of
from icsd.training.launch import folder_to_resume, launched
from icsd.training.loggers import require_wandb
from icsd.training.loop import Command, Event, Loop
from icsd.training.memory import peak_memory
from icsd.training.monitor import TrainingMonitor, diversity
from icsd.training.pretrain import load_damsm
from icsd.training.profile import Profile, profile_training
from icsd.training.randomness import seed_everything
from icsd.training.run_folder import RunFolder
from icsd.training.trainer import Trainer
from icsd.visualization import caption_grid

CHECKPOINTS_KEPT = 3
IMAGES_PER_GRID = 12

LISTED_BY_FOLDER = ("folder", "coco")
"""The sources of data that read, or refuse, every image below ``data.root``."""

FREE_ON_RESUME = (
    *("steps", "output", "name", "data.root", "damsm.checkpoint", "device", "threads", "channels_last", "compile"),
    *("workers", "loggers", "log_every", "sample_every", "checkpoint_every", "evaluate_every", "evaluate"),
    *("precision", "optimizer.generator_lr", "optimizer.discriminator_lr", "optimizer.clip"),
)
"""Keys that a resumed run may change: length, place and intervals, and the remedies for divergence."""


def train(config: TrainConfig, resume: Path | None = None) -> Path:
    """Train a model in a run folder of its own, or continue one.

    SIGINT (Ctrl-C), SIGTERM and SIGHUP end the run after the step in progress, with a checkpoint. On one machine an
    interrupted and resumed run ends in the very weights of an uninterrupted one on the CPU, whatever ended it.

    Args:
        config: The configuration.
        resume: Run folder to continue from its newest checkpoint; a new one below ``config.output`` by default.

    Returns:
        The run folder.

    Raises:
        InputError: Configuration, data or checkpoint cannot be used, or the losses are no longer finite.
        KeyboardInterrupt: A signal ended the run; the message says how to resume.
    """
    resume = folder_to_resume(config, resume)
    with launched(config, resume) as team, contextlib.ExitStack() as stack:
        _check_place(config, resume)
        if resume is not None:
            folder = RunFolder(resume)
            team.first(lambda: stack.enter_context(folder.locked()))
        session = prepare(config, resume, team)
        if resume is None:
            name = session.train_set.name
            folder = RunFolder(team.first(lambda: RunFolder.create(config.output, config.name, name).path))
            team.first(lambda: stack.enter_context(folder.locked()))
        print(f"run          {folder.path}")
        session.announce()
        run = Run(folder, session)
        run.loop.run()
        if team.leads:
            run.report()
    return folder.path


def dry_run(config: TrainConfig, resume: Path | None = None) -> None:
    """Build everything, take two steps, the first to warm up, and print what a run would take. Writes nothing.

    Args:
        config: The configuration.
        resume: Run folder whose newest checkpoint to begin from.

    Raises:
        InputError: Configuration, data or checkpoint cannot be used.
    """
    resume = resume and checkpoint.run_folder_of(resume)
    with launched(config, resume) as team:
        _check_place(config, resume)
        _dry_run(prepare(config, resume, team))


def _dry_run(session: Session) -> None:
    """Take two steps, and print what a run would take."""
    session.announce()
    config = session.trainer.config
    trainer, start = session.trainer, session.trainer.step_count
    for batches in session.batches(start, start + 2):
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
    unlogged = replace(config, evaluate_every=None, loggers=[])  # the packages for scores and logs need not be there
    session = prepare(unlogged, None, Team())
    session.announce()
    return profile_training(session.trainer, session.batches(0, 2 * steps + 1), steps)


@dataclass
class Session:
    """A trainer and its data."""

    trainer: Trainer
    train_set: CaptionedImages
    test_set: CaptionedImages
    backend: str
    """Name of the operator's backend."""
    notes: list[str]
    """Notes for the user before training begins, one line each."""

    def batches(self, start: int, stop: int) -> Iterator[tuple[Batch, ...]]:
        """Yield the batches of each step from ``start`` to ``stop``."""
        config = self.trainer.config
        tokenizer = self.trainer.model.text_encoder.tokenizer
        similar = config.adversarial.wrong_captions == "similar"
        draws = SampledDataset(
            self.train_set, tokenizer, config.batch_size, config.seed, similar=similar, team=self.trainer.team
        )
        batches = draws.batches_of(
            start * config.accumulate,
            stop * config.accumulate,
            config.workers,
            pin_memory=self.trainer.device.type == "cuda",
        )
        return zip(*[batches] * config.accumulate, strict=True)

    def announce(self) -> None:
        """Print what is about to be trained on what."""
        trainer, config = self.trainer, self.trainer.config
        networks = {"text encoder": trainer.model.text_encoder, "generator": trainer.model.generator}
        networks |= {
            f"discriminator {resolution}": discriminator
            for resolution, discriminator in zip(trainer.resolutions, trainer.discriminators, strict=True)
        }
        sizes = ", ".join(
            f"{name} {sum(weight.numel() for weight in network.parameters()) / 1e6:.2f} M"
            for name, network in networks.items()
        )
        threads = f", threads: {torch.get_num_threads()}" if trainer.device.type == "cpu" else ""
        print(f"data         {self.train_set.name}: {len(self.train_set)} images, {len(self.test_set)} more held out")
        if self.train_set.attribution:
            print(f"             {self.train_set.attribution}")
        for note in self.notes:
            print(f"note         {note}")
        print(f"weights      {sizes}")
        accumulated = f" in {config.accumulate} batches" if config.accumulate > 1 else ""
        print(f"step         {config.batch_size * config.accumulate} images{accumulated}, {config.precision}")
        ranks = f", {trainer.team.size} ranks" if trainer.team.size > 1 else ""
        print(f"device       {trainer.device}{threads}{ranks}; operator: {self.backend}", flush=True)


def prepare(config: TrainConfig, resume: Path | None, team: Team) -> Session:
    """Open the data and build the trainer, new or restored.

    Raises:
        InputError: Configuration, data or checkpoint cannot be used.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    if "wandb" in config.loggers and team.leads:
        require_wandb()
    if config.evaluate_every:
        lite0_files()
    resolution = config.generator.resolutions[-1]
    train_set, test_set = (open_dataset(config.data, split, resolution) for split in ("train", "test"))
    if config.evaluate_every:
        require_two_images(test_set)
    resume, notes = run_folder.check_start(resume)
    notes += [*train_set.notes, *_single_class(train_set)]
    seed_everything(config.seed)
    if resume is not None:
        trainer, changes = _restored(config, resume, train_set, team)
        notes += changes
    elif config.damsm.checkpoint is not None:
        trainer = _guided(config, train_set.vocabulary, team)
    else:
        captions = [caption for captions in train_set.captions for caption in captions]
        trainer = Trainer(config, build_text_encoder(config.text, captions, train_set.vocabulary), team=team)
    notes += check_captions(trainer.model.text_encoder.tokenizer, train_set, test_set)
    return Session(trainer, train_set, test_set, _backend(trainer.device), notes)


def _check_place(config: TrainConfig, resume: Path | None) -> None:
    """Refuse a run folder among the images of a data set, since those of the run would be read as data."""
    root, place = config.data.root, resume or config.output
    if root is None or config.data.name not in LISTED_BY_FOLDER or not place.resolve().is_relative_to(root.resolve()):
        return
    if any(part.startswith(".") for part in place.resolve().relative_to(root.resolve()).parts):  # it is not read
        return
    if resume is None:
        raise InputError(
            f"output is {place}, which lies in data.root, {root}, so that the images of the run would be read as data: "
            "give an output outside of it"
        )
    raise InputError(
        f"the run folder {place} lies in data.root, {root}, so that the images of the run are read as data: move the "
        "run folder out of it, and resume it there"
    )


def _single_class(train_set: CaptionedImages) -> list[str]:
    """Return a note if no caption is a wrong one for any image."""
    if len(set(map(int, train_set.class_ids))) > 1:
        return []
    return [
        "all images are of one class, so the discriminators see no wrong captions and the class of an image has no "
        "other effect: leave the classes out if captions tell the images apart"
    ]


def _guided(config: TrainConfig, vocabulary: Vocabulary | None, team: Team) -> Trainer:
    """Return a trainer whose text encoder is pretrained, with the image encoder that was trained beside it."""
    damsm, config.text = load_damsm(config.damsm.checkpoint, config.generator.resolutions[-1], vocabulary)
    return Trainer(config, damsm.text_encoder, damsm, team)


def _restored(config: TrainConfig, folder: Path, train_set: CaptionedImages, team: Team) -> tuple[Trainer, list[str]]:
    """Return the trainer that wrote the newest checkpoint of a run folder, and notes about what has changed since."""
    path = checkpoint.find(folder, checkpoint.MODEL)
    state = checkpoint.load(path)
    with checkpoint.restoring(path):
        wanted, defaults = run_folder.plain(config), run_folder.plain(TrainConfig())
        checkpoint.check_config(path, state["config"], wanted, FREE_ON_RESUME, defaults)
        if state["step"] >= config.steps and checkpoint.EVENTS_DUE not in state:
            raise InputError(
                f"{folder} is already trained for {state['step']} steps: give a larger `--steps` to continue"
            )
        notes = differences(state.get("data"), describe_data(train_set))
        if any(state.get("queues", {}).values()):  # of an earlier version
            notes.append(
                f"{path} holds the features of earlier samples in another order: distillation.*.queue starts empty"
            )
        if config.damsm.checkpoint is not None:
            trainer = _guided(config, train_set.vocabulary, team)
            notes += _check_image_encoder(path, state, trainer)
        else:
            trainer = Trainer(config, restore_text_encoder(config.text, state["text"]), team=team)
        trainer.load_state_dict(state)
    return trainer, notes


def _check_image_encoder(path: Path, state: dict[str, Any], trainer: Trainer) -> list[str]:
    """Check that the image encoder that guides a run is the one of its checkpoint.

    Returns:
        A note if the checkpoint does not tell.

    Raises:
        InputError: It is another one.
    """
    if "image_encoder" not in state:
        return [f"{path} does not tell which image encoder guided it; that of damsm.checkpoint does from now on"]
    if state["image_encoder"] != _image_encoder_digest(trainer):
        raise InputError(
            f"damsm.checkpoint is {trainer.config.damsm.checkpoint}, whose image encoder is not the one that guided "
            f"the run up to step {state['step']}: give the checkpoint of the encoders that the run began with"
        )
    return []


def _image_encoder_digest(trainer: Trainer) -> str | None:
    """Return the SHA-256 of the weights of the image encoder that guides a run, None without one."""
    if trainer.damsm is None:
        return None
    digest = hashlib.sha256()
    for name, weights in trainer.damsm.image_encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(weights.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _backend(device: torch.device) -> str:
    """Name the operator's backend for this device, before a run begins that could not use it."""
    example = torch.ones(2, 1, device=device)
    try:
        cross_sample_similarity(example)
        return select(None, [example]).name
    except (ValueError, RuntimeError) as error:
        raise InputError(f"the operator cannot be used: {error}") from error


class Run:
    """A run of GAN training in its folder: image grids, scores and the report at the end.

    Args:
        folder: The run folder, locked.
        session: The trainer and its data.
    """

    def __init__(self, folder: RunFolder, session: Session) -> None:
        self.folder = folder
        self.trainer = session.trainer
        self.config = config = session.trainer.config
        self.train_set, self.test_set = session.train_set, session.test_set
        self.monitor = TrainingMonitor(config.generator.resolutions, config.optimizer.ema_decay)
        self.images = folder.path / "images"
        if self.trainer.team.leads:
            self.images.mkdir(exist_ok=True)
            if self.train_set.attribution:
                (self.images / "ATTRIBUTION").write_text(f"{self.train_set.attribution}\n", encoding="utf-8")
        self.best = self._best_score()
        rates = config.optimizer
        self.loop = Loop(
            config,
            session.trainer,
            folder,
            session.batches,
            Command(
                "train",
                "image",
                (
                    f"--optimizer.generator-lr {rates.generator_lr / 2:g}",
                    f"--optimizer.discriminator-lr {rates.discriminator_lr / 2:g}",
                ),
            ),
            CHECKPOINTS_KEPT,
            extra_state={
                "attribution": self.train_set.attribution,
                "data": describe_data(self.train_set),
                "image_encoder": _image_encoder_digest(session.trainer),
            },
            measured=session.trainer.measurements,
            summarize=_summary,
            on_line=lambda line: self._warn(self.monitor.line(line)),
            events=[
                Event(config.sample_every, self._draw),
                Event(config.evaluate_every, self._evaluate, everyone=True),
            ],
            team=session.trainer.team,
        )

    def report(self) -> None:
        """Score the model where the data has attributes, and print where everything is and what to try next."""
        print()
        if self.config.evaluate and self.test_set.attributes:
            scores = self._score_attributes()
            print("accuracy of the attributes: on real unseen images (ceiling), on images generated from unseen")
            print("captions (result), and had those captions been shuffled (floor)\n")
            print(f"{format_scores(scores)}\n")
            attributes = [asdict(score) for score in scores]
            self.folder.append_metrics({"step": self.trainer.step_count, "attributes": attributes})
        folder = shlex.quote(str(self.folder.path))
        sentence = shlex.quote(self.test_set.captions[0][0])
        print(f"image        {self._grid_path()}")
        print(f"checkpoint   {checkpoint.latest(self.folder.path)}")
        if self.best is not None:
            print(f"best         {checkpoint.best_path(self.folder.path)}, score {self.best:.3f}")
        curves = f"   (curves: tensorboard --logdir {folder})" if "tensorboard" in self.config.loggers else ""
        print(f"metrics      {self.folder.metrics_path}{curves}")
        print(f"try next     icsd sample {sentence} --checkpoint {folder}")

    def _best_score(self) -> float | None:
        """Return the score of the best checkpoint, whether or not its step is to be taken again; none for a new run."""
        best = checkpoint.best_path(self.folder.path)
        if not best.exists() or self.trainer.step_count == 0:
            return None
        return checkpoint.load(best, ["score"])["score"]

    def _warn(self, warnings: list[str]) -> None:
        for warning in warnings:
            tqdm.write(f"warning      step {self.trainer.step_count}: {warning}")

    def _evaluate(self) -> None:
        """Measure the averaged model on held-out captions, and keep it if there was none better."""
        results = self._evaluation.measure()
        score = score_of(results)
        self.loop.log({"score": score, **self.loop.stopwatch.read(), **flat(results)})
        if self.best is None or score > self.best:
            self.loop.save(checkpoint.best_path(self.folder.path), score=score)
            self.best = score

    @cached_property
    def _evaluation(self) -> TrainingEvaluation:
        evaluation = TrainingEvaluation(self.trainer, self.train_set, self.test_set)
        if self.trainer.team.leads:
            evaluation.write_protocols(self.folder.path / "evaluation" / "during-training.json")
        return evaluation

    @cached_property
    def _classifier(self) -> AttributeClassifier:
        return attribute_classifier(self.train_set, self.config.generator.resolutions[-1])

    def _score_attributes(self) -> list[AttributeScore]:
        return evaluate_attributes(
            lambda captions, seed: self.trainer.generate(captions, seed)[-1], self._classifier, self.test_set
        )

    def _draw(self) -> None:
        """Generate held-out captions, always the same with the same noise, beside the real images."""
        count = min(IMAGES_PER_GRID, len(self.test_set))
        chosen = [index * len(self.test_set) // count for index in range(count)]
        captions = [self.test_set.captions[index][0] for index in chosen]
        real = torch.stack([self.test_set[index]["image"] for index in chosen])
        generated = self.trainer.generate(captions, self.config.seed)
        step = self.trainer.step_count
        if count > 1:
            share = diversity(generated[-1]) / max(diversity(real), 1e-6)
            self.loop.log({"diversity": share})
            self._warn(self.monitor.diversity(step, share))
        grid = caption_grid(
            [*generated, real],
            captions,
            headers=[*(f"{resolution} px" for resolution in self.config.generator.resolutions), "real, unseen"],
            title=f"{self.train_set.name}, step {step}",
            footer=self.train_set.attribution,
        )
        grid.save(self._grid_path())
        self.loop.loggers.image(step, "held-out captions", np.asarray(grid))

    def _grid_path(self) -> Path:
        return self.images / f"step-{self.trainer.step_count:08d}.png"


def _summary(line: dict[str, float]) -> dict[str, float]:
    """Return the numbers for the progress bar.

    They are the sums of the losses of the discriminators and of the generator, the share of the distillation in the
    generator's gradient, and the inconsistency between the stages of the generator.
    """
    summary = {
        side[0].upper(): sum(value for name, value in line.items() if name.startswith(f"{side}/"))
        for side in ("discriminator", "generator")
    }
    measured = {"distillation": "share/generator/distillation", "inconsistency": "inconsistency/generator"}
    return summary | {shown: line[name] for shown, name in measured.items() if name in line}


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in a nested state."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        yield from itertools.chain.from_iterable(map(_tensors, state.values()))
