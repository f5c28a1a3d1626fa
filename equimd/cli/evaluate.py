"""``equimd evaluate``: errors against labelled frames."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from equimd.cli.common import (
    AcceptPredictions,
    Device,
    Dtype,
    Json,
    Keys,
    NoPbc,
    OtherLevel,
    PotentialName,
    Select,
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

if TYPE_CHECKING:
    from equimd.analysis.accuracy import AccuracyResult, GroupErrors

# So many groups fit on a screen.
MOST_GROUPS = 20


def evaluate(
    potential: PotentialName,
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="Labelled frames: extxyz, npz, db, H5MD, ….")],
    stride: Stride = 1,
    reference: Annotated[str | None, typer.Option(help="Label the frames with gfn1-xtb or gfn2-xtb instead.")] = None,
    accept_predictions: AcceptPredictions = False,
    other_level: OtherLevel = False,
    topology: Topology = None,
    select: Select = None,
    no_pbc: NoPbc = False,
    unit: Units = None,
    key: Keys = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    symmetrize: Symmetrize = None,
    json: Json = None,
) -> None:
    """Measure the errors of energies, forces and stress against the labels of a data set."""
    check_json(json)
    frames = list(open_frames(dataset, topology, unit, key, stride, select=select, no_pbc=no_pbc))
    calculator = make_calculator(potential, device, dtype, symmetrize)
    from equimd.analysis.accuracy import evaluate_accuracy
    from equimd.frames.electrons import check_frames

    header = getattr(calculator, "header", None)
    if header is not None:  # a calculator of somebody else's knows itself what charges it takes
        check_frames(frames, header, str(dataset), stride)
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
        from rich.console import Group
        from rich.text import Text

        parts = [grid(f"{result.name} on {result.n_frames} frames of {dataset}", _rows(result))]
        if len(result.by_group) > 1:
            parts.append(_group_table(result))
        if result.suspicious:
            parts.append(Text(f"Suspicious: {result.suspicious}.", style="bold"))
        return Group(*parts)

    emit(result, json, show)


def _rows(result: "AccuracyResult") -> list[tuple[str, str, str]]:
    blocks = (
        ("Force", result.force, 1e3, "meV/Å"),
        ("Energy per atom", result.energy_per_atom, 1e3, "meV"),
        ("Energy", result.energy, 1e3, "meV"),
        ("Stress", result.stress, 1e3, "meV/Å³"),
        ("Stress", result.stress_gpa, 1.0, "GPa"),
    )
    rows = []
    for name, errors, factor, its_unit in blocks:
        if errors is not None:
            rows += [(f"{name}, MAE", number(errors.mae, factor), its_unit)]
            rows += [(f"{name}, RMSE", number(errors.rmse, factor), its_unit)]
    if result.lossy is not None:
        rows.append(("Lossy", result.lossy, ""))
    if result.other_level is not None:
        rows.append(("Another level of theory", result.other_level, ""))
    return rows


def _group_table(result: "AccuracyResult") -> Any:
    """The errors of each group of frames, the largest force errors first."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    heading = Text(f"By {result.group_key}", style="bold")
    table = Table(box=box.SIMPLE_HEAD, title=heading, title_justify="left")
    table.add_column(str(result.group_key), no_wrap=True)
    for column in ("frames", "force MAE", "force RMSE", "energy MAE", "energy RMSE"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", style="dim", no_wrap=True)

    def size(item: tuple[str, "GroupErrors"]) -> float:
        return item[1].force.mae if item[1].force else -1.0

    for name, group in sorted(result.by_group.items(), key=size, reverse=True)[:MOST_GROUPS]:
        cells = [
            number(value, 1e3)
            for errors in (group.force, group.energy_per_atom)
            for value in ((errors.mae, errors.rmse) if errors else (None, None))
        ]
        table.add_row(name or "(none)", str(group.n_frames), *cells, "meV/Å, meV/atom")
    if len(result.by_group) > MOST_GROUPS:
        table.caption = f"and {len(result.by_group) - MOST_GROUPS} more groups, all of them in --json"
    return table
