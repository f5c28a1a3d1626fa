"""The folder of a training: process 0 alone writes there, and a file is replaced whole or not at all."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from equimd.errors import FailedError, InputError
from equimd.frames import write_frames
from equimd.models.checkpoint import ENSEMBLE_FILE, MODEL_FILE, load_checkpoint, save_checkpoint
from equimd.models.potential import Potential
from equimd.results import DISK_FULL
from equimd.training.distributed import World
from equimd.training.ledger import Ledger
from equimd.training.loggers import Loggers
from equimd.training.reporting import MetricsFile, writing
from equimd.training.result import RESULT_FILE, TrainingResult
from equimd.training.sections import LoggingSection
from equimd.training.setup import Setup
from equimd.training.state import STATE_FILE, Progress, read_state, write_state

LAST_FILE = "last.safetensors"
START_FILE = "start.xyz"
MEMBER = "member-{}"


def check_folder(folder: Path, resume: bool, ensemble: bool = False) -> None:
    """Refuse a folder that holds something else than a training of this kind, one or an ``ensemble``.

    Raises:
        InputError: for a file; for a folder that is not empty without ``resume``; with it, for one that holds results
            without a state, or one training where an ensemble is wanted, or the reverse.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; accepted is a folder that does not exist yet")
    if not resume and folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} exists already; give another folder, or resume to continue what is in it")
    found = [name for name in (STATE_FILE, MODEL_FILE, RESULT_FILE) if (folder / name).exists()]
    members = (folder / ENSEMBLE_FILE).exists() or (folder / MEMBER.format(1)).exists()
    if ensemble and found:
        raise InputError(f"cannot resume {folder}: {found[0]} there is of one training; leave --members out")
    if not ensemble and members:
        raise InputError(f"cannot resume {folder}: it holds an ensemble; give --members")
    if found and STATE_FILE not in found:
        raise InputError(
            f"cannot resume {folder}: it holds {found[0]} but no {STATE_FILE} to continue from; give another folder"
        )


class RunFolder:
    """What a training writes. Every process calls the same methods; where process 0 cannot write, all end."""

    metrics: MetricsFile  # these two on process 0, once open
    loggers: Loggers

    def __init__(
        self, folder: Path, setup: Setup, world: World, modules: dict[str, nn.Module], optimizers: list[Optimizer]
    ) -> None:
        self.folder, self.setup, self.world, self.optimizers = folder, setup, world, optimizers
        self.modules: dict[str, nn.Module] = {"weights": setup.potential, "average": setup.average, **modules}
        with world.together():
            self.progress = read_state(folder, setup.identity, self.modules, optimizers) or Progress()
        self.progress.sessions += 1
        self.ledger = Ledger(self.progress, world)
        self.saved_at = self.ledger.hours

    def open(self, section: LoggingSection) -> None:
        """Make the folder and what is written row by row."""

        def make() -> None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"cannot make {self.folder}: {error.strerror}") from error
            if not (self.folder / START_FILE).exists():
                with writing(self.folder / START_FILE):
                    write_frames(self.folder / START_FILE, [self.setup.start])
            header, p = self.setup.header, self.progress
            self.metrics = MetricsFile(self.folder, p.rows)
            self.loggers = Loggers(section, self.folder, header["name"], header["recipe"], p.step)

        self._by_first(make)

    def close(self) -> None:
        """No more rows will come."""
        if self.world.is_first:
            self.loggers.close()

    def write_row(self, row: dict[str, Any], improved: bool) -> None:
        """The numbers of a validation, and the average of the weights where it is the best."""

        def write() -> None:
            if improved:
                save_checkpoint(self.folder / MODEL_FILE, self.setup.average, self.header())
            self.metrics.append(row)
            self.loggers.write(self.progress.step, row)

        self._by_first(write)
        self.progress.rows += 1

    def save(self) -> None:
        """Write last.safetensors and the state."""
        self.saved_at = self.ledger.hours
        self._by_first(self._write_state)

    def save_alone(self) -> None:
        """The same where other processes may be gone."""
        if self.world.is_first:
            with explaining_a_full_disk():
                self._write_state()

    def load_best(self, potential: Potential) -> None:
        """Fill a potential with the best average of the weights."""

        def load() -> None:
            best, _ = load_checkpoint(self.folder / MODEL_FILE, potential.device, str(potential.dtype)[6:])
            potential.load_state_dict(best.state_dict())

        self._by_first(load)
        self.world.broadcast(potential)

    def write_result(self, best: Potential, result: TrainingResult) -> None:
        """result.json, and the errors in the header of the best weights."""
        errors = {"valid": result.valid.model_dump(), "test": result.test and result.test.model_dump()}

        def write() -> None:
            save_checkpoint(self.folder / MODEL_FILE, best, {**self.header(), "errors": errors})
            result.write(self.folder / RESULT_FILE)

        self._by_first(write)

    def header(self) -> dict[str, Any]:
        """The checkpoints' header, with the ledger as it stands."""
        return {**self.setup.header, "ledger": self.ledger.entry()}

    def _write_state(self) -> None:
        self.ledger.note()
        save_checkpoint(self.folder / LAST_FILE, self.setup.average, self.header())
        write_state(self.folder, self.progress, self.setup.identity, self.modules, self.optimizers)

    def _by_first(self, action: Callable[[], None]) -> None:
        with self.world.together(), explaining_a_full_disk():
            if self.world.is_first:
                action()


@contextmanager
def explaining_a_full_disk() -> Iterator[None]:
    """Say how to go on where a write inside finds no room."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise FailedError(
            f"no space left on the disk while writing {error.filename}; what was there before is whole: make room and"
            " continue with --resume"
        ) from error
