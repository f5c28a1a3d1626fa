"""Rows of a table, weighted and summed: how radial weights are read from their table while it is being trained."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from equimd.kernels.codegen import OPTIONS
from equimd.kernels.compiled import compile_kernel
from equimd.kernels.threads import WORK_PER_THREAD, get_num_threads, run_ranges

_DTYPES = {torch.float32: "float32", torch.float64: "float64"}


@dataclass(frozen=True, eq=False)
class Intervals:
    """Which rows of the table each edge reads: ``n_taken`` from ``interval[e] · step`` on.

    interval (E,) int64; order, ptr: the edges sorted by interval, and where those of each interval begin.
    """

    interval: Tensor
    order: Tensor
    ptr: Tensor
    step: int
    n_taken: int

    @property
    def n_intervals(self) -> int:
        """Number of intervals K; the table has (K − 1)·step + n_taken rows."""
        return self.ptr.shape[0] - 1

    @property
    def n_rows(self) -> int:
        """Rows of the table."""
        return (self.n_intervals - 1) * self.step + self.n_taken


def make_intervals(interval: Tensor, n_intervals: int, step: int, n_taken: int) -> Intervals:
    """Sort edges by their interval (E,), 0 … K−1.

    Raises:
        ValueError: for an interval outside that range.
    """
    if interval.numel() and (int(interval.min()) < 0 or int(interval.max()) >= n_intervals):
        raise ValueError(f"interval must lie in 0..{n_intervals - 1}, got {int(interval.min())}..{int(interval.max())}")
    ptr = torch.zeros(n_intervals + 1, dtype=torch.int64, device="cpu")
    torch.cumsum(torch.bincount(interval, minlength=n_intervals), 0, out=ptr[1:])
    return Intervals(interval.contiguous(), torch.argsort(interval, stable=True), ptr, step, n_taken)


def interpolate(weights: Tensor, table: Tensor, intervals: Intervals) -> Tensor:
    """``out[e] = Σ_q weights[e, q] · table[interval[e]·step + q]``, (E, M), on the CPU; differentiable once, by table.

    weights (E, n_taken), table (rows, M), float32 or float64 both. Raises ValueError for shapes, dtypes or devices that
    do not fit.
    """
    if weights.shape != (len(intervals.interval), intervals.n_taken) or table.shape[:-1] != (intervals.n_rows,):
        raise ValueError(
            f"weights and table must be ({len(intervals.interval)}, {intervals.n_taken}) and ({intervals.n_rows}, M), "
            f"got {tuple(weights.shape)} and {tuple(table.shape)}"
        )
    if weights.device.type != "cpu" or table.device.type != "cpu":
        raise ValueError(f"weights and table must be on the CPU, got {weights.device} and {table.device}")
    if weights.dtype != table.dtype or weights.dtype not in _DTYPES:
        raise ValueError(f"weights and table must be float32 or float64, got {weights.dtype} and {table.dtype}")
    return _Interpolate.apply(weights, table, intervals)  # pyright: ignore[reportReturnType]


class _Interpolate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, table: Tensor, intervals: Intervals) -> Tensor:
        weights, table = weights.contiguous(), table.contiguous()
        ctx.save_for_backward(weights)
        ctx.intervals = intervals
        return _run("values", weights, table, None, intervals, table.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor, None]:
        (weights,), intervals, g = ctx.saved_tensors, ctx.intervals, g.contiguous()
        parts = _run("table", weights, None, g, intervals, g.shape[1])  # (K, n_taken, M): intervals share rows
        table = g.new_zeros(intervals.n_rows, g.shape[1])
        k, step = intervals.n_intervals, intervals.step
        for start in range(0, intervals.n_taken, step):
            rows = parts[:, start : start + step].reshape(-1, g.shape[1])
            table[start : start + k * step] += rows
        return None, table, None


def _run(kind: str, b: Tensor, t: Tensor | None, g: Tensor | None, intervals: Intervals, width: int) -> Tensor:
    n_edges, n_taken = b.shape
    out = b.new_empty((n_edges, width) if kind == "values" else (intervals.n_intervals, n_taken, width))
    if out.numel() == 0 or n_edges == 0 or width == 0:
        return out.zero_()
    kernel = _kernel(kind, width, intervals.step, n_taken, _DTYPES[b.dtype])
    tensors = (b, t, g, out, intervals.interval, intervals.order, intervals.ptr)
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    parts = max(1, min(get_num_threads(), n_edges * width * n_taken // WORK_PER_THREAD))
    count = intervals.n_intervals if kind == "table" else n_edges
    run_ranges(kernel, pointers, [count * k // parts for k in range(parts + 1)])
    return out


@functools.lru_cache(maxsize=256)
def _kernel(kind: str, width: int, step: int, n_taken: int, dtype: str) -> Callable[..., None]:
    taken = range(n_taken)
    rows = [f"r{q} = t[interval[e] * {step} + {q}]" for q in taken]
    if kind == "values":
        body = [
            "for e in range(low, high):",
            *(f"    {row}" for row in rows),
            *(f"    b{q} = b[e, {q}]" for q in taken),
            "    to = out[e]",
            f"    for c in range({width}):",
            "        to[c] = " + " + ".join(f"b{q} * r{q}[c]" for q in taken),
        ]
    else:
        body = [
            "for k in range(low, high):",
            *(f"    o{q} = parts[k * {n_taken} + {q}]" for q in taken),
            *(f"    o{q}[:] = ZERO" for q in taken),
            "    for m in range(ptr[k], ptr[k + 1]):",
            "        e = order[m]",
            "        own = g[e]",
            *(f"        b{q} = b[e, {q}]" for q in taken),
            f"        for c in range({width}):",
            "            v = own[c]",
            *(f"            o{q}[c] += b{q} * v" for q in taken),
        ]
    shapes = {"b": n_taken, "t": width, "g": width, "out": width}
    lines = [
        '"""Made by equimd.kernels.interpolation; safe to delete."""\n',
        "import numpy as np",
        "from numba import carray, cfunc, types\n",
        f"REAL, INDEX = types.CPointer(types.{dtype}), types.CPointer(types.int64)",
        f"ROWS, ZERO = 1 << 40, np.{dtype}(0)\n\n",
        "@cfunc(",
        "    types.void(REAL, REAL, REAL, REAL, INDEX, INDEX, INDEX, types.int64, types.int64),",
        f"    cache=True, {OPTIONS},",
        ")",
        "def kernel(p_b, p_t, p_g, p_out, p_interval, p_order, p_ptr, low, high):",
        *(f"    {name} = carray(p_{name}, (ROWS, {row}))" for name, row in shapes.items()),
        "    parts = out",
        *(f"    {name} = carray(p_{name}, ROWS)" for name in ("interval", "order", "ptr")),
        *("    " + line for line in body),
        "",
    ]
    return compile_kernel("\n".join(lines), 7)
