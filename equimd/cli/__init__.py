"""The command line: one module per command, each parses and calls, nothing else.

Exit codes: 0 done, 1 failed, 2 bad input. Whatever goes wrong is said in one line on standard error; EQUIMD_DEBUG=1
shows the traceback. Heavy libraries are imported inside the commands, so that ``equimd --help`` is quick.
"""

import errno
import os
import sys
import warnings

import typer

from equimd.cli import compare, data, equivariance, evaluate, info, md, report, throughput, train
from equimd.errors import InputError

app = typer.Typer(
    name="equimd",
    help="Equivariant and unconstrained potentials, compared along your own molecular dynamics.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for module in (compare, train, md, equivariance, evaluate, throughput, report, info):
    app.command(module.__name__.rsplit(".", 1)[1])(module.command)
app.add_typer(data.app, name="data")


def main(arguments: list[str] | None = None) -> None:
    """Run a command and leave with its exit code."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run a command; its exit code."""
    debug = bool(os.environ.get("EQUIMD_DEBUG"))
    warnings.showwarning = _show_warning  # this process is ours: one line per warning, like everything else
    try:
        code = app(arguments, standalone_mode=False)
    except InputError as error:
        if debug:
            raise
        return _complain(str(error), 2)
    except typer.TyperException as error:  # an argument that typer refuses
        return _complain(error.format_message(), 2)
    except (typer.Abort, KeyboardInterrupt):
        return _complain("interrupted; what was written stays, and --resume goes on where there is one", 1)
    except OSError as error:
        if debug:
            raise
        hint = "; free some space and run again, with --resume where there is one" if _is_full(error) else ""
        where = f" ({error.filename})" if error.filename else ""
        return _complain(f"{error.strerror or error}{where}{hint}", 1)
    except Exception as error:
        if debug:
            raise
        return _complain(f"{type(error).__name__}: {error} (EQUIMD_DEBUG=1 shows where)", 1)
    return code if isinstance(code, int) else 0


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _complain(message: str, code: int) -> int:
    print(f"equimd: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    if issubclass(category, UserWarning) and not issubclass(category, DeprecationWarning):
        print(f"equimd: warning: {' '.join(str(message).split())}", file=sys.stderr)
