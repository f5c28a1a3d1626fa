"""Where metrics go besides metrics.csv: TensorBoard, Weights & Biases; each is imported where a recipe asks for it.

Both show the training; neither decides it: a service that fails, at its start or later, is left out with a warning.
"""

import secrets
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from equimd.errors import InputError
from equimd.results import write_text_atomically
from equimd.training.sections import LoggingSection, WandbSection

TENSORBOARD_FOLDER = "tensorboard"
WANDB_ID_FILE = "wandb-id.txt"


def check_packages(section: LoggingSection) -> None:
    """Import what a recipe asks for.

    Raises:
        InputError: where a package is missing.
    """
    wanted = (
        (section.tensorboard, "torch.utils.tensorboard", "tensorboard"),
        (section.wandb is not None, "wandb", "wandb"),
    )
    for is_wanted, module, package in wanted:
        if is_wanted:
            try:
                import_module(module)
            except ImportError as error:
                raise InputError(
                    f"logging.{package} needs the package {package}, which is not installed: pip install"
                    ' "equimd[logging]"'
                ) from error


class Logger(Protocol):
    """Something that takes the numbers of a validation."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log the values of a step."""

    def close(self) -> None:
        """No more will come."""


class TensorBoardLogger:
    """Event files in the run's folder; those of steps that a resume repeats are purged."""

    def __init__(self, folder: Path, step: int) -> None:
        self._writer = import_module("torch.utils.tensorboard").SummaryWriter(
            str(folder / TENSORBOARD_FOLDER), purge_step=step + 1
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log the values of a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """No more will come."""
        self._writer.close()


class WandbLogger:
    """A run of Weights & Biases that a resume continues: its id is kept in the run's folder."""

    def __init__(self, section: WandbSection, folder: Path, name: str, config: dict[str, Any]) -> None:
        wandb = import_module("wandb")
        known = folder / WANDB_ID_FILE
        if not known.exists():
            write_text_atomically(known, secrets.token_hex(4) + "\n")
        self._run = wandb.init(
            project=section.project,
            entity=section.entity,
            mode=section.mode,
            id=known.read_text(encoding="utf-8").strip(),
            resume="allow",
            name=name,
            dir=str(folder),
            config=config,
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log the values of a step."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """No more will come."""
        self._run.finish()


class Loggers:
    """Those that a recipe asks for; ``step`` is where the training begins."""

    def __init__(self, section: LoggingSection, folder: Path, name: str, config: dict[str, Any], step: int) -> None:
        self._open: list[Logger] = []
        if section.tensorboard:
            self._add(TensorBoardLogger, folder, step)
        if section.wandb is not None:
            self._add(WandbLogger, section.wandb, folder, name, config)

    def write(self, step: int, row: dict[str, Any]) -> None:
        """The numbers of a row of metrics.csv."""
        values = {name: float(value) for name, value in row.items() if name != "step" and value is not None}
        self._each(lambda logger: logger.write(step, values))

    def close(self) -> None:
        """No more will come."""
        self._each(lambda logger: logger.close())
        self._open = []

    def _add(self, kind: Callable[..., Logger], *arguments: Any) -> None:
        try:
            self._open.append(kind(*arguments))
        except Exception as error:  # a network, a disk, a server, no login
            warnings.warn(f"{kind.__name__} is left out: {error}", stacklevel=3)

    def _each(self, action: Callable[[Logger], None]) -> None:
        for logger in list(self._open):
            try:
                action(logger)
            except Exception as error:  # a network, a disk, a server
                self._open.remove(logger)
                warnings.warn(f"{type(logger).__name__} is left out from here on: {error}", stacklevel=3)
