"""Frames as flat arrays with their neighbour lists: packed in chunks, held in memory while small, else in files.

Every array is the concatenation over frames. Files are raw numbers, one file for each array, mapped into memory when
opened: of a large set only what is looked at is read, and the operating system may drop it again.
"""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from equimd.errors import FailedError
from equimd.frames.fingerprints import WIDTH
from equimd.results import write_text_atomically

FORMAT_VERSION = 6
META_FILE = "meta.json"
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
    belongs to the whole: see ``packing.Packer``. ``folder`` is where the files are, None in memory.
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


class Writer:
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
