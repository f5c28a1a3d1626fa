"""Labelled sets in npz files, in the layouts of rMD17 and sGDML, read from the archive a few rows at a time."""

import logging
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from equimd.errors import InputError
from equimd.frames.electrons import electron_kind
from equimd.frames.labeller import Labeller
from equimd.frames.labels import LabelKeys, UnitSpec, attach_labels

# rMD17 (Christensen, von Lilienfeld, 2020) and sGDML (https://docs.sgdml.org): numbers, positions, energies, forces.
_LAYOUTS = (("nuclear_charges", "coords", "energies", "forces"), ("z", "R", "E", "F"))
RMD17_UNITS = UnitSpec(energy="kcal/mol", length="Å")
_ROWS_PER_CHUNK = 1000


class NpzSet:
    """An npz file of one molecule or, with numbers (T, N), of several of one size.

    The file says nothing of its units unless it is sGDML's (`e_unit`, `r_unit`): without `unit_spec` they are those
    that rMD17 documents, kcal/mol and Å, with a notice.
    """

    def __init__(self, path: Path, unit_spec: UnitSpec | None, keys: LabelKeys):
        self.path, self._units, self._keys = path, unit_spec, keys

    def count(self) -> int:
        """Number of frames."""
        with self._open() as archive:
            return self._rows(archive, self._names(archive)[1]).shape[0]

    def frames(self, keep: Callable[[int, int], bool] | None = None) -> Iterator[Atoms | None]:
        """Labelled frames; None where ``keep`` (index, number of atoms) says no.

        Raises:
            InputError: if an array is missing or its shape does not fit.
        """
        with self._open() as archive:
            number_key, position_key, energy_key, force_key = self._names(archive)
            spec = self._resolve_units(archive)
            self._check_keys(archive, spec)
            positions = self._rows(archive, position_key)
            if len(positions.shape) != 3 or positions.shape[2] != 3:
                shape = positions.shape
                raise InputError(f"{self.path}: {position_key} has shape {shape}; accepted: (frames, atoms, 3)")
            n_frames, n_atoms = positions.shape[:2]
            numbers = self._rows(archive, number_key)
            if numbers.shape not in ((n_atoms,), (n_frames, n_atoms)):
                raise InputError(f"{self.path}: {number_key} has shape {numbers.shape}; accepted: ({n_atoms},)")
            columns = {"positions": positions}
            for label, name in (("energy", energy_key), ("forces", force_key)):
                if name in _members(archive):
                    columns[label] = self._rows(archive, name)
                    if columns[label].shape[:1] != (n_frames,):
                        found = columns[label].shape[0] if columns[label].shape else 1
                        raise InputError(f"{self.path}: {name} has {found} frames; accepted: {n_frames}")
            electrons = self._electrons(archive, n_frames)
            fixed = numbers.read(n_atoms) if len(numbers.shape) == 1 else None
            if fixed is None:
                columns["numbers"] = numbers
            for start in range(0, n_frames, _ROWS_PER_CHUNK):
                count = min(_ROWS_PER_CHUNK, n_frames - start)
                chunk = {label: rows.read(count) for label, rows in columns.items()}
                for k in range(count):
                    if keep is not None and not keep(start + k, n_atoms):
                        yield None
                        continue
                    atoms = Atoms(chunk["numbers"][k] if fixed is None else fixed, positions=chunk["positions"][k])
                    if "energy" in chunk:
                        atoms.info["energy"] = chunk["energy"][k].reshape(())
                    if "forces" in chunk:
                        atoms.arrays["forces"] = chunk["forces"][k]
                    atoms.info.update({name: values[start + k].item() for name, values in electrons.items()})
                    names = LabelKeys(finite=self._keys.finite)
                    yield attach_labels(atoms, spec, names, f"{self.path}, frame {start + k}")

    @contextmanager
    def _open(self) -> Iterator[zipfile.ZipFile]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                yield archive
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(f"{self.path}: cannot be read ({error}); accepted: an npz file of arrays") from error

    def _rows(self, archive: zipfile.ZipFile, name: str) -> "_Rows":
        try:
            return _Rows(archive, name)
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{self.path}: cannot be read ({error}); accepted: an npz file of arrays") from error

    def _names(self, archive: zipfile.ZipFile) -> tuple[str, str, str, str]:
        stored = _members(archive)
        for number, position, energy, force in _LAYOUTS:
            if number in stored and position in stored:
                return number, position, self._keys.energy or energy, self._keys.forces or force
        raise InputError(f"{self.path}: has keys {', '.join(stored)}; accepted: {' '.join(_LAYOUTS[0])}, or z R E F")

    def _check_keys(self, archive: zipfile.ZipFile, spec: UnitSpec) -> None:
        """A key that was asked for must be there, and be in the units that its name states."""
        Labeller(self.path, spec, self._keys)
        stored = _members(archive)
        for label, key in self._keys.named().items():
            if key.lower() == "none":
                continue
            if label not in ("energy", "forces"):
                raise InputError(f"{self.path}: the key {label} does not apply to npz; accepted: energy, forces")
            if key not in stored:
                near = get_close_matches(key, stored, n=1)
                accepted = f"a name that is there, such as {near[0]!r}" if near else ", ".join(stored)
                raise InputError(f"{self.path}: no array is {key!r}, the key of {label}; accepted: {accepted}")

    def _electrons(self, archive: zipfile.ZipFile, n_frames: int) -> dict[str, np.ndarray]:
        """Charges and spins (frames,) that arrays state, one for each frame or for all."""
        stored = {name: self._rows(archive, name) for name in _members(archive) if electron_kind(name) is not None}
        found = {}
        for name, rows in stored.items():
            if int(np.prod(rows.shape)) in (1, n_frames):
                values = rows.read(rows.shape[0] if rows.shape else 1)
                found[name] = np.broadcast_to(np.ravel(values), n_frames)
        return found

    def _resolve_units(self, archive: zipfile.ZipFile) -> UnitSpec:
        if self._units is not None:
            return self._units
        stored = _members(archive)
        energy, length = (
            _text(self._rows(archive, key).read(1)) if key in stored else None for key in ("e_unit", "r_unit")
        )
        if energy is not None and length is not None:
            length = {"Ang": "Å", "ang": "Å", "angstrom": "Å", "bohr": "Bohr"}.get(length, length)
            return UnitSpec(energy=energy, length=length)
        logging.getLogger("equimd").warning(
            "%s names no units: taken as kcal/mol and Å, as rMD17 documents; other units: UnitSpec", self.path
        )
        return RMD17_UNITS


class _Rows:
    """One array of an archive, read from the first row on; never unpickled. Format: `numpy.lib.format`."""

    def __init__(self, archive: zipfile.ZipFile, name: str) -> None:
        self._stream = archive.open(f"{name}.npy")
        version = np.lib.format.read_magic(self._stream)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        self.shape, fortran, self._dtype = header(self._stream)
        if self._dtype.hasobject:
            raise ValueError(f"{name} holds Python objects, which only a pickle can store")
        self._whole = None
        if fortran and len(self.shape) > 1:  # its rows are not contiguous
            data = self._stream.read(int(np.prod(self.shape)) * self._dtype.itemsize)
            self._whole = np.frombuffer(data, self._dtype).reshape(self.shape, order="F")
        self._next = 0

    def read(self, count: int) -> np.ndarray:
        """The next ``count`` rows; of a scalar, the scalar."""
        first, self._next = self._next, self._next + count
        if self._whole is not None:
            return self._whole[first : self._next]
        shape = (count, *self.shape[1:]) if self.shape else ()
        size = int(np.prod(shape)) * self._dtype.itemsize
        data = self._stream.read(size)
        if len(data) != size:
            raise EOFError(f"ends within row {first + len(data) * count // max(size, 1)}")
        return np.frombuffer(data, self._dtype).reshape(shape)


def _members(archive: zipfile.ZipFile) -> list[str]:
    return [name.removesuffix(".npy") for name in archive.namelist()]


def _text(value: Any) -> str:
    value = value.item() if isinstance(value, np.ndarray) else value
    return value.decode() if isinstance(value, bytes) else str(value)
