"""Structures, labelled data sets and trajectories as `ase.Atoms`, lazily: one function for every format."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from ase import Atoms

from equimd.errors import InputError
from equimd.frames import extxyz, tables
from equimd.frames.checks import N_CHECKED, check_plausible
from equimd.frames.labeller import Labeller
from equimd.frames.labels import DEFAULT_KEYS, LabelKeys, UnitSpec
from equimd.frames.transaction import recover

XYZ_SUFFIXES = (".xyz", ".extxyz")
MDTRAJ_SUFFIXES = (".dcd", ".xtc", ".trr")
HDF5_SUFFIXES = (".h5", ".h5md", ".hdf5")
LMDB_SUFFIX = ".aselmdb"

Keep = Callable[[int, int], bool]
"""Whether a frame is wanted, by its index in the file and its number of atoms."""


class PlausibilityWarning(UserWarning):
    """A data set whose numbers look wrong: most often its units."""


@dataclass(frozen=True)
class Source:
    """How one format is read: a fresh iterator of frames, and their number (None: by iterating).

    A reader may leave out the work for frames that are not wanted, and pass None in their places.
    """

    open: Callable[[Keep | None], Iterator[Atoms | None]]
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
        every = None if self.stride == 1 else lambda k, _: k % self.stride == 0
        for index, atoms in enumerate(self.source.open(every)):
            if index % self.stride or atoms is None:
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

    def select(self, keep: Keep) -> Iterator[tuple[int, Atoms]]:
        """Index in the file and frame of those for which ``keep(index, number of atoms)`` is true; nothing is checked.

        Most formats are read no further than it takes to step over the others. `stride` has no say here.
        """
        for index, atoms in enumerate(self.source.open(keep)):
            if atoms is not None and keep(index, len(atoms)):
                yield index, atoms

    def __len__(self) -> int:
        """Number of frames; formats without a count are read through once."""
        if self._length is None:
            total = self.source.count() if self.source.count is not None else sum(1 for _ in self.source.open(None))
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
    finite: bool = True,
) -> Frames:
    """Frames of a file, lazily, with their labels in a `SinglePointCalculator` (eV, eV/Å, eV/Å³).

    Args:
        path: extxyz or xyz (`.gz` too), ASE `.db` and `.traj`, `.aselmdb` or a folder of such shards, `.npz` in the
            layout of rMD17 or sGDML, HDF5 in the layouts of `labelled_h5`, H5MD, DCD, XTC, TRR, mdtraj HDF5, or any
            structure that ASE reads.
        topology: A file with the elements, for DCD, XTC, TRR and H5MD without species; ours or any that mdtraj reads.
        units: Units of the file; by default what its format prescribes. npz prescribes none: kcal/mol and Å, as rMD17
            documents, with a notice. Trajectories through mdtraj are always nm.
        keys: Names of the labels; by default the usual ones, whatever their case.
        stride: Keep every `stride`-th frame.
        finite: Refuse labels that are not finite, with their frame; components of a stress may be NaN.

    Raises:
        InputError: if the file is missing, of unknown format, lacks what the format needs, or is malformed.
    """
    path = Path(path)
    if not path.is_dir():
        recover(path)
    for name in (path, Path(topology) if topology is not None else path):
        if name.is_dir() and not tables.lmdb_shards(name):
            raise InputError(f"{name}: is a folder without .aselmdb files; accepted: a file of structures")
        if not name.exists():
            raise InputError(f"{name}: no such file; accepted: a file of structures")
        if not name.is_dir() and not name.is_file():
            raise InputError(f"{name}: is a device, a pipe or a socket; accepted: a regular file of structures")
    if not isinstance(stride, int) or stride < 1:
        raise InputError(f"stride is {stride}; accepted: 1 or more")
    if not finite:
        keys = replace(keys or DEFAULT_KEYS, finite=False)
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
        said: set[str] = set()
        return Source(
            lambda keep: _labelled_xyz(path, keep, Labeller(path, units, chosen, said)), lambda: extxyz.count(path)
        )
    if suffix == ".npz":
        from equimd.frames.npz import NpzSet

        stored = NpzSet(path, units, chosen)
        return Source(stored.frames, stored.count)
    if suffix == ".db":
        return Source(
            lambda _: tables.iterate_database(path, units, chosen),
            lambda: tables.count_database(path),
        )
    if suffix == LMDB_SUFFIX or path.is_dir():
        shards = tables.LmdbSet(path, units, chosen)
        return Source(lambda _: shards.frames(), shards.count)
    if suffix in HDF5_SUFFIXES:
        return _hdf5_source(path, topology, units, keys)
    if suffix in MDTRAJ_SUFFIXES:
        from equimd.frames.trajectories import MdtrajTrajectory

        _refuse_options(path, units=units, keys=keys)
        trajectory = MdtrajTrajectory(path, topology, _elements(topology))
        return Source(lambda _: trajectory.frames(), trajectory.count)
    return Source(lambda _: tables.iterate_ase(path, units, chosen))


def _hdf5_source(path: Path, topology: Path | None, units: UnitSpec | None, keys: LabelKeys | None) -> Source:
    """H5MD (`particles`), a labelled set, or mdtraj's layout (`coordinates`)."""
    import h5py

    from equimd.frames.labelled_h5 import LabelledH5, is_labelled

    try:
        with h5py.File(path, "r") as file:
            is_h5md = "h5md" in file or "particles" in file
            labelled = not is_h5md and is_labelled(file)
            if not (is_h5md or labelled or "coordinates" in file):
                found = ", ".join(list(file)[:5])
                raise InputError(
                    f"{path}: HDF5 with {found}; accepted: H5MD (particles), mdtraj's (coordinates), or groups of"
                    " positions and atomic_numbers"
                )
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error}); accepted: a whole HDF5 file") from error
    if labelled:
        stored = LabelledH5(path, units, keys or DEFAULT_KEYS)
        return Source(stored.frames, stored.count)
    _refuse_options(path, keys=keys)
    if is_h5md:
        from equimd.frames.h5md_reader import H5MDReader

        reader = H5MDReader(path, units, _elements(topology), (keys or DEFAULT_KEYS).finite)
    else:
        from equimd.frames.trajectories import MdtrajHDF5

        _refuse_options(path, units=units)
        reader = MdtrajHDF5(path, _elements(topology))
    return Source(lambda _: reader.frames(), reader.count)


def _labelled_xyz(path: Path, keep: Keep | None, labeller: Labeller) -> Iterator[Atoms | None]:
    for index, atoms in enumerate(extxyz.iterate(path, keep, labeller.hear)):
        yield None if atoms is None else labeller.label(atoms, f"{path}, frame {index}")
    labeller.finish()


def _elements(topology: Path | None) -> np.ndarray | None:
    """Atomic numbers (N,) of the first frame of a topology in one of our formats; None leaves it to mdtraj."""
    if topology is None or format_suffix(topology) not in (*XYZ_SUFFIXES, ".traj", ".db", ".npz"):
        return None
    return next(iter(read_frames(topology))).numbers


def _refuse_options(path: Path, **options: object) -> None:
    for name, value in options.items():
        if value is not None and value != LabelKeys(finite=False):
            raise InputError(f"{path}: {name}= does not apply to {path.suffix}; accepted: without it")
