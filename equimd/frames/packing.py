"""From labelled frames to flat arrays, chunk by chunk: labels, neighbour lists, fingerprints, and what is odd."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from equimd.errors import InputError
from equimd.frames import arrays
from equimd.frames.arrays import FIELDS, FORMAT_VERSION, FrameArrays, Writer
from equimd.frames.checks import N_CHECKED, check_plausible, check_species
from equimd.frames.electrons import Tally, is_isolated_atom
from equimd.frames.fingerprints import fingerprints
from equimd.frames.labels import DEFAULT_KEYS, LabelKeys, labels_of, not_finite
from equimd.frames.unclaimed import unclaimed_labels
from equimd.neighbors import neighbor_list, used_cell
from equimd.origin import predicted_by
from equimd.theory import stated_level

FRAMES_PER_CHUNK = 256
ATOMS_PER_CHUNK = 20_000
_SAME_ENERGY = 1e-4  # eV; what is printed with five digits, or computed twice, differs by less


class Packer:
    """Packs labelled frames and their neighbour lists; a context, which closes the files where an error ends it.

    ``meta`` of the result: format; files (frames of each file); cutoff in Å; species; n_labelled (frames with energy,
    forces, stress); isolated_atoms (energies in eV by atomic number, of single atoms with ``config_type=IsolatedAtom``,
    which are set aside); contradictions (messages, where two of these of one element differ); implausible ([file,
    message] about its first frames, see ``check_plausible``); not_finite ([index, what]; only of frames that were read
    with ``finite=False``); unclaimed ([file, message] about what looks like a label and is not read as one, see
    ``unclaimed_labels``); electrons (charges and spins that frames state, see ``Tally``); predictions ([who made them,
    how many frames, index of the first] of results that are no labels, see ``equimd.origin``); levels (the same of
    levels of theory that frames state, see ``equimd.theory``).
    """

    def __init__(
        self,
        cutoff: float,
        folder: Callable[[], Path],
        in_memory: int | None = None,
        keys: LabelKeys | None = None,
    ) -> None:
        self.cutoff, self._make_folder, self._keys = cutoff, folder, keys or DEFAULT_KEYS
        self._in_memory = arrays.IN_MEMORY if in_memory is None else in_memory
        self._writer: Writer | None = None
        self._held: list[dict[str, np.ndarray]] = []
        self._bytes = 0
        self._species: set[int] = set()
        self._files: list[int] = []
        self._n_labelled = {"energy": 0, "forces": 0, "stress": 0}
        self._isolated: dict[int, float] = {}
        self._contradictions: dict[int, str] = {}
        self._not_finite: list[tuple[int, str]] = []
        self._implausible: list[tuple[int, str]] = []
        self._unclaimed: list[tuple[int, str]] = []
        self._electrons = Tally()
        self._predictions: dict[str, tuple[int, int]] = {}
        self._levels: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> "Packer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def add_file(self, frames: Iterable[tuple[int, Atoms]], name: str, n_frames: int | None = None) -> None:
        """Frames of one file with their indices in it; ``n_frames`` of the whole file, where not all of them come.

        Raises:
            InputError: for positions, a cell or labels that make no sense, with the frame.
            OSError: where the folder cannot be written.
        """
        packed = self._pack_each(frames, name, n_frames)
        file = len(self._files)
        self._unclaimed += [(file, message) for message in unclaimed_labels(packed, self._keys)]

    def _pack_each(self, frames: Iterable[tuple[int, Atoms]], name: str, n_frames: int | None) -> Iterator[Atoms]:
        """Pack the frames and hand each on, but for isolated atoms."""
        first, index, is_first = sum(self._files), -1, True
        held: list[tuple[int, Atoms]] = []
        n_atoms = 0
        for index, atoms in frames:
            if is_isolated_atom(atoms):
                self._add_isolated(atoms, f"{name}: frame {index}")
                continue
            self._electrons.add(first + index, atoms, f"{name}, frame {index}")
            self._note_origin(first + index, atoms)
            held.append((index, atoms))
            n_atoms += len(atoms)
            if len(held) == FRAMES_PER_CHUNK or n_atoms >= ATOMS_PER_CHUNK:
                self._append(held, first, name, is_first)
                held, n_atoms, is_first = [], 0, False
            yield atoms
        if held:
            self._append(held, first, name, is_first)
        self._files.append(index + 1 if n_frames is None else n_frames)

    def _note_origin(self, index: int, atoms: Atoms) -> None:
        for found, said in ((self._predictions, predicted_by(atoms)), (self._levels, stated_level(atoms))):
            if said is not None and any(value is not None for value in labels_of(atoms).values()):
                count, first = found.get(said, (0, index))
                found[said] = count + 1, first

    def _add_isolated(self, atoms: Atoms, where: str) -> None:
        energy, number = labels_of(atoms)["energy"], int(atoms.numbers[0])
        if energy is None:
            return
        known = self._isolated.setdefault(number, energy)
        if not abs(known - energy) <= _SAME_ENERGY:
            symbol = atoms.get_chemical_symbols()[0]
            said = f"{where} says that an isolated {symbol} has {energy:.6f} eV, another that it has {known:.6f} eV"
            self._contradictions.setdefault(number, said)

    def finish(self, **extra: Any) -> FrameArrays:
        """The arrays; in files, everything is on the disk when this returns."""
        meta = {
            "format": FORMAT_VERSION,
            "files": self._files,
            "cutoff": self.cutoff,
            "species": sorted(self._species),
            "n_labelled": self._n_labelled,
            "isolated_atoms": {str(number): energy for number, energy in sorted(self._isolated.items())},
            "contradictions": list(self._contradictions.values()),
            "implausible": self._implausible,
            "not_finite": self._not_finite,
            "unclaimed": self._unclaimed,
            "electrons": self._electrons.entries,
            "predictions": [[by, count, first] for by, (count, first) in self._predictions.items()],
            "levels": [[level, count, first] for level, (count, first) in self._levels.items()],
            **extra,
        }
        if self._writer is not None:
            return self._writer.finish(meta)
        joined = {
            name: np.concatenate([chunk[name] for chunk in self._held])
            if self._held
            else np.zeros((0, *shape), dtype=dtype)
            for name, (shape, dtype) in FIELDS.items()
        }
        return FrameArrays(joined, meta)

    def _append(self, frames: list[tuple[int, Atoms]], first: int, name: str, is_first: bool) -> None:
        chunk, bad = pack(frames, self.cutoff, name)
        if is_first:
            checked = frames[:N_CHECKED]
            messages = check_plausible([atoms for _, atoms in checked], [index for index, _ in checked])
            self._implausible += [(len(self._files), message) for message in messages]
        chunk["index"] += first
        bad = [(first + index, what) for index, what in bad]
        self._not_finite += bad
        self._species.update(np.unique(chunk["numbers"]).tolist())
        owner = np.repeat(np.arange(len(frames)), chunk["n_atoms"])
        with_forces = np.zeros(len(frames), dtype=bool)
        with_forces[owner[~np.isnan(chunk["forces"]).any(axis=1)]] = True
        self._n_labelled["energy"] += int((~np.isnan(chunk["energy"])).sum())
        self._n_labelled["forces"] += int(with_forces.sum())
        self._n_labelled["stress"] += int((~np.isnan(chunk["stress"])).any(axis=(1, 2)).sum())
        if self._writer is not None:
            self._writer.append(chunk)
            return
        self._held.append(chunk)
        self._bytes += sum(array.nbytes for array in chunk.values())
        if self._bytes > self._in_memory:
            self._writer = Writer(self._make_folder())
            for one in self._held:
                self._writer.append(one)
            self._held = []


def pack(
    frames: list[tuple[int, Atoms]], cutoff: float, name: str
) -> tuple[dict[str, np.ndarray], list[tuple[int, str]]]:
    """The arrays of a chunk of frames with their indices, and which labels are not finite; ``name`` is the file's."""
    lists: dict[str, list[Any]] = {name: [] for name in FIELDS}
    bad: list[tuple[int, str]] = []
    for index, atoms in frames:
        positions, cell, pbc = atoms.positions, atoms.cell.array, np.asarray(atoms.pbc, dtype=bool)
        if len(atoms) == 0:
            raise InputError(f"{name}, frame {index}: the frame is empty (0 atoms); accepted: 1 or more")
        labels = labels_of(atoms)
        for label in ("energy", "forces"):
            value = labels[label]
            if value is not None and not np.isfinite(value).all():
                bad.append((index, not_finite(label, np.asarray(value))))
        try:
            check_species(atoms.numbers)
            cell = used_cell(cell, pbc)
            edges, shifts = neighbor_list(positions, cell, pbc, cutoff)
        except InputError as error:
            raise InputError(f"{name}, frame {index}: {error}") from error
        row = {"positions": positions, "numbers": atoms.numbers, "cell": cell[None], "pbc": pbc[None]}
        row |= {"edges": edges.T, "shifts": shifts, "index": [index], "n_atoms": [len(atoms)], "n_edges": [len(shifts)]}
        row |= {"energy": _or_nan(labels["energy"], (1,)), "forces": _or_nan(labels["forces"], (len(atoms), 3))}
        row["stress"] = _or_nan(labels["stress"], (1, 3, 3))
        for array, value in row.items():
            lists[array].append(value)
    chunk = {array: np.concatenate(rows) for array, rows in lists.items() if array != "fingerprint"}
    chunk["fingerprint"] = fingerprints(chunk, cutoff)
    return {array: chunk[array].astype(_dtype_for(chunk[array], dtype)) for array, (_, dtype) in FIELDS.items()}, bad


def _or_nan(label: np.ndarray | float | None, shape: tuple[int, ...]) -> np.ndarray:
    return np.full(shape, np.nan) if label is None else np.reshape(np.asarray(label, dtype=np.float64), shape)


def _dtype_for(values: np.ndarray, dtype: str) -> np.dtype:
    """``dtype``, or for integers the first wider one that holds the values."""
    chosen = np.dtype(dtype)
    if chosen.kind != "i" or not values.size:
        return chosen
    low, high = int(values.min()), int(values.max())
    while low < np.iinfo(chosen).min or high > np.iinfo(chosen).max:
        chosen = np.dtype(f"i{2 * chosen.itemsize}")
    return chosen
