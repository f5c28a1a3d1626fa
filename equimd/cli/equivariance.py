"""``equimd equivariance``: force-equivariance error along a trajectory."""

from pathlib import Path
from typing import Annotated

import typer

from equimd.cli.common import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    SymmetrizeOption,
    TopologyOption,
    check_json,
    deliver,
    progress_bar,
)


def command(
    potential: Annotated[str, typer.Argument(help="name or path of a potential")],
    trajectory: Annotated[Path, typer.Argument(help="extxyz, H5MD, ASE traj, DCD, XTC, TRR, …")],
    reference: Annotated[
        str | None, typer.Option(help="gfn1-xtb or gfn2-xtb; labels of the frames unless given")
    ] = None,
    degree: Annotated[int, typer.Option(help="highest l that the quadrature integrates exactly")] = 4,
    rotations: Annotated[int | None, typer.Option(help="this many random rotations instead of a quadrature")] = None,
    inversion: Annotated[bool, typer.Option(help="O(3) instead of SO(3)")] = True,
    stride: Annotated[int, typer.Option(min=1, help="every so many frames")] = 1,
    seed: int = 0,
    topology: TopologyOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    symmetrize: SymmetrizeOption = None,
    json: JsonOption = None,
) -> None:
    """How far forces are from equivariant, with error bars, noise floor and share of the loss."""
    from equimd.analysis.equivariance import equivariance_error
    from equimd.calculators.ase import EquimdCalculator
    from equimd.frames import read_list

    check_json(json)
    frames = read_list(trajectory, topology=topology, stride=stride)
    calculator = EquimdCalculator(potential, device=device, dtype=dtype, symmetrize=symmetrize)
    with progress_bar("rotating") as progress:
        result = equivariance_error(
            calculator,
            frames,
            degree,
            inversion,
            n_rotations=rotations,
            seed=seed,
            reference=reference,
            progress=progress,
        )
    force = result.force
    lines = [
        f"{calculator.name} on {result.n_frames} frames, {result.group.n_rotations} rotations ({result.group.kind})",
        f"force-equivariance error {1e3 * force.rmse_equiv:.4g} ± {1e3 * force.stderr:.2g} meV/Å"
        f" ({force.relative:.3g} of the RMS force){', at the numerical floor' if force.at_floor else ''}",
        f"95th percentile {1e3 * force.p95:.4g} meV/Å; worst frame {force.worst_frame.index}; worst atom "
        f"{force.worst_atom.element}{force.worst_atom.index} of frame {force.worst_atom.frame}",
    ]
    if result.loss is not None:
        lines.append(
            f"share of the loss {result.loss.percent_of_loss:.3g} % (L_mean {1e6 * result.loss.l_mean:.4g}, "
            f"L_equiv {1e6 * result.loss.l_equiv:.4g} (meV/Å)²)"
        )
    deliver(result, json, "\n".join(lines))
