"""``equimd train``: train a potential from a recipe."""

from pathlib import Path
from typing import Annotated

import typer

from equimd.cli.common import JsonOption, check_json, deliver


def command(
    recipe: Annotated[Path, typer.Argument(help="a recipe, YAML")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="folder of the run; runs/<name> unless given")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, such as optimizer.lr=1e-3")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in the folder")] = False,
    json: JsonOption = None,
) -> None:
    """Train a potential; validation reports errors, L_mean, L_equiv and their percentage."""
    from equimd.training import train
    from equimd.training.recipe import load_recipe

    check_json(json)
    loaded = load_recipe(recipe, set_ or [])
    folder = output or Path("runs") / loaded.name
    result = train(loaded, folder, resume=resume)
    errors = result.test or result.valid
    lines = [f"{result.name}: {result.stopped} after {result.steps} steps, {result.device_hours:.2f} device-hours"]
    if errors.force_mae is not None:
        lines.append(
            f"force MAE {1e3 * errors.force_mae:.2f} meV/Å on the {'test' if result.test else 'validation'} set"
        )
    lines.append(f"the potential is {folder / 'model.safetensors'}")
    deliver(result, json, "\n".join(lines))
