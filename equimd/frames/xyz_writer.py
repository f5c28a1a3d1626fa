"""Writes extended XYZ, plain or gzipped, that reads back equal here and in ASE; what cannot be written is named.

Columns have eight decimals, as ASE writes them, or ten digits if all their numbers are tiny. Results are written if
the calculator holds them for these very positions.
"""

import gzip
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms, FixCartesian

from equimd import origin
from equimd.errors import InputError
from equimd.frames.comment import format_pair
from equimd.frames.labels import ATOM_RESULTS, CONFIG_RESULTS, from_voigt
from equimd.frames.losses import Losses, fresh_results

_RESERVED_KEYS = ("lattice", "pbc", "properties")
_RESERVED_COLUMNS = ("species", "symbols", "element", "pos", "positions", "Z", "numbers", "atomic_numbers", "move_mask")
_TINY = 1e-5
"""Numbers below this would keep fewer than three digits of eight decimals."""


class FrameFormatter:
    """Frames as text; what cannot be written is warned about once for each file."""

    def __init__(self, name: str) -> None:
        self._losses = Losses(name, "extended XYZ")

    def format(self, atoms: Atoms, where: str) -> str:
        """The lines of a frame.

        Raises:
            InputError: if `info` or `arrays` hold another value than the calculator under the same name.
        """
        info, arrays = dict(origin.stated_in_info(atoms).info), dict(atoms.arrays)
        for name, value in fresh_results(atoms, self._losses).items():
            store = info if name in CONFIG_RESULTS else arrays
            if name in store and not np.array_equal(store[name], value):
                kind = "info" if store is info else "arrays"
                what = f"the calculator and atoms.{kind} hold different values of {name!r}"
                raise InputError(f"{where}: {what}; accepted: one of them (del atoms.{kind}[{name!r}])")
            store[name] = value
        columns = self._columns(atoms, arrays)
        properties = ":".join(f"{name}:{kind}:{len(parts)}" for name, kind, _, parts in columns)
        pairs = self._pairs(atoms, info)
        if atoms.cell.array.any():
            lattice = " ".join(str(x) for x in atoms.cell.array.ravel())
            pairs.insert(0, f'Lattice="{lattice}"')
        pairs.insert(bool(atoms.cell.array.any()), f"Properties={properties}")
        pattern = " ".join(pattern for _, _, pattern, parts in columns for _ in parts) + "\n"
        rows = zip(*(part for _, _, _, parts in columns for part in parts), strict=True)
        return f"{len(atoms)}\n{' '.join(pairs)}\n" + "".join(pattern % row for row in rows)

    def _pairs(self, atoms: Atoms, info: dict[Any, Any]) -> list[str]:
        pairs = []
        for key, value in info.items():
            if key == "stress" and np.size(value) == 6:
                value = from_voigt(np.ravel(value))
            reserved = not isinstance(key, str) or key.lower() in _RESERVED_KEYS
            pair = None if reserved else format_pair(key, value)
            if pair is None:
                self._losses.add(f"the info {key!r} ({type(value).__name__})")
            else:
                pairs.append(pair)
        return [*pairs, 'pbc="' + " ".join("FT"[int(one)] for one in atoms.pbc) + '"']

    def _columns(self, atoms: Atoms, arrays: dict[str, np.ndarray]) -> list[tuple[str, str, str, list[list]]]:
        """(name, kind, pattern, numbers) of each column."""
        columns = [("species", "S", "%-2s", [list(atoms.symbols)]), _column("pos", atoms.positions)]
        mask = self._move_mask(atoms)
        if mask is not None:
            columns.append(_column("move_mask", mask))
        for name, values in arrays.items():
            if name in ("numbers", "positions"):
                continue
            written = "charge" if name == "charges" else name
            taken = written in _RESERVED_COLUMNS or written in [column[0] for column in columns]
            usable = isinstance(name, str) and name and not set(name) & set(":=\"'{}[]\\, \t\r\n")
            column = _column(written, values) if usable and not taken else None
            if column is None:
                self._losses.add(f"the array {name!r} ({values.dtype}, shape {values.shape})")
            else:
                columns.append(column)
        return columns

    def _move_mask(self, atoms: Atoms) -> np.ndarray | None:
        """True where an atom may move: (N,), or (N, 3) if single directions are fixed; None if all may."""
        mask = np.ones((len(atoms), 3), dtype=bool)
        for constraint in atoms.constraints:
            if isinstance(constraint, FixAtoms):
                mask[constraint.index] = False
            elif isinstance(constraint, FixCartesian):
                mask[constraint.index] &= ~np.asarray(constraint.mask, dtype=bool)
            else:
                self._losses.add(f"the constraint {type(constraint).__name__}")
        if mask.all():
            return None
        return mask[:, 0] if (mask == mask[:, :1]).all() else mask


def _column(name: str, values: np.ndarray) -> tuple[str, str, str, list[list]] | None:
    """A column, or None for what columns cannot hold."""
    values = np.asarray(values)
    if name in ATOM_RESULTS and values.ndim == 3:
        values = values.reshape(len(values), -1)
    if values.ndim not in (1, 2) or (values.ndim == 2 and values.shape[1] == 0):
        return None
    parts = [values.tolist()] if values.ndim == 1 else values.T.tolist()
    kind = values.dtype.kind
    if kind in "OU" and all(isinstance(one, str) and one.split() == [one] for part in parts for one in part):
        return name, "S", "%-2s" if kind == "U" else "%s", parts
    if kind in "iu":
        return name, "I", "%8d", parts
    if kind == "b":
        return name, "L", " %.1s", parts
    if kind == "f":
        largest = np.abs(values, where=np.isfinite(values), out=np.zeros_like(values)).max(initial=0.0)
        return name, "R", "%16.9e" if 0.0 < largest < _TINY else "%16.8f", parts
    return None


def write(path: Path, frames: Iterable[Atoms]) -> None:
    """Write frames through a temporary name; `.gz` is compressed without a time stamp, so equal frames, equal bytes."""
    temporary = path.with_name(path.name + ".tmp")
    formatter = FrameFormatter(str(path))
    try:
        with open(temporary, "wb") as raw:
            if path.suffix == ".gz":
                with (
                    gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed,
                    io.TextIOWrapper(packed, encoding="utf-8", newline="\n") as text,
                ):
                    for index, atoms in enumerate(frames):
                        text.write(formatter.format(atoms, f"{path}, frame {index}"))
            else:
                with io.TextIOWrapper(raw, encoding="utf-8", newline="\n", write_through=True) as text:
                    for index, atoms in enumerate(frames):
                        text.write(formatter.format(atoms, f"{path}, frame {index}"))
                    text.flush()
                    os.fsync(raw.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
