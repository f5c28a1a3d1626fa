"""``equimd throughput``: how fast a potential is."""

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
    start_of,
)


def command(
    potential: Annotated[str, typer.Argument(help="name or path of a potential")],
    structure: Annotated[str | None, typer.Argument(help="a structure; the potential's own unless given")] = None,
    timestep_fs: Annotated[float, typer.Option(min=1e-3, help="time step that ns/day are counted with")] = 0.5,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    symmetrize: SymmetrizeOption = None,
    json: JsonOption = None,
) -> None:
    """Milliseconds per evaluation and per MD step, ns per day, atom-steps per device-hour, memory."""
    from equimd.analysis.throughput import measure_throughput
    from equimd.calculators.ase import EquimdCalculator

    check_json(json)
    calculator = EquimdCalculator(potential, device=device, dtype=dtype, symmetrize=symmetrize)
    atoms = start_of(potential) if structure is None else read_structure(structure)
    with progress_bar("timing") as progress:
        result = measure_throughput(calculator, atoms, timestep_fs, progress=progress)
    deliver(
        result,
        json,
        f"{result.name}, {result.n_atoms} atoms, {result.device}, {result.dtype}"
        f"{' (unstable: the machine was busy)' if result.unstable else ''}\n"
        f"{result.ms_per_step.median:.3g} ms per MD step, {result.ms_per_forward.median:.3g} ms per evaluation\n"
        f"{result.ns_per_day:.4g} ns/day, {result.atom_steps_per_device_hour:.4g} atom-steps per device-hour",
    )
