"""``equimd equivariance``: how far from equivariant the forces are, along a trajectory."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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

if TYPE_CHECKING:
    from equimd.analysis.equivariance_results import EquivarianceResult, LossShare, Spread, StressSpread


def equivariance(
    potential: PotentialName,
    trajectory: Annotated[Path, typer.Argument(metavar="TRAJECTORY", help="Frames, in any format that equimd reads.")],
    degree: Annotated[int, typer.Option(help="The degree to which the quadrature over rotations is exact.")] = 4,
    inversion: Annotated[
        bool, typer.Option(help="Measure over rotations with inversion, O(3), instead of SO(3).")
    ] = True,
    n_rotations: Annotated[
        int | None, typer.Option("--random", help="Use this many random rotations instead of the quadrature.")
    ] = None,
    seed: Seed = 0,
    reference: Annotated[
        str | None, typer.Option(help="Label the frames with gfn1-xtb or gfn2-xtb, for the share of the loss.")
    ] = None,
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
    """Measure the equivariance error of forces along a trajectory, its noise floor and its share of the loss."""
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
        from rich.console import Group
        from rich.text import Text

        from equimd.report.verdict import judge, stress_in_words

        title = f"{result.name}, {result.n_frames} frames, {result.group.n_rotations} rotations each"
        suspicious = result.loss and result.loss.suspicious
        lines = [f"Verdict: {judge(result).text}.", stress_in_words(result)]
        lines += [suspicious and f"Suspicious: {suspicious}."]
        rows = _rows(result)
        if result.lossy is not None:
            rows.append(("Lossy", result.lossy, ""))
        if result.other_level is not None:
            rows.append(("Another level of theory", result.other_level, ""))
        return Group(grid(title, rows), *(Text(line, style="bold") for line in lines if line))

    emit(result, json, show)


def _rows(result: "EquivarianceResult") -> list[tuple[str, str, str]]:
    """The table: forces, energy, stress where there is a cell, the loss where there are labels."""
    force, loss = result.force, result.loss
    floor = "  rounding floor, estimated" if force.floor_kind == "estimated" else "  rounding floor"
    return [
        ("Equivariance error of forces", number(force.rmse_equiv, 1e3), f"± {number(force.stderr, 1e3)} meV/Å"),
        *_parts(force, 1e3, "meV/Å"),
        ("  relative to the RMS force", number(force.relative), ""),
        ("  95th percentile of frames", number(force.p95, 1e3), "meV/Å"),
        (floor, number(force.floor, 1e3), "meV/Å"),
        ("Spread of the energy", number(result.energy.std_per_atom, 1e3), "meV/atom"),
        *_parts(result.energy, 1e3, "meV/atom"),
        *_stress_rows(result.stress),
        *_loss_rows(loss),
    ]


def _parts(spread: "Spread", factor: float, unit: str) -> list[tuple[str, str, str]]:
    if spread.proper is None or spread.inversion is None:
        return []
    return [
        ("  rotations alone", number(spread.proper, factor), f"± {number(spread.proper_stderr, factor)} {unit}"),
        ("  from inversion", number(spread.inversion, factor), f"± {number(spread.inversion_stderr, factor)} {unit}"),
    ]


def _stress_rows(stress: "StressSpread | None") -> list[tuple[str, str, str]]:
    if stress is None:
        return []
    spread, asymmetry = number(stress.rmse_equiv, 1e3), number(stress.antisymmetric, 1e3)
    return [
        ("Spread of the stress", spread, f"meV/Å³, {number(stress.rmse_equiv_gpa)} GPa"),
        *_parts(stress, 1e3, "meV/Å³"),
        ("  relative to the RMS stress", number(stress.relative), ""),
        ("  asymmetry", asymmetry, f"meV/Å³, {number(stress.antisymmetric_gpa)} GPa"),
    ]


def _loss_rows(loss: "LossShare | None") -> list[tuple[str, str, str]]:
    if loss is None:
        return []
    remaining = number(loss.l_mean**0.5 if loss.l_mean > 0 else 0, 1e3)
    return [
        ("Share of the loss", number(loss.percent_of_loss), f"± {number(loss.stderr)} %"),
        ("  error that rotations cannot explain", remaining, "meV/Å"),
    ]
