"""``equimd md``: molecular dynamics with a potential."""

from pathlib import Path
from typing import Annotated

import typer

from equimd.cli.common import (
    Device,
    Dtype,
    Json,
    NoPbc,
    PotentialName,
    Seed,
    Select,
    StructureName,
    Symmetrize,
    Threads,
    check_json,
    cpu_threads,
    emit,
    grid,
    make_calculator,
    number,
    progress,
    read_structure,
)
from equimd.errors import InputError


def md(
    potential: PotentialName,
    structure: StructureName,
    output: Annotated[Path, typer.Option("-o", "--output", help="Trajectory: .h5 (H5MD) or .xyz.")],
    ensemble: Annotated[str, typer.Option(help="nve, nvt or npt.")] = "nvt",
    steps: Annotated[int, typer.Option(help="Number of steps in all.")] = 2000,
    timestep: Annotated[float, typer.Option(help="Time step in fs.")] = 0.5,
    temperature: Annotated[float, typer.Option(help="Temperature in K, also of the first velocities.")] = 300.0,
    pressure: Annotated[float, typer.Option(help="Pressure in bar, for npt.")] = 1.0,
    friction: Annotated[float, typer.Option(help="Friction of the thermostat in 1/fs.")] = 0.01,
    stride: Annotated[int, typer.Option(help="Write every n-th step.")] = 20,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 1000,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run that wrote the output.")] = False,
    select: Select = None,
    no_pbc: NoPbc = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    symmetrize: Symmetrize = None,
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Run molecular dynamics; a killed run continues with --resume."""
    check_json(json)
    if output.is_dir():
        raise InputError(f"-o is {output}, a folder; accepted is a file that ends in .h5 or .xyz")
    from equimd.md import run_md
    from equimd.md.settings import make_settings

    settings = make_settings(
        ensemble=ensemble,
        steps=steps,
        timestep_fs=timestep,
        temperature_K=temperature,
        pressure_bar=pressure,
        friction_per_fs=friction,
        stride=stride,
        checkpoint_every=checkpoint_every,
        seed=seed,
    )
    atoms = read_structure(structure, select, no_pbc)
    calculator = make_calculator(potential, device, dtype, symmetrize)
    with cpu_threads(threads, len(atoms)), progress() as bar:
        result = run_md(atoms, calculator, settings, output, resume=resume, progress=bar.named("steps"))

    def show():  # noqa: ANN202
        rows = [
            ("Steps", f"{result.steps:,}", f"{result.time_ps:g} ps"),
            ("Frames", f"{result.n_frames:,}", ""),
            ("Mean temperature", number(result.mean_temperature_K), "K"),
            ("Wall time", number(result.wall_seconds), "s"),
        ]
        return grid(f"{result.formula} with {result.calculator} → {result.trajectory}", rows)

    emit(result, json, show)
    if result.stopped is not None:
        raise RuntimeError(f"the run stopped, {result.stopped}; {result.trajectory} holds it up to there")
