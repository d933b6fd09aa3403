"""The start of a run on several ranks, and its restart by torchrun."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import yaml

from icsd.errors import InputError
from icsd.team import Team, joined
from icsd.training import checkpoint, run_folder
from icsd.training.config import RunConfig


def folder_to_resume(config: RunConfig, resume: Path | None) -> Path | None:
    """Return the run folder to go on in: the given one, or that of a run that torchrun restarts; None starts a new run.

    Args:
        config: The configuration.
        resume: The run folder that is to be resumed or its ``checkpoints``, or None.

    Raises:
        InputError: torchrun may restart the run, which has no name.
    """
    if resume is not None:
        return checkpoint.run_folder_of(resume)
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) == 0:
        return None
    if config.name is None:
        raise InputError(
            "torchrun may restart this run, which has no name: give a name, by which a restart finds the run"
        )
    folder = config.output / config.name
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return folder if again and folder.is_dir() else None


@contextlib.contextmanager
def launched(config: RunConfig, resume: Path | None) -> Iterator[Team]:
    """Join the ranks of this launch for a `with` block.

    Args:
        config: The configuration.
        resume: The run folder that is to be resumed, or None.

    Raises:
        InputError: The ranks have different configurations.
    """
    with joined() as team:
        team.check_equal("the configuration", yaml.safe_dump({"resume": str(resume), **run_folder.plain(config)}))
        yield team


def check_share(config: RunConfig, team: Team) -> None:
    """Raise an InputError unless the ranks can share a batch evenly."""
    if config.batch_size % team.size:
        raise InputError(
            f"batch_size is {config.batch_size}, which {team.size} ranks cannot share evenly: give a multiple of "
            f"{team.size}"
        )
    if config.batch_size < 2 * team.size and not config.sync_batch_norm:
        raise InputError(
            f"batch_size is {config.batch_size}, one image for each of {team.size} ranks: give at least 2 for each, or "
            "set sync_batch_norm"
        )
