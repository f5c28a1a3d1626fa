"""``equimd train``: a potential from a recipe."""

from pathlib import Path
from typing import Annotated

import typer

from equimd.cli.common import Json, check_json, emit, grid, number


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="What to train, on what, and how.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A new folder; by default runs/<name of the recipe>.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key: optimizer.lr=1e-3.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue what is in the folder.")] = False,
    json: Json = None,
) -> None:
    """Train a potential as a recipe says; a killed training continues with --resume."""
    check_json(json)
    from equimd.training import load_recipe
    from equimd.training import train as run

    loaded = load_recipe(recipe, overrides or ())
    folder = output or Path("runs") / loaded.name
    result = run(loaded, folder, resume=resume, progress=json != "-")

    def show():  # noqa: ANN202
        test = result.test or result.valid
        which = "test" if result.test else "validation"
        rows = [
            (f"Force error (MAE), {which}", number(test.force_mae, 1e3), "meV/Å"),
            (f"Energy error (MAE), {which}", number(test.energy_per_atom_mae, 1e3), "meV/atom"),
            ("Steps", f"{result.steps:,}", ""),
            ("Cost", number(result.device_hours), f"device-hours ({result.device})"),
        ]
        return grid(f"{result.name} → {folder}", rows)

    emit(result, json, show)
