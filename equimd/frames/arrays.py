"""Frames as flat arrays with their neighbour lists: packed in chunks, held in memory while small, else in files.

Every array is the concatenation over frames. Files are raw numbers, one file for each array, mapped into memory when
opened: of a large set only what is looked at is read, and the operating system may drop it again.
"""

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from ase import Atoms

from equimd.errors import FailedError, InputError
from equimd.frames.checks import N_CHECKED, check_plausible, check_species
from equimd.frames.electrons import Tally, is_isolated_atom
from equimd.frames.fingerprints import WIDTH, fingerprints
from equimd.frames.labels import DEFAULT_KEYS, LabelKeys, labels_of, not_finite
from equimd.frames.unclaimed import unclaimed_labels
from equimd.neighbors import neighbor_list
from equimd.results import write_text_atomically

FORMAT_VERSION = 5
META_FILE = "meta.json"
FRAMES_PER_CHUNK = 256
ATOMS_PER_CHUNK = 20_000
_SAME_ENERGY = 1e-4  # eV; what is printed with five digits, or computed twice, differs by less
_NUMBERS_PER_CHUNK = 1 << 20  # atoms and edges of what is looked at at once
NOT_FOR_WANT_OF_FILES = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)
IN_MEMORY = 4 << 20
"""Bytes up to which arrays are held in memory instead of files."""

# Shape after the first axis and dtype of every array; integers of edges are widened where a set asks for it.
ATOM_FIELDS = {"positions": ((3,), "f8"), "numbers": ((), "u1"), "forces": ((3,), "f8")}
EDGE_FIELDS = {"edges": ((2,), "i2"), "shifts": ((3,), "i1")}
FRAME_FIELDS = {
    "cell": ((3, 3), "f8"),
    "pbc": ((3,), "?"),
    "energy": ((), "f8"),
    "stress": ((3, 3), "f8"),
    "n_atoms": ((), "i4"),
    "n_edges": ((), "i4"),
    "index": ((), "i8"),
    "fingerprint": ((WIDTH,), "f8"),
}
FIELDS: dict[str, tuple[tuple[int, ...], str]] = ATOM_FIELDS | EDGE_FIELDS | FRAME_FIELDS


@dataclass(frozen=True)
class FrameArrays:
    """S frames of N atoms and E directed edges in all; NaN where a frame has no label.

    positions (N, 3) Å; numbers (N,); forces (N, 3) eV/Å; edges (E, 2) as receiver and sender, which count the atoms of
    their frame; shifts (E, 3); cell (S, 3, 3) Å; pbc (S, 3); energy (S,) eV; stress (S, 3, 3) eV/Å³; n_atoms, n_edges
    (S,); index (S,), the place of a frame in its files, one after another; fingerprint (S, WIDTH). ``meta`` says what
    belongs to the whole: see ``Packer``. ``folder`` is where the files are, None in memory.
    """

    arrays: Mapping[str, np.ndarray]
    meta: Mapping[str, Any]
    folder: Path | None = None
    atom_start: np.ndarray = field(init=False, repr=False)
    edge_start: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, counts in (("atom_start", self["n_atoms"]), ("edge_start", self["n_edges"])):
            start = np.zeros(len(counts) + 1, dtype=np.int64)
            np.cumsum(counts, out=start[1:])
            object.__setattr__(self, name, start)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __len__(self) -> int:
        return len(self.arrays["n_atoms"])

    def unmet_key(self, keys: Any) -> str | None:
        """The label (energy, forces, stress, virial) that ``keys`` gives a name of and no frame has; None without."""
        counts = self.meta["n_labelled"]
        for label in ("energy", "forces", "stress", "virial"):
            if getattr(keys, label, None) is not None and not counts["stress" if label == "virial" else label]:
                return label
        return None

    def lone_atoms(self) -> np.ndarray:
        """Indices of frames of a single atom without neighbours that does not say that it is an isolated one."""
        alone = (np.asarray(self["n_atoms"]) == 1) & (np.asarray(self["n_edges"]) == 0)
        return np.asarray(self["index"])[alone & np.isfinite(self["energy"])]

    def frame(self, k: int) -> dict[str, np.ndarray]:
        """The arrays of one frame."""
        atoms = slice(self.atom_start[k], self.atom_start[k + 1])
        edges = slice(self.edge_start[k], self.edge_start[k + 1])
        out = {name: self[name][atoms] for name in ATOM_FIELDS} | {name: self[name][edges] for name in EDGE_FIELDS}
        return out | {name: self[name][k] for name in FRAME_FIELDS}

    def distances(self, frames: slice, atoms: slice, edges: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lengths (E,) in Å of the edges of a chunk, and their receivers and senders, counted within the chunk."""
        frame = np.repeat(np.arange(frames.stop - frames.start), self["n_edges"][frames])
        first = (self.atom_start[frames.start : frames.stop] - atoms.start)[frame]
        i, j = first + self["edges"][edges, 0], first + self["edges"][edges, 1]
        positions, shifts = np.asarray(self["positions"][atoms]), np.asarray(self["shifts"][edges])
        vectors = positions[j] - positions[i]
        if shifts.any():
            vectors = vectors + np.einsum("ea,eab->eb", shifts, np.asarray(self["cell"][frames])[frame])
        return np.linalg.norm(vectors, axis=1), i, j

    def chunks(self, n_frames: int = 4096) -> Iterator[tuple[slice, slice, slice]]:
        """Ranges of frames, of their atoms and of their edges that cover the set; large frames make them shorter."""
        size, start = self.atom_start + self.edge_start, 0
        while start < len(self):
            within = int(np.searchsorted(size, size[start] + _NUMBERS_PER_CHUNK, side="right")) - 1
            stop = min(max(within, start + 1), start + n_frames, len(self))
            yield (
                slice(start, stop),
                slice(self.atom_start[start], self.atom_start[stop]),
                slice(self.edge_start[start], self.edge_start[stop]),
            )
            start = stop


class Packer:
    """Packs labelled frames and their neighbour lists; a context, which closes the files where an error ends it.

    ``meta`` of the result: format; files (frames of each file); cutoff in Å; species; n_labelled (frames with energy,
    forces, stress); isolated_atoms (energies in eV by atomic number, of single atoms with ``config_type=IsolatedAtom``,
    which are set aside); contradictions (messages, where two of these of one element differ); implausible ([file,
    message] about its first frames, see ``check_plausible``); not_finite ([index, what]; only of frames that were read
    with ``finite=False``); unclaimed ([file, message] about what looks like a label and is not read as one, see
    ``unclaimed_labels``); electrons (charges and spins that frames state, see ``Tally``).
    """

    def __init__(
        self,
        cutoff: float,
        folder: Callable[[], Path],
        in_memory: int | None = None,
        keys: LabelKeys | None = None,
    ) -> None:
        self.cutoff, self._make_folder, self._keys = cutoff, folder, keys or DEFAULT_KEYS
        self._in_memory = IN_MEMORY if in_memory is None else in_memory
        self._writer: _Writer | None = None
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
            held.append((index, atoms))
            n_atoms += len(atoms)
            if len(held) == FRAMES_PER_CHUNK or n_atoms >= ATOMS_PER_CHUNK:
                self._append(held, first, name, is_first)
                held, n_atoms, is_first = [], 0, False
            yield atoms
        if held:
            self._append(held, first, name, is_first)
        self._files.append(index + 1 if n_frames is None else n_frames)

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
            self._writer = _Writer(self._make_folder())
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


class _Writer:
    """Appends chunks to one file for each array."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._dtypes = {name: np.dtype(dtype) for name, (_, dtype) in FIELDS.items()}
        self._files: dict[str, IO[bytes]] = {name: open(self._path(name), "wb") for name in FIELDS}  # noqa: SIM115

    def append(self, chunk: Mapping[str, np.ndarray]) -> None:
        """Write a chunk at the end."""
        for name, values in chunk.items():
            if values.dtype.itemsize > self._dtypes[name].itemsize:
                self._widen(name, values.dtype)
            self._files[name].write(np.ascontiguousarray(values, dtype=self._dtypes[name]).data)

    def finish(self, meta: dict[str, Any]) -> FrameArrays:
        """Put everything on the disk, last of all what makes the folder valid."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self.close()
        fields = {
            name: {"dtype": self._dtypes[name].str, "bytes": self._path(name).stat().st_size} for name in self._files
        }
        write_text_atomically(self.folder / META_FILE, json.dumps({**meta, "fields": fields}, indent=1))
        opened = open_arrays(self.folder)
        if opened is None:
            raise FailedError(f"{self.folder}: files that were just written are gone or not whole; run again")
        return opened

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()

    def _widen(self, name: str, dtype: np.dtype) -> None:
        """Write again what is there, with wider integers."""
        self._files[name].close()
        narrow, path = self._path(name).with_suffix(".narrow"), self._path(name)
        os.replace(path, narrow)
        self._files[name] = open(path, "wb")  # noqa: SIM115
        with open(narrow, "rb") as old:
            while block := old.read(1 << 20):
                self._files[name].write(np.frombuffer(block, self._dtypes[name]).astype(dtype).data)
        narrow.unlink()
        self._dtypes[name] = dtype

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.bin"


def open_arrays(folder: Path) -> FrameArrays | None:
    """The arrays of a folder, mapped into memory; None where there are none, or not all of them, or of another format.

    They cannot be written to: pages of a private mapping that can be would count as memory, all of them.

    Raises:
        OSError: where memory or open files are at their limit.
    """
    try:
        meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
        if meta["format"] != FORMAT_VERSION:
            return None
        arrays = {}
        for name, (shape, _) in FIELDS.items():
            path, stored = folder / f"{name}.bin", meta["fields"][name]
            dtype = np.dtype(stored["dtype"])
            if path.stat().st_size != stored["bytes"]:
                return None
            rows = stored["bytes"] // (dtype.itemsize * int(np.prod(shape)))
            whole = (rows, *shape)
            arrays[name] = np.memmap(path, dtype, mode="r", shape=whole) if rows else np.zeros(whole, dtype)
        opened = FrameArrays(arrays, meta, folder)
        n_atoms, n_edges = int(opened.atom_start[-1]), int(opened.edge_start[-1])
        lengths = {name: len(opened) for name in FRAME_FIELDS}
        lengths |= dict.fromkeys(ATOM_FIELDS, n_atoms) | dict.fromkeys(EDGE_FIELDS, n_edges)
        return opened if all(len(arrays[name]) == length for name, length in lengths.items()) else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, OSError) and error.errno in NOT_FOR_WANT_OF_FILES:
            raise
        return None
