"""Extended XYZ, plain or gzipped: a fast reader, and a writer whose gzip bytes depend on the frames alone.

Format: https://github.com/libAtoms/extxyz. Comment lines are parsed by ASE; the columns here, ten times as fast.
"""

import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers
from ase.io.extxyz import key_val_str_to_dict

from equimd import origin
from equimd.errors import InputError

_DEFAULT_PROPERTIES = "species:S:1:pos:R:3"
_TRUE = ("T", "True", "true", "1")


def open_text(path: Path) -> IO[str]:
    """A text stream of a file, decompressed where its name ends in `.gz`."""
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8")


def iterate(path: Path, keep: Callable[[int, int], bool] | None = None) -> Iterator[Atoms | None]:
    """Frames as the file has them, labels still in `info` and `arrays`.

    Where `keep` (index, number of atoms) says no, the lines are stepped over and None takes the frame's place.

    Raises:
        InputError: for a truncated or malformed file, with the frame.
    """
    with open_text(path) as stream:
        index = 0
        try:
            while (n_atoms := _atom_count(stream, f"{path}, frame {index}")) is not None:
                if keep is None or keep(index, n_atoms):
                    yield _read_frame(stream, n_atoms, f"{path}, frame {index}")
                else:
                    _step_over(stream, n_atoms, f"{path}, frame {index}")
                    yield None
                index += 1
        except (EOFError, OSError, zlib.error, UnicodeDecodeError) as error:
            raise InputError(f"{path}, frame {index}: cannot be read ({error}); accepted: a whole xyz file") from error


def count(path: Path) -> int:
    """Number of frames, by stepping over their lines.

    Raises:
        InputError: for a truncated or malformed file, with the frame.
    """
    frames = 0
    with open_text(path) as stream:
        try:
            while (n_atoms := _atom_count(stream, f"{path}, frame {frames}")) is not None:
                _step_over(stream, n_atoms, f"{path}, frame {frames}")
                frames += 1
        except (EOFError, OSError, zlib.error, UnicodeDecodeError) as error:
            raise InputError(f"{path}, frame {frames}: cannot be read ({error}); accepted: a whole xyz file") from error
    return frames


def _atom_count(stream: IO[str], where: str) -> int | None:
    """Number of atoms from the first line of a frame; None at the end of the file."""
    line = stream.readline()
    while line and not line.strip():
        line = stream.readline()
    if not line:
        return None
    try:
        n_atoms = int(line)
    except ValueError:
        raise InputError(f"{where}: number of atoms is {line.strip()[:40]!r}; accepted: an integer") from None
    if n_atoms < 0:
        raise InputError(f"{where}: number of atoms is {n_atoms}; accepted: 0 or more")
    return n_atoms


def _step_over(stream: IO[str], n_atoms: int, where: str) -> None:
    for _ in range(n_atoms + 1):
        if not stream.readline():
            raise InputError(f"{where}: the file ends within it; accepted: a whole file")


def _read_frame(stream: IO[str], n_atoms: int, where: str) -> Atoms:
    info = _comment(stream.readline().strip())
    columns = _columns(str(info.pop("Properties", _DEFAULT_PROPERTIES)), where)
    width = sum(n for _, _, n in columns)
    lines = [stream.readline() for _ in range(n_atoms)]
    tokens = "".join(lines).split()
    if len(tokens) != n_atoms * width:
        if lines and not lines[-1]:
            raise InputError(f"{where}: the file ends within it; accepted: {n_atoms} lines of atoms")
        short = next((n for n, line in enumerate(lines) if len(line.split()) != width), 0)
        raise InputError(f"{where}: atom {short} has {len(lines[short].split())} columns; accepted: {width}")
    arrays = {}
    start = 0
    for name, kind, n in columns:
        arrays[name] = _column(tokens, start, n, width, kind, f"{where}: column {name!r}")
        start += n
    return _to_atoms(arrays, info, where)


def _comment(line: str) -> dict:
    """Key-value pairs of a comment line; free text stays one value."""
    if "=" not in line:
        return {"comment": line} if line else {}
    return key_val_str_to_dict(line)


def _columns(properties: str, where: str) -> list[tuple[str, str, int]]:
    """(name, kind, width) of each property in `name:kind:width:...`."""
    fields = properties.split(":")
    columns = list(zip(fields[::3], fields[1::3], fields[2::3], strict=False))
    if len(fields) % 3 or any(kind not in "RISL" or not n.isdigit() for _, kind, n in columns):
        raise InputError(f"{where}: Properties={properties!r}; accepted: name:R|I|S|L:width, joined by colons")
    return [(name, kind, int(n)) for name, kind, n in columns]


def _column(tokens: list[str], start: int, n: int, width: int, kind: str, where: str) -> np.ndarray:
    """One property, (N,) or (N, n)."""
    parts = [tokens[start + column :: width] for column in range(n)]
    try:
        if kind == "R":
            values = np.array([list(map(float, part)) for part in parts], dtype=np.float64)
        elif kind == "I":
            values = np.array([list(map(int, part)) for part in parts], dtype=np.int64)
        elif kind == "L":
            values = np.array([[token in _TRUE for token in part] for part in parts], dtype=bool)
        else:
            values = np.array(parts)
    except ValueError as error:
        raise InputError(f"{where}: {error}; accepted: numbers") from None
    return values[0] if n == 1 else np.ascontiguousarray(values.T)


def _to_atoms(arrays: dict[str, np.ndarray], info: dict, where: str) -> Atoms:
    symbols = next((arrays.pop(name) for name in ("species", "symbols", "element") if name in arrays), None)
    numbers = next((arrays.pop(name) for name in ("Z", "numbers", "atomic_numbers") if name in arrays), None)
    positions = next((arrays.pop(name) for name in ("pos", "positions") if name in arrays), None)
    if positions is None or (symbols is None and numbers is None):
        raise InputError(f"{where}: Properties lack species or pos; accepted: species:S:1:pos:R:3:...")
    if numbers is None and symbols is not None:
        numbers = _numbers_of(symbols, where)
    lattice = info.pop("Lattice", None)
    if lattice is not None and np.shape(lattice) != (3, 3):
        raise InputError(f"{where}: Lattice has {np.size(lattice)} numbers; accepted: 9")
    pbc = info.pop("pbc", lattice is not None)
    # ASE's parser fills matrices column by column, so the rows of the file are the columns here.
    cell = None if lattice is None else np.asarray(lattice, dtype=np.float64).T
    atoms = Atoms(numbers, positions=positions, cell=cell, pbc=pbc, info=info)
    if "initial_charges" in arrays:
        atoms.set_initial_charges(arrays.pop("initial_charges"))
    for name, values in arrays.items():
        atoms.new_array(name, values)
    return atoms


def _numbers_of(symbols: np.ndarray, where: str) -> list[int]:
    try:
        return [atomic_numbers[symbol] for symbol in symbols.tolist()]
    except KeyError:
        pass
    numbers = []
    for symbol in symbols.tolist():
        number = int(symbol) if symbol.isdigit() else atomic_numbers.get(symbol.capitalize())
        if number is None or number > 118:
            raise InputError(f"{where}: species {symbol!r} is no element; accepted: chemical symbols")
        numbers.append(number)
    return numbers


def write(path: Path, frames: Iterable[Atoms]) -> None:
    """Write frames through a temporary name; `.gz` is compressed without a time stamp, so equal frames, equal bytes."""
    from ase.io.extxyz import write_extxyz

    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as raw:
            if path.suffix == ".gz":
                with (
                    gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed,
                    io.TextIOWrapper(packed, encoding="utf-8") as text,
                ):
                    for atoms in frames:
                        write_extxyz(text, [origin.stated_in_info(atoms)])
            else:
                with io.TextIOWrapper(raw, encoding="utf-8", write_through=True) as text:
                    for atoms in frames:
                        write_extxyz(text, [origin.stated_in_info(atoms)])
                    text.flush()
                    os.fsync(raw.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
