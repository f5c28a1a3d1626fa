"""Trajectory files that a kill at any moment leaves whole, and that can be cut back to a checkpoint."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from ase import Atoms

from equimd.errors import InputError
from equimd.frames import H5MDWriter
from equimd.frames.transaction import transaction
from equimd.frames.xyz_writer import FrameFormatter


class Output(Protocol):
    """A trajectory being written; frames are safe once ``flush`` returns."""

    def append(self, atoms: Atoms, step: int, time_fs: float, temperature_K: float) -> None:
        """Add a frame that carries its results."""
        ...

    def flush(self) -> int:
        """Write what has gathered; a mark that ``truncate`` understands."""
        ...

    def truncate(self, mark: int) -> None:
        """Forget what came after the mark."""
        ...


class H5MDOutput:
    """An H5MD file; the mark is the number of frames."""

    def __init__(self, path: Path, append: bool) -> None:
        self.writer = H5MDWriter(path, append=append)

    def append(self, atoms: Atoms, step: int, time_fs: float, temperature_K: float) -> None:
        """Add a frame."""
        self.writer.append(atoms, step=step, time_fs=time_fs, temperature_K=temperature_K)

    def flush(self) -> int:
        """Append the gathered frames in one transaction."""
        self.writer.flush()
        return self.writer.n_frames

    def truncate(self, mark: int) -> None:
        """Keep the first ``mark`` frames."""
        self.writer.truncate(mark)


class ExtxyzOutput:
    """An extxyz file with momenta, masses, constraints, forces, energy and stress; the mark is its size in bytes."""

    def __init__(self, path: Path, append: bool) -> None:
        self.path = path
        self.pending = io.StringIO()
        self._formatter = FrameFormatter(str(path))

    def append(self, atoms: Atoms, step: int, time_fs: float, temperature_K: float) -> None:
        """Add a frame; step, time_fs and temperature_K go into its comment line."""
        frame = atoms.copy()
        frame.calc = atoms.calc
        results = getattr(atoms.calc, "results", {})
        frame.info = {name: value for name, value in frame.info.items() if name not in results}  # of the start
        frame.info |= {"step": step, "time_fs": time_fs, "temperature_K": temperature_K}
        self.pending.write(self._formatter.format(frame, f"{self.path}, step {step}"))

    def flush(self) -> int:
        """Append the gathered frames in one transaction."""
        if not self.pending.tell():
            return self.path.stat().st_size if self.path.exists() else 0
        with transaction(self.path) as overlay:
            overlay.seek(0, os.SEEK_END)
            overlay.write(self.pending.getvalue().encode())
        self.pending = io.StringIO()
        return overlay.size

    def truncate(self, mark: int) -> None:
        """Keep the first ``mark`` bytes."""
        with transaction(self.path) as overlay:
            if overlay.size < mark:
                raise InputError(
                    f"{self.path} has {overlay.size} bytes; accepted: {mark} or more, as its checkpoint says"
                )
            overlay.truncate(mark)


OUTPUTS = {".h5": H5MDOutput, ".h5md": H5MDOutput, ".xyz": ExtxyzOutput, ".extxyz": ExtxyzOutput}


def open_output(path: Path, append: bool) -> Output:
    """The output for a path's suffix.

    Raises:
        InputError: for another suffix, a folder that does not exist, or a file that exists (without ``append``).
    """
    if path.suffix.lower() not in OUTPUTS:
        raise InputError(f"output is {path}; accepted suffixes are {', '.join(OUTPUTS)}")
    if not path.parent.is_dir():
        raise InputError(f"output is {path}, but the folder {path.parent} does not exist")
    if not append and path.exists():
        raise InputError(f"output {path} exists; give another name, or resume the run that wrote it")
    if append and not path.exists():
        raise InputError(f"cannot resume: {path} does not exist")
    return OUTPUTS[path.suffix.lower()](path, append)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold `path` against other runs inside the block, by a lock that ends with the process and leaves no file.

    Raises:
        InputError: another run writes there now, or the folder does not exist or may not be written.
    """
    if not path.parent.is_dir():
        raise InputError(f"output is {path}, but the folder {path.parent} does not exist")
    lock = path.with_name(path.name + ".lock")
    try:
        file = _locked(lock)
    except BlockingIOError:
        raise InputError(
            f"another run is writing {path} now; accepted: another output, or wait until it ends"
        ) from None
    except OSError as error:
        raise InputError(f"output is {path}, but {path.parent} cannot be written ({error.strerror})") from error
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        file.close()


def _locked(lock: Path) -> io.BufferedWriter:
    """The open lock file, held by this process where the system knows such locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return open(lock, "wb")
    while True:
        file = open(lock, "wb")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise
        except OSError:  # a network folder without locks
            return file
        # Another run may have removed the file between opening and locking; then the lock holds nothing.
        if lock.exists() and os.fstat(file.fileno()).st_ino == lock.stat().st_ino:
            return file
        file.close()
