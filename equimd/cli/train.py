"""``equimd train``: a potential, or several that make an ensemble, from a recipe."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from equimd.cli.common import Json, check_json, emit, grid, number

if TYPE_CHECKING:
    from equimd.training.members import EnsembleResult
    from equimd.training.result import TrainingResult


def train(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe: what to train, on which data, and how.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="A new folder for the run. The default is runs/<name of the recipe>."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe, such as optimizer.lr=1e-3."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the training run in the folder.")] = False,
    members: Annotated[
        int | None, typer.Option("--members", metavar="M", help="Train an ensemble of M members, whose seeds count up.")
    ] = None,
    bagging: Annotated[bool, typer.Option("--bagging", help="Each member draws its own data.n_train frames.")] = False,
    json: Json = None,
) -> None:
    """Train a potential by a recipe. A killed training run continues with --resume.

    Several processes train together if torchrun or srun starts them:
    torchrun --nproc-per-node=N -m equimd train RECIPE.yaml -o RUN.
    """
    from equimd.training.distributed import join
    from equimd.training.memory import keep_freed_memory

    keep_freed_memory()
    with join() as world:
        with world.together():
            check_json(json)
            from equimd.errors import InputError
            from equimd.training import load_recipe

            if bagging and members is None:
                raise InputError("--bagging is for the members of an ensemble; give --members M too")
            loaded = load_recipe(recipe, overrides or ())
            folder = output or Path("runs") / loaded.name
        if members is not None:
            from equimd.training.members import train_members

            ensemble = train_members(loaded, folder, members, bagging, resume, progress=json != "-", world=world)
            if world.is_first:
                emit(ensemble, json, lambda: _show_ensemble(ensemble, folder))
            return
        from equimd.training import train as run

        result = run(loaded, folder, resume=resume, progress=json != "-", world=world)
        if world.is_first:
            emit(result, json, lambda: _show(result, folder))


def _show(result: "TrainingResult", folder: Path):  # noqa: ANN202
    test, which = (result.test, "test") if result.test else (result.valid, "validation")
    devices = result.device if result.n_devices == 1 else f"{result.n_devices} x {result.device}"
    rows = [
        (f"Force error (MAE), {which}", number(test.force_mae, 1e3), "meV/Å"),
        (f"Energy error (MAE), {which}", number(test.energy_per_atom_mae, 1e3), "meV/atom"),
        *_stress(f"Stress error (MAE), {which}", test.stress_mae),
        ("Steps", f"{result.steps:,}", ""),
        ("Speed of training", number(result.frames_per_s), "frames/s"),
        ("Cost", number(result.device_hours), f"device-hours ({devices})"),
        ("", number(result.cpu_hours), "CPU-hours" + (", on a machine that did other work" if result.shared else "")),
    ]
    return grid(f"{result.name} → {folder}", rows)


def _stress(label: str, error: float | None) -> list[tuple[str, str, str]]:
    """The row of a stress error, none without labels."""
    from equimd.units import GPA

    if error is None:
        return []
    return [(label, number(error, 1e3), f"meV/Å³ ({number(error / GPA)} GPa)")]


def _show_ensemble(result: "EnsembleResult", folder: Path):  # noqa: ANN202
    single = [member.force_mae for member in result.errors if member.force_mae is not None]
    rows = [
        (f"Force error (MAE) of the mean, {result.split}", number(result.mean.force_mae, 1e3), "meV/Å"),
        ("Force error (MAE) of one member", number(sum(single) / len(single) if single else None, 1e3), "meV/Å"),
        *_stress(f"Stress error (MAE) of the mean, {result.split}", result.mean.stress_mae),
        ("Spread of the members' forces (RMS)", number(result.spread_rms, 1e3), "meV/Å"),
        ("Correlation of spread and error", number(result.correlation), ""),
        ("Cost", number(result.device_hours), "device-hours"),
        ("", number(result.cpu_hours), "CPU-hours" + (", on a machine that did other work" if result.shared else "")),
    ]
    return grid(f"{result.name}, {len(result.members)} members → {folder}", rows)
