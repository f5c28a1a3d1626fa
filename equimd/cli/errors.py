"""What a failure looks like: one line on stderr and an exit code; 1 where work failed, 2 where the input was bad."""

import errno
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

from typer import Abort, Exit
from typer.core import TyperGroup

from equimd.cli.output import session, speakable
from equimd.errors import FailedError, InputError, KernelWarning

FAILED, BAD_INPUT = 1, 2
# What typer returns in place of KeyboardInterrupt.
INTERRUPTED = 130


class Commands(TyperGroup):
    """The group of commands, with our way to report errors in place of a traceback or a panel."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> Any:
        """Run a command; always ends in SystemExit."""
        arguments = sys.argv[1:] if args is None else list(args)
        debug = "--debug" in arguments or os.environ.get("EQUIMD_DEBUG", "") not in ("", "0")
        extra["standalone_mode"] = False
        with speakable():
            self._run(arguments, debug, extra)

    def _run(self, arguments: list[str], debug: bool, extra: dict[str, Any]) -> Any:
        try:
            with _plain_warnings(), session():
                code = super().main(arguments, "equimd", **extra)
                _flush()
        except KeyboardInterrupt:
            code = INTERRUPTED
        except Exception as error:
            if debug and not _is_usage(error):
                raise
            sys.exit(_report(error))
        if code == INTERRUPTED:
            _say("error: interrupted; files written so far are whole and stay")
            code = FAILED
        sys.exit(code if isinstance(code, int) else 0)


def _report(error: Exception) -> int:
    if isinstance(error, Exit):
        return error.exit_code
    if isinstance(error, Abort):
        _say("error: interrupted; files written so far are whole and stay")
        return FAILED
    if _is_usage(error):
        context = getattr(error, "ctx", None)
        if type(error).__name__ == "NoArgsIsHelpError" and context is not None:
            print(context.get_help(), file=sys.stderr)
            return BAD_INPUT
        where = f" (see {context.command_path} --help)" if context is not None else ""
        _say(f"error: {error.format_message().rstrip('.')}{where}")  # type: ignore[attr-defined]
        return BAD_INPUT
    if isinstance(error, InputError):
        _say(f"error: {error}")
        return BAD_INPUT
    if isinstance(error, FailedError):
        _say(f"error: {error}")
        return FAILED
    if isinstance(error, BrokenPipeError):
        # Whoever read our output has stopped; say nothing, and let the interpreter's own flush hit nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        _say(f"error: no space left on the disk{where}; make room and run again, files already written are whole")
        return FAILED
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        _say(f"error: the name {str(error.filename)[:60]}… is longer than this system allows; give a shorter one")
        return BAD_INPUT
    kind = type(error).__name__
    _say(f"error: {kind}: {error or 'no message'} (EQUIMD_DEBUG=1 or equimd --debug shows where)")
    return FAILED


def _is_usage(error: Exception) -> bool:
    """Whether the command line could not be parsed; by duck, as typer brings its own copy of click or uses the real."""
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _say(text: str) -> None:
    """One line, whatever the message holds."""
    print(f"equimd: {' '.join(text.split())}", file=sys.stderr)


@contextmanager
def _plain_warnings() -> Any:
    """Warnings meant for users as one line on stderr; those meant for developers not at all."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        _say(f"warning: {message}")

    with warnings.catch_warnings():
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning, RuntimeWarning):
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("default", category=UserWarning)
        warnings.filterwarnings("default", category=KernelWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch|e3nn|ase|openmm|mdtraj")
        warnings.showwarning = show
        yield
