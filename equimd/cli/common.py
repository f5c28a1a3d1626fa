"""What commands share: options, JSON output, a progress bar, reading structures."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from equimd.errors import InputError

if TYPE_CHECKING:
    from ase import Atoms

    from equimd.results import Result

JsonOption = Annotated[str | None, typer.Option("--json", help="write the result as JSON; - is standard output")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
DtypeOption = Annotated[str, typer.Option(help="float32 or float64")]
SymmetrizeOption = Annotated[str | None, typer.Option(help="average, random or canonical")]
TopologyOption = Annotated[Path | None, typer.Option(help="structure that names the atoms of a DCD, XTC or TRR file")]

Say = Callable[[str], None]


def deliver(result: "Result", json: str | None, text: str) -> None:
    """Print ``text``, or the JSON alone where it goes to standard output; write the JSON to a file where asked."""
    if json == "-":
        print(result.to_json())
        return
    if json is not None:
        result.write(json)
    print(text)


def check_output(path: Path | None, flag: str) -> None:
    """Refuse an output file whose folder does not exist, before any work is done."""
    if path is not None and not path.parent.exists():
        raise InputError(f"{flag} is {path}, but the folder {path.parent} does not exist; make it first")


def check_json(json: str | None) -> None:
    """The same for --json."""
    check_output(None if json in (None, "-") else Path(json or ""), "--json")


def read_structure(path: str | Path) -> "Atoms":
    """The last frame of a file, or the ``start.xyz`` of a potential's folder or name."""
    from equimd.frames import read_list
    from equimd.models.checkpoint import list_potentials

    if str(path) in list_potentials():
        return start_of(str(path))
    return read_list(path)[-1]


def start_of(potential: str) -> "Atoms":
    """The structure that a potential ships with."""
    from equimd.frames import read_list
    from equimd.models.checkpoint import find_potential

    folder = find_potential(potential)
    start = folder / "start.xyz" if folder.is_dir() else folder.parent / "start.xyz"
    if not start.exists():
        raise InputError(f"{potential} ships no start.xyz; give a structure")
    return read_list(start)[-1]


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, silent where that is no terminal; called with (done, total)."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
