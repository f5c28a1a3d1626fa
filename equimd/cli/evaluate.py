"""``equimd evaluate``: errors on labelled frames."""

from pathlib import Path
from typing import Annotated

import typer

from equimd.cli.common import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    SymmetrizeOption,
    check_json,
    deliver,
    progress_bar,
)


def command(
    potential: Annotated[str, typer.Argument(help="name or path of a potential")],
    dataset: Annotated[Path, typer.Argument(help="frames with energy, forces and perhaps stress")],
    energy_unit: Annotated[
        str | None, typer.Option(help="unit of energies in the file, eV unless it says otherwise")
    ] = None,
    length_unit: Annotated[
        str | None, typer.Option(help="unit of lengths in the file, Å unless it says otherwise")
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    symmetrize: SymmetrizeOption = None,
    json: JsonOption = None,
) -> None:
    """Mean absolute and root-mean-square errors of energy, forces and stress."""
    from equimd.analysis.accuracy import evaluate_accuracy
    from equimd.calculators.ase import EquimdCalculator
    from equimd.frames import UnitSpec, read_list

    check_json(json)
    given = {key: value for key, value in (("energy", energy_unit), ("length", length_unit)) if value is not None}
    frames = read_list(dataset, units=UnitSpec(**given) if given else None)
    calculator = EquimdCalculator(potential, device=device, dtype=dtype, symmetrize=symmetrize)
    with progress_bar("evaluating") as progress:
        result = evaluate_accuracy(calculator, frames, progress=progress)
    lines = [f"{result.name} on {result.n_frames} frames of {dataset}"]
    for label, errors, unit in (
        ("energy per atom", result.energy_per_atom, "meV"),
        ("force", result.force, "meV/Å"),
        ("stress", result.stress, "meV/Å³"),
    ):
        if errors is not None:
            lines.append(f"{label:>16}: MAE {1e3 * errors.mae:.4g}, RMSE {1e3 * errors.rmse:.4g} {unit}")
    deliver(result, json, "\n".join(lines))
