"""H5MD 1.1 (de Buyl, Colberg, Höfling, Comput. Phys. Commun. 185, 1546 (2014); https://h5md.nongnu.org): the writer.

`particles/all` holds position (Å), velocity (Å/fs), force (kJ/mol/Å), mass, species (atomic numbers) and box (3×3
edges, rows are lattice vectors; none without periodicity, so that no reader takes it for periodic); `observables` holds
potential_energy, kinetic_energy (eV), temperature (K) and stress (eV/Å³, tension positive). `parameters/equimd` holds
the rest (see `h5md_extras`). Every value and time carries a `unit` attribute, as the `units` module asks; forces are in
kJ/mol/Å, the one spelling with Å that MDAnalysis knows: `MDAnalysis.Universe("start.xyz", "run.h5", format="H5MD")`.
"""

from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from ase import Atoms

from equimd import origin, units
from equimd.errors import InputError
from equimd.frames.h5md_extras import CELL, INFO, System, read_system, system_of, update_system, write_system
from equimd.frames.h5md_units import unit_factor
from equimd.frames.labels import labels_of
from equimd.frames.transaction import recover, transaction

GROUP = "particles/all"
_CHUNK_BYTES = 1 << 16


class Element(NamedTuple):
    """A time-dependent element of the file: its path, its unit and its shape per frame, -1 standing for N."""

    path: str
    unit: str
    shape: tuple[int, ...]


ELEMENTS = {
    "position": Element(f"{GROUP}/position", "Angstrom", (-1, 3)),
    "velocity": Element(f"{GROUP}/velocity", "Angstrom fs-1", (-1, 3)),
    "force": Element(f"{GROUP}/force", "kJ mol-1 Angstrom-1", (-1, 3)),
    "edges": Element(f"{GROUP}/box/edges", "Angstrom", (3, 3)),
    "potential_energy": Element("observables/potential_energy", "eV", ()),
    "kinetic_energy": Element("observables/kinetic_energy", "eV", ()),
    "temperature": Element("observables/temperature", "K", ()),
    "stress": Element("observables/stress", "eV Angstrom-3", (3, 3)),
}


# Molecules may have a cell, but readers such as MDAnalysis take any box for a periodic one.
_MOLECULE_CELL = Element(CELL, "Angstrom", (3, 3))
_FIRST = ELEMENTS["position"].path
_TIMES = (f"{_FIRST}/step", f"{_FIRST}/time")


class H5MDWriter:
    """Writes a trajectory of one system; readable and whole after a kill at any moment.

    Frames gather in memory until `flush`, which opens the file, appends them in one transaction and closes it: what was
    flushed is safe, what was not is lost. A flush cut short by a kill is finished by the next reader or writer of
    equimd (see `equimd.frames.transaction`). Quantities that a frame lacks are stored as NaN; what the format cannot
    hold is named in the file, and in a `NotStoredWarning`.
    """

    def __init__(self, path: str | Path, *, append: bool = False, creator: str = "equimd"):
        """Start a new file, or continue an existing one with `append`.

        Raises:
            InputError: if the file exists without `append`, or does not exist with it.
        """
        self.path = Path(path)
        recover(self.path)
        if self.path.exists() != append:
            raise InputError(
                f"{self.path} {'exists' if not append else 'does not exist'};"
                f" accepted: {'a new file, or append=True' if not append else 'an existing file'}"
            )
        self._creator = creator
        self._frames: list[tuple[int, float, dict[str, np.ndarray], str]] = []
        self._system: System | None = None
        self._origin: str | None = None
        self.n_frames = 0
        if append:
            with h5py.File(self.path, "r") as file:
                self.n_frames = _dataset(file, ELEMENTS["position"].path + "/value").shape[0]
                boundary = [
                    _text(name) == "periodic" for name in np.asarray(_group(file, GROUP + "/box").attrs["boundary"])
                ]
                species, mass = (_dataset(file, f"{GROUP}/{name}")[()] for name in ("species", "mass"))
                self._system = read_system(file, species, boundary, mass)
                self._origin = file[GROUP].attrs.get(origin.KEY)

    def append(self, atoms: Atoms, *, step: int, time_fs: float, temperature_K: float | None = None) -> None:
        """Add a frame: positions, momenta, cell, `info`, and the labels its calculator holds.

        Raises:
            InputError: if elements, periodicity, masses, tags, initial charges or magnetic moments, constraints, or who
                made the results differ from those of the first frame.
        """
        system = system_of(atoms)
        if self._system is None:
            self._system = system
        info = self._system.take(system, f"{self.path}: the frame at step {step}")
        labels = labels_of(atoms)
        if any(value is not None for value in labels.values()):
            self._note_origin(origin.predicted_by(atoms), step)
        nan = float("nan")
        values = {
            "position": atoms.positions.copy(),
            "velocity": atoms.get_velocities() / units.ASE_TIME_FS,
            "force": labels["forces"],
            "edges": atoms.cell.array.copy(),
            "potential_energy": labels["energy"],
            "kinetic_energy": atoms.get_kinetic_energy(),
            "temperature": atoms.get_temperature() if temperature_K is None else temperature_K,
            "stress": labels["stress"],
        }
        full = {name: np.array(nan if value is None else value, dtype=np.float64) for name, value in values.items()}
        self._frames.append((step, time_fs, full, info))
        self.n_frames += 1

    def _note_origin(self, by: str | None, step: int) -> None:
        """The results of a file have one origin, which its group states; "" is a reference method's, None not known."""
        if self._origin is None:
            self._origin = by or ""
        elif (by or "") != self._origin:
            what = f"{self.path}: the results of the frame at step {step} are those of {by or 'a reference'}"
            raise InputError(f"{what}, the ones before of {self._origin or 'a reference'}; accepted: one origin")

    def flush(self) -> None:
        """Write the gathered frames to the file; it is closed and synced when this returns."""
        if not self._frames or self._system is None:
            return
        with transaction(self.path) as overlay:
            new = overlay.size == 0
            with h5py.File(overlay, "w" if new else "r+", libver=("v110", "v110")) as file:
                if new:
                    self._create(file, self._system)
                update_system(file, self._system, str(self.path))
                self._extend(file)
        self._frames.clear()

    def truncate(self, n_frames: int) -> None:
        """Keep the first `n_frames` frames of the file and forget what was not flushed.

        Raises:
            InputError: if the file holds fewer.
        """
        self._frames.clear()
        with transaction(self.path) as overlay, h5py.File(overlay, "r+", libver=("v110", "v110")) as file:
            held = _dataset(file, ELEMENTS["position"].path + "/value").shape[0]
            if held < n_frames:
                raise InputError(
                    f"{self.path} holds {held} frames; accepted: {n_frames} or more, as its checkpoint says"
                )
            values = [f"{element.path}/value" for element in (*ELEMENTS.values(), _MOLECULE_CELL)]
            for path in (*_TIMES, INFO, *values):
                if path in file:
                    _dataset(file, path).resize(n_frames, axis=0)
        self.n_frames = n_frames

    def __enter__(self) -> "H5MDWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    def _create(self, file: h5py.File, system: System) -> None:
        file.create_group("h5md").attrs["version"] = np.array([1, 1])
        file.create_group("h5md/author").attrs["name"] = "unknown"
        creator = file.create_group("h5md/creator")
        creator.attrs["name"], creator.attrs["version"] = self._creator, _version()
        file.create_group("h5md/modules/units").attrs["version"] = np.array([1, 0])
        box = file.create_group(f"{GROUP}/box")
        box.attrs["dimension"] = 3
        box.attrs["boundary"] = ["periodic" if periodic else "none" for periodic in system.pbc]
        file[f"{GROUP}/species"] = system.numbers.astype(np.int32)
        file[f"{GROUP}/mass"] = system.masses
        file[f"{GROUP}/mass"].attrs["unit"] = "u"
        write_system(file, system)
        elements = ELEMENTS if system.pbc.any() else ELEMENTS | {"edges": _MOLECULE_CELL}
        for element in elements.values():
            shape = tuple(len(system.numbers) if n < 0 else n for n in element.shape)
            chunk = max(1, _CHUNK_BYTES // (8 * int(np.prod(shape, dtype=int) or 1)))
            group = file.create_group(element.path)
            value = group.create_dataset(
                "value", (0, *shape), np.float64, maxshape=(None, *shape), chunks=(chunk, *shape)
            )
            value.attrs["unit"] = element.unit
            if element.path == _FIRST:
                group.create_dataset("step", (0,), np.int64, maxshape=(None,), chunks=(512,))
                group.create_dataset("time", (0,), np.float64, maxshape=(None,), chunks=(512,)).attrs["unit"] = "fs"
            else:  # a hard link: all elements share one clock
                group["step"], group["time"] = file[_TIMES[0]], file[_TIMES[1]]

    def _extend(self, file: h5py.File) -> None:
        if self._origin:
            file[GROUP].attrs[origin.KEY] = self._origin
        steps, times, frames, infos = zip(*self._frames, strict=True)
        columns = {_TIMES[0]: np.array(steps), _TIMES[1]: np.array(times)}
        if INFO in file:
            columns[INFO] = np.array(infos, dtype=object)
        for name, element in ELEMENTS.items():
            path = (element.path if element.path in file else _MOLECULE_CELL.path) + "/value"
            values = _dataset(file, path)
            factor = unit_factor(_text(values.attrs["unit"]), path)  # of eV/Å in files that equimd 0.1.0 began
            rows = np.stack([np.broadcast_to(frame[name], values.shape[1:]) for frame in frames])
            columns[path] = rows if factor == 1.0 else rows / factor
        for path, data in columns.items():
            dataset = _dataset(file, path)
            start = dataset.shape[0]
            dataset.resize(start + len(data), axis=0)
            dataset[start:] = data


def _version() -> str:
    try:
        return metadata.version("equimd")
    except metadata.PackageNotFoundError:
        return "unknown"


def _dataset(file: h5py.Group, path: str) -> h5py.Dataset:
    item: Any = file[path]
    return item


def _group(file: h5py.Group, path: str) -> h5py.Group:
    item: Any = file[path]
    return item


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
