"""PDBx/mmCIF files of any number of models, through OpenMM; crystallographers' CIF is ASE's."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from equimd import units
from equimd.errors import InputError
from equimd.frames.pdb import box_vectors
from equimd.frames.topology import Site, Topology, with_masses

LOSSY = "mmcif: positions as rounded as the file has them, cell orientation lost"


class MmcifTrajectory:
    """The models of one file, of which the box is one; `topology`, if given, has the elements."""

    def __init__(self, path: Path, topology: Topology | None = None):
        self.path, self._topology = path, topology

    def count(self) -> int:
        """Number of models."""
        return self._read().getNumFrames()

    def frames(self) -> Iterator[Atoms]:
        """Models in Å, with `info["lossy"]`.

        Raises:
            InputError: if the file is damaged, or an atom has no element.
        """
        file = self._read()
        topology = self._names(file.topology)
        box = self._box(file.topology)
        for index in range(file.getNumFrames()):
            positions = np.array(file.getPositions(asNumpy=True, frame=index)._value) * units.NM
            if positions.shape != (len(topology.numbers), 3):
                what = f"{len(positions)} atoms, not {len(topology.numbers)}"
                raise InputError(f"{self.path}, model {index}: {what}; accepted: the same atoms in every model")
            atoms = with_masses(Atoms(topology.numbers, positions=positions), topology.masses)
            if box is not None:
                atoms.set_cell(box)
                atoms.pbc = True
            atoms.info["lossy"] = LOSSY
            yield atoms

    def topology(self) -> Topology:
        """Elements and names."""
        return self._names(self._read().topology)

    def _read(self) -> Any:
        from openmm.app import PDBxFile

        try:
            return PDBxFile(str(self.path))
        except Exception as error:  # OpenMM's parser raises whatever it stumbles over
            what = f"{type(error).__name__}: {str(error)[:120]}"
            raise InputError(f"{self.path}: OpenMM cannot read it ({what}); accepted: PDBx/mmCIF") from error

    def _names(self, stored: Any) -> Topology:
        listed = list(stored.atoms())
        sites = [
            Site(atom.name, atom.residue.name, str(atom.residue.id), str(atom.residue.chain.id)) for atom in listed
        ]
        if self._topology is not None:
            if len(self._topology.numbers) != len(listed):
                n_given = len(self._topology.numbers)
                raise InputError(f"{self.path}: {len(listed)} atoms, but {self._topology.where} has {n_given}")
            return Topology(self._topology.numbers, str(self.path), self._topology.masses, sites)
        bare = next((k for k, atom in enumerate(listed) if atom.element is None), None)
        if bare is not None:
            what = f"atom {bare} ({sites[bare].name} of {sites[bare].residue}) has no type_symbol that is an element"
            raise InputError(f"{self.path}: {what}; accepted: real atoms, or topology=... with the elements")
        heavy = [atom.element.mass._value if atom.element.symbol == "D" else None for atom in listed]
        numbers = np.array([atom.element.atomic_number for atom in listed])
        masses = None
        if any(heavy):
            masses = Atoms(numbers).get_masses()
            masses[[k for k, mass in enumerate(heavy) if mass]] = [mass for mass in heavy if mass]
        return Topology(numbers, str(self.path), masses, sites)

    def _box(self, stored: Any) -> np.ndarray | None:
        vectors = stored.getPeriodicBoxVectors()
        if vectors is None:
            return None
        cell = Atoms(cell=np.array(vectors._value) * units.NM).cell
        lengths, angles = cell.cellpar()[:3].round(6), cell.cellpar()[3:].round(6)
        return box_vectors(lengths.tolist(), angles.tolist(), str(self.path))


def is_mmcif(path: Path) -> bool:
    """Whether a .cif file is PDBx/mmCIF: its atoms have Cartesian coordinates under names with a point."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return any(line.lstrip().startswith("_atom_site.") for line in file)
    except OSError:
        return False
