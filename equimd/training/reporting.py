"""What a training shows and writes down while it runs: a progress bar or log lines, and metrics.csv."""

import csv
import io
import math
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from equimd.errors import InputError
from equimd.results import write_text_atomically

METRICS_FILE = "metrics.csv"
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
    "l_mean",
    "l_equiv",
    "percent_of_loss",
    "device_hours",
    "frames_per_s",
)


class MetricsFile:
    """``metrics.csv``: one row per validation; truncated to ``rows`` when a training is resumed."""

    def __init__(self, folder: Path, rows: int) -> None:
        self.path = folder / METRICS_FILE
        kept = _line(COLUMNS)
        if rows:
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
            if len(lines) < rows + 1:
                raise InputError(f"cannot resume: {self.path} has fewer than the {rows} rows that were written")
            kept = "".join(lines[: rows + 1])
        try:
            write_text_atomically(self.path, kept)
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror or error}") from error

    def append(self, row: dict[str, Any]) -> None:
        """Add a row; numbers with seven significant digits, empty where there is none."""
        _write(self.path, "a", _line([_text(row.get(column)) for column in COLUMNS]))


def _line(cells: Any) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value) if isinstance(value, int | str) else f"{value:.7g}"


def _write(path: Path, mode: str, text: str) -> None:
    try:
        with open(path, mode, encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


class Reporter:
    """A progress bar with the time left on a terminal, a line per validation elsewhere; silent when not wanted."""

    def __init__(self, name: str, wanted: bool) -> None:
        self.name, self.wanted = name, wanted
        self.bar: Any = None
        self._next = 0.0

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

    def advance(self, fraction: float) -> None:
        """Move the bar, at most five times a second."""
        if self.bar is not None and time.monotonic() >= self._next:
            self._next = time.monotonic() + 0.2
            self.bar.update(self.bar.task_ids[0], completed=fraction)

    def validated(self, fraction: float, row: dict[str, Any]) -> None:
        """Show the numbers of a validation."""
        if not self.wanted:
            return
        parts = [
            f"{label} {row[column]:.4g}{unit}"
            for label, column, unit in (
                ("F MAE", "valid_force_mae_meV_per_A", " meV/Å"),
                ("E MAE", "valid_energy_mae_meV_per_atom", " meV/atom"),
                ("symmetry", "percent_of_loss", " % of loss"),
            )
            if row.get(column) is not None and not math.isnan(row[column])
        ]
        status = ", ".join(parts)
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=fraction, status=status)
            return
        left = f"{row['minutes_left']:.1f} min left" if row.get("minutes_left") is not None else ""
        line = f"{self.name}: {100 * fraction:.0f} % step {row['step']} epoch {row['epoch']}: {status} {left}"
        print(line.rstrip(), file=sys.stderr, flush=True)
