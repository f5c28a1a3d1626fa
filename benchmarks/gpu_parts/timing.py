"""How long a call takes on a device: warm-up, then blocks of calls between two events, and the median block."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

N_BLOCKS = 7
WARM_UP_CALLS = 3


def measure(call: Callable[[], Any], device: str, block_seconds: float) -> dict[str, Any]:
    """ms of one call, its spread = (slowest − fastest block) / median, calls a block, peak memory in MiB on a GPU.

    The warm-up, as long as three blocks, is where kernels are compiled and memory is first asked for.
    """
    on_gpu = torch.device(device).type == "cuda"
    for _ in range(WARM_UP_CALLS):
        call()
    begin, n_warm = time.perf_counter(), 0
    while n_warm == 0 or time.perf_counter() - begin < 3 * block_seconds:
        call()
        synchronize(device)
        n_warm += 1
    n_calls = max(1, round(block_seconds * n_warm / (time.perf_counter() - begin)))
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    blocks = [(_block_on_gpu if on_gpu else _block_on_cpu)(call, n_calls) for _ in range(N_BLOCKS)]
    median = float(np.median(blocks))
    result = {"ms": median, "spread": (max(blocks) - min(blocks)) / median, "calls_per_block": n_calls}
    if on_gpu:
        result["peak_memory_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    return result


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _block_on_gpu(call: Callable[[], Any], n_calls: int) -> float:
    """ms a call, by the GPU's clock; gaps between kernels count."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(n_calls):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / n_calls


def _block_on_cpu(call: Callable[[], Any], n_calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(n_calls):
        call()
    return 1e3 * (time.perf_counter() - begin) / n_calls
