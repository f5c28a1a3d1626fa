"""Labelled sets in ASE databases, fairchem's `.aselmdb` among them, and in whatever else ASE reads."""

import json
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from equimd.errors import InputError
from equimd.frames.labeller import Labeller
from equimd.frames.labels import STRESS_NAMES, VIRIAL_NAMES, LabelKeys, UnitSpec

# Columns of a row that ASE wants as arrays, which JSON may hold as lists.
_ROW_ARRAYS = {"numbers", "positions", "cell", "pbc", "forces", "stress", "momenta", "charges", "magmoms"}
_ROW_ARRAYS |= {"initial_charges", "initial_magmoms", "masses", "tags", "dipole"}
_ROWS_PER_PAGE = 1000


def iterate_database(path: Path, unit_spec: UnitSpec | None, keys: LabelKeys) -> Iterator[Atoms]:
    """Rows of an ASE database: labels from its calculator, key-value pairs, or data (where SchNetPack keeps them).

    SchNetPack's `_property_unit_dict` and `_distance_unit` are honoured where no units are given.

    Raises:
        InputError: for a file that is damaged, or no database.
    """
    with _open_database(path) as database:
        with _naming(f"{path}: the metadata"):
            labeller = Labeller(path, unit_spec or _database_units(path, dict(database.metadata), keys), keys)
        index, last = 0, 0
        while True:
            with _naming(f"{path}: a row from number {index} on"):  # ASE fetches at once whatever is selected
                rows = list(database.select(f"id>{last}", sort="id", limit=_ROWS_PER_PAGE))
            if not rows:
                labeller.finish()
                return
            for row in rows:
                where = f"{path}, row {index}"
                with _naming(where):
                    atoms = labeller.label(_frame_of_row(row, keys), where)
                yield atoms
                index, last = index + 1, row.id


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """What damaged values do to ASE is told in one line, with where they are."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, zlib.error) as error:
        what = f"{type(error).__name__}: {error}"
        raise InputError(f"{where} cannot be read ({what}); accepted: a whole database of ASE") from error


def _frame_of_row(row: Any, keys: LabelKeys) -> Atoms:
    """The atoms with their calculator's results, `info` of key-value pairs and data; data of all atoms are arrays."""
    atoms = row.toatoms()
    if atoms.calc is not None:
        atoms.calc.parameters.update(row.get("calculator_parameters") or {})
    atoms.info = dict(row.key_value_pairs)
    tensors = {*STRESS_NAMES, *VIRIAL_NAMES}  # of the shape of forces where there are three atoms
    for name, value in dict(row.data).items():
        try:
            array = np.asarray(value)
        except ValueError:  # of unequal lengths: no label
            atoms.info.setdefault(name, value)
            continue
        if array.shape == (len(atoms), 3) and name.lower() not in tensors and name not in (keys.stress, keys.virial):
            atoms.arrays[name] = array
        elif array.size == 1 and array.dtype.kind in "fiu":
            atoms.info[name] = array.item()
        elif array.dtype.kind in "fiu":
            atoms.info[name] = array
        else:
            atoms.info.setdefault(name, value)
    return atoms


def count_database(path: Path) -> int:
    """Number of rows."""
    with _open_database(path) as database:
        return database.count()


@contextmanager
def _open_database(path: Path) -> Iterator[Any]:
    from ase.db import connect

    try:
        yield connect(path)
    except sqlite3.OperationalError as error:
        raise InputError(
            f"{path}: cannot be opened or read now ({error}); is another program writing to it?"
        ) from error
    except sqlite3.DatabaseError as error:
        raise InputError(f"{path}: cannot be read ({error}); accepted: a whole database of ASE") from error


class LmdbSet:
    """Rows of `.aselmdb` files as fairchem's data sets have them: one file, or a folder of shards in order of name.

    The format is that of ase-db-backends: LMDB with keys "1", "2", ... whose values are zlib-compressed JSON of the
    columns of an ASE row, "nextid" and "deleted_ids" beside them. Nothing is ever unpickled. Needs the package `lmdb`.
    """

    def __init__(self, path: Path, unit_spec: UnitSpec | None, keys: LabelKeys):
        self.path, self._units, self._keys = path, unit_spec, keys
        self.shards = lmdb_shards(path) if path.is_dir() else [path]
        try:
            import lmdb  # noqa: F401
        except ImportError:
            raise InputError(f'{path}: reading .aselmdb needs the package lmdb: pip install "equimd[lmdb]"') from None

    def count(self) -> int:
        """Number of rows, over all shards."""
        total = 0
        for shard in self.shards:
            with self._open(shard) as rows:
                total += len(self._ids(rows))
        return total

    def frames(self) -> Iterator[Atoms]:
        """Labelled frames, shard after shard."""
        from ase.db.row import AtomsRow

        for shard in self.shards:
            with self._open(shard) as rows:
                spec = self._units or _database_units(shard, self._entry(rows, "metadata") or {}, self._keys)
                labeller = Labeller(shard, spec, self._keys)
                for index, number in enumerate(self._ids(rows)):
                    where = f"{shard}, row {index}"
                    columns = self._entry(rows, str(number))
                    if not isinstance(columns, dict) or not {"numbers", "positions"} <= columns.keys():
                        raise InputError(f"{where}: lacks numbers or positions; accepted: rows of an ASE database")
                    for name in _ROW_ARRAYS & columns.keys():
                        columns[name] = np.asarray(columns[name])
                    try:
                        atoms = _frame_of_row(AtomsRow({**columns, "id": number}), self._keys)
                    except (KeyError, AttributeError, TypeError) as error:
                        raise InputError(f"{where}: lacks {error}; accepted: rows of an ASE database") from error
                    yield labeller.label(atoms, where)
                labeller.finish()

    @contextmanager
    def _open(self, shard: Path) -> Iterator[Any]:
        import lmdb

        try:
            with (
                lmdb.open(str(shard), subdir=False, readonly=True, lock=False) as environment,
                environment.begin() as rows,
            ):
                yield rows
        except (lmdb.Error, zlib.error, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise InputError(f"{shard}: cannot be read ({error}); accepted: a whole .aselmdb file") from error

    def _entry(self, rows: Any, key: str) -> Any:
        from ase.io.jsonio import decode

        value = rows.get(key.encode("ascii"))
        return None if value is None else decode(zlib.decompress(value).decode("utf-8"))

    def _ids(self, rows: Any) -> list[int]:
        deleted = set(self._entry(rows, "deleted_ids") or ())
        return [number for number in range(1, self._entry(rows, "nextid") or 1) if number not in deleted]


def lmdb_shards(folder: Path) -> list[Path]:
    """The `.aselmdb` files of a folder, in order of name."""
    return sorted(folder.glob("*.aselmdb"))


def _database_units(path: Path, metadata: dict, keys: LabelKeys) -> UnitSpec:
    properties = metadata.get("_property_unit_dict") or {}
    names = (keys.energy, "energy", "energy_U0", "E")
    energy = next((properties[name] for name in names if name in properties), None)
    if energy is None:
        return UnitSpec()
    lengths = {"Ang": "Å", "Angstrom": "Å", "angstrom": "Å", "Bohr": "Bohr", "bohr": "Bohr", "nm": "nm"}
    forces = str(properties.get(keys.forces or "forces", "")).rsplit("/", 1)
    energies = {"Ha": "Hartree", "kcal/mol": "kcal/mol"}
    try:
        return UnitSpec(
            energy=str(energies.get(energy, energy)),
            length=lengths.get(metadata.get("_distance_unit", "Ang"), "Å"),
            force_energy=energies.get(forces[0], forces[0]) if len(forces) == 2 else None,
            force_length=lengths.get(forces[1], forces[1]) if len(forces) == 2 else None,
        )
    except InputError as error:
        raise InputError(f"{path}: {error}; or say units=UnitSpec(...)") from None


def iterate_ase(path: Path, unit_spec: UnitSpec | None, keys: LabelKeys) -> Iterator[Atoms]:
    """Frames of any file that ASE reads, `.traj` included.

    Raises:
        InputError: if ASE does not know the format or cannot read the file.
    """
    from ase.io import iread

    frames = iread(path, index=":")
    index, labeller = 0, Labeller(path, unit_spec, keys)
    while True:
        try:
            atoms = next(frames)
        except StopIteration:
            labeller.finish()
            return
        except Exception as error:  # ASE's readers raise whatever they stumble over
            raise InputError(
                f"{path}, frame {index}: ASE cannot read it ({type(error).__name__}: {str(error)[:120]}); accepted:"
                " .xyz .extxyz .db .traj .npz .h5 .h5md .dcd .xtc .trr, or a format of ASE"
            ) from error
        yield labeller.label(atoms, f"{path}, frame {index}")
        index += 1
