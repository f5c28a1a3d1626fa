"""Labelled sets in HDF5 that is no trajectory: flat, a group per molecule (ANI-1x, SPICE), a group per frame (MACE).

Every group that holds positions and atomic numbers is one molecule; the file itself may be that group. Accepted names,
whatever their case, for T frames of N atoms:

    positions        positions, coordinates, conformations, coords, R         (T, N, 3), or (N, 3) for one frame
    atomic numbers   atomic_numbers, numbers, species, z, nuclear_charges     (N,) or (T, N); numbers or symbols
    energy           the names of `labels`, energies, dft_total_energy        (T,), (T, 1) or ()
    forces           the names of `labels`                                    like positions
    gradients        gradients, gradient, dft_total_gradient                  forces of the opposite sign
    cell, pbc        cell, cells, lattice; pbc                                (3, 3) or (T, 3, 3); (3,) or (T, 3)
    stress           the names of `labels`                                    (T, 3, 3) or (T, 6)
    charge, spin     see ``electrons``; datasets or attributes                (T,), (T, 1) or (); kept in `info`

Other names, or paths, are given as keys (ANI-1x: energy=wb97x_dz.energy, forces=wb97x_dz.forces), letter by letter, as
must one of two energies, forces or stresses of a molecule. Forces with the name of a gradient are one. Labels may be
in a group ``properties`` of the molecule's. Units come from attributes `unit` or
`units` of the datasets, or else must be given: such files agree on nothing. A label that is NaN throughout, as in
ANI-1x, or the text "None", as in MACE, is one that the frame has not.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import h5py
import numpy as np
from ase import Atoms
from ase.data import atomic_numbers

from equimd.errors import InputError
from equimd.frames.electrons import electron_kind
from equimd.frames.h5md_units import unit_factor
from equimd.frames.labels import ENERGY_NAMES, FORCES_NAMES, STRESS_NAMES, LabelKeys, UnitSpec, attach_labels

FRAMES_PER_CHUNK = 500
NUMBERS = ("atomic_numbers", "numbers", "species", "z", "nuclear_charges")
POSITIONS = ("positions", "coordinates", "conformations", "coords", "r")
_KEYED = ("energy", "forces", "stress")
"""What a key may name; of the rest, the first of the names counts."""
_NAMES = {
    "energy": (*ENERGY_NAMES, "energies", "dft_total_energy"),
    "forces": FORCES_NAMES,
    "gradients": ("gradients", "gradient", "dft_total_gradient"),
    "stress": STRESS_NAMES,
    "cell": ("cell", "cells", "lattice"),
    "pbc": ("pbc",),
}
# Of one frame, where it is not that of the positions.
_SHAPES = {"energy": ((), (1,)), "stress": ((3, 3), (6,)), "cell": ((3, 3),), "pbc": ((3,),)}
_FACTORS = {"energy": "energy_factor", "forces": "force_factor", "gradients": "force_factor"}
_FACTORS |= {"positions": "length_factor", "cell": "length_factor", "stress": "stress_factor"}


@dataclass
class _Column:
    """One dataset of a molecule: its factor to equimd's units, and whether it has a row for every frame."""

    values: h5py.Dataset
    factor: float
    per_frame: bool

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop in equimd's units."""
        if self.per_frame:
            stored = self.values[start:stop]
        else:
            stored = np.broadcast_to(self.values[()], (stop - start, *self.values.shape))
        return stored if self.factor == 1.0 else np.asarray(stored, dtype=np.float64) * self.factor


class LabelledH5:
    """One file; see this module for what it may hold."""

    def __init__(self, path: Path, unit_spec: UnitSpec | None, keys: LabelKeys):
        self.path, self._units, self._keys = path, unit_spec, keys

    def count(self) -> int:
        """Number of frames."""
        with self._open() as file:
            return sum(_n_frames(_find(group, POSITIONS)) for group in molecules(file))

    def frames(self, keep: Callable[[int, int], bool] | None = None) -> Iterator[Atoms | None]:
        """Labelled frames, molecule by molecule; None where ``keep`` (index, number of atoms) says no.

        Raises:
            InputError: for shapes that do not fit, elements or units that are not known, keys of no molecule.
        """
        with self._open() as file:
            self._check_keys(file)
            index = 0
            for group in molecules(file):
                for atoms in self._molecule(group, index, keep):
                    yield atoms
                    index += 1

    def _molecule(self, group: Any, first: int, keep: Callable[[int, int], bool] | None) -> Iterator[Atoms | None]:
        columns = self._columns(group)
        n_frames = _n_frames(columns["positions"].values)
        n_atoms = columns["positions"].values.shape[-2]
        numbers = self._elements(group, n_frames, n_atoms)
        electrons = _electrons(group, n_frames)
        for start in range(0, n_frames, FRAMES_PER_CHUNK):
            stop = min(start + FRAMES_PER_CHUNK, n_frames)
            wanted = [keep is None or keep(first + k, n_atoms) for k in range(start, stop)]
            if not any(wanted):
                yield from [None] * len(wanted)
                continue
            chunk = {name: column.rows(start, stop) for name, column in columns.items()}
            for k, chosen in enumerate(wanted):
                if not chosen:
                    yield None
                    continue
                frame = {name: rows[k] for name, rows in chunk.items()}
                elements = numbers if numbers.ndim == 1 else numbers[start + k]
                atoms = self._frame(elements, frame, f"{self.path}, frame {first + start + k} ({group.name})")
                atoms.info.update({name: values[start + k].item() for name, values in electrons.items()})
                yield atoms

    def _frame(self, numbers: np.ndarray, frame: dict[str, np.ndarray], where: str) -> Atoms:
        cell = frame.get("cell")
        atoms = Atoms(numbers, positions=frame["positions"], cell=cell, pbc=frame.get("pbc", cell is not None))
        gradients = frame.get("gradients")
        forces = frame.get("forces", None if gradients is None else -gradients)
        for store, name, value in (
            (atoms.info, "energy", frame.get("energy")),
            (atoms.arrays, "forces", forces),
            (atoms.info, "stress", frame.get("stress")),
        ):
            if value is not None and not np.isnan(value).all():
                store[name] = value.reshape(()) if name == "energy" else value
        names = LabelKeys(voigt=self._keys.voigt, stress_sign=self._keys.stress_sign, finite=self._keys.finite)
        return attach_labels(atoms, UnitSpec(), names, where)

    def _columns(self, group: Any) -> dict[str, _Column]:
        found = {"positions": _find(group, POSITIONS)}
        for name, usual in _NAMES.items():
            key = getattr(self._keys, name, None)
            if key is not None:
                found[name] = _keyed(group, key)
                continue
            stored = _named(group, usual)
            if len(stored) > 1 and name in _KEYED:
                self._refuse_several(group, stored, name)
            found[name] = stored[0] if stored else None
        key = self._keys.forces
        if key is None and found["forces"] is None and len(stored := _named(group, _NAMES["gradients"])) > 1:
            self._refuse_several(group, stored, "forces")
        if key is not None and key.rsplit("/", 1)[-1].lower() in _NAMES["gradients"]:
            found["gradients"], found["forces"] = found["forces"], None
        elif key is not None or found["forces"] is not None:
            found["gradients"] = None
        shape = found["positions"].shape
        if len(shape) not in (2, 3) or shape[-1] != 3:
            raise InputError(f"{self.path}: {found['positions'].name} has shape {shape}; accepted: (frames, atoms, 3)")
        return {name: self._column(name, values, shape) for name, values in found.items() if values is not None}

    def _refuse_several(self, group: Any, stored: list[Any], name: str) -> NoReturn:
        names = " and ".join(values.name.removeprefix(group.name).lstrip("/") for values in stored)
        what = f"{self.path}: {group.name} has {names}"
        raise InputError(f"{what}; accepted: one of them, or its name as the key {name}")

    def _check_keys(self, file: h5py.File) -> None:
        """Some molecules may lack a label; a key that all of them lack is a mistake."""
        for name in _KEYED:
            key = getattr(self._keys, name)
            if key is not None and all(_keyed(group, key) is None for group in molecules(file)):
                what = f"{self.path}: no molecule has {key!r}, the key of {name}"
                raise InputError(f"{what}; accepted: a dataset's name, or its path from the molecule")

    def _column(self, name: str, values: Any, shape: tuple[int, ...]) -> _Column:
        """``shape`` is that of the positions."""
        one_frame = _SHAPES.get(name, (shape[-2:],))
        per_frame = len(shape) == 3 and values.shape in [(shape[0], *one) for one in one_frame]
        fixed = values.shape in one_frame and (len(shape) == 2 or name in ("cell", "pbc"))
        if not per_frame and not fixed:
            raise InputError(f"{self.path}: {values.name} has shape {values.shape}; the positions have {shape}")
        return _Column(values, self._factor(name, values), per_frame)

    def _factor(self, name: str, values: Any) -> float:
        """Of a dataset to equimd's units; what its attributes and the caller say must agree."""
        if name not in _FACTORS:
            return 1.0
        stated = next((values.attrs[key] for key in ("unit", "units") if key in values.attrs), None)
        given = None if self._units is None else getattr(self._units, _FACTORS[name])
        if stated is None:
            if given is None:
                what = f"{self.path}: {values.name} names no unit"
                raise InputError(f"{what}; accepted: an attribute 'units', or units given (energy, length, stress)")
            return given
        text = stated.decode() if isinstance(stated, bytes) else str(stated)
        factor = unit_factor(text, f"{self.path}: {values.name}")
        if given is not None and abs(given / factor - 1.0) > 1e-4:  # constants of different years
            raise InputError(f"{self.path}: {values.name} is in {text!r}, but other units were given; leave one out")
        return factor

    def _elements(self, group: Any, n_frames: int, n_atoms: int) -> np.ndarray:
        stored = _find(group, NUMBERS)[()]
        if stored.shape not in ((n_atoms,), (n_frames, n_atoms)):
            raise InputError(f"{self.path}: {group.name} has {stored.shape} atomic numbers for {n_atoms} atoms")
        if stored.dtype.kind in "iu":
            return stored.astype(np.int64)
        if stored.dtype.kind == "f" and (stored == stored.round()).all():
            return stored.astype(np.int64)
        symbols = [text.decode() if isinstance(text, bytes) else str(text) for text in stored.ravel()]
        unknown = [symbol for symbol in symbols if symbol.capitalize() not in atomic_numbers]
        if unknown:
            raise InputError(f"{self.path}: {group.name} has the species {unknown[0]!r}; accepted: chemical symbols")
        return np.array([atomic_numbers[symbol.capitalize()] for symbol in symbols]).reshape(stored.shape)

    def _open(self) -> h5py.File:
        try:
            return h5py.File(self.path, "r")
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error}); accepted: a whole HDF5 file") from error


def is_labelled(file: h5py.File) -> bool:
    """Whether a file holds a molecule in one of these layouts."""
    return next(molecules(file), None) is not None


def molecules(group: Any) -> Iterator[Any]:
    """Groups with positions and atomic numbers, depth first in order of name; what is inside one is its own."""
    if _find(group, POSITIONS) is not None and _find(group, NUMBERS) is not None:
        yield group
        return
    for name in group:
        if isinstance(item := group[name], h5py.Group):
            yield from molecules(item)


def _find(group: Any, names: tuple[str, ...]) -> Any:
    """The dataset of the group that has the first of these names, whatever its case; None where there is none."""
    by_name = {name.lower(): name for name in group if isinstance(group.get(name), h5py.Dataset)}
    return next((group[by_name[name]] for name in names if name in by_name), None)


def _named(group: Any, names: tuple[str, ...]) -> list[Any]:
    """The datasets of the group or its ``properties`` with one of these names, whatever its case, in their order."""
    found = [
        (names.index(name.lower()), place[name]) for place in _places(group) for name in place if name.lower() in names
    ]
    return [values for _, values in sorted(found, key=lambda pair: pair[0]) if _is_label(values)]


def _keyed(group: Any, key: str) -> Any:
    """The dataset of exactly this name or path, of the group or else its ``properties``; None where there is none."""
    if key.startswith("/"):  # of the file, which would be every molecule's
        return None
    return next((values for place in _places(group) if _is_label(values := place.get(key))), None)


def _places(group: Any) -> list[Any]:
    inner = group.get("properties")
    return [group, inner] if isinstance(inner, h5py.Group) else [group]


def _electrons(group: Any, n_frames: int) -> dict[str, np.ndarray]:
    """Charges and spins (frames,) that a group states in datasets or attributes, one for each frame or for all."""
    stored = [(name, place[name]) for place in _places(group) for name in place if electron_kind(name) is not None]
    stored = [(name, values[()]) for name, values in stored if _is_label(values)]
    stored += [(name, value) for name, value in group.attrs.items() if electron_kind(name) is not None]
    plain = [(name, np.ravel(values)) for name, values in stored]
    return {
        name: np.broadcast_to(values, n_frames)
        for name, values in plain
        if values.dtype.kind in "fiub" and values.size in (1, n_frames)
    }


def _is_label(values: Any) -> bool:
    return isinstance(values, h5py.Dataset) and not _is_none(values)


def _is_none(values: h5py.Dataset) -> bool:
    return values.shape == () and h5py.check_string_dtype(values.dtype) is not None and values.asstr()[()] == "None"


def _n_frames(positions: Any) -> int:
    return positions.shape[0] if len(positions.shape) == 3 else 1
