"""Standard output and standard error: characters that they can write, and JSON that stands alone.

``--json -`` promises that standard output holds JSON and nothing else. Libraries print there as well, in Python and in
C. So file descriptor 1 is lent to standard error while a command works, and the JSON goes to where it pointed before.
"""

import codecs
import contextlib
import ctypes
import os
import re
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any, TextIO

from equimd.errors import InputError

_SPELLED = {"→": "->", "–": "-", "—": "-", "…": "...", "•": "*", "±": "+-", "×": "x", "·": ".", "µ": "u", "μ": "u"}
_SPELLED |= {"≥": ">=", "≤": "<=", "−": "-", "′": "'", "’": "'", "━": "-", "─": "-", "╸": "-", "╺": "-"}
# Columns of a table that is written to a file: none of ours is as wide.
_WIDE = 10_000

_session: contextlib.ExitStack | None = None
_alone: TextIO | None = None


@contextlib.contextmanager
def speakable() -> Iterator[None]:
    """Both streams spell out what their encoding lacks (Å as A), in place of an error after the work is done."""
    codecs.register_error("equimd", _spell)
    changed = []
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # no stream, one of another kind, or closed
            changed.append((stream, stream.errors))
            stream.reconfigure(errors="equimd")  # type: ignore[union-attr]
    try:
        yield
    finally:
        for stream, errors in changed:
            with contextlib.suppress(AttributeError, OSError, ValueError):
                stream.reconfigure(errors=errors)  # type: ignore[union-attr]


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_spelled(character) for character in error.object[error.start : error.end]), error.end


def _spelled(character: str) -> str:
    plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode("ascii")
    return _SPELLED.get(character) or plain or "?"


@contextlib.contextmanager
def session() -> Iterator[None]:
    """While a command works; what ``keep_for_json`` did is undone after it."""
    global _session
    with contextlib.ExitStack() as _session:
        try:
            yield
        finally:
            stack, _session = _session, None
            stack.close()


def keep_for_json() -> None:
    """Until the command ends, standard output belongs to ``write_json``; what is printed goes to standard error."""
    if sys.stdout is None:
        raise InputError("--json is -, but standard output is closed; accepted is a file")
    if _session is not None and _alone is None:
        _session.enter_context(_lent_to_stderr())


@contextlib.contextmanager
def _lent_to_stderr() -> Iterator[None]:
    global _alone
    stream, descriptor, kept = sys.stdout, _descriptor(sys.stdout), None
    stream.flush()
    _alone = out = stream
    if descriptor is not None:
        _flush_c()  # what was printed before
        kept = os.dup(descriptor)
        _alone = out = open(kept, "w", encoding="ascii", newline="\n")  # noqa: SIM115 (closed below)
        target = _descriptor(sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY) if target is None else target, descriptor)
    if sys.stderr is not None:
        sys.stdout = sys.stderr
    try:
        yield
    finally:
        sys.stdout = stream
        if descriptor is not None and kept is not None:
            _flush_c()  # what C libraries hold back would follow the JSON
            os.dup2(kept, descriptor)
            with contextlib.suppress(OSError):  # whoever read it has gone
                out.close()
        _alone = None


def write_json(text: str) -> None:
    """Write JSON to standard output, in ASCII: every terminal and every pipe has that."""
    out = _alone or sys.stdout
    out.write(re.sub(r"[^\x00-\x7f]+", lambda found: _escaped(found[0]), text) + "\n")
    out.flush()


def _escaped(text: str) -> str:
    units = text.encode("utf-16-be")
    return "".join(f"\\u{units[k]:02x}{units[k + 1]:02x}" for k in range(0, len(units), 2))


def show(renderable: Any) -> None:
    """Print a table or text of rich; to a file, in lines as long as they need."""
    from rich.console import Console

    terminal = sys.stdout is not None and sys.stdout.isatty()
    Console(highlight=False, soft_wrap=True, width=None if terminal else _WIDE).print(renderable)


def _descriptor(stream: Any) -> int | None:
    """The file descriptor of a stream; None for one in memory."""
    try:
        return stream.fileno()
    except (AttributeError, OSError, ValueError):
        return None


def _flush_c() -> None:
    with contextlib.suppress(Exception):
        ctypes.CDLL(None if os.name == "posix" else "ucrtbase").fflush(None)
