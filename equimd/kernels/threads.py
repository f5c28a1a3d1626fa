"""Kernels on several threads: ranges of nodes, one each, on a pool of this process."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

# Multiply-adds below which another thread costs more (about 50 µs to wake it) than it saves.
WORK_PER_THREAD = 3_000_000
_lock, _inside, _threads_before = threading.Lock(), 0, 1
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
        while futures:
            with contextlib.suppress(KeyboardInterrupt):
                wait(futures)
                break
    for future in futures:
        future.result()


def get_num_threads() -> int:
    """How many threads kernels may use: torch's number, or what it was outside ``torch_on_one_thread``."""
    return _threads_before if _inside else torch.get_num_threads()


@contextlib.contextmanager
def torch_on_one_thread() -> Iterator[int]:
    """Keep torch's operations on the thread that calls them, and yield how many threads there are to share the work.

    Its own threads wait for more by spinning, on cores that kernels could use. The setting is the process's; it is set
    back when the last of those who are in here leaves.
    """
    global _inside, _threads_before
    with _lock:
        if _inside == 0:
            _threads_before = torch.get_num_threads()
            torch.set_num_threads(1)
        _inside += 1
    try:
        yield _threads_before
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                torch.set_num_threads(_threads_before)


def _get_pool(n_workers: int) -> ThreadPoolExecutor:
    """Threads of this process; a fork leaves none of its parent's behind, so it makes its own."""
    global _pool
    if _pool is None or _pool[0] != os.getpid() or _pool[1] < n_workers:
        _pool = (os.getpid(), n_workers, ThreadPoolExecutor(n_workers, thread_name_prefix="equimd-kernels"))
    return _pool[2]
