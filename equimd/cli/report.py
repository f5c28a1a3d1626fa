"""``equimd report``: draw a comparison again from its results."""

from pathlib import Path
from typing import Annotated

import typer

from equimd.cli.common import Json, check_json, emit


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a comparison, or its results.json.")],
    json: Json = None,
) -> None:
    """Write report.html again from results.json and show the table."""
    check_json(json)
    from equimd.report import load_results, write_report
    from equimd.report.table import rich_table

    result = load_results(folder)
    path = write_report(result, folder if folder.is_dir() else folder.parent)

    def show():  # noqa: ANN202
        from rich.console import Group
        from rich.text import Text

        words = [Text(f"• {line}") for line in result.verdict]
        return Group(rich_table(result), *words, Text(f"\n{path}", style="dim"))

    emit(result, json, show)
