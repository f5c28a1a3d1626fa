"""MD trajectories, lazily in chunks, for their geometry: DCD, XTC and TRR through mdtraj, and mdtraj's HDF5.

The HDF5 layout (https://mdtraj.org/1.9.7/hdf5_format.html) is read by h5py: mdtraj itself would ask for PyTables.

These formats drop forces, store float32 nm, and keep lengths and angles of the cell but not its orientation; XTC rounds
to 0.01 Å as well (above 9 atoms). Each frame says so in `info["lossy"]`. Never take them as a source of force
comparisons: half of 0.01 Å on a bond of 30 eV/Å² is 0.15 eV/Å.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from ase import Atoms
from ase.data import atomic_numbers

from equimd import units
from equimd.errors import InputError

FRAMES_PER_CHUNK = 100
LOSSY = {
    ".xtc": "xtc: positions rounded to 0.01 Å, cell orientation lost",
    ".dcd": "dcd: float32 positions, cell orientation lost",
    ".trr": "trr: float32 positions",
    ".h5": "mdtraj-hdf5: float32 positions, cell orientation lost",
}


class MdtrajHDF5:
    """A trajectory in mdtraj's HDF5 layout; `numbers` (N,) override the elements of its own topology."""

    def __init__(self, path: Path, numbers: np.ndarray | None):
        self.path, self._numbers = path, numbers

    def count(self) -> int:
        """Number of frames."""
        with h5py.File(self.path, "r") as file:
            coordinates: Any = file["coordinates"]
            return int(coordinates.shape[0])

    def frames(self) -> Iterator[Atoms]:
        """Frames in Å, with `info["lossy"]`, and `info["time_fs"]` where the file has times.

        Raises:
            InputError: if the file names no elements, or others than it has atoms.
        """
        with h5py.File(self.path, "r") as file:
            coordinates: Any = file["coordinates"]
            numbers = self._elements(file)
            if numbers.shape != (coordinates.shape[1],):
                raise InputError(f"{self.path}: {numbers.size} elements for {coordinates.shape[1]} atoms")
            optional: Any = {name: file[name] for name in ("time", "cell_lengths", "cell_angles") if name in file}
            for start in range(0, len(coordinates), FRAMES_PER_CHUNK):
                window = slice(start, start + FRAMES_PER_CHUNK)
                rows = {name: data[window] for name, data in optional.items()}
                for k, positions in enumerate(coordinates[window].astype(np.float64)):
                    atoms = Atoms(numbers, positions=positions * units.NM)
                    if "cell_lengths" in rows and rows["cell_lengths"][k].any():
                        atoms.set_cell([*(rows["cell_lengths"][k] * units.NM), *rows["cell_angles"][k]])
                        atoms.pbc = True
                    atoms.info["lossy"] = LOSSY[".h5"]
                    if "time" in rows:
                        atoms.info["time_fs"] = float(rows["time"][k]) * 1000.0
                    yield atoms

    def _elements(self, file: h5py.File) -> np.ndarray:
        if self._numbers is not None:
            return self._numbers
        if "topology" not in file:
            raise InputError(f"{self.path}: has no topology; accepted: with topology=FILE that has the elements")
        stored: Any = file["topology"]
        text = np.ravel(stored[()])[0]
        topology = json.loads(text)
        atoms = [atom for chain in topology["chains"] for residue in chain["residues"] for atom in residue["atoms"]]
        atoms.sort(key=lambda atom: atom["index"])
        numbers = np.array([atomic_numbers.get(str(atom["element"]).capitalize(), 0) for atom in atoms])
        if (numbers < 1).any():
            raise InputError(f"{self.path}: atom {int(numbers.argmin())} of the topology has no element")
        return numbers


class MdtrajTrajectory:
    """A trajectory that mdtraj reads; `numbers` (N,) are its elements, or `topology` a file of mdtraj's with them."""

    def __init__(self, path: Path, topology: Path | None, numbers: np.ndarray | None):
        self.path, self._topology_path, self._numbers = path, topology, numbers
        if topology is None:
            raise InputError(
                f"{path}: a {path.suffix} file has no elements; accepted: with topology=FILE that has them"
            )

    def count(self) -> int:
        """Number of frames."""
        import mdtraj

        with mdtraj.open(str(self.path)) as file:
            return len(file)

    def frames(self) -> Iterator[Atoms]:
        """Frames in Å, with `info["lossy"]`, and `info["time_fs"]` where the format stores the time.

        Raises:
            InputError: if the topology does not fit, or the file cannot be read.
        """
        import mdtraj

        chunks = mdtraj.iterload(str(self.path), chunk=FRAMES_PER_CHUNK, top=self._topology())
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
