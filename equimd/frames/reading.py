"""Structures, labelled data sets and trajectories as `ase.Atoms`, lazily: one function for every format."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from ase import Atoms

from equimd.errors import InputError
from equimd.frames import extxyz, tables
from equimd.frames.checks import check_plausible
from equimd.frames.labels import DEFAULT_KEYS, DEFAULT_UNITS, LabelKeys, UnitSpec, attach_labels
from equimd.frames.transaction import recover

N_CHECKED = 64
XYZ_SUFFIXES = (".xyz", ".extxyz")
MDTRAJ_SUFFIXES = (".dcd", ".xtc", ".trr")
HDF5_SUFFIXES = (".h5", ".h5md", ".hdf5")


class PlausibilityWarning(UserWarning):
    """A data set whose numbers look wrong: most often its units."""


@dataclass(frozen=True)
class Source:
    """How one format is read: a fresh iterator of frames, and their number (None: by iterating)."""

    open: Callable[[], Iterator[Atoms]]
    count: Callable[[], int] | None = None


@dataclass
class Frames:
    """Frames of a file as `ase.Atoms`, read while iterating; may be iterated any number of times.

    The first pass looks at its first frames and warns (`PlausibilityWarning`) where their numbers suggest other units.
    """

    path: Path
    source: Source = field(repr=False)
    stride: int = 1
    _checked: bool = field(default=False, repr=False)
    _length: int | None = field(default=None, repr=False)

    def __iter__(self) -> Iterator[Atoms]:
        first: list[Atoms] = []
        index = -1
        for index, atoms in enumerate(self.source.open()):
            if index % self.stride:
                continue
            if not self._checked:
                first.append(atoms)
                if len(first) == N_CHECKED:
                    self._check(first)
            yield atoms
        if index < 0:
            raise InputError(f"{self.path}: holds no frames; accepted: one or more")
        self._length = -(-(index + 1) // self.stride)
        if not self._checked:
            self._check(first)

    def __len__(self) -> int:
        """Number of frames; formats without a count are read through once."""
        if self._length is None:
            total = self.source.count() if self.source.count is not None else sum(1 for _ in self.source.open())
            self._length = -(-total // self.stride)
        return self._length

    def _check(self, frames: list[Atoms]) -> None:
        self._checked = True
        for message in check_plausible(frames):
            warnings.warn(f"{self.path}: {message}", PlausibilityWarning, stacklevel=3)


def read_frames(
    path: str | Path,
    *,
    topology: str | Path | None = None,
    units: UnitSpec | None = None,
    keys: LabelKeys | None = None,
    stride: int = 1,
) -> Frames:
    """Frames of a file, lazily, with their labels in a `SinglePointCalculator` (eV, eV/Å, eV/Å³).

    Args:
        path: extxyz or xyz (`.gz` too), ASE `.db` and `.traj`, `.npz` in the layout of rMD17 or sGDML, H5MD, DCD, XTC,
            TRR, mdtraj HDF5, or any structure that ASE reads.
        topology: A file with the elements, for DCD, XTC, TRR and H5MD without species; ours or any that mdtraj reads.
        units: Units of the file; by default what its format prescribes. npz prescribes none: kcal/mol and Å, as rMD17
            documents, with a notice. Trajectories through mdtraj are always nm.
        keys: Names of the labels; by default the usual ones, whatever their case.
        stride: Keep every `stride`-th frame.

    Raises:
        InputError: if the file is missing, of unknown format, lacks what the format needs, or is malformed.
    """
    path = Path(path)
    recover(path)
    for name in (path, Path(topology) if topology is not None else path):
        if not name.is_file():
            raise InputError(f"{name}: no such file; accepted: a file of structures")
    if stride < 1:
        raise InputError(f"stride is {stride}; accepted: 1 or more")
    return Frames(path, _source(path, None if topology is None else Path(topology), units, keys), stride)


def read_list(
    path: str | Path,
    *,
    topology: str | Path | None = None,
    units: UnitSpec | None = None,
    keys: LabelKeys | None = None,
    stride: int = 1,
) -> list[Atoms]:
    """All frames of a file in memory; arguments and errors as for `read_frames`."""
    return list(read_frames(path, topology=topology, units=units, keys=keys, stride=stride))


def format_suffix(path: Path) -> str:
    """The suffix that names the format, without `.gz`, in lower case."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _source(path: Path, topology: Path | None, units: UnitSpec | None, keys: LabelKeys | None) -> Source:
    suffix, chosen = format_suffix(path), keys or DEFAULT_KEYS
    if suffix in XYZ_SUFFIXES:
        spec = units or DEFAULT_UNITS
        return Source(lambda: _labelled(extxyz.iterate(path), path, spec, chosen), lambda: extxyz.count(path))
    if suffix == ".npz":
        stored = tables.NpzSet(path, units, chosen)
        return Source(stored.frames, stored.count)
    if suffix == ".db":
        return Source(
            lambda: tables.iterate_database(path, units, chosen),
            lambda: tables.count_database(path),
        )
    if suffix in MDTRAJ_SUFFIXES or (suffix in HDF5_SUFFIXES and not _is_h5md(path)):
        from equimd.frames.trajectories import MdtrajHDF5, MdtrajTrajectory

        _refuse_options(path, units=units, keys=keys)
        numbers = _elements(topology)
        in_hdf5 = suffix in HDF5_SUFFIXES
        trajectory = MdtrajHDF5(path, numbers) if in_hdf5 else MdtrajTrajectory(path, topology, numbers)
        return Source(trajectory.frames, trajectory.count)
    if suffix in HDF5_SUFFIXES:
        from equimd.frames.h5md_reader import H5MDReader

        _refuse_options(path, keys=keys)
        reader = H5MDReader(path, units, _elements(topology))
        return Source(reader.frames, reader.count)
    return Source(lambda: tables.iterate_ase(path, units or DEFAULT_UNITS, chosen))


def _labelled(frames: Iterator[Atoms], path: Path, units: UnitSpec, keys: LabelKeys) -> Iterator[Atoms]:
    for index, atoms in enumerate(frames):
        yield attach_labels(atoms, units, keys, f"{path}, frame {index}")


def _elements(topology: Path | None) -> np.ndarray | None:
    """Atomic numbers (N,) of the first frame of a topology in one of our formats; None leaves it to mdtraj."""
    if topology is None or format_suffix(topology) not in (*XYZ_SUFFIXES, ".traj", ".db", ".npz"):
        return None
    return next(iter(read_frames(topology))).numbers


def _is_h5md(path: Path) -> bool:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            if "h5md" in file or "particles" in file:
                return True
            if "coordinates" in file:
                return False
            found = ", ".join(list(file)[:5])
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error}); accepted: a whole HDF5 file") from error
    raise InputError(f"{path}: HDF5 with {found}; accepted: H5MD (particles) or mdtraj's HDF5 (coordinates)")


def _refuse_options(path: Path, **options: object) -> None:
    for name, value in options.items():
        if value is not None:
            raise InputError(f"{path}: {name}= does not apply to {path.suffix}; accepted: without it")
