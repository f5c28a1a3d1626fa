"""The base of every result object: frozen, JSON by pydantic, with a schema version and the machine it was made on.

What is read from files that others may have written goes through ``parse_json`` and ``check_plain``: they bound what
comes after them.
"""

import datetime
import errno
import hashlib
import json
import math
import os
import platform
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Never

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from equimd.errors import InputError

SCHEMA_VERSION = 1

# What the system says where there is no room for a file.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

# A float that may be NaN (an error bar of one sample): NaN in Python, null in JSON, and read back as NaN.
Number = Annotated[float, BeforeValidator(lambda value: float("nan") if value is None else value)]


# Of nested values that are read from files. Our own go four levels deep.
MAX_DEPTH, _MAX_VALUES = 32, 500_000
_MAX_INTEGER = 2**63


class Checked(BaseModel):
    """A model whose constructor refuses bad values by InputError, in one line; ``model_validate`` is pydantic's own."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            message = explain(error)
            if message.startswith("unknown key"):
                message = f"{message} of {type(self).__name__}; accepted are {', '.join(type(self).model_fields)}"
            raise InputError(message) from error

    # pydantic then validates a nested model itself, and an error inside keeps its place in the whole.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


def explain(error: ValidationError) -> str:
    """The first problem that pydantic found, in one line."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"the key {where!r} is missing"
    if first["type"] == "extra_forbidden":
        return f"unknown key {where!r}"
    value = " ".join(repr(first["input"]).split())
    shown = value if len(value) <= 60 else f"{value[:60]}…"
    return f"{where} is {shown}: {message}" if where else message


class Block(Checked):
    """A frozen part of a result; unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")


class Provenance(Block):
    """What every measurement records: date, machine, versions."""

    date: str
    python: str
    processor: str
    n_threads: int
    versions: dict[str, str]


class Result(Block):
    """A result that is written as a file of its own."""

    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """The result as indented JSON text."""
        return self.model_dump_json(indent=2)

    def write(self, path: str | Path) -> None:
        """Write the JSON to ``path`` through a temporary name, so that a crash leaves no half file."""
        write_text_atomically(Path(path), self.to_json() + "\n")


def parse_json(text: str, finite: bool = True) -> Any:
    """JSON that says one thing: no key twice, bounded as ``check_plain`` bounds it; ``finite`` refuses NaN as well.

    Raises:
        ValueError: what is wrong, in one line.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} is there twice")
        return found

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    check_plain(value, finite)
    return value


def check_plain(value: Any, finite: bool = True) -> None:
    """Refuse nested values (as of JSON or YAML) that are too deep, too many, no plain values, or not finite.

    Raises:
        ValueError: what is wrong, in one line.
    """

    def refuse(what: str) -> Never:
        raise ValueError(what)

    waiting, n_values = [(value, 1)], 0
    while waiting:
        one, depth = waiting.pop()
        n_values += 1
        if depth > MAX_DEPTH or n_values > _MAX_VALUES:
            refuse(f"it is nested deeper than {MAX_DEPTH}, or holds more than {_MAX_VALUES} values")
        if isinstance(one, dict):
            waiting += [(part, depth + 1) for pair in one.items() for part in pair]
        elif isinstance(one, list):
            waiting += [(part, depth + 1) for part in one]
        elif isinstance(one, float):
            if finite and not math.isfinite(one):
                refuse(f"{one} is not finite")
        elif isinstance(one, int):
            if abs(one) >= _MAX_INTEGER:
                refuse("an integer does not fit into 64 bits")
        elif isinstance(one, str):
            try:
                one.encode("utf-8")
            except UnicodeEncodeError:
                refuse("a text holds half of a surrogate pair")
        elif one is not None and not isinstance(one, datetime.date):  # YAML knows dates
            refuse(f"a value is a {type(one).__name__}")


def content_hash(content: Any) -> str:
    """SHA-256 of nested values: of their JSON with sorted keys, whatever file they come from."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def write_text_atomically(path: Path, text: str) -> None:
    """Write text as ``write_bytes_atomically`` does."""
    write_bytes_atomically(path, text.encode("utf-8"))


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Write, fsync and rename; the old file stays whole until the new one is.

    Raises:
        OSError: which names the file, where it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@cache
def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        return f"{names[0]} ({os.cpu_count()} cores)"
    except (OSError, IndexError):
        return f"{platform.processor() or platform.machine()} ({os.cpu_count()} cores)"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _n_threads() -> int:
    """Threads torch computes with where it is loaded, else the cores there are."""
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch is not None else os.cpu_count() or 1


def provenance(n_threads: int | None = None, **extra_versions: Any) -> Provenance:
    """Date, processor, thread count and package versions of this process."""
    packages = ("equimd", "torch", "numpy", "llvmlite", "triton", "ase", "openmm", "vesin", "tblite")
    return Provenance(
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        python=platform.python_version(),
        processor=_processor(),
        n_threads=n_threads or _n_threads(),
        versions={name: _version(name) for name in packages} | extra_versions,
    )
