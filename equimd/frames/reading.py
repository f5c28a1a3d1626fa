"""Structures, labelled data sets and trajectories as `ase.Atoms`, lazily: one function for every format."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ase import Atoms

from equimd.errors import InputError
from equimd.frames import extxyz
from equimd.frames.checks import check_plausible
from equimd.frames.labels import DEFAULT_KEYS, DEFAULT_UNITS, LabelKeys, UnitSpec, attach_labels

N_CHECKED = 64


class PlausibilityWarning(UserWarning):
    """A data set whose numbers look wrong: most often its units."""


@dataclass(frozen=True)
class Source:
    """How one format is read: a fresh iterator of frames, and their number."""

    open: Callable[[], Iterator[Atoms]]
    count: Callable[[], int]


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
        if self._length is None:
            self._length = -(-self.source.count() // self.stride)
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
        topology: A file with the elements, for DCD, XTC and TRR; ours or any that mdtraj reads.
        units: Units of the file; by default what its format prescribes.
        keys: Names of the labels; by default the usual ones, whatever their case.
        stride: Keep every `stride`-th frame.

    Raises:
        InputError: if the file is missing, of unknown format, lacks what the format needs, or is malformed.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file; accepted: a file of structures")
    if stride < 1:
        raise InputError(f"stride is {stride}; accepted: 1 or more")
    return Frames(path, _source(path, topology, units, keys or DEFAULT_KEYS), stride)


def read_list(path: str | Path, **options) -> list[Atoms]:
    """All frames of a file in memory; the options are those of `read_frames`."""
    return list(read_frames(path, **options))


def _source(path: Path, topology: str | Path | None, units: UnitSpec | None, keys: LabelKeys) -> Source:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and (suffixes[-1] in (".xyz", ".extxyz") or suffixes[-2:] in ([".xyz", ".gz"], [".extxyz", ".gz"])):
        return Source(
            lambda: _labelled(extxyz.iterate(path), path, units or DEFAULT_UNITS, keys), lambda: extxyz.count(path)
        )
    raise InputError(f"{path}: unknown format; accepted: .xyz .extxyz (.gz)")


def _labelled(frames: Iterator[Atoms], path: Path, units: UnitSpec, keys: LabelKeys) -> Iterator[Atoms]:
    for index, atoms in enumerate(frames):
        yield attach_labels(atoms, units, keys, f"{path}, frame {index}")
