"""``equimd md``: molecular dynamics with a potential."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    ended_by_a_signal,
    grid,
    make_calculator,
    number,
    open_structures,
    progress,
)
from equimd.errors import FailedError, InputError
from equimd.units import BAR, GPA

if TYPE_CHECKING:
    from equimd.md import MDResult
    from equimd.md.averages import Mean


def md(
    potential: PotentialName,
    structure: StructureName,
    output: Annotated[Path, typer.Option("-o", "--output", help="The trajectory: a .h5 (H5MD) or .xyz file.")],
    frame: Annotated[
        int | None, typer.Option(help="Start from this frame of STRUCTURE; -1 is the last. The default is the first.")
    ] = None,
    ensemble: Annotated[str, typer.Option(help="The ensemble: nve, nvt or npt.")] = "nvt",
    steps: Annotated[int, typer.Option(help="Number of steps of the whole run.")] = 2000,
    timestep: Annotated[float, typer.Option(help="Time step in fs.")] = 0.5,
    temperature: Annotated[
        float, typer.Option(help="Temperature in K. Velocities are drawn at it if STRUCTURE has none.")
    ] = 300.0,
    pressure: Annotated[float, typer.Option(help="Pressure in bar, for the ensemble npt.")] = 1.0,
    friction: Annotated[float, typer.Option(help="Friction of the thermostat in 1/fs.")] = 0.01,
    stride: Annotated[int, typer.Option(help="Write every n-th step to the trajectory.")] = 20,
    checkpoint_every: Annotated[int, typer.Option(help="Number of steps between checkpoints.")] = 1000,
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
    """Run molecular dynamics. A killed run continues with --resume."""
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
    atoms = _start(structure, frame, select, no_pbc)
    if resume and not (output.exists() or output.with_name(f"{output.name}.state.json").exists()):
        warnings.warn(f"there is no run at {output} to continue: it begins at step 0", UserWarning, stacklevel=2)
    calculator = make_calculator(potential, device, dtype, symmetrize)
    with cpu_threads(threads, len(atoms)), progress() as bar, ended_by_a_signal():
        result = run_md(atoms, calculator, settings, output, resume=resume, progress=bar.named("steps"))

    emit(result, json, lambda: _summary(result))
    if result.stopped is not None:
        raise FailedError(
            f"the run stopped at {result.time_ps:g} ps, {result.stopped}; {result.trajectory} holds it up to there"
        )


def _start(structure: str, frame: int | None, select: str | None, no_pbc: bool) -> Any:
    """The structure a run starts from; a word if a file offers others and none was chosen."""
    frames = open_structures(structure, select, no_pbc)
    if frame is None:
        first, count = next(iter(frames)), len(frames)
        if count > 1:
            message = f"{structure} holds {count} frames: the run starts from the first; --frame chooses (-1: the last)"
            warnings.warn(message, UserWarning, stacklevel=3)
        return first
    listed = list(frames)
    if not -len(listed) <= frame < len(listed):
        last = len(listed) - 1
        held = "is one structure" if last == 0 else f"holds {len(listed)} frames"
        raise InputError(
            f"--frame is {frame}, and {structure} {held}; accepted: {f'0 to {last}' if last else '0'}, or -1"
        )
    return listed[frame]


def _summary(result: "MDResult") -> Any:
    rows = [
        ("Steps", f"{result.steps:,}", f"{result.time_ps:g} ps"),
        ("Frames", f"{result.n_frames:,}", ""),
        ("Mean temperature", _mean(result.temperature_K) or number(result.mean_temperature_K), "K"),
        ("Mean volume", _mean(result.volume_A3), "Å³"),
        ("Mean density", _mean(result.density_g_cm3), "g/cm³"),
        ("Mean pressure", _mean(result.pressure_bar), "bar"),
        ("", _mean(result.pressure_bar, BAR / GPA), "GPa"),
        ("Wall time", number(result.wall_seconds), "s"),
    ]
    title = f"{result.formula} with {result.calculator} → {result.trajectory}"
    return grid(title, [row for row in rows if row[1]])


def _mean(mean: "Mean | None", factor: float = 1.0) -> str:
    """A mean with its error bar; nothing for none. The volume of a cell that is fixed has no error."""
    from equimd.report.numbers import with_error

    return "" if mean is None else with_error(factor * mean.value, factor * mean.stderr)
