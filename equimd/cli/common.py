"""What several commands share: options, progress bars, and where results go."""

import dataclasses
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from equimd.cli import output
from equimd.errors import InputError

if TYPE_CHECKING:
    from equimd.frames import Frames
    from equimd.results import Result

# Below so many atoms one thread is the fastest, or nearly so.
SMALL = 64

PotentialName = Annotated[
    str,
    typer.Argument(
        metavar="POTENTIAL",
        help="The name of a shipped potential (see equimd info), a path, or package.module:factory.",
    ),
]
StructureName = Annotated[
    str,
    typer.Argument(
        metavar="STRUCTURE", help="A file, whose first structure is used, or the name of a shipped potential."
    ),
]
Json = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write the result as JSON to this file; - is standard output."),
]
Device = Annotated[str, typer.Option(help="The device: auto, cpu, cuda or cuda:<index>.")]
Dtype = Annotated[str, typer.Option(help="The precision: float32 or float64.")]
Symmetrize = Annotated[str | None, typer.Option(help="Restore symmetry at inference: average, random or canonical.")]
Threads = Annotated[
    int | None,
    typer.Option(help="Number of CPU threads. The default is OMP_NUM_THREADS, or one thread for fewer than 64 atoms."),
]
Seed = Annotated[int, typer.Option(help="The seed of everything that is random.")]
Stride = Annotated[int, typer.Option(help="Use every n-th frame only.")]
Topology = Annotated[
    Path | None,
    typer.Option(
        help="A file with the elements and names of the atoms, for formats that have none (DCD, XTC, TRR, Amber's)."
    ),
]
Select = Annotated[
    str | None,
    typer.Option(
        metavar="ATOMS", help="Keep these atoms only, in mdtraj's selection language: 'not water', 'resname LIG'."
    ),
]
NoPbc = Annotated[
    bool, typer.Option("--no-pbc", help="Drop the box, if the file names one but the simulation had none.")
]
AcceptPredictions = Annotated[
    bool,
    typer.Option("--accept-predictions", help="Use results that a potential stored in the frames as labels."),
]
OtherLevel = Annotated[
    bool,
    typer.Option("--other-level", help="Allow a reference whose level of theory is not that of the training."),
]
Units = Annotated[
    list[str] | None,
    typer.Option(
        "--unit",
        metavar="WHAT=UNIT",
        help="Unit of the file: energy=kcal/mol, length=nm, stress=GPa, force_energy=Hartree, force_length=Bohr.",
    ),
]
Keys = Annotated[
    list[str] | None,
    typer.Option(
        "--key",
        metavar="LABEL=NAME",
        help="Name of a label in the file, such as forces=F. For VASP's stress: voigt=vasp and stress_sign=-1.",
    ),
]


def make_calculator(potential: str, device: str = "auto", dtype: str = "float32", symmetrize: str | None = None) -> Any:
    """A potential as a calculator, checked as it is loaded; or what ``module:factory`` makes."""
    from equimd.calculators.named import is_factory, make_foreign

    if is_factory(potential):
        if symmetrize is not None:
            raise InputError(f"--symmetrize is {symmetrize}, but {potential} is no potential of equimd's")
        return make_foreign(potential)
    from equimd.calculators.ase import EquimdCalculator

    return EquimdCalculator(potential, device=device, dtype=dtype, symmetrize=symmetrize)


def open_frames(
    path: Path,
    topology: Path | None,
    units: list[str] | None,
    keys: list[str] | None,
    stride: int = 1,
    finite: bool = True,
    select: str | None = None,
    no_pbc: bool = False,
) -> "Frames":
    """Frames of a file with what the command line says of its units, keys, atoms and box."""
    from equimd.frames import LabelKeys, UnitSpec, read_frames

    spec = UnitSpec(**_pairs("--unit", units, UnitSpec)) if units else None
    named = _pairs("--key", keys, LabelKeys)
    if "stress_sign" in named:
        named["stress_sign"] = {"1": 1, "-1": -1}.get(named["stress_sign"], named["stress_sign"])
    names = LabelKeys(**named) if keys else None
    given: dict[str, Any] = {"topology": topology, "units": spec, "keys": names, "select": select}
    return read_frames(path, **given, stride=stride, finite=finite, pbc=False if no_pbc else None)


def _pairs(option: str, texts: list[str] | None, target: type) -> dict[str, Any]:
    """KEY=VALUE by key, of the fields of a dataclass; ``finite`` is not the user's."""
    accepted = [field.name for field in dataclasses.fields(target) if field.name != "finite"]
    pairs = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not equals or key not in accepted:
            raise InputError(f"{option} is {text!r}; accepted are {', '.join(f'{key}=...' for key in accepted)}")
        pairs[key] = value
    return pairs


def read_structure(name: str, select: str | None = None, no_pbc: bool = False) -> Any:
    """The first structure of a file, or the ``start.xyz`` of the shipped potential that has this name."""
    return next(iter(open_structures(name, select, no_pbc)))


def open_structures(name: str, select: str | None = None, no_pbc: bool = False) -> "Frames":
    """All structures of a file, or the one of the shipped potential that has this name."""
    from equimd.models.checkpoint import shipped_folder

    shipped = shipped_folder(name)
    path = Path(name) if shipped is None else shipped / "start.xyz"
    return open_frames(path, None, None, None, select=select, no_pbc=no_pbc)


def check_json(target: str | None) -> None:
    """Refuse, before the work starts, a place where the result could not be written after it; keep stdout for ``-``."""
    if target is None:
        return
    if target == "-":
        output.keep_for_json()
        return
    path = Path(target)
    if path.is_dir():
        raise InputError(f"--json is {target}, a folder; accepted is a file or - for standard output")
    if not path.parent.is_dir():
        raise InputError(f"--json is {target}, but there is no folder {path.parent}; accepted is an existing one")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"--json is {target}, which may not be written; accepted is a writable file")


def emit(result: "Result", target: str | None, show: Callable[[], Any]) -> None:
    """Write JSON where asked; show the result for humans unless standard output is taken."""
    if target == "-":
        output.write_json(result.to_json())
        return
    if target is not None:
        path = Path(target)
        if path.exists() and not path.is_file():  # a device or a pipe, which must not be replaced
            path.write_text(result.to_json() + "\n", encoding="utf-8")
        else:
            result.write(path)
    output.show(show())


@contextmanager
def cpu_threads(count: int | None, n_atoms: int) -> Iterator[None]:
    """Compute with ``count`` threads inside the block; by default OMP_NUM_THREADS, else one for a small structure.

    Operations on a molecule are too small to share, and threads that wait for each other spin: on a machine that does
    something else as well they made MD thirty times slower.
    """
    if count is not None and count < 1:
        raise InputError(f"--threads is {count}; accepted is 1 or more")
    before = os.environ.get("OMP_NUM_THREADS")
    import torch

    n_before = torch.get_num_threads()
    n_wanted = count or (1 if before is None and n_atoms < SMALL else n_before)
    torch.set_num_threads(n_wanted)
    os.environ["OMP_NUM_THREADS"] = str(n_wanted)  # what results record, and libraries read that are loaded later
    try:
        yield
    finally:
        torch.set_num_threads(n_before)
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


@contextmanager
def ended_by_a_signal() -> Iterator[None]:
    """Inside the block SIGTERM, which queues send before they kill, ends work as Ctrl-C does: what is there is kept."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def grid(title: str, rows: list[tuple[str, str, str]]) -> Any:
    """A small table of label, value and unit."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    heading = Text(title, style="bold", no_wrap=True, overflow="ignore")  # paths are longer than tables are wide
    table = Table(box=box.SIMPLE_HEAD, show_header=False, title=heading, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    table.add_column(style="dim")
    for row in rows:
        table.add_row(*row)
    return table


def number(value: float | None, factor: float = 1.0) -> str:
    """A number with four significant digits; a dash for none."""
    return "–" if value is None or value != value else f"{factor * value:.4g}"


class Stages:
    """A progress bar on stderr, silent where that is no terminal."""

    def __init__(self, bar: Any) -> None:
        self._bar, self._task, self._name = bar, None, ""

    def __call__(self, name: str, done: int, total: int) -> None:
        """Say that ``done`` of ``total`` of the stage ``name`` is done."""
        if name != self._name:
            self._name, self._task = name, self._bar.add_task(name, total=total)
        self._bar.update(self._task, completed=done, total=total)
        if done >= total > 1:
            self._bar.stop_task(self._task)

    def named(self, name: str) -> Callable[[int, int], None]:
        """The callback of one stage."""
        return lambda done, total: self(name, done, total)


@contextmanager
def progress() -> Iterator[Stages]:
    """A bar for each stage of long work, with the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        yield Stages(bar)
