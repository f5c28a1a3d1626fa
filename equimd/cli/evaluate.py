"""``equimd evaluate``: errors against labelled frames."""

from pathlib import Path
from typing import Annotated

import typer

from equimd.cli.common import (
    AcceptPredictions,
    Device,
    Dtype,
    Json,
    Keys,
    OtherLevel,
    PotentialName,
    Stride,
    Symmetrize,
    Topology,
    Units,
    check_json,
    emit,
    grid,
    make_calculator,
    number,
    open_frames,
    progress,
)


def evaluate(
    potential: PotentialName,
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="Labelled frames: extxyz, npz, db, H5MD, ….")],
    stride: Stride = 1,
    reference: Annotated[str | None, typer.Option(help="Label with gfn1-xtb or gfn2-xtb instead.")] = None,
    accept_predictions: AcceptPredictions = False,
    other_level: OtherLevel = False,
    topology: Topology = None,
    unit: Units = None,
    key: Keys = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    symmetrize: Symmetrize = None,
    json: Json = None,
) -> None:
    """Errors of energies, forces and stress against the labels of a data set."""
    check_json(json)
    frames = list(open_frames(dataset, topology, unit, key, stride))
    calculator = make_calculator(potential, device, dtype, symmetrize)
    from equimd.analysis.accuracy import evaluate_accuracy
    from equimd.frames.electrons import check_frames

    check_frames(frames, calculator.header, str(dataset), stride)
    with progress() as bar:
        result = evaluate_accuracy(
            calculator,
            frames,
            reference,
            accept_predictions=accept_predictions,
            other_level=other_level,
            progress=bar.named("frames"),
        )

    def show():  # noqa: ANN202
        blocks = (
            ("Force", result.force, 1e3, "meV/Å"),
            ("Energy per atom", result.energy_per_atom, 1e3, "meV"),
            ("Energy", result.energy, 1e3, "meV"),
            ("Stress", result.stress, 1e3, "meV/Å³"),
        )
        rows = []
        for name, errors, factor, its_unit in blocks:
            if errors is not None:
                rows += [(f"{name}, MAE", number(errors.mae, factor), its_unit)]
                rows += [(f"{name}, RMSE", number(errors.rmse, factor), its_unit)]
        if result.other_level is not None:
            rows.append(("Another level of theory", result.other_level, ""))
        return grid(f"{result.name} on {result.n_frames} frames of {dataset}", rows)

    emit(result, json, show)
