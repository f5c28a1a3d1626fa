"""MD trajectories, lazily in chunks, for their geometry: whatever mdtraj reads, and LAMMPS dumps through ASE.

mdtraj's HDF5 layout (https://mdtraj.org/1.9.7/hdf5_format.html) is read by h5py: mdtraj itself would ask for PyTables.

These formats drop forces, store float32 nm, and keep lengths and angles of the cell but not its orientation; XTC rounds
to 0.01 Å as well (above 9 atoms). Each frame says so in `info["lossy"]`. Never take them as a source of force
comparisons: half of 0.01 Å on a bond of 30 eV/Å² is 0.15 eV/Å.
"""

import json
import logging
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from ase import Atoms

from equimd import units
from equimd.errors import InputError
from equimd.frames.atom_names import masses_of_symbols, number_of_symbol
from equimd.frames.topology import Site, Topology, with_masses

FRAMES_PER_CHUNK = 100
LOSSY = {
    ".xtc": "xtc: positions rounded to 0.01 Å, cell orientation lost",
    ".dcd": "dcd: float32 positions, cell orientation lost",
    ".trr": "trr: float32 positions",
    ".h5": "mdtraj-hdf5: float32 positions, cell orientation lost",
    ".mdcrd": "mdcrd: positions rounded to 0.001 Å, cell orientation lost",
    ".crd": "crd: positions rounded to 0.001 Å, cell orientation lost",
}
# Formats of one frame, which mdtraj does not read in chunks.
_RESTARTS = (".ncrst", ".rst7", ".restrt", ".inpcrd")
_NETCDF = (".nc", ".ncdf", ".netcdf")
SUFFIXES = (".dcd", ".xtc", ".trr", ".mdcrd", ".crd", *_NETCDF, *_RESTARTS)
# The others have none, but mdtraj counts for them.
_WITH_TIMES = (".xtc", ".trr", *_NETCDF, *_RESTARTS)
_WITH_COUNT = (".dcd", ".xtc", ".trr")
# OpenMM's systems have this box until they are given one, and mdtraj's reporters write it.
_DEFAULT_BOX = 20.0 * np.eye(3)


class MdtrajHDF5:
    """A trajectory in mdtraj's HDF5 layout; `topology` overrides its own."""

    def __init__(self, path: Path, topology: Topology | None):
        self.path, self._topology = path, topology

    def count(self) -> int:
        """Number of frames."""
        with h5py.File(self.path, "r") as file:
            coordinates: Any = file["coordinates"]
            return int(coordinates.shape[0])

    def frames(self) -> Iterator[Atoms]:
        """Frames in Å, with `info["lossy"]`, and `info["time_fs"]` if the file has times.

        Raises:
            InputError: if the file names no elements, or others than it has atoms.
        """
        topology = self._topology or self.topology()
        with h5py.File(self.path, "r") as file:
            coordinates: Any = file["coordinates"]
            if topology.numbers.shape != (coordinates.shape[1],):
                raise InputError(f"{self.path}: {topology.numbers.size} elements for {coordinates.shape[1]} atoms")
            optional: Any = {name: file[name] for name in ("time", "cell_lengths", "cell_angles") if name in file}
            for start in range(0, len(coordinates), FRAMES_PER_CHUNK):
                window = slice(start, start + FRAMES_PER_CHUNK)
                rows = {name: data[window] for name, data in optional.items()}
                for k, positions in enumerate(coordinates[window].astype(np.float64)):
                    atoms = with_masses(Atoms(topology.numbers, positions=positions * units.NM), topology.masses)
                    if "cell_lengths" in rows and rows["cell_lengths"][k].any():
                        atoms.set_cell([*(rows["cell_lengths"][k] * units.NM), *rows["cell_angles"][k]])
                        atoms.pbc = True
                    atoms.info["lossy"] = LOSSY[".h5"]
                    if "time" in rows:
                        atoms.info["time_fs"] = float(rows["time"][k]) * 1000.0
                    yield atoms

    def topology(self) -> Topology:
        """The file's own topology.

        Raises:
            InputError: if it has none, or an atom without an element.
        """
        with h5py.File(self.path, "r") as file:
            if "topology" not in file:
                raise InputError(f"{self.path}: has no topology; accepted: with topology=FILE that has the elements")
            stored: Any = file["topology"]
            tree = json.loads(np.ravel(stored[()])[0])
        found: list[tuple[int, str, Site]] = []
        for chain in tree["chains"]:
            for residue in chain["residues"]:
                place = (str(residue["name"]), str(residue.get("resSeq", residue["index"])), str(chain["index"]))
                found += [(a["index"], str(a["element"]), Site(str(a["name"]), *place)) for a in residue["atoms"]]
        found.sort(key=lambda atom: atom[0])
        symbols = [symbol for _, symbol, _ in found]
        numbers = np.array([number_of_symbol(symbol) or 0 for symbol in symbols], dtype=np.int64)
        if (numbers < 1).any():
            raise InputError(f"{self.path}: atom {int(numbers.argmin())} of the topology has no element")
        return Topology(numbers, str(self.path), masses_of_symbols(symbols, numbers), [site for *_, site in found])


class MdtrajTrajectory:
    """A trajectory without elements that mdtraj reads; they come from `topology`."""

    def __init__(self, path: Path, topology: Topology | None):
        self.path = path
        if topology is None:
            raise InputError(
                f"{path}: a {path.suffix} file has no elements; accepted: with topology=FILE that has them"
            )
        self._topology = topology

    @property
    def count(self) -> Callable[[], int] | None:
        """Number of frames, for formats that tell it without being read."""
        return self._count if self.path.suffix.lower() in _WITH_COUNT else None

    def frames(self) -> Iterator[Atoms]:
        """Frames in Å, with `info["lossy"]`, and `info["time_fs"]` if the format stores the time.

        Raises:
            InputError: if the topology does not fit, or the file cannot be read.
        """
        chunks, n_frames = self._chunks(), 0
        while True:
            try:
                with _quiet():
                    chunk = next(chunks)
            except StopIteration:
                self._compare_with_header(n_frames)
                return
            except Exception as error:  # mdtraj's readers raise whatever they stumble over
                raise InputError(
                    f"{self.path}: mdtraj cannot read it with this topology: {type(error).__name__} {str(error)[:120]}"
                ) from error
            n_frames += chunk.n_frames
            yield from self._convert(chunk)

    def _compare_with_header(self, n_frames: int) -> None:
        """A word if a DCD holds fewer frames than its header states; mdtraj passes over that."""
        if self.path.suffix.lower() != ".dcd":
            return
        with open(self.path, "rb") as file:
            head = file.read(12)
        order = "<" if head[:4] == b"T\0\0\0" else ">"
        (stated,) = struct.unpack(order + "i", head[8:12]) if len(head) == 12 and head[4:8] == b"CORD" else (0,)
        if n_frames < stated:
            logging.getLogger("equimd").warning(
                "%s: its header states %d frames, it holds %d: was it cut?", self.path, stated, n_frames
            )

    def _count(self) -> int:
        import mdtraj

        try:
            with _quiet(), mdtraj.open(str(self.path)) as file:
                return len(file)
        except Exception as error:  # mdtraj's readers raise whatever they stumble over
            raise InputError(
                f"{self.path}: mdtraj cannot count its frames ({type(error).__name__}: {str(error)[:120]}); accepted: a"
                " whole file"
            ) from error

    def _chunks(self) -> Iterator[Any]:
        import mdtraj

        topology = self._topology.for_mdtraj()
        if self.path.suffix.lower() in _RESTARTS:
            yield mdtraj.load(str(self.path), top=topology)
            return
        yield from mdtraj.iterload(str(self.path), chunk=FRAMES_PER_CHUNK, top=topology)

    def _convert(self, chunk: Any) -> Iterator[Atoms]:
        suffix = self.path.suffix.lower()
        lossy = LOSSY.get(suffix, f"{suffix[1:]}: float32 positions, cell orientation lost")
        cells = chunk.unitcell_vectors
        for k in range(chunk.n_frames):
            atoms = Atoms(self._topology.numbers, positions=chunk.xyz[k].astype(np.float64) * units.NM)
            with_masses(atoms, self._topology.masses)
            if cells is not None and np.abs(cells[k]).max() > 0:
                atoms.set_cell(cells[k].astype(np.float64) * units.NM)
                atoms.pbc = True
            atoms.info["lossy"] = lossy
            if suffix in _WITH_TIMES:
                atoms.info["time_fs"] = float(chunk.time[k]) * 1000.0
            yield atoms


def default_box(atoms: Atoms) -> str | None:
    """What to say of a frame in the box that OpenMM gives to a system without one; None for other boxes.

    GRO is GROMACS's, which knows no such box.
    """
    if str(atoms.info.get("lossy", "gro")).startswith("gro") or not np.allclose(
        atoms.cell.array, _DEFAULT_BOX, rtol=0, atol=1e-4
    ):
        return None
    return (
        "the box is 20 Å × 20 Å × 20 Å, which OpenMM's reporters write for a run without a box too; if there was none,"
        " pass --no-pbc (Python: pbc=False)"
    )


def is_lammps_dump(path: Path) -> bool:
    """Whether a file is a text dump of LAMMPS, whatever its name."""
    try:
        with open(path, "rb") as file:
            return file.read(14) == b"ITEM: TIMESTEP"
    except OSError:
        return False


def lammps_frames(path: Path, frames: Iterator[Atoms], topology: Topology | None) -> Iterator[Atoms]:
    """Frames of a dump that ASE has read, whose types it takes for atomic numbers, with the elements of `topology`.

    Without a topology the dump must have a column `element`. Velocities are dropped: their unit is LAMMPS's secret.

    Raises:
        InputError: if there are no elements, or a topology of another number of atoms.
    """
    with open(path, encoding="utf-8", errors="replace") as file:
        columns = next((line.split()[2:] for line in file if line.startswith("ITEM: ATOMS")), [])
    if topology is None and "element" not in columns:
        raise InputError(f"{path}: a dump with types and no column element; accepted: with topology=FILE, atoms by id")
    for index, atoms in enumerate(frames):
        if topology is not None:
            if len(topology.numbers) != len(atoms):
                n_given = len(topology.numbers)
                raise InputError(f"{path}, frame {index}: {len(atoms)} atoms, but {topology.where} has {n_given}")
            atoms.set_atomic_numbers(topology.numbers)
            with_masses(atoms, topology.masses)
        atoms.arrays.pop("momenta", None)
        yield atoms


def _quiet() -> Any:
    """Without mdtraj's own warnings, such as the one that scipy reads NetCDF in place of netCDF4."""
    return warnings.catch_warnings(action="ignore")
