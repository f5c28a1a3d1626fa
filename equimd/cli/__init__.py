"""The command line: one module per command; each parses and calls, nothing else."""

from typing import Annotated

import typer

from equimd.cli import check, compare, data, equivariance, evaluate, info, md, report, throughput, train
from equimd.cli.errors import Commands

app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)


def _version(wanted: bool) -> None:
    if wanted:
        from equimd import __version__

        typer.echo(f"equimd {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of a failure (also EQUIMD_DEBUG=1).")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Do I need an equivariant potential? Train both kinds, run MD with them, and measure the answer."""


app.command("compare")(compare.compare)
app.command("train")(train.train)
app.command("md")(md.md)
app.command("evaluate")(evaluate.evaluate)
app.command("equivariance")(equivariance.equivariance)
app.command("throughput")(throughput.throughput)
app.command("check")(check.check)
app.command("report")(report.report)
app.command("info")(info.info)
app.add_typer(data.app, name="data")


def main() -> None:
    """The console script."""
    app()
