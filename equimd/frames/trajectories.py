"""MD trajectories through mdtraj: DCD, XTC, TRR and mdtraj's HDF5, lazily in chunks, for their geometry.

These formats drop forces, store float32 nm, and keep lengths and angles of the cell but not its orientation; XTC rounds
to 0.01 Å as well. Each frame says so in `info["lossy"]`. Never take them as a source of force comparisons: forces at
rounded positions differ from those of the run by up to 0.1 eV/Å (XTC).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from equimd import units
from equimd.errors import InputError

FRAMES_PER_CHUNK = 100
LOSSY = {
    ".xtc": "xtc: positions rounded to 0.01 Å, cell orientation lost",
    ".dcd": "dcd: float32 positions, cell orientation lost",
    ".trr": "trr: float32 positions",
    ".h5": "mdtraj-hdf5: float32 positions, cell orientation lost",
    ".hdf5": "mdtraj-hdf5: float32 positions, cell orientation lost",
}


class MdtrajTrajectory:
    """A trajectory that mdtraj reads; `numbers` (N,) are its elements, or `topology` a file of mdtraj's with them."""

    def __init__(self, path: Path, topology: Path | None, numbers: np.ndarray | None):
        self.path, self._topology_path, self._numbers = path, topology, numbers
        self._hdf5 = path.suffix.lower() in (".h5", ".hdf5")
        if topology is None and not self._hdf5:
            raise InputError(
                f"{path}: a {path.suffix} file has no elements; accepted: with topology=FILE that has them"
            )

    def count(self) -> int:
        """Number of frames."""
        import mdtraj

        with mdtraj.open(str(self.path)) as file:
            return int(file.root.coordinates.shape[0]) if self._hdf5 else len(file)

    def frames(self) -> Iterator[Atoms]:
        """Frames in Å, with `info["lossy"]`, and `info["time_fs"]` where the format stores the time.

        Raises:
            InputError: if the topology does not fit, or the file cannot be read.
        """
        import mdtraj

        topology: Any = None if self._hdf5 else self._topology()
        options = {} if topology is None else {"top": topology}
        chunks = mdtraj.iterload(str(self.path), chunk=FRAMES_PER_CHUNK, **options)
        while True:
            try:
                chunk = next(chunks)
            except StopIteration:
                return
            except Exception as error:  # mdtraj's readers raise whatever they stumble over
                raise InputError(
                    f"{self.path}: mdtraj cannot read it with this topology: {type(error).__name__} {str(error)[:120]}"
                ) from error
            yield from self._convert(chunk)

    def _convert(self, chunk: Any) -> Iterator[Atoms]:
        numbers = self._elements(chunk.topology)
        suffix = self.path.suffix.lower()
        cells = chunk.unitcell_vectors
        for k in range(chunk.n_frames):
            atoms = Atoms(numbers, positions=chunk.xyz[k].astype(np.float64) * units.NM)
            if cells is not None and np.abs(cells[k]).max() > 0:
                atoms.set_cell(cells[k].astype(np.float64) * units.NM)
                atoms.pbc = True
            atoms.info["lossy"] = LOSSY[suffix]
            if suffix != ".dcd":
                atoms.info["time_fs"] = float(chunk.time[k]) * 1000.0
            yield atoms

    def _topology(self) -> Any:
        import mdtraj

        if self._numbers is None:
            try:
                return mdtraj.load_topology(str(self._topology_path))
            except Exception as error:  # mdtraj's readers raise whatever they stumble over
                raise InputError(f"{self._topology_path}: mdtraj cannot read it as a topology ({error})") from error
        topology = mdtraj.Topology()
        residue = topology.add_residue("MOL", topology.add_chain())
        for index, number in enumerate(self._numbers.tolist()):
            element = mdtraj.element.Element.getByAtomicNumber(number)
            topology.add_atom(f"{element.symbol}{index}", element, residue)
        return topology

    def _elements(self, topology: Any) -> np.ndarray:
        numbers = [atom.element.atomic_number if atom.element is not None else 0 for atom in topology.atoms]
        if min(numbers, default=0) < 1:
            atom = numbers.index(min(numbers)) if numbers else 0
            raise InputError(f"{self.path}: atom {atom} of the topology has no element; accepted: real atoms only")
        return np.array(numbers)
