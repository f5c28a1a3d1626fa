"""The convolution of dual numbers on the CPU: values and rates of change in one pass, differentiable once.

What training on forces needs: the gradient of Σ c·∂E/∂r with respect to the weights, for given c, is that of the rate
of change of E along c. It takes one pass forward and one back, where autograd would differentiate a gradient.

Radial weights, the largest of all arrays, exist for some edges at a time: they are read from their table where they
are used, forward and back, so that they stay in the processor's caches.
"""

import bisect
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from equimd.kernels import dual_codegen, interpolation
from equimd.kernels.compiled import compile_kernel
from equimd.kernels.plan import ConvolutionPlan
from equimd.kernels.threads import WORK_PER_THREAD, get_num_threads, run_ranges
from equimd.kernels.topology import Topology

_DTYPES = {torch.float32: "float32", torch.float64: "float64"}
_CHUNK = 1 << 18
"""Numbers of the radial weights that exist at a time, for each thread: 1 MiB in float32."""


@dataclass(frozen=True, eq=False)
class Shares:
    """How radial weights are read from a table: for edge e, ``n_taken`` rows from ``interval[e] · step`` on.

    values (E, 2, n_taken): what each row counts in the value and in its rate of change. interval (E,) int64.
    """

    values: Tensor
    interval: Tensor
    step: int

    @property
    def n_taken(self) -> int:
        """Rows that an edge reads."""
        return self.values.shape[2]


def convolve_dual(
    x: Tensor, sh: Tensor, table: Tensor, shares: Shares, plan: ConvolutionPlan, topology: Topology
) -> Tensor:
    """``convolve`` of values, and its rate of change, (N, 2, D_out, C); rows in the order of ``dual_codegen.row_of``.

    x (N, 2, D_in, C) and sh (E, 2, (l_max_sh+1)²) hold values and rates of change; radial weights are read from
    table (rows, P, C). Differentiable once in x and table.

    Raises:
        ValueError: for shapes, dtypes or intervals that do not fit the plan or each other.
    """
    n_edges, n_channels, interval = topology.n_edges, x.shape[-1], shares.interval
    wanted = {
        "x": (x, (topology.n_senders, 2, plan.dim_in, n_channels)),
        "sh": (sh, (n_edges, 2, plan.dim_sh)),
        "table": (table, (table.shape[0], plan.n_paths, n_channels)),
        "shares": (shares.values, (n_edges, 2, shares.n_taken)),
    }
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape or tensor.dtype != x.dtype or tensor.device.type != "cpu":
            got = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            raise ValueError(f"{name} must be {shape} {x.dtype} on the CPU, got {got}")
    if x.dtype not in _DTYPES:
        raise ValueError(f"x must be float32 or float64, got {x.dtype}")
    if tuple(interval.shape) != (n_edges,) or interval.dtype != torch.int64 or interval.device.type != "cpu":
        got = f"{tuple(interval.shape)} {interval.dtype} on {interval.device}"
        raise ValueError(f"interval must be ({n_edges},) torch.int64 on the CPU, got {got}")
    last = (table.shape[0] - shares.n_taken) // shares.step
    if n_edges and not 0 <= int(interval.min()) <= int(interval.max()) <= last:
        got = f"{int(interval.min())}..{int(interval.max())}"
        raise ValueError(f"interval must lie in 0..{last}, got {got}")
    return _Convolve.apply(x, sh, table, shares, plan, topology)  # pyright: ignore[reportReturnType]


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sh: Tensor, table: Tensor, shares: Shares, plan: ConvolutionPlan, topology: Topology
    ) -> Tensor:
        pass_ = _Pass(x, sh, table, shares, plan, topology)
        ctx.save_for_backward(x, sh, table)
        ctx.rest = shares, plan, topology
        return pass_.forward()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        pass_ = _Pass(*ctx.saved_tensors, *ctx.rest)
        need_x, _, need_table = ctx.needs_input_grad[:3]
        g = g.contiguous()
        return pass_.grad_x(g) if need_x else None, None, pass_.grad_table(g) if need_table else None, None, None, None


class _Pass:
    """One convolution, or its gradient: kernels called for some edges after others, on several threads."""

    def __init__(
        self, x: Tensor, sh: Tensor, table: Tensor, shares: Shares, plan: ConvolutionPlan, topology: Topology
    ) -> None:
        self.plan, self.topology, self.shares = plan, topology, shares
        self.x, self.sh, self.table = x.contiguous(), sh.contiguous(), table.contiguous()
        self.arrays = {
            "x": self.x,
            "sh": self.sh,
            "shares": shares.values.contiguous(),
            "interval": shares.interval.contiguous(),
            "senders": topology.senders,
            "receivers": topology.receivers,
            "ptr": topology.receiver_ptr,
        }
        self.n_channels, self.dtype = x.shape[3], _DTYPES[x.dtype]
        self.row = 2 * plan.n_paths * self.n_channels  # numbers of an edge
        work = 3 * topology.n_edges * self.n_channels * plan.n_terms
        self.n_threads = max(1, min(get_num_threads(), work // WORK_PER_THREAD))

    def forward(self) -> Tensor:
        """The convolution, by receivers."""
        out = self.x.new_empty(self.topology.n_receivers, 2, self.plan.dim_out, self.n_channels)
        arrays = {"out": out, "table": self.table, "order": self.topology.receiver_order}

        def part(low: int, high: int) -> None:
            for first, last, edges in self._chunks(low, high):
                w = self._weights(edges)
                self._call("read", edges.start, edges.stop, arrays, w=w)
                self._call("forward", first, last, arrays, w=w)

        self._run(part, self.topology.split(self.n_threads), out)
        return out

    def grad_table(self, g: Tensor) -> Tensor:
        """The gradient by the table: by receivers, every thread into one of its own."""
        most = 1 + self.topology.n_edges * self.row // self.table.numel()  # a table costs no more than its edges
        bounds = self.topology.split(min(self.n_threads, most))
        tables = self.table.new_zeros(len(bounds) - 1, *self.table.shape)

        def part(low: int, high: int) -> None:
            table = tables[bisect.bisect_right(bounds, low, hi=len(bounds) - 1) - 1]
            arrays = {"g": g, "table": table, "order": self.topology.receiver_order}
            for first, last, edges in self._chunks(low, high):
                w = self._weights(edges)
                self._call("grad_w", first, last, arrays, g_w=w)
                self._call("add", edges.start, edges.stop, arrays, w=w)

        self._run(part, bounds, tables)
        return tables[0] if len(tables) == 1 else tables.sum(dim=0)

    def grad_x(self, g: Tensor) -> Tensor:
        """The gradient by x: each thread has senders of its own to write to."""
        g_x = torch.empty_like(self.x)
        g_x.numpy().fill(0)  # not by torch: its threads would spin on beside ours
        order, bounds = self.topology.sender_groups(self.n_threads)
        arrays = {"g": g, "g_x": g_x, "table": self.table, "order": order}

        def part(low: int, high: int) -> None:
            most = max(1, _CHUNK // self.row)
            for first in range(low, high, most):
                edges = range(first, min(first + most, high))
                w = self._weights(edges)
                self._call("read", edges.start, edges.stop, arrays, w=w)
                self._call("grad_x", edges.start, edges.stop, arrays, w=w)

        self._run(part, bounds, g_x)
        return g_x

    def _run(self, part: Callable[[int, int], None], bounds: Sequence[int], result: Tensor) -> None:
        if self.topology.n_edges == 0 or result.numel() == 0:
            result.zero_()
        else:
            run_ranges(part, (), bounds)

    def _chunks(self, low: int, high: int) -> Iterator[tuple[int, int, range]]:
        """Receivers low … high some at a time: the first, the one after the last, and places of the edges into them."""
        ptr, most = self.topology.receiver_ptr_list, max(1, _CHUNK // self.row)
        while low < high:
            last = max(low + 1, bisect.bisect_right(ptr, ptr[low] + most, low, high + 1) - 1)
            yield low, last, range(ptr[low], ptr[last])
            low = last

    def _weights(self, edges: range) -> "_Chunk":
        return _Chunk(self.x.new_empty(len(edges), self.row), edges.start)

    def _call(self, name: str, low: int, high: int, arrays: dict[str, Tensor], **chunks: "_Chunk") -> None:
        kernel, names = self._kernel(name)
        held = self.arrays | arrays
        pointers = [chunks[n].address if n in chunks else held[n].data_ptr() for n in names]
        kernel(*pointers, low, high)

    def _kernel(self, name: str) -> tuple[Callable[..., None], tuple[str, ...]]:
        if name in ("read", "add"):
            make = getattr(interpolation, f"{name}_kernel")
            n_paths, shares = self.plan.n_paths, self.shares
            return make(n_paths, self.n_channels, shares.step, shares.n_taken, self.dtype), interpolation.ARGUMENTS
        return _kernel(name, self.plan, self.n_channels, self.dtype)


class _Chunk:
    """Rows of radial weights from place ``start`` on, and where place 0 would be: kernels count from there."""

    def __init__(self, rows: Tensor, start: int) -> None:
        self.rows = rows
        self.address = rows.data_ptr() - start * rows.shape[1] * rows.element_size()


@functools.lru_cache(maxsize=256)
def _kernel(
    name: str, plan: ConvolutionPlan, n_channels: int, dtype: str
) -> tuple[Callable[..., None], tuple[str, ...]]:
    source = getattr(dual_codegen, f"{name}_source")(plan, n_channels, dtype)
    return compile_kernel(source.text, len(source.arguments)), source.arguments
