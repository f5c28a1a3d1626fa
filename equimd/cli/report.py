"""``equimd report``: the page of a comparison, from its results.json."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    folder: Annotated[Path, typer.Argument(help="folder with the results.json of a comparison")],
) -> None:
    """Write report.html again, from the results in a folder."""
    from equimd.report import load_results, write_report

    print(write_report(load_results(folder), folder if folder.is_dir() else folder.parent))
