"""The cache of graphs: labelled frames and their neighbour lists, read and built once, mapped into memory afterwards.

It is the folder ``graphs`` beside the compiled kernels: in ``$EQUIMD_CACHE``, else in the user's cache folder. An entry
is a folder named by the hash of all that decides its contents: the SHA-256 of every file and how its name ends, units,
keys, cutoff, which frames were drawn, and the format. It appears by renaming, whole or not at all; one process builds
while others wait; one that is not whole is built again. Sets of a few MiB are read every time and stay in memory.
Entries that nobody has used for three months are deleted when another is built.
"""

import atexit
import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from ase import Atoms
from pydantic import BaseModel, ValidationError

from equimd.errors import FailedError, InputError
from equimd.frames import Frames, LabelKeys, UnitSpec, read_frames
from equimd.frames.arrays import (
    FORMAT_VERSION,
    META_FILE,
    NOT_FOR_WANT_OF_FILES,
    FrameArrays,
    open_arrays,
)
from equimd.frames.electrons import is_isolated_atom
from equimd.frames.packing import Packer
from equimd.frames.reading import format_suffix
from equimd.frames.tables import lmdb_shards
from equimd.kernels.compiled import cache_folder
from equimd.results import write_text_atomically
from equimd.training.data import subset

_REMEMBERED = 1 << 20  # bytes from which on the hash of a file is remembered
_SETTLED_SECONDS = 2.0  # a file that changed just now may change again within the resolution of its time stamp
_UNUSED_SECONDS = 90 * 24 * 3600.0
_ABANDONED_SECONDS = 7 * 24 * 3600.0  # a build that was killed; no build takes so long
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Request:
    """Which frames, and how they are read: ``n_frames`` of the files' are drawn with the seed; None takes all."""

    paths: tuple[Path, ...]
    units: UnitSpec | None
    keys: LabelKeys | None
    cutoff: float
    n_frames: int | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """The files, for messages."""
        return ", ".join(map(str, self.paths))


def graphs_folder() -> Path:
    """Where graphs are kept between runs; not created here."""
    return cache_folder().parent / "graphs"


def frame_arrays(request: Request, progress: bool = False) -> FrameArrays:
    """The frames of a request, from the cache where it has them.

    Raises:
        InputError: for a missing or malformed file, labels that are not finite, no frames at all.
        FailedError: for a full disk, or where memory or open files are at their limit.
    """
    entry = graphs_folder() / _key(request)
    found = _open(request, entry)
    if found is None:
        return _build(request, entry, progress)
    with contextlib.suppress(OSError):
        os.utime(entry / META_FILE)
    return found


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, or of the names and hashes of a folder's shards; in hexadecimal.

    That of a large file is remembered in the cache, until its size, time stamp or inode is another.
    """
    if path.is_dir():
        shards = [f"{shard.name} {file_sha256(shard)}\n" for shard in lmdb_shards(path)]
        return hashlib.sha256("".join(shards).encode()).hexdigest()
    try:
        before = os.stat(path)
        if not stat.S_ISREG(before.st_mode):  # a device has no end, and a pipe may have no beginning
            raise InputError(f"{path}: is a device, a pipe or a socket; accepted: a regular file of labelled frames")
        stamp = {"size": before.st_size, "mtime_ns": before.st_mtime_ns, "inode": before.st_ino}
        note = graphs_folder() / "files" / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]}.json"
        if before.st_size >= _REMEMBERED:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                known = json.loads(note.read_text(encoding="utf-8"))
                if known["stamp"] == stamp:
                    return str(known["sha256"])
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        settled = time.time() - before.st_mtime > _SETTLED_SECONDS and os.stat(path).st_mtime_ns == before.st_mtime_ns
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; accepted: a file of labelled frames") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if before.st_size >= _REMEMBERED and settled:
        with contextlib.suppress(OSError):
            note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_text_atomically(note, json.dumps({"stamp": stamp, "sha256": digest}))
    return digest


def remembered(arrays: FrameArrays, name: str, key: Any, model: type[Model], compute: Callable[[], Model]) -> Model:
    """What ``compute`` makes of the arrays, kept as JSON beside them; ``key`` is what else it depends on."""
    if arrays.folder is None:
        return compute()
    path = arrays.folder / f"{name}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
    with contextlib.suppress(OSError, ValidationError):
        return model.model_validate_json(path.read_text(encoding="utf-8"))
    value = compute()
    with contextlib.suppress(OSError):
        write_text_atomically(path, value.model_dump_json())
    return value


def _key(request: Request) -> str:
    decides = {
        "format": FORMAT_VERSION,
        "files": [(file_sha256(path), format_suffix(path)) for path in request.paths],
        "units": None if request.units is None else vars(request.units),
        "keys": None if request.keys is None else vars(request.keys),
        "cutoff": request.cutoff,
        "drawn": None if request.n_frames is None else (request.n_frames, request.seed),
    }
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:32]


class _FoundError(Exception):
    """Another process has built the entry in the meantime."""


def _open(request: Request, entry: Path) -> FrameArrays | None:
    """What is there, whole; None where nothing is."""
    try:
        return open_arrays(entry)
    except OSError as error:
        raise _limited(request, entry, error) from error


def _limited(request: Request, entry: Path, error: OSError) -> FailedError:
    return FailedError(
        f"cannot map the graphs of {request.name} from {entry}: {error.strerror or error}; raise the limits of"
        " address space and of open files (ulimit -v, ulimit -n)"
    )


def _build(request: Request, entry: Path, progress: bool) -> FrameArrays:
    """Read the files, in memory at first; what outgrows it goes into a folder beside the entry, then takes its name."""
    with contextlib.ExitStack() as stack:
        folder: Path | None = None

        def make_folder() -> Path:
            nonlocal folder
            try:
                entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                alone = stack.enter_context(_lock(entry))
                if _open(request, entry) is not None:
                    raise _FoundError
                if alone:  # leftovers of builds that were killed
                    for old in entry.parent.glob(f"{entry.name}.*.tmp"):
                        shutil.rmtree(old, ignore_errors=True)
                _delete_unused(entry.parent)
                folder = Path(tempfile.mkdtemp(dir=entry.parent, prefix=f"{entry.name}.", suffix=".tmp"))
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                folder = Path(tempfile.mkdtemp(dir=_temporary_folder()))  # not writable: for this process alone
            return folder

        try:
            arrays = _read(request, entry.name, make_folder, progress)
            if folder is not None and folder.parent == entry.parent:
                shutil.rmtree(entry, ignore_errors=True)  # it was not whole
                with contextlib.suppress(OSError):  # where there are no locks, another process may have been first
                    os.rename(folder, entry)
                arrays = _open(request, entry)
        except _FoundError:
            arrays = _open(request, entry)
        except OSError as error:
            if error.errno in NOT_FOR_WANT_OF_FILES:
                raise _limited(request, entry, error) from error
            raise FailedError(
                f"cannot keep the graphs of {request.name} in {entry.parent}: {error.strerror or error}; make room, or"
                " set EQUIMD_CACHE to a folder on another disk"
            ) from error
        if arrays is None:
            raise FailedError(
                f"the graphs of {request.name} vanished from {entry.parent} while they were built; run again"
            )
        return arrays


def _read(request: Request, key: str, make_folder: Callable[[], Path], progress: bool) -> FrameArrays:
    files = [read_frames(path, units=request.units, keys=request.keys) for path in request.paths]
    counts: list[int | None] = [None] * len(files)
    chosen: np.ndarray | None = None
    if request.n_frames is not None:
        counts = [_count(file) for file in files]
        chosen = subset(sum(map(int, counts)), request.n_frames, request.seed)  # type: ignore[arg-type]
    with Packer(request.cutoff, make_folder, keys=request.keys) as packer, _progress(request, files, progress) as seen:
        first = 0
        for path, file, count in zip(request.paths, files, counts, strict=True):
            wanted = None
            if chosen is not None:
                assert count is not None
                wanted = np.zeros(count, dtype=bool)
                wanted[chosen[(chosen >= first) & (chosen < first + count)] - first] = True
                first += count
            packer.add_file(seen(_readable(_chosen(file, wanted), path)), str(path), count)
        arrays = packer.finish(key=key)
    if not len(arrays):
        only = " but isolated atoms" if arrays.meta["isolated_atoms"] else ""
        raise InputError(f"{request.name} holds no frames{only}; at least one is needed")
    return arrays


def _count(file: Frames) -> int:
    try:
        return len(file)
    except OSError as error:
        raise InputError(f"cannot read {file.path}: {error.strerror or error}") from error


def _readable(frames: Iterator[tuple[int, Atoms]], path: Path) -> Iterator[tuple[int, Atoms]]:
    """The frames; errors of the system while they are read are no errors of the folder that they are written to."""
    try:
        yield from frames
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def _chosen(file: Frames, wanted: np.ndarray | None) -> Iterator[tuple[int, Atoms]]:
    """Frames that are wanted (None: all), and isolated atoms whether they are or not."""
    if wanted is None:
        yield from file.select(lambda index, n_atoms: True)
        return
    for index, atoms in file.select(lambda index, n_atoms: n_atoms == 1 or bool(wanted[index])):
        if wanted[index] or is_isolated_atom(atoms):
            yield index, atoms


@contextmanager
def _progress(
    request: Request, files: Sequence[Frames], wanted: bool
) -> Iterator[Callable[[Iterator[tuple[int, Atoms]]], Iterator[tuple[int, Atoms]]]]:
    """Counts frames as they pass, on a bar where standard error is a terminal."""
    if not wanted or not sys.stderr.isatty():
        yield lambda frames: frames
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        total = request.n_frames
        if total is None and all(file.source.count is not None for file in files):
            total = sum(map(len, files))
        names = ", ".join(path.name for path in request.paths)
        task = bar.add_task(f"reading {names}", total=total)

        def seen(frames: Iterator[tuple[int, Atoms]]) -> Iterator[tuple[int, Atoms]]:
            for item in frames:
                bar.advance(task)
                yield item

        yield seen


@contextmanager
def _lock(entry: Path) -> Iterator[bool]:
    """Wait until no other process builds this entry; False where the system has no such locks. A kill releases it."""
    path = entry.with_suffix(".lock")
    try:
        import fcntl

        file = open(path, "w")  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_EX)
    except (ImportError, OSError):
        yield False
        return
    with file:  # it stays when it is released: another process may wait for this very file
        yield True


def _delete_unused(folder: Path) -> None:
    for path in [*folder.glob(f"*/{META_FILE}"), *folder.glob("*.lock"), *folder.glob("files/*.json")]:
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _UNUSED_SECONDS:
                if path.name == META_FILE:
                    shutil.rmtree(path.parent, ignore_errors=True)
                else:
                    path.unlink()
    for path in folder.glob("*.tmp"):
        with contextlib.suppress(OSError):
            newest = max(one.stat().st_mtime for one in (path, *path.iterdir()))
            if time.time() - newest > _ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


@functools.cache
def _temporary_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="equimd-graphs-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
