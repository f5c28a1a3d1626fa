"""What a training shows and writes down while it runs: a progress bar or log lines, and metrics.csv."""

import csv
import io
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from equimd.errors import InputError
from equimd.results import DISK_FULL, write_text_atomically
from equimd.training.distributed import World
from equimd.training.dynamics import SymmetryRecord
from equimd.training.ledger import Ledger
from equimd.training.recipe import Recipe
from equimd.training.setup import Setup, device_name
from equimd.training.state import Progress
from equimd.training.validation import Errors

METRICS_FILE = "metrics.csv"
FIRST_QUIET, MOST_QUIET = 30.0, 600.0
"""Seconds without a line, in a log."""
COLUMNS = (
    "step",
    "epoch",
    "lr",
    "train_loss",
    "train_energy_rmse_meV_per_atom",
    "train_force_rmse_meV_per_A",
    "train_stress_rmse_meV_per_A3",
    "train_noise_rmse",
    "valid_energy_mae_meV_per_atom",
    "valid_energy_rmse_meV_per_atom",
    "valid_force_mae_meV_per_A",
    "valid_force_rmse_meV_per_A",
    "valid_stress_mae_meV_per_A3",
    "valid_stress_rmse_meV_per_A3",
    "l_mean",
    "l_equiv",
    "percent_of_loss",
    "device_hours",
    "frames_per_s",
)


class MetricsFile:
    """``metrics.csv``: one row per validation; truncated to ``rows`` when a training is resumed, its columns kept."""

    def __init__(self, folder: Path, rows: int) -> None:
        self.path, self.columns = folder / METRICS_FILE, list(COLUMNS)
        kept = _line(COLUMNS)
        if rows:
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
            if len(lines) < rows + 1:
                raise InputError(f"cannot resume: {self.path} has fewer than the {rows} rows that were written")
            kept, self.columns = "".join(lines[: rows + 1]), lines[0].strip().split(",")
        with writing(self.path):
            write_text_atomically(self.path, kept)

    def append(self, row: dict[str, Any]) -> None:
        """Add a row; numbers with seven significant digits, empty where there is none."""
        with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(_line([_text(row.get(column)) for column in self.columns]))
            file.flush()
            os.fsync(file.fileno())


def _line(cells: Any) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value) if isinstance(value, int | str) else f"{value:.7g}"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A full disk stays an OSError, which names the file; everything else is bad input."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def metrics_row(
    progress: Progress, epochs: int, errors: Errors, symmetry: SymmetryRecord | None, ledger: Ledger
) -> dict[str, Any]:
    """A row of metrics.csv, in the units that its columns name; None where there is no number."""
    p = progress
    loss, *squares = (total / n if n else None for total, n in zip(p.sums, p.n_sums, strict=True))
    energy, forces, stress, noise = (None if mean is None else math.sqrt(mean) for mean in squares)
    return {
        "step": p.step,
        "epoch": epochs,
        "lr": p.lr,
        "train_loss": loss,
        "train_energy_rmse_meV_per_atom": _milli(energy),
        "train_force_rmse_meV_per_A": _milli(forces),
        "train_stress_rmse_meV_per_A3": _milli(stress),
        "train_noise_rmse": noise,
        "valid_energy_mae_meV_per_atom": _milli(errors.energy_per_atom_mae),
        "valid_energy_rmse_meV_per_atom": _milli(errors.energy_per_atom_rmse),
        "valid_force_mae_meV_per_A": _milli(errors.force_mae),
        "valid_force_rmse_meV_per_A": _milli(errors.force_rmse),
        "valid_stress_mae_meV_per_A3": _milli(errors.stress_mae),
        "valid_stress_rmse_meV_per_A3": _milli(errors.stress_rmse),
        "device_hours": ledger.device_hours,
        "frames_per_s": ledger.recent_frames_per_s(),
        **({} if symmetry is None else symmetry._asdict()),
    }


def _milli(value: float | None) -> float | None:
    return None if value is None else 1000.0 * value


def describe(recipe: Recipe, setup: Setup, world: World, step: int) -> str:
    """What is about to be trained, on what, in one line."""
    batch, muon_lr = recipe.batch, recipe.optimizer.muon_lr
    sizes = [f"{batch.n_frames:,} frames"] if batch.n_frames else []
    sizes += [f"at most {batch.max_edges:,} edges"] if batch.max_edges else []
    parts = [
        f"{recipe.model.family}, {sum(p.numel() for p in setup.potential.parameters()):,} parameters",
        f"{len(setup.train):,} training and {len(setup.valid):,} validation frames",
        f"global batch of {' and '.join(sizes)}",
        f"lr {recipe.optimizer.lr:g}" + (f", {muon_lr:g} for hidden matrices" if muon_lr is not None else ""),
        f"{world.size} {'process' if world.size == 1 else 'processes'} on {device_name(setup.device)}",
        f"{recipe.dtype}" + (f" with {recipe.precision} products" if recipe.precision != "float32" else ""),
    ]
    return "; ".join(parts) + (f"; continues after step {step:,}" if step else "")


class Reporter:
    """A progress bar with the time left on a terminal, lines elsewhere; silent when not wanted.

    Lines are those of validations and, where these are far apart, one between them: half a minute after the first step,
    then after twice as long each time, up to ten minutes.
    """

    def __init__(self, name: str, wanted: bool) -> None:
        self.name, self.wanted = name, wanted
        self.bar: Any = None
        self._next = 0.0
        self._quiet, self._spoke = FIRST_QUIET, 0.0
        self._first: tuple[float, float] | None = None

    def __enter__(self) -> "Reporter":
        if self.wanted and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(elapsed_when_finished=True),
                TextColumn("{task.fields[status]}"),
                console=Console(stderr=True),
            )
            self.bar.add_task(self.name, total=1.0, status="")
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, fraction: float, status: Callable[[], str]) -> None:
        """Move the bar, at most five times a second; without one, say the ``status`` after a long silence."""
        if not self.wanted:
            return
        now = time.monotonic()
        if self.bar is not None:
            if now >= self._next:
                self._next = now + 0.2
                self.bar.update(self.bar.task_ids[0], completed=fraction)
            return
        if self._first is None:
            self._first, self._spoke = (fraction, now), now
        if now - self._spoke >= self._quiet:
            self._quiet = min(2.0 * self._quiet, MOST_QUIET)
            self.say(f"{100 * fraction:.3g} % {status()} {self._time_left(fraction)}".rstrip())

    def say(self, text: str) -> None:
        """A line of its own."""
        self._spoke = time.monotonic()
        if self.bar is not None:
            self.bar.console.print(f"{self.name}: {text}", highlight=False, markup=False)
        elif self.wanted:
            print(f"{self.name}: {text}", file=sys.stderr, flush=True)

    def validated(self, fraction: float, row: dict[str, Any]) -> None:
        """Show the numbers of a validation."""
        if not self.wanted:
            return
        parts = [
            f"{label} {row[column]:.4g}{unit}"
            for label, column, unit in (
                ("F MAE", "valid_force_mae_meV_per_A", " meV/Å"),
                ("E MAE", "valid_energy_mae_meV_per_atom", " meV/atom"),
                ("stress MAE", "valid_stress_mae_meV_per_A3", " meV/Å³"),
                ("symmetry", "percent_of_loss", " % of loss"),
                ("speed", "frames_per_s", " frames/s"),
            )
            if row.get(column) is not None and not math.isnan(row[column])
        ]
        status = ", ".join(parts)
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=fraction, status=status)
            return
        line = f"{100 * fraction:.0f} % step {row['step']} epoch {row['epoch']}: {status} {self._time_left(fraction)}"
        self.say(line.rstrip())

    def _time_left(self, fraction: float) -> str:
        """By the pace since the first call."""
        now = time.monotonic()
        if self._first is None:
            self._first = fraction, now
        done = fraction - self._first[0]
        return f"{(now - self._first[1]) / 60.0 * (1.0 - fraction) / done:.1f} min left" if done > 0 else ""
