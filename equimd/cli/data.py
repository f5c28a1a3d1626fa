"""``equimd data``: look into files of frames."""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from equimd.cli.common import (
    Json,
    Keys,
    NoPbc,
    Select,
    Topology,
    Units,
    check_json,
    emit,
    grid,
    number,
    open_frames,
    progress,
)
from equimd.errors import FailedError

if TYPE_CHECKING:
    from equimd.report.inspection import Comparison, Inspection

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look into files of frames.")


@app.callback()
def _group() -> None:
    """Look into files of frames."""


@app.command()
def inspect(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Frames, in any format that equimd reads. Name the training set first."),
    ],
    topology: Topology = None,
    select: Select = None,
    no_pbc: NoPbc = False,
    unit: Units = None,
    key: Keys = None,
    cutoff: Annotated[float, typer.Option(help="The cutoff within which neighbours are counted, in Å.")] = 5.0,
    figure: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw a figure: .png, .svg or .pdf.")] = None,
    json: Json = None,
) -> None:
    """Count, check and draw what files hold. If there are several, find the frames that two of them share."""
    check_json(json)
    from equimd.report.data_figure import check_figure, write_figure
    from equimd.report.inspection import Comparison, inspect_files, suggest_recipe

    if figure is not None:
        check_figure(figure)
    opened = [open_frames(file, topology, unit, key, finite=False, select=select, no_pbc=no_pbc) for file in files]
    failure: FailedError | None = None

    def draw(names: Any, surveys: Any) -> None:
        nonlocal failure
        assert figure is not None
        try:
            write_figure(figure, names, surveys)
        except FailedError as error:  # after the numbers
            failure = error

    with progress() as stages:
        result = inspect_files(opened, cutoff, stages, None if figure is None else draw, _names(key))
    looked = result.files if isinstance(result, Comparison) else [result]
    shared = result.shared if isinstance(result, Comparison) else []
    suggested = suggest_recipe(looked, unit or [], key or [], shared)
    emit(result, json, lambda: _show(looked, result, suggested, None if failure else figure))
    if failure is not None:
        raise failure


def _names(pairs: list[str] | None) -> Any:
    """The names of labels among the options, which ``open_frames`` has checked."""
    from equimd.frames import LabelKeys

    given = dict(pair.split("=", 1) for pair in pairs or ())
    energy, forces, stress, virial = (given.get(label) for label in ("energy", "forces", "stress", "virial"))
    return LabelKeys(energy, forces, stress, virial)


def _show(looked: "list[Inspection]", result: "Inspection | Comparison", recipe: str, figure: Path | None) -> Any:
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = [grid(one.path, _rows(one)) for one in looked]
    if len(looked) > 1:
        parts.append(grid("Between the files", _shared_rows(result)))
    lines = textwrap.indent(f"\n{recipe}\n", "  ")
    parts += [Text("For a recipe", style="bold"), Text(lines, no_wrap=True, overflow="ignore")]
    if figure is not None:
        parts.append(Text(f"Drawn in {figure}"))
    return Group(*parts)


def _rows(one: "Inspection") -> list[tuple[str, str, str]]:
    sizes, quantiles = one.n_atoms, one.force_quantiles or {}
    rows = [
        ("Frames", f"{one.n_frames:,}", f"{one.periodic:,} periodic" if one.periodic else "none periodic"),
        ("Atoms", str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}", "in a frame"),
        ("Elements", " ".join(one.elements), ", ".join(f"{count:,}" for count in one.elements.values()) + " atoms"),
        *((f"Frames with {label}", f"{count:,}", "") for label, count in one.n_labelled.items()),
    ]
    rows += [
        (f"States {said.what}", f"{said.value:g}", f"{said.name} in {said.n_frames:,} frames, first {said.first_frame}")
        for said in one.electrons[:5]
    ]
    if one.isolated_atoms:
        values = ", ".join(f"{symbol} {energy:.4f}" for symbol, energy in one.isolated_atoms.items())
        rows.append(("Isolated atoms", values, "eV, set aside"))
    if one.energy_per_atom:
        low, mean, high = one.energy_per_atom
        rows.append(("Energy per atom", f"{mean:.4f}", f"eV, from {low:.4f} to {high:.4f}"))
        rows.append(
            ("Energy beyond the fit", number(one.energy_residual, 1e3), "meV/atom, RMS; fitted atomic energies")
        )
    if quantiles:
        by_element = ", ".join(f"{symbol} {number(value)}" for symbol, value in one.force_rms_by_element.items())
        rows.append(("RMS force", number(one.force_rms), f"eV/Å per component; {by_element}"))
        tail = f"eV/Å, median; 99 % below {number(quantiles['99'])}, all below {number(quantiles['100'])}"
        rows.append(("Force on an atom", number(quantiles["50"]), tail))
    if one.volume_per_atom:
        volume = one.volume_per_atom
        rows.append(("Volume per atom", number(volume.mean), f"Å³, from {number(volume.low)} to {number(volume.high)}"))
    spread = f"within {one.cutoff:g} Å; by frame {number(one.neighbors.low)} to {number(one.neighbors.high)}"
    rows.append(("Neighbours of an atom", number(one.neighbors.mean), spread))
    rows.append(("Closest atoms", number(one.shortest), "Å"))
    rows.append(("Duplicates inside", f"{one.n_duplicates:,}", _frames(f"{a} = {b}" for a, b in one.duplicates)))
    rows.append(("Outliers", f"{one.n_outliers:,}", ""))
    rows += [
        ("", f"frame {odd.frame}", f"{odd.what} {number(odd.value)} {odd.unit}".rstrip()) for odd in one.outliers[:5]
    ]
    if one.n_not_finite:
        rows.append(("Labels not finite", f"{one.n_not_finite:,}", "training refuses them"))
        rows += [("", f"frame {frame}", what) for frame, what in one.not_finite[:5]]
    if one.n_net_force:
        rows.append(("Net force", f"{one.n_net_force:,}", "molecules whose forces do not add up to zero"))
    rows += [("Lossy", one.lossy, "")] if one.lossy else []
    return rows + [("Warning", text, "") for text in one.warnings]


def _shared_rows(result: Any) -> list[tuple[str, str, str]]:
    rows = []
    for pair in result.shared:
        names = f"{Path(pair.file).name} in {Path(pair.other).name}"
        rows.append((names, f"{pair.n_frames:,} frames", _frames(f"{a} = {b}" for a, b in pair.frames)))
        if pair.new_elements:
            rows.append(("", " ".join(pair.new_elements), f"not in {Path(pair.other).name}"))
    return rows


def _frames(shown: Any) -> str:
    names = list(shown)
    return "frames " + ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else ""
