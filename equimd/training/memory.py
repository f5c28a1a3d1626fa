"""What to do when memory runs out: which setting to lower, and to what; and how to keep what a step has freed."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from equimd.errors import FailedError
from equimd.graph import AtomGraph

_PHRASES = ("can't allocate memory", "out of memory", "cannot allocate memory", "std::bad_alloc")


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_MMAP_BYTES, _OLDER_MMAP_BYTES = 1 << 30, 1 << 25  # the second is the most that older versions of glibc accept


class OutOfMemoryError(FailedError):
    """Memory ran out; the message names the batch and the setting to lower."""


@contextmanager
def advising(setting: str, where: str, *graphs: AtomGraph) -> Iterator[None]:
    """Say what to do where ``graphs`` are too much for this machine; ``setting`` limits their edges, all together."""
    try:
        yield
        return
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    n_frames, n_edges = sum(graph.n_systems for graph in graphs), sum(graph.n_edges for graph in graphs)
    size = f"{n_frames} frames with {sum(graph.n_atoms for graph in graphs):,} atoms and {n_edges:,} edges"
    if n_frames == 1:
        advice = "a single frame cannot be divided: choose a smaller network or cutoff, or more memory"
    else:
        half = max(n_edges // 2, 1)
        advice = f"set {setting} to {half} or less (--set {setting}={half}), the same results in smaller pieces,"
        advice += " and continue with --resume"
    raise OutOfMemoryError(f"out of memory {where}, for {size}; {advice}")


def keep_freed_memory() -> bool:
    """Let glibc keep what a step frees for the next, which pays page faults otherwise; False without glibc.

    It is for a process of its own: the setting is the whole process's.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mapped = any(mallopt(_M_MMAP_THRESHOLD, size) for size in (_MMAP_BYTES, _OLDER_MMAP_BYTES))
    return bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)) and mapped


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return any(phrase in text for phrase in _PHRASES)
