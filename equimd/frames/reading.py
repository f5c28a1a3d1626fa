"""Structures, labelled data sets and trajectories as `ase.Atoms`, lazily: one function for every format."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ase import Atoms

from equimd.errors import InputError
from equimd.frames import extxyz, tables
from equimd.frames.checks import N_CHECKED, check_plausible
from equimd.frames.labeller import Labeller
from equimd.frames.labels import DEFAULT_KEYS, LabelKeys, UnitSpec
from equimd.frames.parts import Part
from equimd.frames.topology import Topology, load_with_mdtraj, topology_of
from equimd.frames.transaction import recover

XYZ_SUFFIXES = (".xyz", ".extxyz")
HDF5_SUFFIXES = (".h5", ".h5md", ".hdf5")
MMCIF_SUFFIXES = (".mmcif", ".pdbx")
LMDB_SUFFIX = ".aselmdb"
# Of a topology that our own readers read; mdtraj reads the rest.
_OUR_TOPOLOGIES = (
    *XYZ_SUFFIXES,
    *HDF5_SUFFIXES,
    *MMCIF_SUFFIXES,
    ".cif",
    ".traj",
    ".db",
    ".npz",
    ".pdb",
    ".ent",
    ".gro",
)

Keep = Callable[[int, int], bool]
"""Whether a frame is wanted, by its index in the file and its number of atoms."""


class PlausibilityWarning(UserWarning):
    """A data set whose numbers look wrong: most often its units."""


class LossyWarning(UserWarning):
    """A trajectory whose format rounds positions: forces there are not those of the run that wrote it."""


@dataclass(frozen=True)
class Source:
    """How one format is read: a fresh iterator of frames, their number (None: by iterating), and the names of atoms.

    A reader may leave out the work for frames that are not wanted, and pass None in their places.
    """

    open: Callable[[Keep | None], Iterator[Atoms | None]]
    count: Callable[[], int] | None = None
    topology: Callable[[], Topology] | None = None


@dataclass
class Frames:
    """Frames of a file as `ase.Atoms`, read while iterating; may be iterated any number of times.

    The first pass looks at its first frames and warns (`PlausibilityWarning`) if their numbers suggest other units, and
    (`LossyWarning`) if the format has rounded them; `lossy` says how, once a frame has been read.
    """

    path: Path
    source: Source = field(repr=False)
    stride: int = 1
    lossy: str | None = None
    _checked: bool = field(default=False, repr=False)
    _said: bool = field(default=False, repr=False)
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
                self._say(atoms)
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
        if frames:
            self._say(frames[0])

    def _say(self, atoms: Atoms) -> None:
        """Once, how the format has changed what it holds."""
        if self._said:
            return
        self._said, lossy = True, atoms.info.get("lossy")
        if not lossy:
            return
        self.lossy = str(lossy)
        what = f"{lossy}: forces here are not those of the run; 0.01 Å of a bond is 0.3 eV/Å"
        warnings.warn(f"{self.path}: {what}", LossyWarning, stacklevel=4)
        from equimd.frames.trajectories import default_box

        if (message := default_box(atoms)) is not None:
            warnings.warn(f"{self.path}: {message}", PlausibilityWarning, stacklevel=4)


def read_frames(
    path: str | Path,
    *,
    topology: str | Path | None = None,
    units: UnitSpec | None = None,
    keys: LabelKeys | None = None,
    stride: int = 1,
    finite: bool = True,
    select: str | None = None,
    pbc: bool | None = None,
) -> Frames:
    """Frames of a file, lazily, with their labels in a `SinglePointCalculator` (eV, eV/Å, eV/Å³).

    Args:
        path: extxyz or xyz (`.gz` too), ASE `.db` and `.traj`, `.aselmdb` or a folder of such shards, `.npz` in the
            layout of rMD17 or sGDML, HDF5 in the layouts of `labelled_h5`, H5MD, mdtraj HDF5, PDB (`.gz` too),
            PDBx/mmCIF, GRO, DCD, XTC, TRR, Amber's NetCDF and restart files, LAMMPS dumps, or any structure that ASE
            reads.
        topology: A file with the elements, for formats that have none, and with names for `select`; ours or any that
            mdtraj reads. A format with elements must have the same ones.
        units: Units of the file; by default what its format prescribes. npz prescribes none: kcal/mol and Å, as rMD17
            documents, with a notice. Trajectories through mdtraj are always nm.
        keys: Names of the labels; by default the usual ones, whatever their case.
        stride: Keep every `stride`-th frame.
        finite: Refuse labels that are not finite, with their frame; components of a stress may be NaN.
        select: Keep these atoms: an expression of mdtraj's selection language, such as "not water". Labels of the
            whole are dropped, since they are not those of the part.
        pbc: False drops cell, periodicity and stress, for a box that there was not.

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
    if pbc:
        raise InputError("pbc is True; accepted: False, which drops the box, or None, which leaves it")
    if not finite:
        keys = replace(keys or DEFAULT_KEYS, finite=False)
    given = None if topology is None else _read_topology(Path(topology))
    source = _source(path, given, units, keys)
    part = Part(path, given, source.topology, select, pbc)
    return Frames(path, source if part.is_whole else replace(source, open=part.of(source.open)), stride)


def read_list(
    path: str | Path,
    *,
    topology: str | Path | None = None,
    units: UnitSpec | None = None,
    keys: LabelKeys | None = None,
    stride: int = 1,
    select: str | None = None,
    pbc: bool | None = None,
) -> list[Atoms]:
    """All frames of a file in memory; arguments and errors as for `read_frames`."""
    return list(read_frames(path, topology=topology, units=units, keys=keys, stride=stride, select=select, pbc=pbc))


def format_suffix(path: Path) -> str:
    """The suffix that names the format, without `.gz`, in lower case."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _source(path: Path, topology: Topology | None, units: UnitSpec | None, keys: LabelKeys | None) -> Source:
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
    if (reader := _geometry(path, topology, suffix)) is not None:
        _refuse_options(path, units=units, keys=keys)
        return Source(lambda _: reader.frames(), reader.count, getattr(reader, "topology", None))
    from equimd.frames.trajectories import is_lammps_dump, lammps_frames

    if is_lammps_dump(path):
        return Source(lambda _: lammps_frames(path, tables.iterate_ase(path, units, chosen), topology))
    return Source(lambda _: tables.iterate_ase(path, units, chosen))


def _geometry(path: Path, topology: Topology | None, suffix: str) -> Any:
    """The reader of a format that holds geometry and no labels; None for other formats."""
    if suffix in (".pdb", ".ent"):
        from equimd.frames.pdb import PdbTrajectory

        return PdbTrajectory(path, topology)
    if suffix == ".gro":
        from equimd.frames.gro import GroTrajectory

        return GroTrajectory(path, topology)
    if suffix in (*MMCIF_SUFFIXES, ".cif"):
        from equimd.frames.mmcif import MmcifTrajectory, is_mmcif

        return MmcifTrajectory(path, topology) if suffix != ".cif" or is_mmcif(path) else None
    from equimd.frames.trajectories import SUFFIXES, MdtrajTrajectory

    return MdtrajTrajectory(path, topology) if suffix in SUFFIXES else None


def _hdf5_source(path: Path, topology: Topology | None, units: UnitSpec | None, keys: LabelKeys | None) -> Source:
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

        reader = H5MDReader(path, units, topology, (keys or DEFAULT_KEYS).finite)
        return Source(lambda _: reader.frames(), reader.count)
    from equimd.frames.trajectories import MdtrajHDF5

    _refuse_options(path, units=units)
    reader = MdtrajHDF5(path, topology)
    return Source(lambda _: reader.frames(), reader.count, reader.topology)


def _labelled_xyz(path: Path, keep: Keep | None, labeller: Labeller) -> Iterator[Atoms | None]:
    for index, atoms in enumerate(extxyz.iterate(path, keep, labeller.hear)):
        yield None if atoms is None else labeller.label(atoms, f"{path}, frame {index}")
    labeller.finish()


def _read_topology(path: Path) -> Topology:
    """Of the first frame of a file that we read, or of one that mdtraj reads."""
    if format_suffix(path) not in _OUR_TOPOLOGIES:
        return load_with_mdtraj(path)
    frames = read_frames(path)
    if frames.source.topology is not None:
        return frames.source.topology()
    return topology_of(next(iter(frames)), str(path))


def _refuse_options(path: Path, **options: object) -> None:
    for name, value in options.items():
        if value is not None and value != LabelKeys(finite=False):
            raise InputError(f"{path}: {name}= does not apply to {path.suffix}; accepted: without it")
