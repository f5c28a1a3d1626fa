"""Changes to a file that happen wholly or not at all, whenever the process is killed.

HDF5 does not survive a kill while it writes. So it is given a file-like object that keeps its changes in memory, page
by page; on leaving the block they are written to a journal (`<name>.journal`, through a temporary name), then applied,
then the journal is deleted. A journal that is found later is applied again, which does no harm: pages are absolute.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

PAGE = 4096


class Overlay(io.RawIOBase):
    """A readable, writable, seekable view of a file whose changes stay in memory."""

    def __init__(self, path: Path):
        self._base = open(path, "rb") if path.exists() else io.BytesIO()  # noqa: SIM115
        self.size = self._base_size = self._base.seek(0, os.SEEK_END)
        self.pages: dict[int, bytearray] = {}
        self._position = 0

    def readable(self) -> bool:
        """True."""
        return True

    def writable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to an offset; returns it."""
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        return self._position

    def tell(self) -> int:
        """The present offset."""
        return self._position

    def readinto(self, buffer) -> int:
        """Fill the buffer from the present offset on; returns the number of bytes read."""
        view = memoryview(buffer).cast("B")
        n = max(0, min(len(view), self.size - self._position))
        done = 0
        while done < n:
            number, start = divmod(self._position + done, PAGE)
            part = min(PAGE - start, n - done)
            view[done : done + part] = self._page(number)[start : start + part]
            done += part
        self._position += n
        return n

    def write(self, data) -> int:
        """Write at the present offset; returns the number of bytes written."""
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            number, start = divmod(self._position + done, PAGE)
            part = min(PAGE - start, len(view) - done)
            if number not in self.pages:
                self.pages[number] = self._page(number)
            self.pages[number][start : start + part] = view[done : done + part]
            done += part
        self._position += done
        self.size = max(self.size, self._position)
        return done

    def truncate(self, size: int | None = None) -> int:
        """Set the size of the file; returns it."""
        size = self._position if size is None else size
        if size < self.size:
            for number in [number for number in self.pages if number * PAGE >= size]:
                del self.pages[number]
            number, start = divmod(size, PAGE)
            if start:
                self.pages[number] = self._page(number)
                self.pages[number][start:] = bytes(PAGE - start)
            self._base_size = min(self._base_size, size)
        self.size = size
        return size

    def close(self) -> None:
        """Close the file underneath; changes are discarded unless they were committed."""
        if not self.closed:
            self._base.close()
        super().close()

    def _page(self, number: int) -> bytearray:
        """A page as it is now, padded with zeros."""
        if number in self.pages:
            return self.pages[number]
        start = number * PAGE
        self._base.seek(start)
        data = self._base.read(max(0, min(PAGE, self._base_size - start)))
        return bytearray(data).ljust(PAGE, b"\0")


@contextmanager
def transaction(path: Path) -> Iterator[Overlay]:
    """An `Overlay` of the file (which need not exist); its changes are committed if the block ends without an error."""
    recover(path)
    overlay = Overlay(path)
    try:
        yield overlay
        numbers = np.array(sorted(overlay.pages), dtype=np.int64)
        blocks = b"".join(bytes(overlay.pages[number]) for number in numbers.tolist())
        pages = np.frombuffer(blocks, dtype=np.uint8).reshape(-1, PAGE)
        size = overlay.size
    finally:
        overlay.close()
    journal = _journal(path)
    temporary = journal.with_name(journal.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, numbers=numbers, pages=pages, size=np.int64(size))
            _sync(file)
        os.replace(temporary, journal)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    recover(path)


def recover(path: Path) -> bool:
    """Finish a transaction whose journal was written but which was killed before its end; True if there was one."""
    if not path.name:  # "." and "/" are folders
        return False
    journal = _journal(path)
    if not journal.exists():
        return False
    with np.load(journal, allow_pickle=False) as stored:
        numbers, pages, size = stored["numbers"], stored["pages"], int(stored["size"])
    with open(path, "r+b" if path.exists() else "w+b") as file:
        for number, page in zip(numbers.tolist(), pages, strict=True):
            file.seek(number * PAGE)
            file.write(page.tobytes())
        file.truncate(size)
        _sync(file)
    journal.unlink()
    return True


def _journal(path: Path) -> Path:
    return path.with_name(path.name + ".journal")


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())
