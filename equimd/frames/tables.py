"""Labelled sets in tables: npz in the layouts of rMD17 and sGDML, ASE databases, and whatever else ASE reads."""

import logging
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from equimd.errors import InputError
from equimd.frames.labels import LabelKeys, UnitSpec, attach_labels

# rMD17 (Christensen, von Lilienfeld, 2020) and sGDML (https://docs.sgdml.org): numbers, positions, energies, forces.
_LAYOUTS = (("nuclear_charges", "coords", "energies", "forces"), ("z", "R", "E", "F"))
RMD17_UNITS = UnitSpec(energy="kcal/mol", length="Å")


class NpzSet:
    """An npz file of one molecule or, with numbers (T, N), of several of one size.

    The file says nothing of its units unless it is sGDML's (`e_unit`, `r_unit`): without `unit_spec` they are those
    that rMD17 documents, kcal/mol and Å, with a notice.
    """

    def __init__(self, path: Path, unit_spec: UnitSpec | None, keys: LabelKeys):
        self.path, self._units, self._keys = path, unit_spec, keys

    def count(self) -> int:
        """Number of frames."""
        with self._open() as stored:
            return int(np.shape(stored[self._names(stored)[1]])[0])

    def frames(self) -> Iterator[Atoms]:
        """Labelled frames.

        Raises:
            InputError: if an array is missing or its shape does not fit.
        """
        with self._open() as stored:
            number_key, position_key, energy_key, force_key = self._names(stored)
            spec = self._resolve_units(stored)
            numbers, positions = stored[number_key], stored[position_key]
            energies = stored.get(energy_key)
            forces = stored.get(force_key)
        if positions.ndim != 3 or positions.shape[2] != 3:
            raise InputError(f"{self.path}: {position_key} has shape {positions.shape}; accepted: (frames, atoms, 3)")
        n_frames, n_atoms = positions.shape[:2]
        if numbers.shape not in ((n_atoms,), (n_frames, n_atoms)):
            raise InputError(f"{self.path}: {number_key} has shape {numbers.shape}; accepted: ({n_atoms},)")
        if energies is not None:
            energies = energies.reshape(-1)
        for name, array in ((energy_key, energies), (force_key, forces)):
            if array is not None and len(array) != n_frames:
                raise InputError(f"{self.path}: {name} has {len(array)} frames; accepted: {n_frames}")
        for k in range(n_frames):
            atoms = Atoms(numbers if numbers.ndim == 1 else numbers[k], positions=positions[k])
            if energies is not None:
                atoms.info["energy"] = energies[k]
            if forces is not None:
                atoms.arrays["forces"] = forces[k]
            yield attach_labels(atoms, spec, LabelKeys(), f"{self.path}, frame {k}")

    def _open(self) -> Any:
        try:
            return np.load(self.path, allow_pickle=False)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{self.path}: cannot be read ({error}); accepted: an npz file of arrays") from error

    def _names(self, stored: Any) -> tuple[str, str, str, str]:
        for number, position, energy, force in _LAYOUTS:
            if number in stored and position in stored:
                return number, position, self._keys.energy or energy, self._keys.forces or force
        raise InputError(
            f"{self.path}: has keys {', '.join(stored.files)}; accepted: {' '.join(_LAYOUTS[0])}, or z R E F"
        )

    def _resolve_units(self, stored: Any) -> UnitSpec:
        if self._units is not None:
            return self._units
        energy, length = (_text(stored[key]) if key in stored else None for key in ("e_unit", "r_unit"))
        if energy is not None and length is not None:
            length = {"Ang": "Å", "ang": "Å", "angstrom": "Å", "bohr": "Bohr"}.get(length, length)
            return UnitSpec(energy=energy, length=length)
        logging.getLogger("equimd").warning(
            "%s names no units: taken as kcal/mol and Å, as rMD17 documents; other units: UnitSpec", self.path
        )
        return RMD17_UNITS


def iterate_database(path: Path, unit_spec: UnitSpec | None, keys: LabelKeys) -> Iterator[Atoms]:
    """Rows of an ASE database: labels from its calculator, key-value pairs, or data (where SchNetPack keeps them).

    SchNetPack's `_property_unit_dict` and `_distance_unit` are honoured where no units are given.
    """
    from ase.db import connect

    database = connect(path)
    spec = unit_spec or _database_units(path, dict(database.metadata))
    for index, row in enumerate(database.select()):
        atoms = row.toatoms()
        atoms.info = dict(row.key_value_pairs)
        for name, value in dict(row.data).items():
            array = np.asarray(value)
            if array.shape == (len(atoms), 3):
                atoms.arrays[name] = array
            elif array.size == 1 and array.dtype.kind in "fiu":
                atoms.info[name] = array.item()
            elif array.dtype.kind in "fiu":
                atoms.info[name] = array
        yield attach_labels(atoms, spec, keys, f"{path}, row {index}")


def count_database(path: Path) -> int:
    """Number of rows."""
    from ase.db import connect

    return connect(path).count()


def _database_units(path: Path, metadata: dict) -> UnitSpec:
    properties = metadata.get("_property_unit_dict") or {}
    energy = next((properties[name] for name in ("energy", "energy_U0", "E") if name in properties), None)
    if energy is None:
        return UnitSpec()
    lengths = {"Ang": "Å", "Angstrom": "Å", "angstrom": "Å", "Bohr": "Bohr", "bohr": "Bohr", "nm": "nm"}
    forces = str(properties.get("forces", "")).rsplit("/", 1)
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


def iterate_ase(path: Path, unit_spec: UnitSpec, keys: LabelKeys) -> Iterator[Atoms]:
    """Frames of any file that ASE reads, `.traj` included.

    Raises:
        InputError: if ASE does not know the format or cannot read the file.
    """
    from ase.io import iread

    frames = iread(path, index=":")
    index = 0
    while True:
        try:
            atoms = next(frames)
        except StopIteration:
            return
        except Exception as error:  # ASE's readers raise whatever they stumble over
            raise InputError(
                f"{path}, frame {index}: ASE cannot read it ({type(error).__name__}: {str(error)[:120]}); accepted:"
                " .xyz .extxyz .db .traj .npz .h5 .h5md .dcd .xtc .trr, or a format of ASE"
            ) from error
        yield attach_labels(atoms, unit_spec, keys, f"{path}, frame {index}")
        index += 1


def _text(value: Any) -> str:
    value = value.item() if isinstance(value, np.ndarray) else value
    return value.decode() if isinstance(value, bytes) else str(value)
