"""The training loop under GAN training and DAMSM pretraining.

It takes the steps and runs what follows some of them: lines of metrics, image grids, scores and checkpoints. It ends
after a signal with a checkpoint, and before a checkpoint of weights that are not finite.
"""

from __future__ import annotations

import contextlib
import errno
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from icsd.errors import InputError, is_out_of_memory
from icsd.team import Team
from icsd.training import checkpoint, run_folder
from icsd.training.batches import Batch
from icsd.training.config import RunConfig
from icsd.training.interruption import ends_of_children_unnoticed, finishing_steps
from icsd.training.loggers import Loggers
from icsd.training.run_folder import RunFolder
from icsd.training.stopwatch import Stopwatch

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Steps(Protocol):
    """Networks and optimizers, and the step that trains them."""

    step_count: int
    """Steps taken so far."""

    def step(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Take a step; return the losses by name, scalars without graph."""

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        """Return all weights that the step trains."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on except configuration and data."""


@dataclass
class Command:
    """The command that a run belongs to, for messages."""

    name: str
    """Name of the command, such as "train"."""
    unit: str
    """Name of one sample of a step."""
    remedies: tuple[str, ...]
    """Options that help against divergence."""


@dataclass
class Event:
    """Something that happens every so many steps, and after the last step."""

    every: int | None
    """Steps between two times; None is never."""
    action: Callable[[], None]
    everyone: bool = False
    """True if all ranks take the action together; otherwise the first one takes it."""


@dataclass
class Loop:
    """A run in progress.

    Args:
        config: The configuration.
        trainer: Networks and optimizers, new or restored.
        folder: The run folder, locked.
        batches: Returns the batches of each step from one step to another.
        command: The command, for messages.
        checkpoints_kept: Number of checkpoints kept beside the best one.
        extra_state: Entries of a checkpoint beside configuration and state of the trainer.
        measured: Returns further numbers of the last step, for its line of metrics.
        summarize: Reduces losses and further numbers to those that the progress bar shows.
        on_line: Called with each line of losses and further numbers.
        events: Events beside lines of metrics and checkpoints.
        team: The ranks that train together. The first one logs, saves and draws.
    """

    config: RunConfig
    trainer: Steps
    folder: RunFolder
    batches: Callable[[int, int], Iterable[Sequence[Batch]]]
    command: Command
    checkpoints_kept: int
    extra_state: dict[str, Any] = field(default_factory=dict)
    measured: Callable[[], dict[str, float]] = dict
    summarize: Callable[[dict[str, float]], dict[str, float]] = dict
    on_line: Callable[[dict[str, float]], None] | None = None
    events: list[Event] = field(default_factory=list)
    team: Team = field(default_factory=Team)

    @property
    def step(self) -> int:
        """Steps taken so far."""
        return self.trainer.step_count

    def run(self) -> None:
        """Take the remaining steps.

        Raises:
            InputError: The losses or weights are no longer finite, an image cannot be read, a process that loads data
                was killed, memory does not suffice, or another rank ended or stalled.
            OSError: A file cannot be written.
            KeyboardInterrupt: A signal ended the run; the message says how to resume.
        """
        if self.team.leads:
            for note in self.folder.begin(self.config, self.step):
                print(f"note         {note}", flush=True)
            self.loggers = Loggers(self.folder, self.config.loggers, run_folder.plain(self.config), self.step)
        # The first rank may not have dropped a line that was cut off yet when another one would read it.
        self.stopwatch = Stopwatch(self.folder.metrics_path if self.team.leads else None)
        try:
            self._run()
        except (RuntimeError, ConnectionError) as error:
            # PyTorch reports a killed process wherever the main thread is at that time, even while a log is closed.
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            message = f"a process that loads data ended ({' '.join(str(error).split())})"
            raise InputError(f"{message}; lower workers if memory is short: {self.last_good()}") from error

    def _run(self) -> None:
        """Take the remaining steps, and close the logs whatever happens."""
        try:
            with self._progress() as self.progress, finishing_steps() as interruption:
                self._take_steps_together(interruption)
        except ConnectionError:
            raise
        except OSError as error:
            space = "; free some space" if error.errno in _FULL else ""
            raise OSError(f"{_described(error)}{space}: {self.last_good()}") from error
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise InputError(f"memory does not suffice for a step ({error}): lower batch_size") from error
        finally:
            if self.team.leads:
                self.loggers.close()

    def log(self, values: dict[str, float]) -> None:
        """Add numbers by name to the metrics of this step."""
        if self.team.leads:
            self.loggers.scalars(self.step, values)

    def save(self, path: Any, **extra: float) -> None:
        """Save a checkpoint, unless the weights are not finite.

        Args:
            path: File to write or replace.
            **extra: Further entries.
        """
        self._check_finite({})
        if not self.team.leads:
            return
        state = {"config": run_folder.plain(self.config), **self.extra_state, **extra, **self.trainer.state_dict()}
        checkpoint.save(path, state)

    def last_good(self, *options: str) -> str:
        """Return how to go on from the newest checkpoint.

        Args:
            *options: Options that the command should have.
        """
        try:
            good = checkpoint.latest(self.folder.path)
        except InputError:
            return f"there is no checkpoint yet; start again with\n  {self.resume_command(*options)}"
        return f"{good} is still good; continue from it with\n  {self.resume_command(*options)}"

    def resume_command(self, *options: str) -> str:
        """Return the command line that resumes the run."""
        return " ".join(["icsd", self.command.name, "--resume", shlex.quote(str(self.folder.path)), *options])

    def write(self, line: str) -> None:
        """Print a line above the progress bar."""
        self.progress.write(line)

    def _take_steps_together(self, interruption: Any) -> None:
        """Take the steps, and find out which rank is missing if contact was lost.

        This happens while signals are caught: torchrun ends the other ranks after the first one that failed.
        """
        try:
            self._take_steps(interruption)
        except (RuntimeError, ConnectionError) as error:
            if not self.team.lost_contact(error):
                raise
            raise InputError(
                f"rank {self.team.rank} of {self.team.size} lost contact with {self.team.missing()}, after step "
                f"{self.step} ({' '.join(str(error).split())}): {self.last_good()}"
            ) from error

    def _take_steps(self, interruption: Any) -> None:
        """Take the steps until the last one or a signal."""
        stop, recent, since = self.config.steps, [], self.stopwatch.seconds
        newest = checkpoint.step_path(self.folder.path, self.step)
        if self.team.first(lambda: bool(self.step) and checkpoint.events_are_due(newest)):
            self._act_on_events()
            self._save_step()
        for batches in self._loaded(self.step, stop):
            recent.append(self.trainer.step(batches))
            self.progress.set_description(f"step {self.step}", refresh=False)
            images = sum(len(batch.captions) for batch in batches)
            self.progress.update(images)
            if self._is_due(self.config.log_every):
                times = self.stopwatch.read()
                rate = images * len(recent) / (self.stopwatch.seconds - since)
                self._log_losses(recent, {f"{self.command.unit}s_per_second": round(rate, 2), **times})
                recent, since = [], self.stopwatch.seconds
            self._act_on_events()
            interrupted = self.team.any(bool(interruption.signal))
            if self._is_due(self.config.checkpoint_every) or interrupted:
                self._save_step()
            if interrupted and self.step < stop:
                message = f"stopped at step {self.step} of {stop}; continue with\n  {self.resume_command()}"
                raise KeyboardInterrupt(message)

    def _loaded(self, start: int, stop: int) -> Iterator[Sequence[Batch]]:
        """Yield the batches of each step from one step to another.

        Raises:
            InputError: An image cannot be read; the message says how to go on.
        """
        batches = iter(self.batches(start, stop))
        loaded = self._next(batches)  # starts the processes that load data
        with ends_of_children_unnoticed():
            while loaded is not None:
                yield loaded
                loaded = self._next(batches)

    def _next(self, batches: Iterator[Sequence[Batch]]) -> Sequence[Batch] | None:
        """Return the batches of the next step, None after the last one."""
        try:
            with self._keeping_steps():
                return next(batches, None)
        except InputError as error:
            raise InputError(f"{error}: {self.last_good()}") from error

    def _act_on_events(self) -> None:
        """Take the actions of the events that are due."""
        for event in self.events:
            if self._is_due(event.every) and (event.everyone or self.team.leads):
                with self._keeping_steps(**{checkpoint.EVENTS_DUE: True}), self.stopwatch.paused():
                    event.action()

    @contextlib.contextmanager
    def _keeping_steps(self, **extra: bool) -> Iterator[None]:
        """Save a checkpoint with further entries if something between two steps fails, so that no step is lost."""
        try:
            yield
        except Exception:
            if self.step:
                self._save_step(**extra)
            raise

    def _save_step(self, **extra: bool) -> None:
        """Save a checkpoint of this step with further entries, and remove those that are no longer kept."""
        with self.stopwatch.paused():
            self.save(checkpoint.step_path(self.folder.path, self.step), **extra)
            if self.team.leads:
                checkpoint.prune(self.folder.path, self.checkpoints_kept)

    def _is_due(self, every: int | None) -> bool:
        """Return whether something that happens every so many steps happens after this one."""
        return bool(every) and (self.step % every == 0 or self.step == self.config.steps)

    def _log_losses(self, recent: Sequence[dict[str, Tensor]], speed: dict[str, float]) -> None:
        """Log the mean losses of the last steps beside numbers on their speed."""
        means = torch.stack([torch.stack([each[name] for each in recent]).mean() for name in recent[0]])
        self.team.average([means])
        losses = dict(zip(recent[0], means.tolist(), strict=True))
        self._check_finite(losses)
        line = {**losses, **self.measured()}
        self.log({**speed, **line})
        if self.on_line and self.team.leads:
            self.on_line(line)
        shown = {name: f"{value:.3f}" for name, value in self.summarize(line).items()}
        self.progress.set_postfix(shown, refresh=False)

    def _check_finite(self, losses: dict[str, float]) -> None:
        """Raise when training has diverged, before a checkpoint of it replaces a good one."""
        values = [*((name, torch.tensor(value)) for name, value in losses.items()), *self.trainer.named_parameters()]
        bad = next((name for name, value in values if not value.isfinite().all()), None)
        if bad is not None:
            advice = self.last_good(*self.command.remedies)
            raise InputError(f"training diverged by step {self.step}, {bad} is not finite: {advice}")

    def _progress(self) -> tqdm:
        """Return the progress bar, which counts images."""
        per_step = self.config.batch_size * getattr(self.config, "accumulate", 1)
        return tqdm(
            desc=f"step {self.step}",
            total=self.config.steps * per_step,
            initial=self.step * per_step,
            unit=self.command.unit,
            mininterval=0.5 if sys.stderr.isatty() else 30,
            disable=not self.team.leads,
        )


def _described(error: OSError) -> str:
    """Return an operating system's error as one line with its file."""
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
