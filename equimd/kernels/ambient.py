"""What torch keeps about the calling thread and process, taken out of the way of a prediction.

A default device, autocast, inference mode and a fork change what the same lines of code compute, or whether they end.
The default dtype acts only where modules are built: whatever evaluates them names its dtypes. Denormal numbers and
deterministic algorithms change nothing here; ``torch.set_float32_matmul_precision`` is the user's choice and stays.
"""

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

_AUTOCAST = ("cpu", "cuda")
_nothing = contextlib.nullcontext()
_building = threading.RLock()
_forked = False


def plain_torch(keep_autocast: bool = False) -> contextlib.AbstractContextManager[None]:
    """Within this block, in this thread: tensors on the CPU by default, no inference mode, no autocast.

    In a forked process torch's operations stay on one thread within it, since the threads that OpenMP had in the parent
    are gone and it would wait for them. A training may want to ``keep_autocast``.
    """
    if not (
        torch.is_inference_mode_enabled()
        or _forked
        or torch.empty(0).device.type != "cpu"  # get_default_device() takes five times as long
        or (not keep_autocast and any(map(torch.is_autocast_enabled, _AUTOCAST)))
    ):
        return _nothing
    return _plain(keep_autocast)


@contextlib.contextmanager
def _plain(keep_autocast: bool) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        n_threads = torch.get_num_threads()
        if _forked and n_threads > 1:
            torch.set_num_threads(1)
            stack.callback(torch.set_num_threads, n_threads)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.device("cpu"))
        for device in () if keep_autocast else _AUTOCAST:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def in_plain_torch(function: Callable[P, T]) -> Callable[P, T]:
    """The function, run in ``plain_torch``."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with plain_torch():
            return function(*args, **kwargs)

    return run


@contextlib.contextmanager
def building() -> Iterator[None]:
    """``plain_torch`` with float32 as the default dtype, to build modules in; also decorates a function.

    The default dtype is the process's. Where it is another one, it is float32 for all threads until the block ends.
    """
    with plain_torch(), _building:
        before = torch.get_default_dtype()
        if before is torch.float32:
            yield
            return
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def _after_fork() -> None:
    """In the child: another thread of the parent may have held the lock."""
    global _forked, _building
    _forked, _building = True, threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
