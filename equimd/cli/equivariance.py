"""``equimd equivariance``: how far from equivariant the forces are, along a trajectory."""

from pathlib import Path
from typing import Annotated

import typer

from equimd.cli.common import (
    AcceptPredictions,
    Device,
    Dtype,
    Json,
    NoPbc,
    OtherLevel,
    PotentialName,
    Seed,
    Select,
    Stride,
    Symmetrize,
    Topology,
    check_json,
    emit,
    grid,
    make_calculator,
    number,
    open_frames,
    progress,
)


def equivariance(
    potential: PotentialName,
    trajectory: Annotated[Path, typer.Argument(metavar="TRAJECTORY", help="Frames in any format that is read.")],
    degree: Annotated[int, typer.Option(help="Degree to which the quadrature over rotations is exact.")] = 4,
    inversion: Annotated[bool, typer.Option(help="Measure over O(3) instead of SO(3).")] = True,
    n_rotations: Annotated[
        int | None, typer.Option("--random", help="Use this many random rotations instead of the quadrature.")
    ] = None,
    seed: Seed = 0,
    reference: Annotated[str | None, typer.Option(help="Label with gfn1-xtb or gfn2-xtb for the loss.")] = None,
    accept_predictions: AcceptPredictions = False,
    other_level: OtherLevel = False,
    stride: Stride = 1,
    topology: Topology = None,
    select: Select = None,
    no_pbc: NoPbc = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    symmetrize: Symmetrize = None,
    json: Json = None,
) -> None:
    """Force-equivariance error along a trajectory, its noise floor, and its share of the loss."""
    check_json(json)
    frames = list(open_frames(trajectory, topology, None, None, stride, select=select, no_pbc=no_pbc))
    calculator = make_calculator(potential, device, dtype, symmetrize)
    from equimd.analysis.equivariance import equivariance_error

    with progress() as bar:
        result = equivariance_error(
            calculator,
            frames,
            degree,
            inversion,
            n_rotations,
            seed,
            reference,
            accept_predictions=accept_predictions,
            other_level=other_level,
            progress=bar.named("frames"),
        )

    def show():  # noqa: ANN202
        from equimd.report.verdict import judge

        force, loss = result.force, result.loss
        rows = [
            ("Equivariance error of forces", number(force.rmse_equiv, 1e3), f"± {number(force.stderr, 1e3)} meV/Å"),
            ("  relative to the RMS force", number(force.relative), ""),
            ("  95th percentile of frames", number(force.p95, 1e3), "meV/Å"),
            ("  rounding floor", number(force.floor, 1e3), "meV/Å"),
            ("Spread of the energy", number(result.energy.std_per_atom, 1e3), "meV/atom"),
        ]
        if loss is not None:
            rows += [
                ("Share of the loss", number(loss.percent_of_loss), f"± {number(loss.stderr)} %"),
                (
                    "  error that rotations cannot explain",
                    number(loss.l_mean**0.5 if loss.l_mean > 0 else 0, 1e3),
                    "meV/Å",
                ),
            ]
        rows.append(("Verdict", judge(result).text, ""))
        if result.lossy is not None:
            rows.append(("Lossy", result.lossy, ""))
        if result.other_level is not None:
            rows.append(("Another level of theory", result.other_level, ""))
        title = f"{result.name}, {result.n_frames} frames, {result.group.n_rotations} rotations each"
        return grid(title, rows)

    emit(result, json, show)
