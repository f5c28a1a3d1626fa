"""``equimd data``: look into files of frames."""

from pathlib import Path
from typing import Annotated

import typer

from equimd.cli.common import Json, Keys, Topology, Units, check_json, emit, grid, number, open_frames

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look into files of frames.")


@app.callback()
def _group() -> None:
    """Look into files of frames."""


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Frames in any format that is read.")],
    topology: Topology = None,
    unit: Units = None,
    key: Keys = None,
    json: Json = None,
) -> None:
    """Count frames, elements and labels, and check that the numbers are plausible."""
    check_json(json)
    import warnings

    from equimd.frames import PlausibilityWarning
    from equimd.report.inventory import summarise

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PlausibilityWarning)  # the summary says so itself
        result = summarise(file, open_frames(file, topology, unit, key))

    def show():  # noqa: ANN202
        sizes = result.n_atoms
        rows = [
            ("Frames", f"{result.n_frames:,}", f"{result.periodic:,} periodic"),
            ("Atoms", str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}", ""),
            ("Elements", " ".join(result.elements), ""),
            *((f"Frames with {label}", f"{count:,}", "") for label, count in result.n_labelled.items()),
        ]
        if result.energy_per_atom:
            low, mean, high = result.energy_per_atom
            rows.append(("Energy per atom", f"{mean:.4f}", f"eV, from {low:.4f} to {high:.4f}"))
        rows.append(("RMS force", number(result.force_rms), "eV/Å"))
        rows += [("Warning", text, "") for text in result.warnings]
        return grid(str(file), rows)

    emit(result, json, show)
