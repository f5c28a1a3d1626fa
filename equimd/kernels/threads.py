"""Kernels on several threads: ranges of nodes, one each, on a pool of this process."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

# Multiply-adds below which another thread costs more (about 50 µs to wake it) than it saves.
WORK_PER_THREAD = 3_000_000
_local = threading.local()  # OpenMP counts threads for each thread that asks
_pool: tuple[int, int, ThreadPoolExecutor] | None = None  # (process, threads, pool)


def run_ranges(kernel: Callable[..., None], arguments: Sequence[int], bounds: Sequence[int]) -> None:
    """Call ``kernel(*arguments, low, high)`` for consecutive ``bounds``, all at once; returns when all are done."""
    if len(bounds) == 2:
        kernel(*arguments, bounds[0], bounds[1])
        return
    pool = _get_pool(len(bounds) - 2)
    futures: list[Future[None]] = []
    try:
        for low, high in zip(bounds[1:], bounds[2:], strict=False):
            futures.append(pool.submit(kernel, *arguments, low, high))
        kernel(*arguments, bounds[0], bounds[1])
    finally:  # the memory must outlive every thread that writes to it, whatever interrupts this one
        interrupted = _wait_for_all(futures)
    if interrupted is not None:
        raise interrupted
    for future in futures:
        future.result()


def _wait_for_all(futures: list[Future[None]]) -> KeyboardInterrupt | None:
    """Wait, and say whether the user asked to stop meanwhile."""
    interrupted = None
    while True:
        try:
            wait(futures)
            return interrupted
        except KeyboardInterrupt as error:
            interrupted = error


def get_num_threads() -> int:
    """How many threads kernels may use: torch's number, or what it was outside ``torch_on_one_thread``."""
    return getattr(_local, "before", None) or torch.get_num_threads()


@contextlib.contextmanager
def torch_on_one_thread() -> Iterator[int]:
    """Keep torch's operations on the thread that calls them, and yield how many threads there are to share the work.

    Its own threads wait for more by spinning, on cores that kernels could use. The setting is of the calling thread,
    which keeps it between nested uses; a thread that first asks torch for anything in the meantime begins with one.
    """
    before = get_num_threads()
    outermost = not hasattr(_local, "before")
    if outermost:
        _local.before = before
        torch.set_num_threads(1)
    try:
        yield before
    finally:
        if outermost:
            del _local.before
            torch.set_num_threads(before)


def _get_pool(n_workers: int) -> ThreadPoolExecutor:
    """Threads of this process; a fork leaves none of its parent's behind, so it makes its own."""
    global _pool
    if _pool is None or _pool[0] != os.getpid() or _pool[1] < n_workers:
        _pool = (os.getpid(), n_workers, ThreadPoolExecutor(n_workers, thread_name_prefix="equimd-kernels"))
    return _pool[2]
