"""The base of every result object: frozen, JSON by pydantic, with a schema version and the machine it was made on."""

import datetime
import errno
import os
import platform
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

SCHEMA_VERSION = 1

# What the system says where there is no room for a file.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

# A float that may be NaN (an error bar of one sample): NaN in Python, null in JSON, and read back as NaN.
Number = Annotated[float, BeforeValidator(lambda value: float("nan") if value is None else value)]


class Block(BaseModel):
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
    packages = ("equimd", "torch", "e3nn", "numpy", "numba", "triton", "ase", "openmm", "vesin", "tblite")
    return Provenance(
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        python=platform.python_version(),
        processor=_processor(),
        n_threads=n_threads or _n_threads(),
        versions={name: _version(name) for name in packages} | extra_versions,
    )
