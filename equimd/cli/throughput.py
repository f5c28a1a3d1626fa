"""``equimd throughput``: how fast a potential is on a structure."""

from typing import Annotated

import typer

from equimd.cli.common import (
    Device,
    Dtype,
    Json,
    NoPbc,
    PotentialName,
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


def throughput(
    potential: PotentialName,
    structure: StructureName,
    timestep: Annotated[float, typer.Option(help="Time step in fs.")] = 0.5,
    block_seconds: Annotated[float, typer.Option(help="Length of each timed block, in seconds.")] = 0.5,
    profile: Annotated[bool, typer.Option(help="Show how long each part of an evaluation takes.")] = False,
    select: Select = None,
    no_pbc: NoPbc = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    symmetrize: Symmetrize = None,
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Measure the time of an evaluation and of an MD step, ns per day, and memory."""
    check_json(json)
    atoms = read_structure(structure, select, no_pbc)
    calculator = make_calculator(potential, device, dtype, symmetrize)
    from equimd.analysis.throughput import TimingSettings, measure_throughput

    settings = TimingSettings(block_seconds=block_seconds)
    with cpu_threads(threads, len(atoms)), progress() as bar:
        result = measure_throughput(
            calculator, atoms, timestep, settings=settings, progress=bar.named("blocks"), profile=profile
        )

    def show():  # noqa: ANN202
        step, forward = result.ms_per_step, result.ms_per_forward
        rows = [
            ("MD step", number(step.median), f"ms, spread {100 * step.spread:.0f} %"),
            ("Evaluation", number(forward.median), f"ms, spread {100 * forward.spread:.0f} %"),
            ("Speed", number(result.ns_per_day), f"ns/day at {result.timestep_fs:g} fs"),
            ("Per atom and step", number(result.us_per_atom_step), "µs"),
            ("Peak memory", number(result.peak_memory_mib), "MiB"),
        ]
        if result.unstable:
            rows.append(("Unstable", "spread above 20 %", "the machine was busy"))
        if result.profile_ms is not None:
            total = sum(result.profile_ms.values())
            rows.append(("On one thread", number(total), "ms an evaluation, of which"))
            rows += [
                (f"  {part}", number(ms), f"ms, {100 * ms / total:.1f} %") for part, ms in result.profile_ms.items()
            ]
        return grid(f"{result.name}, {result.n_atoms} atoms, {result.device}, {result.dtype}", rows)

    emit(result, json, show)
