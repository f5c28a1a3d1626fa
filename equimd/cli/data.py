"""``equimd data``: look at labelled frames."""

from pathlib import Path
from typing import Annotated

import typer

from equimd.cli.common import TopologyOption

app = typer.Typer(help="Look at structures and labels.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Look at structures and labels."""


@app.command("inspect")
def inspect(
    file: Annotated[Path, typer.Argument(help="any file that can be read")],
    topology: TopologyOption = None,
) -> None:
    """Frames, elements, sizes, labels, and whether the numbers look like eV and Å."""
    import numpy as np

    from equimd.frames import check_plausible, labels_of, read_list

    frames = read_list(file, topology=topology)
    labels = [labels_of(frame) for frame in frames]
    sizes = sorted({len(frame) for frame in frames})
    symbols = sorted({symbol for frame in frames for symbol in frame.get_chemical_symbols()})
    span = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    print(f"{len(frames)} frames of {span} atoms: {', '.join(symbols)}")
    for key in ("energy", "forces", "stress"):
        print(f"  {key}: in {sum(label[key] is not None for label in labels)} frames")
    forces = [label["forces"] for label in labels if label["forces"] is not None]
    if forces:
        components = np.concatenate([f.ravel() for f in forces])
        print(f"  force RMS {np.sqrt(np.mean(components**2)):.3g} eV/Å, largest {np.abs(components).max():.3g} eV/Å")
    for line in check_plausible(frames):
        print(f"  look: {line}")
