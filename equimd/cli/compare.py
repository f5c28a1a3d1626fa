"""``equimd compare``: the main job."""

import os
from pathlib import Path
from typing import Annotated

import typer

from equimd.cli.common import (
    Device,
    Dtype,
    Json,
    OtherLevel,
    Seed,
    Threads,
    check_json,
    cpu_threads,
    emit,
    ended_by_a_signal,
    progress,
)


def compare(
    potentials: Annotated[
        list[str] | None,
        typer.Argument(metavar="[POTENTIAL]...", help="Names or paths of potentials. The default is the ethanol pair."),
    ] = None,
    structure: Annotated[
        Path | None,
        typer.Option(help="The structure that the MD runs start from. The default is the first potential's own."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Number of MD steps with each potential.")] = 2000,
    timestep: Annotated[float, typer.Option(help="Time step in fs.")] = 0.5,
    temperature: Annotated[float, typer.Option(help="Temperature in K.")] = 300.0,
    frames: Annotated[int, typer.Option(help="Number of frames of each run that are labelled and measured.")] = 50,
    reference: Annotated[
        str | None,
        typer.Option(help="Label with gfn1-xtb or gfn2-xtb. The default is what the potentials were trained on."),
    ] = None,
    other_level: OtherLevel = False,
    block_seconds: Annotated[float, typer.Option(help="Length of each timed block, in seconds.")] = 0.5,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "float32",
    threads: Threads = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="A new folder for the report and the results.")] = Path(
        "equimd-compare"
    ),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the earlier comparison in the folder.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the unfinished comparison in the folder. If there is none, start one."),
    ] = False,
    json: Json = None,
) -> None:
    """Run MD with each potential, label its frames, and measure errors, symmetry, drift and speed."""
    from pydantic import ValidationError

    from equimd.errors import InputError
    from equimd.report.comparison import CompareSettings

    check_json(json)
    try:
        settings = CompareSettings.model_validate(
            {
                "steps": steps,
                "timestep_fs": timestep,
                "temperature_K": temperature,
                "frames": min(frames, steps),
                "nve_steps": max(10, min(steps, 2000)),
                "reference": reference,
                "other_level": other_level,
                "timing_seconds": block_seconds,
                "seed": seed,
                "device": device,
                "dtype": dtype,
            }
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{first['loc'][0]} is {first['input']!r}: {first['msg']}") from error
    from equimd.comparison import DEFAULT_PAIR, start_structure
    from equimd.comparison import compare as run

    names = potentials or list(DEFAULT_PAIR)
    atoms = start_structure(names, structure)
    with cpu_threads(threads, len(atoms)), progress() as bar, ended_by_a_signal():
        result = run(
            names,
            atoms,
            settings=settings,
            output=output,
            overwrite=overwrite,
            resume=resume,
            processes=os.cpu_count() or 1,
            progress=bar,
        )
    emit(result, json, lambda: _summary(result, output))


def _summary(result, output: Path):  # noqa: ANN001, ANN202
    from rich.console import Group
    from rich.text import Text

    from equimd.report import REPORT_FILE, RESULTS_FILE
    from equimd.report.table import rich_table

    words = [Text(f"• {line}") for line in result.verdict]
    where = f"\n{output / REPORT_FILE}\n{output / RESULTS_FILE}   ({result.wall_seconds:.0f} s)"
    return Group(rich_table(result), *words, Text(where, style="dim"))
