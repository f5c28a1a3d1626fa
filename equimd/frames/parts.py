"""Parts of frames: some of their atoms, or without a box."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from equimd import origin
from equimd.errors import InputError
from equimd.frames.topology import Topology, topology_of


class Part:
    """What is kept of the frames of one file, and the check that a topology given for it has its elements."""

    def __init__(
        self,
        path: Path,
        topology: Topology | None,
        own: Callable[[], Topology] | None,
        select: str | None,
        pbc: bool | None,
    ):
        """``own`` reads the topology that the file itself has."""
        self._path, self._topology, self._own, self._select, self._pbc = path, topology, own, select, pbc
        self._chosen: dict[bytes, np.ndarray] = {}

    @property
    def is_whole(self) -> bool:
        """Whether frames are passed on as they are."""
        return self._topology is None and self._select is None and self._pbc is None

    def of(self, opened: Callable[[Any], Iterator[Atoms | None]]) -> Callable[[Any], Iterator[Atoms | None]]:
        """The same source, of the parts.

        Raises:
            InputError: while iterating, if a frame has not the topology's elements, or the selection is refused.
        """

        def frames(keep: Any) -> Iterator[Atoms | None]:
            for index, atoms in enumerate(opened(keep)):
                yield None if atoms is None else self._part(atoms, f"{self._path}, frame {index}")

        return frames

    def _part(self, atoms: Atoms, where: str) -> Atoms:
        if self._topology is not None and not np.array_equal(self._topology.numbers, atoms.numbers):
            formula = Atoms(self._topology.numbers).get_chemical_formula()
            what = f"has other elements ({atoms.get_chemical_formula()}) than {self._topology.where} ({formula})"
            raise InputError(f"{where}: {what}; accepted: the same atoms in the same order")
        if self._select is not None:
            atoms = atoms[self._indices(atoms, where)]
        if self._pbc is False:
            _drop_box(atoms)
        return atoms

    def _indices(self, atoms: Atoms, where: str) -> np.ndarray:
        key = atoms.numbers.tobytes()
        if key not in self._chosen:
            assert self._select is not None
            topology = self._topology or (self._own() if self._own is not None else topology_of(atoms, str(self._path)))
            if not np.array_equal(topology.numbers, atoms.numbers):
                what = f"{len(atoms)} atoms that are not those of the first"
                raise InputError(f"{where}: {what}; accepted with select: the same atoms in every frame")
            self._chosen[key] = topology.select(self._select)
        return self._chosen[key]


def _drop_box(atoms: Atoms) -> None:
    """Take away cell and periodicity, and the stress, which needs a volume; energy and forces stay."""
    results = dict(getattr(atoms.calc, "results", {}))
    results.pop("stress", None)
    atoms.pbc = False
    atoms.set_cell(None, apply_constraint=False)
    if atoms.calc is not None:
        by = origin.predicted_by(atoms)
        atoms.calc = SinglePointCalculator(atoms, **results)
        origin.mark(atoms, by)
