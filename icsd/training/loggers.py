"""Loggers of metrics: the metrics file of a run always, TensorBoard and Weights & Biases as configured."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from icsd.errors import InputError
from icsd.training.run_folder import RunFolder, write_text


class Logger(Protocol):
    """A place for metrics and images."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add numbers by name."""

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Add an image, uint8 `(H, W, 3)`."""

    def close(self) -> None:
        """Write what is not yet written."""


class MetricsFile:
    """The metrics file of a run folder; it holds no images, which are files of their own."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.folder.append_metrics({"step": step, **values})

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        pass

    def close(self) -> None:
        pass


class TensorBoard:
    """Event files for TensorBoard in the run folder.

    Args:
        folder: The run folder.
        config: Unused.
        step: Last step before this part of the run; what was written of later steps is hidden.
    """

    def __init__(self, folder: RunFolder, config: dict[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder.path / "tensorboard", purge_step=step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        self.writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, which a resumed run goes on with; WANDB_MODE=offline needs no account.

    Args:
        folder: The run folder; it gives the run its name and keeps its id.
        config: The configuration, shown beside the run.
        step: Unused: Weights & Biases ignores steps that it has.

    Raises:
        InputError: The package is not installed.
    """

    def __init__(self, folder: RunFolder, config: dict[str, Any], step: int) -> None:
        self.wandb = require_wandb()
        place = folder.path / "wandb-id"
        identifier = place.read_text().strip() if place.exists() else self.wandb.util.generate_id()
        write_text(place, f"{identifier}\n")
        self.run = self.wandb.init(
            project="icsd",
            name=folder.path.name,
            id=identifier,
            resume="allow",
            dir=str(folder.path),
            config=config,
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        self.run.log({name: self.wandb.Image(pixels)}, step=step)

    def close(self) -> None:
        self.run.finish()


LOGGERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def require_wandb() -> Any:
    """Return the package wandb.

    Raises:
        InputError: It is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise InputError(f"loggers holds wandb, which cannot be imported ({error}): pip install wandb") from error


class Loggers:
    """All loggers of a run together.

    Args:
        folder: The run folder.
        names: Keys of `LOGGERS`, beside the metrics file.
        config: The configuration as JSON values.
        step: Last step before this part of the run.
    """

    def __init__(self, folder: RunFolder, names: Sequence[str], config: dict[str, Any], step: int) -> None:
        self.loggers: list[Logger] = [MetricsFile(folder), *(LOGGERS[name](folder, config, step) for name in names)]

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add numbers by name to every logger."""
        for logger in self.loggers:
            logger.scalars(step, values)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Add an image, uint8 `(H, W, 3)`, to every logger."""
        for logger in self.loggers:
            logger.image(step, name, pixels)

    def close(self) -> None:
        """Close every logger."""
        for logger in self.loggers:
            logger.close()
