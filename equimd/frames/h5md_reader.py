"""Reads H5MD 1.1 files, ours and the basic layout of others: positions, box, species, velocities, forces, energies."""

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
from equimd.frames.labels import UnitSpec, not_finite, to_voigt
from equimd.frames.transaction import recover

FRAMES_PER_CHUNK = 100
_BASES = {"angstrom": 1.0, "a": 1.0, "å": 1.0, "nm": units.NM, "pm": 0.01, "bohr": units.BOHR}
_BASES |= {"fs": 1.0, "ps": 1000.0, "ns": 1e6, "ev": 1.0, "mev": 1e-3, "hartree": units.HARTREE, "k": 1.0, "u": 1.0}
_BASES |= {"bohrs": units.BOHR, "ang": 1.0, "angstroms": 1.0, "ha": units.HARTREE}
_BASES |= {"eh": units.HARTREE, "kj": units.KJ_PER_MOL, "kcal": units.KCAL_PER_MOL, "mol": 1.0, "amu": 1.0}
_BASES |= {"gpa": units.GPA, "kbar": units.KBAR, "bar": units.BAR}


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

    Units come from the file's `unit` attributes; without them, from `unit_spec`, or else eV, Å and fs with a notice.
    Elements come from `numbers` if given, else from the file's species: names, an enumeration, or atomic numbers, which
    must agree with the masses. A label that is NaN throughout is one that the frame has not; one that is not finite in
    part is refused, or passed on without `finite`, but for a stress that is NaN in part.
    """

    def __init__(
        self, path: Path, unit_spec: UnitSpec | None = None, numbers: np.ndarray | None = None, finite: bool = True
    ):
        self.path, self._units, self._numbers, self._finite = path, unit_spec, numbers, finite
        self._noticed = False

    def count(self) -> int:
        """Number of frames."""
        with self._open() as file:
            return int(self._child(file[self._group(file)], "position/value").shape[0])

    def frames(self) -> Iterator[Atoms]:
        """Frames with velocities, labels, and `info` keys `step` and `time_fs`.

        Raises:
            InputError: if positions or species are missing or make no sense, or a unit is not known.
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
            for name, factor in (("potential_energy", "energy_factor"), ("stress", "stress_factor")):
                for parent in ("observables/" + str(group.name).rsplit("/", 1)[-1], "observables"):
                    if parent in file and (
                        found := self._series(file[parent], name, getattr(self._units, factor, 1.0))
                    ):
                        series[name] = found
                        break
            yield from self._assemble(group, series)

    def _assemble(self, group: h5py.Group, series: dict[str, _Series]) -> Iterator[Atoms]:
        position = series["position"]
        assert position.steps is not None
        numbers = self._elements(group, position.values.shape[1])
        pbc = self._periodicity(group)
        steps, times = position.steps, position.times_fs
        by = group.attrs.get(origin.KEY)
        for start in range(0, len(steps), FRAMES_PER_CHUNK):
            window = slice(start, start + FRAMES_PER_CHUNK)
            values = {name: self._read(one, steps[window]) for name, one in series.items()}
            for k, step in enumerate(steps[window]):
                frame: dict[str, Any] = {name: rows[k] for name, rows in values.items() if rows[k] is not None}
                atoms = Atoms(numbers, positions=frame["position"], pbc=pbc)
                if "edges" in frame:
                    edges = frame["edges"]
                    atoms.set_cell(edges if edges.ndim == 2 else np.diag(edges))
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
                "%s names no unit for %s: taken as eV, Å and fs; other units: UnitSpec", self.path, item.name
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

    def _elements(self, group: Any, n_atoms: int) -> np.ndarray:
        if self._numbers is not None:
            numbers = np.asarray(self._numbers)
        elif "species" in group:
            numbers = self._species(group["species"])
            self._check_masses(group, numbers)
        else:
            raise InputError(
                f"{self.path}: {group.name} has no species; accepted: a file with species, or topology=..."
            )
        if numbers.shape != (n_atoms,):
            raise InputError(f"{self.path}: {numbers.size} species for {n_atoms} atoms; accepted: one for each atom")
        return numbers

    def _species(self, item: Any) -> np.ndarray:
        if isinstance(item, h5py.Group):
            series: Any = item["value"]
            values, dtype = series[0], series.dtype
        else:
            values, dtype = item[()], item.dtype
        enumeration = h5py.check_enum_dtype(dtype)
        if enumeration is not None:
            names = {number: name for name, number in enumeration.items()}
            values = [names[int(value)] for value in values]
        elif dtype.kind in "iu":
            values = np.asarray(values, dtype=np.int64)
            if values.min() < 1 or values.max() > 118:
                raise InputError(f"{self.path}: species {values.min()} to {values.max()}; accepted: atomic numbers")
            return values
        try:
            return np.array([atomic_numbers[_text(value).capitalize()] for value in values])
        except KeyError as error:
            raise InputError(
                f"{self.path}: species {error} is no element; accepted: symbols, or topology=..."
            ) from None

    def _check_masses(self, group: Any, numbers: np.ndarray) -> None:
        """Species of other programs may be mere type indices; masses tell."""
        if "mass" not in group or not isinstance(group["mass"], h5py.Dataset):
            return
        masses = np.asarray(group["mass"][()], dtype=np.float64)
        if masses.shape != numbers.shape:
            return
        wrong = np.flatnonzero((np.abs(masses / atomic_masses[numbers] - 1.0) > 0.2) & (numbers != 1))
        if wrong.size:
            raise InputError(
                f"{self.path}: species {numbers[wrong[0]]} has mass {masses[wrong[0]]:.3g}: type indices,"
                " not atomic numbers; accepted: topology=... with the elements"
            )


def _attach(atoms: Atoms, frame: dict[str, np.ndarray], where: str, finite: bool) -> None:
    if "velocity" in frame and np.isfinite(frame["velocity"]).all():
        atoms.set_velocities(frame["velocity"] * units.ASE_TIME_FS)
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


def unit_factor(text: str, where: str) -> float:
    """The factor from a unit such as `kJ mol-1 nm-1` or `hartree/bohr` to equimd's.

    Raises:
        InputError: for a unit that is not known.
    """
    text, *divisors = text.replace("³", "3").split("/")
    factor = 1.0
    for divisor in divisors:
        factor /= unit_factor(divisor, where)
    for token in text.replace("**", "").replace("^", "").replace("*", " ").split():
        base = token.rstrip("+-0123456789")
        exponent = token[len(base) :] or "1"
        if base.lower() not in _BASES or exponent in ("+", "-", "0"):
            raise InputError(f"{where} has unit {text!r}; accepted: products of {', '.join(_BASES)}")
        factor *= _BASES[base.lower()] ** int(exponent)
    return factor


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
