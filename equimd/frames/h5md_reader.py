"""Reads H5MD 1.1 files, ours and the basic layout of others: positions, box, elements, masses, velocities, labels."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import atomic_masses, atomic_numbers

from equimd import origin, units
from equimd.errors import InputError
from equimd.frames.h5md_extras import CELL, INFO, decode_info, read_system, template
from equimd.frames.h5md_units import unit_factor
from equimd.frames.labels import UnitSpec, not_finite, to_voigt
from equimd.frames.masses import wrong_mass_text
from equimd.frames.topology import Topology
from equimd.frames.transaction import recover

FRAMES_PER_CHUNK = 100


@dataclass
class _Series:
    """One element of the file: its dataset, its factor to equimd's units, and the steps of its frames."""

    values: h5py.Dataset
    factor: float
    steps: np.ndarray | None
    times_fs: np.ndarray | None

    @property
    def fixed(self) -> bool:
        return self.steps is None

    def rows(self, steps: np.ndarray) -> np.ndarray:
        """Index of the frame of each step in this element, −1 where it has none."""
        assert self.steps is not None
        order = np.argsort(self.steps, kind="stable")
        places = np.searchsorted(self.steps[order], steps).clip(max=max(len(order) - 1, 0))
        found = order[places] if len(order) else np.full(len(steps), -1)
        return np.where(self.steps[found] == steps, found, -1) if len(order) else found


class H5MDReader:
    """Reads one file chunk by chunk; holds it open only while iterating.

    Units come from the file's `unit` attributes; without them, from `unit_spec`, or else eV, Å, fs and u with a notice.
    Elements come from `topology` if given, else from the file's species: names, an enumeration, or atomic numbers,
    which must agree with the masses. Frames have the masses, constraints and `info` that the file holds. A label that
    is NaN throughout is one that the frame has not; one that is not finite in part is refused, or passed on without
    `finite`, but for a stress that is NaN in part.
    """

    def __init__(
        self, path: Path, unit_spec: UnitSpec | None = None, topology: Topology | None = None, finite: bool = True
    ):
        self.path, self._units, self._topology, self._finite = path, unit_spec, topology, finite
        self._noticed = False

    def count(self) -> int:
        """Number of frames."""
        with self._open() as file:
            return int(self._child(file[self._group(file)], "position/value").shape[0])

    def frames(self) -> Iterator[Atoms]:
        """Frames with velocities, labels, and `info` keys `step` and `time_fs`.

        Raises:
            InputError: if positions or species are missing or make no sense, masses are not those of the elements, or a
                unit is not known.
        """
        with self._open() as file:
            group: Any = file[self._group(file)]
            position = self._series(group, "position", self._length())
            if position is None or position.steps is None:
                raise InputError(f"{self.path}: {group.name} has no position/value; accepted: an H5MD trajectory")
            series = {"position": position}
            for name, path, factor in (
                ("velocity", "velocity", self._length()),
                ("force", "force", self._units.force_factor if self._units else 1.0),
                ("edges", "box/edges", self._length()),
            ):
                if (found := self._series(group, path, factor)) is not None:
                    series[name] = found
            if (cell := self._series(file, CELL, 1.0)) is not None:
                series["edges"] = cell
            for name, factor in (("potential_energy", "energy_factor"), ("stress", "stress_factor")):
                for parent in ("observables/" + str(group.name).rsplit("/", 1)[-1], "observables"):
                    if parent in file and (
                        found := self._series(file[parent], name, getattr(self._units, factor, 1.0))
                    ):
                        series[name] = found
                        break
            yield from self._assemble(file, group, series)

    def _assemble(self, file: h5py.File, group: h5py.Group, series: dict[str, _Series]) -> Iterator[Atoms]:
        position = series["position"]
        assert position.steps is not None
        numbers, masses = self._system(group, position.values.shape[1])
        shared = template(read_system(file, numbers, self._periodicity(group), masses), str(self.path))
        infos: Any = file.get(INFO)
        steps, times = position.steps, position.times_fs
        by = group.attrs.get(origin.KEY)
        for start in range(0, len(steps), FRAMES_PER_CHUNK):
            window = slice(start, start + FRAMES_PER_CHUNK)
            values = {name: self._read(one, steps[window]) for name, one in series.items()}
            texts = [""] * len(steps[window]) if infos is None else infos.asstr()[window]
            for k, step in enumerate(steps[window]):
                frame: dict[str, Any] = {name: rows[k] for name, rows in values.items() if rows[k] is not None}
                atoms = shared.copy()
                atoms.positions = frame["position"]
                if "edges" in frame:
                    edges = frame["edges"]
                    atoms.set_cell(edges if edges.ndim == 2 else np.diag(edges), apply_constraint=False)
                if texts[k]:
                    atoms.info = decode_info(texts[k])
                atoms.info["step"] = int(step)
                if times is not None:
                    atoms.info["time_fs"] = float(times[start + k])
                _attach(atoms, frame, f"{self.path}, frame {start + k}", self._finite)
                yield origin.mark(atoms, None if by is None else _text(by))

    def _read(self, series: _Series, steps: np.ndarray) -> list[np.ndarray | None]:
        if series.fixed:
            value = np.asarray(series.values[()], dtype=np.float64) * series.factor
            return [value] * len(steps)
        rows = series.rows(steps)
        present = rows[rows >= 0]
        if not present.size:
            return [None] * len(steps)
        low = int(present.min())
        block = np.asarray(series.values[low : int(present.max()) + 1], dtype=np.float64) * series.factor
        return [block[row - low] if row >= 0 else None for row in rows]

    def _series(self, parent: Any, path: str, default: float) -> _Series | None:
        """The element at a path, fixed in time or not; None where the file has none."""
        if path not in parent:
            return None
        item = parent[path]
        if isinstance(item, h5py.Dataset):
            return _Series(item, self._factor(item, default), None, None)
        if "value" not in item:
            return None
        value = item["value"]
        steps = _clock(item.get("step"), len(value))
        times = _clock(item.get("time"), len(value)) if "time" in item else None
        if times is not None:
            times = times * self._factor(item["time"], 1.0)
        return _Series(value, self._factor(value, default), steps.astype(np.int64), times)

    def _factor(self, item: Any, default: float) -> float:
        unit = item.attrs.get("unit")
        if unit is not None:
            return unit_factor(_text(unit), f"{self.path}: {item.name}")
        if self._units is None and not self._noticed:
            self._noticed = True
            logging.getLogger("equimd").warning(
                "%s names no unit for %s: taken as eV, Å, fs and u; other units: UnitSpec", self.path, item.name
            )
        return default

    def _length(self) -> float:
        return self._units.length_factor if self._units else 1.0

    def _open(self) -> h5py.File:
        recover(self.path)
        try:
            return h5py.File(self.path, "r")
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error}); accepted: a whole HDF5 file") from error

    def _group(self, file: h5py.File) -> str:
        particles: Any = file.get("particles")
        names = [] if particles is None else [n for n in particles if "position" in particles[n]]
        if len(names) != 1:
            raise InputError(f"{self.path}: particle groups with positions are {names}; accepted: one")
        return f"particles/{names[0]}"

    def _child(self, group: Any, path: str) -> Any:
        if path not in group:
            raise InputError(f"{self.path}: {group.name} has no {path}; accepted: an H5MD trajectory")
        return group[path]

    def _periodicity(self, group: Any) -> list[bool]:
        if "box" not in group:
            return [False] * 3
        boundary = [_text(name) for name in np.atleast_1d(group["box"].attrs.get("boundary", ["none"] * 3))]
        return [name in ("periodic", "True", "1") for name in boundary]

    def _system(self, group: Any, n_atoms: int) -> tuple[np.ndarray, np.ndarray]:
        """Atomic numbers and masses (u) of N atoms."""
        if self._topology is not None:
            numbers = self._topology.numbers
        elif "species" in group:
            numbers = self._species(group["species"])
        else:
            raise InputError(
                f"{self.path}: {group.name} has no species; accepted: a file with species, or topology=..."
            )
        if numbers.shape != (n_atoms,):
            raise InputError(f"{self.path}: {numbers.size} species for {n_atoms} atoms; accepted: one for each atom")
        if self._topology is not None and self._topology.masses is not None:
            return numbers, self._topology.masses
        if "mass" not in group:
            if self._topology is None and not self._named(group) and _could_be_types(numbers):
                what = f"species 1 to {numbers.max()} and no masses: type indices or atomic numbers?"
                raise InputError(f"{self.path}: {what} accepted: species with names, or topology=... with the elements")
            return numbers, atomic_masses[numbers]
        masses = self._masses(group, numbers)
        if self._topology is None and (text := wrong_mass_text(numbers, masses)) is not None:
            raise InputError(
                f"{self.path}: {text}: type indices, not atomic numbers, or masses changed on purpose; accepted:"
                " topology=... with the elements, which takes these masses as they are"
            )
        return numbers, masses

    def _masses(self, group: Any, numbers: np.ndarray) -> np.ndarray:
        """Masses (u) of N atoms, stored once for all, by species, by atom, or by frame and atom."""
        series = self._series(group, "mass", 1.0)
        if series is None:
            raise InputError(f"{self.path}: {group['mass'].name} has no value; accepted: an element of H5MD")
        masses = np.asarray(series.values[()], dtype=np.float64) * series.factor
        if masses.ndim == 2 and len(masses) and masses.shape[1] in (1, len(numbers)):
            if (masses != masses[0]).any():
                raise InputError(f"{self.path}: masses change along the trajectory; accepted: fixed ones")
            masses = masses[0]
        species, index = np.unique(numbers, return_inverse=True)
        if masses.shape in ((), (1,)):
            masses = np.broadcast_to(masses, numbers.shape)
        elif masses.shape == species.shape and masses.shape != numbers.shape:
            masses = masses[index]
        if masses.shape != numbers.shape or not (np.isfinite(masses) & (masses > 0)).all():
            raise InputError(
                f"{self.path}: {group['mass'].name} has shape {series.values.shape}, for {len(numbers)} atoms, or"
                " values that are not positive; accepted: a positive mass for each atom"
            )
        return np.array(masses)

    def _species(self, item: Any) -> np.ndarray:
        values, dtype = _value(item)[()], _value(item).dtype
        if isinstance(item, h5py.Group) and values.ndim == 2 and len(values):
            if (values != values[0]).any():
                raise InputError(f"{self.path}: species change along the trajectory; accepted: fixed ones")
            values = values[0]
        enumeration = h5py.check_enum_dtype(dtype)
        if enumeration is not None:
            names = {number: name for name, number in enumeration.items()}
            values = [names.get(int(value), str(value)) for value in values]
        elif dtype.kind in "iu":
            values = np.asarray(values, dtype=np.int64)
            if values.min(initial=1) < 1 or values.max(initial=1) > 118:
                raise InputError(f"{self.path}: species {values.min()} to {values.max()}; accepted: atomic numbers")
            return values
        try:
            return np.array([atomic_numbers[_text(value).strip().capitalize()] for value in np.ravel(values)])
        except KeyError as error:
            raise InputError(
                f"{self.path}: species {error} is no element; accepted: symbols, or topology=..."
            ) from None

    def _named(self, group: Any) -> bool:
        """Whether species are names and no integers."""
        dtype = _value(group["species"]).dtype
        return dtype.kind not in "iu" or h5py.check_enum_dtype(dtype) is not None


def _value(item: Any) -> Any:
    return item["value"] if isinstance(item, h5py.Group) else item


def _could_be_types(numbers: np.ndarray) -> bool:
    """Whether these are the integers from 1 on: H, He, Li, ... or the types 1, 2, 3, ... of a force field."""
    kinds = np.unique(numbers)
    return np.array_equal(kinds, np.arange(1, len(kinds) + 1))


def _attach(atoms: Atoms, frame: dict[str, np.ndarray], where: str, finite: bool) -> None:
    if "velocity" in frame and np.isfinite(frame["velocity"]).all():
        momenta = frame["velocity"] * units.ASE_TIME_FS * atoms.get_masses()[:, None]
        atoms.set_momenta(momenta, apply_constraint=False)
    labels = {"energy": frame.get("potential_energy"), "forces": frame.get("force"), "stress": frame.get("stress")}
    results: dict[str, Any] = {}
    for name, value in labels.items():
        if value is None or np.isnan(value).all() or (name == "stress" and value.shape != (3, 3)):
            continue
        odd = np.isinf(value) if name == "stress" else ~np.isfinite(value)
        if finite and odd.any():
            what = not_finite(name, np.where(odd, value, 0.0))
            raise InputError(f"{where}: {what}; accepted: finite numbers, or NaN throughout for no {name}")
        results[name] = float(value) if name == "energy" else to_voigt(value) if name == "stress" else value
    if results:
        atoms.calc = SinglePointCalculator(atoms, **results)


def _clock(item: Any, n: int) -> np.ndarray:
    """Steps or times of n frames: stored one by one, or as an increment with an offset (H5MD 1.1)."""
    if item is None:
        return np.arange(n)
    if item.shape == ():
        return np.arange(n) * item[()] + item.attrs.get("offset", 0)
    return item[()]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
