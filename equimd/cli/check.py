"""``equimd check``: a certificate for a calculator."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from equimd.cli.common import (
    Device,
    Dtype,
    Json,
    Seed,
    Symmetrize,
    check_json,
    emit,
    make_calculator,
    open_structures,
    progress,
)
from equimd.errors import InputError

if TYPE_CHECKING:
    from equimd.contract.certificate import Certificate


def check(
    calculator: Annotated[
        str,
        typer.Argument(
            metavar="CALCULATOR",
            help="A shipped potential, a path, or an ASE calculator: package.module:factory or script.py:factory.",
        ),
    ],
    structures: Annotated[
        list[str] | None,
        typer.Argument(metavar="STRUCTURE...", help="Up to three files, of which the first structures are used."),
    ] = None,
    tolerance: Annotated[
        list[str] | None, typer.Option("--tolerance", metavar="CHECK=VALUE", help="Another tolerance, in eV/Å.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    symmetrize: Symmetrize = None,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Check what every simulation relies on; exit code 1 if anything fails.

    Symmetries, derivatives, neighbours, distances and repetition are measured, each with its tolerance.
    """
    check_json(json)
    limits = _limits(tolerance)
    field = make_calculator(calculator, device, dtype, symmetrize)
    listed = [next(iter(open_structures(name))) for name in structures or _own_structure(calculator)]
    from equimd.analysis.check import check as certify

    with progress() as bar:
        result = certify(field, listed or None, tolerances=limits, seed=seed, progress=bar.named("checks"))
    emit(result, json, lambda: _table(result))
    if not result.ok:
        raise typer.Exit(1)


def _own_structure(name: str) -> list[str]:
    """The structure that lies beside a potential."""
    from equimd.models.checkpoint import shipped_folder

    if shipped_folder(name, quiet=True) is not None:
        return [name]
    folder = Path(name) if Path(name).is_dir() else Path(name).parent
    beside = folder / "start.xyz"
    return [str(beside)] if beside.is_file() and Path(name).exists() else []


def _limits(texts: list[str] | None) -> dict[str, float]:
    limits = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        try:
            limits[name] = float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise InputError(f"--tolerance is {text!r}; accepted is such as rotation=1e-3")
    return limits


def _table(result: "Certificate") -> Any:
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    title = Text(f"{result.calculator}, checked in {result.seconds:.0f} s", style="bold")
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("check", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("accepted", justify="right", no_wrap=True)
    table.add_column(), table.add_column()
    styles = {"pass": "green", "fail": "bold red", "not applicable": "dim"}
    for row in result.rows:
        value = "" if row.value is None else f"{row.value:.2g}"
        accepted = "" if row.tolerance is None else f"{row.tolerance:.2g} {row.unit}"
        what = f"{row.note or row.quantity}{f' of {row.structure}' if row.status == 'fail' else ''}"
        table.add_row(row.name, value, accepted, Text(row.status, style=styles[row.status]), what)
    lines = [Text(result.line, style="bold", overflow="fold")]
    if result.learned_symmetry:
        lines.append(Text("Rotations and inversion are learned, not built in; equimd equivariance measures them."))
    return Group(table, *lines)
