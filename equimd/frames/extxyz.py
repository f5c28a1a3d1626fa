"""Reads extended XYZ, plain or gzipped. The writer is in `xyz_writer`.

Format: https://github.com/libAtoms/extxyz. Columns have the meaning that they have for ASE: `move_mask` becomes
constraints, `masses`, `tags`, `momenta`, `initial_charges` and `initial_magmoms` are those of the atoms, `charge` is
a result. `mass` is read as masses, in amu or in QUIP's unit. Other columns, velocities among them, stay in `arrays`
as they are.
"""

import gzip
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import IO

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms, FixCartesian
from ase.data import atomic_masses, atomic_numbers

from equimd.errors import InputError
from equimd.frames.comment import Text, lattice_of, pbc_of, split, value_of
from equimd.units import ASE_TIME_FS

_DEFAULT_PROPERTIES = "species:S:1:pos:R:3"
_BOOLEANS = {"T": True, "True": True, "true": True, "TRUE": True, "1": True}
_BOOLEANS |= {"F": False, "False": False, "false": False, "FALSE": False, "0": False}
_FIRST_LINE = 4096
_LONGEST_LINE, _LONGEST_COMMENT = 1 << 20, 1 << 24  # comment lines hold whole inputs of other programs
_IPI = re.compile(r"CELL[\[({](abcABC|H|GENH)|positions\{")
# Columns that ASE gives a meaning: shapes after the first axis, and the kinds of numbers.
_OF_ATOMS = {
    "masses": (((),), "fi"),
    "tags": (((),), "i"),
    "momenta": (((3,),), "fi"),
    "initial_charges": (((),), "fi"),
    "initial_magmoms": (((), (3,)), "fi"),
}
_QUIP_MASS = ASE_TIME_FS**2  # an amu in QUIP's unit of mass, eV fs² / Å²
_AMU = (0.3, 4.1)
"""Ratio of a mass in amu to that of the element: from muonium to hydrogen of repartitioned mass."""


def open_text(path: Path) -> IO[str]:
    """A text stream of a file, decompressed where its name ends in `.gz`."""
    return gzip.open(path, "rt", encoding="utf-8-sig") if path.suffix == ".gz" else open(path, encoding="utf-8-sig")


def iterate(
    path: Path,
    keep: Callable[[int, int], bool] | None = None,
    hear: Callable[[str, bool], None] | None = None,
) -> Iterator[Atoms | None]:
    """Frames as the file has them, labels still in `info` and `arrays`.

    If `keep` (index, number of atoms) says no, the lines are stepped over and None takes the frame's place. `hear` is
    given the comment line of every frame, before the frame comes, and whether it is stepped over.

    Raises:
        InputError: for a truncated or malformed file, with the frame.
    """
    with open_text(path) as stream:
        index = 0
        try:
            while (n_atoms := _atom_count(stream, f"{path}, frame {index}")) is not None:
                where = f"{path}, frame {index}"
                wanted = keep is None or keep(index, n_atoms)
                line = _comment_line(stream, where)
                if hear is not None:
                    hear(line, not wanted)
                if wanted:
                    yield _read_frame(line, stream, n_atoms, where)
                else:
                    _step_over(stream, n_atoms, where)
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
                _comment_line(stream, f"{path}, frame {frames}")
                _step_over(stream, n_atoms, f"{path}, frame {frames}")
                frames += 1
        except (EOFError, OSError, zlib.error, UnicodeDecodeError) as error:
            raise InputError(f"{path}, frame {frames}: cannot be read ({error}); accepted: a whole xyz file") from error
    return frames


def _atom_count(stream: IO[str], where: str) -> int | None:
    """Number of atoms from the first line of a frame; None at the end of the file."""
    line = stream.readline(_FIRST_LINE)
    while line and not line.strip():
        line = stream.readline(_FIRST_LINE)
    if not line:
        return None
    text = line.strip()
    try:
        n_atoms = int(text.replace("_", "-"))  # Python reads 1_0 as ten
    except ValueError:
        raise InputError(f"{where}: number of atoms is {text[:40]!r}; accepted: an integer") from None
    if not 0 <= n_atoms <= sys.maxsize:
        raise InputError(f"{where}: number of atoms is {text[:40]}; accepted: 0 or more, as many as there are")
    return n_atoms


def _comment_line(stream: IO[str], where: str) -> str:
    line = stream.readline(_LONGEST_COMMENT)
    if len(line) == _LONGEST_COMMENT:
        raise InputError(f"{where}: the comment line has {_LONGEST_COMMENT} characters or more; accepted: fewer")
    if not line:
        raise InputError(f"{where}: the file ends within it; accepted: a whole file")
    return line.strip()


def _lines(stream: IO[str], n: int, where: str) -> Iterator[str]:
    """The lines of n atoms; a file that ends before is no reason to go on asking."""
    k = -1
    for k, line in enumerate(islice(iter(partial(stream.readline, _LONGEST_LINE), ""), n)):
        if len(line) == _LONGEST_LINE:
            raise InputError(f"{where}: the line of atom {k} has {_LONGEST_LINE} characters or more; accepted: fewer")
        yield line
    if k + 1 < n:
        raise InputError(f"{where}: the file ends within it; accepted: {n} lines of atoms")


def _step_over(stream: IO[str], n_atoms: int, where: str) -> None:
    for _ in _lines(stream, n_atoms, where):
        pass


def _read_frame(line: str, stream: IO[str], n_atoms: int, where: str) -> Atoms:
    if _IPI.search(line):
        what = "the comment line is i-PI's, whose cell and units are not read"
        raise InputError(f"{where}: {what}; accepted: extended XYZ with Lattice= in Å")
    try:
        texts = _pairs(line)
        properties, lattice, pbc = (_take(texts, name) for name in ("properties", "lattice", "pbc"))
        info = {key: value_of(key, text) for key, text in texts.items()}
        cell = None if lattice is None else lattice_of(lattice)
        periodic = np.full(3, lattice is not None) if pbc is None else pbc_of(pbc)
    except ValueError as error:
        raise InputError(f"{where}: the comment line cannot be read: {error}") from None
    if cell is None and np.size(info.get("cell", ())) == 9:
        raise InputError(f"{where}: the comment line has cell= and no Lattice; accepted: the vectors as Lattice=")
    columns = _columns(_DEFAULT_PROPERTIES if properties is None else properties.text, where)
    width = sum(n for _, _, n in columns)
    rows = [line.split() for line in _lines(stream, n_atoms, where)]
    for k, row in enumerate(rows):
        if len(row) != width:
            raise InputError(f"{where}: atom {k} has {len(row)} columns; accepted: {width}")
    tokens = list(chain.from_iterable(rows))
    arrays = {}
    start = 0
    for name, kind, n in columns:
        arrays[name] = _column(tokens, start, n, width, kind, f"{where}: column {name!r}")
        start += n
    return _to_atoms(arrays, info, cell, periodic, where)


def _pairs(line: str) -> dict[str, Text]:
    """Texts by key; a line that says nothing of columns or cell may also be anything."""
    if "=" not in line:
        return {"comment": Text(line)} if line else {}
    try:
        return split(line)
    except ValueError:
        if "properties" in line.lower() or "lattice" in line.lower():
            raise
        return {"comment": Text(line)}


def _take(texts: dict[str, Text], name: str) -> Text | None:
    """Removes and returns the value of a key in any case.

    Raises:
        ValueError: if spellings in two cases have different values.
    """
    spelled = [key for key in texts if key.lower() == name]
    values = [texts.pop(key) for key in spelled]
    for key, value in zip(spelled[1:], values[1:], strict=True):
        if value.text.split() != values[0].text.split():
            raise ValueError(f"{spelled[0]!r} and {key!r} differ; accepted: one of them")
    return values[0] if values else None


def _columns(properties: str, where: str) -> list[tuple[str, str, int]]:
    """(name, kind, width) of each property in `name:kind:width:...`."""
    fields = properties.split(":")
    columns = list(zip(fields[::3], fields[1::3], fields[2::3], strict=False))
    usable = [bool(name) and kind in tuple("RISL") and n.isdecimal() and int(n) > 0 for name, kind, n in columns]
    if len(fields) % 3 or not all(usable):
        accepted = "name:R|I|S|L:width, joined by colons"
        raise InputError(f"{where}: Properties is {properties[:200]!r}; accepted: {accepted}")
    names = [name for name, _, _ in columns]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"{where}: Properties names {twice[0]!r} twice; accepted: each column once")
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
            values = np.array([[_BOOLEANS[token] for token in part] for part in parts], dtype=bool)
        else:
            values = np.array(parts)
    except (ValueError, OverflowError) as error:
        raise InputError(f"{where}: {error}; accepted: numbers") from None
    except KeyError as error:
        raise InputError(f"{where}: {error} is neither true nor false; accepted: T or F") from None
    return values[0] if n == 1 else np.ascontiguousarray(values.T)


def _to_atoms(arrays: dict[str, np.ndarray], info: dict, cell: np.ndarray | None, pbc: np.ndarray, where: str) -> Atoms:
    symbols = _first(arrays, ("species", "symbols", "element"))
    numbers = _first(arrays, ("Z", "numbers", "atomic_numbers"))
    positions = _first(arrays, ("pos", "positions"))
    if positions is None or (symbols is None and numbers is None):
        raise InputError(f"{where}: Properties lack species or pos; accepted: species:S:1:pos:R:3:...")
    if positions.ndim != 2 or positions.shape[1] != 3 or positions.dtype.kind not in "fi":
        raise InputError(f"{where}: positions are not three numbers for each atom; accepted: pos:R:3")
    if numbers is None:
        if symbols is None or symbols.ndim != 1:
            raise InputError(f"{where}: species takes several columns; accepted: species:S:1")
        numbers = np.array(_numbers_of(symbols.astype(str), where), dtype=np.int64)
    if numbers.ndim != 1 or numbers.dtype.kind != "i" or (numbers < 0).any():
        raise InputError(f"{where}: atomic numbers are not one whole number for each atom; accepted: Z:I:1")
    clash = next((name for name in ("numbers", "positions") if name in arrays), None)
    if clash is not None:
        raise InputError(f"{where}: there are two columns for {clash}; accepted: one")
    atoms = Atoms(numbers, positions=positions, cell=cell, pbc=pbc, info=info)
    move_mask = arrays.pop("move_mask", None)
    _rename(arrays, atoms, where)
    for name, values in arrays.items():
        shapes, kinds = _OF_ATOMS.get(name, ((values.shape[1:],), values.dtype.kind))
        if values.shape[1:] not in shapes or values.dtype.kind not in kinds:
            what = f"{values.dtype.name} of shape {values.shape}"
            raise InputError(f"{where}: column {name!r} is {what}; accepted: what ASE writes under this name")
        atoms.new_array(name, values, dtype=np.float64 if kinds == "fi" else None)
    if move_mask is not None:
        atoms.set_constraint(constraints_of(move_mask, where))
    return atoms


def _first(arrays: dict[str, np.ndarray], names: tuple[str, ...]) -> np.ndarray | None:
    return next((arrays.pop(name) for name in names if name in arrays), None)


def _rename(arrays: dict[str, np.ndarray], atoms: Atoms, where: str) -> None:
    """ASE calls the charges of a calculator `charge`; libAtoms calls masses `mass`, QUIP in units of its own."""
    if "charge" in arrays and "charges" not in arrays:
        arrays["charges"] = arrays.pop("charge")
    key = next((name for name in arrays if name.lower() in ("mass", "masses") and name != "masses"), None)
    mass = None if key is None else arrays[key]
    if key is not None and mass is not None and "masses" not in arrays and mass.ndim == 1 and mass.dtype.kind in "fi":
        known = np.clip(atoms.numbers, 0, len(atomic_masses) - 1)
        ratio = mass / atomic_masses[known]
        for unit in (1.0, _QUIP_MASS):
            if ((ratio / unit > _AMU[0]) & (ratio / unit < _AMU[1])).all():
                arrays["masses"] = arrays.pop(key) / unit
                return
        worst = int(np.argmax(np.abs(np.log(np.clip(ratio, 1e-9, None)))))
        raise InputError(
            f"{where}: column {key!r} gives atom {worst} a mass of {mass[worst]:g}; accepted: masses in amu"
        )


def constraints_of(move_mask: np.ndarray, where: str) -> list[FixAtoms | FixCartesian]:
    """Constraints of a mask (N,) or (N, 3) that is true where an atom may move: what ASE's reader makes, in few."""
    if move_mask.dtype.kind not in "bi" or (move_mask.ndim == 2 and move_mask.shape[1] != 3):
        raise InputError(f"{where}: move_mask is not one or three of T and F for each atom; accepted: move_mask:L:1")
    fixed = ~move_mask.astype(bool)
    if fixed.ndim == 1:
        fixed = np.repeat(fixed[:, None], 3, axis=1)
    constraints: list[FixAtoms | FixCartesian] = []
    for mask in np.unique(fixed, axis=0):
        indices = np.flatnonzero((fixed == mask).all(axis=1))
        if mask.all():
            constraints.insert(0, FixAtoms(indices=indices))
        elif mask.any():
            constraints.append(FixCartesian(indices, mask=mask))
    return constraints


def _numbers_of(symbols: np.ndarray, where: str) -> list[int]:
    try:
        return [atomic_numbers[symbol] for symbol in symbols.tolist()]
    except KeyError:
        pass
    numbers = []
    for symbol in symbols.tolist():
        number = int(symbol) if symbol.isdecimal() and len(symbol) < 4 else atomic_numbers.get(symbol.capitalize())
        if number is None or number > 118:
            raise InputError(f"{where}: species {symbol[:40]!r} is no element; accepted: chemical symbols")
        numbers.append(number)
    return numbers
