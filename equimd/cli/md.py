"""``equimd md``: run molecular dynamics."""

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
    read_structure,
)


def command(
    potential: Annotated[str, typer.Argument(help="name or path of a potential")],
    structure: Annotated[str, typer.Argument(help="a structure, or the name of a potential for its start.xyz")],
    output: Annotated[Path, typer.Option("--output", "-o", help="trajectory: .h5, .h5md, .xyz or .extxyz")],
    ensemble: Annotated[str, typer.Option(help="nve, nvt or npt")] = "nvt",
    steps: Annotated[int, typer.Option(help="time steps in all")] = 1000,
    timestep_fs: float = 0.5,
    temperature_k: Annotated[float, typer.Option("--temperature", help="K")] = 300.0,
    friction_per_fs: float = 0.01,
    pressure_bar: float = 1.0,
    stride: Annotated[int, typer.Option(help="steps between stored frames")] = 10,
    checkpoint_every: Annotated[int, typer.Option(help="steps between checkpoints")] = 1000,
    seed: int = 0,
    engine: Annotated[str, typer.Option(help="ase")] = "ase",
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run that wrote the output")] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    symmetrize: SymmetrizeOption = None,
    json: JsonOption = None,
) -> int:
    """Run MD; stops with a readable trajectory when the dynamics explodes (exit code 1)."""
    from equimd.calculators.ase import EquimdCalculator
    from equimd.md import run_md
    from equimd.md.settings import make_settings

    check_json(json)
    settings = make_settings(
        ensemble=ensemble,
        steps=steps,
        timestep_fs=timestep_fs,
        temperature_K=temperature_k,
        friction_per_fs=friction_per_fs,
        pressure_bar=pressure_bar,
        stride=stride,
        checkpoint_every=checkpoint_every,
        seed=seed,
        engine=engine,
    )
    atoms = read_structure(structure)
    calculator = EquimdCalculator(potential, device=device, dtype=dtype, symmetrize=symmetrize)
    with progress_bar(f"{ensemble} with {calculator.name}") as progress:
        result = run_md(atoms, calculator, settings, output, resume=resume, progress=progress)
    end = f"stopped: {result.stopped}" if result.stopped else "finished"
    deliver(
        result,
        json,
        f"{result.formula}, {result.steps} steps ({result.time_ps:g} ps), mean {result.mean_temperature_K:.0f} K, "
        f"{result.wall_seconds:.1f} s: {end}\n{result.n_frames} frames in {result.trajectory}",
    )
    return 1 if result.stopped else 0
