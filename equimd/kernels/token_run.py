"""What evaluates a transformer on a CPU, step by step: compiled kernels and matrix products on arrays by name."""

import time
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from equimd.kernels.threads import WORK_PER_THREAD, run_ranges
from equimd.kernels.topology import Topology
from equimd.kernels.workspace import Workspace

Axis = Literal["atom", "token"]


class Kernel(NamedTuple):
    """A compiled function, the arrays it takes in order, and how it is shared among threads."""

    run: Callable[..., None]
    arguments: tuple[str, ...]
    axis: Axis  # what it walks
    work: int  # multiply-adds per token or edge; 0 where only one thread may write


class Run:
    """One evaluation: kernels and linear maps on arrays by name.

    shared: arrays that have the name of another, which is the array they are.
    """

    def __init__(
        self,
        kernels: Mapping[str, Kernel],
        workspace: Workspace,
        shared: Mapping[str, str],
        topology: Topology,
        tensors: dict[str, Tensor],
        seconds: dict[str, float] | None,
    ) -> None:
        self.workspace, self._kernels, self._shared = workspace, kernels, shared
        self._topology, self._seconds = topology, seconds
        self._held: dict[str, Tensor] = {}  # as long as their addresses are used
        self.n_threads = 1
        self._n_tokens = 0
        workspace.fit(atom=topology.n_receivers, edge=topology.n_edges)
        self._pointers = dict(workspace.pointers)
        self.hold(tensors)

    def hold(self, tensors: Mapping[str, Tensor]) -> None:
        """Let kernels find further arrays."""
        self._held |= tensors
        self._pointers |= {name: tensor.data_ptr() for name, tensor in tensors.items()}

    def make_tokens(self) -> None:
        """Find the edges within the cutoff, make room for their tokens, and fill x0."""
        n = self._topology.n_receivers
        self.kernel("distances", "forward: tokens")
        first = torch.zeros(n + 1, dtype=torch.int64, device="cpu")
        torch.cumsum(self.workspace.tensors["count"][:n] + 1, 0, out=first[1:])
        longest = (first[1:] - first[:-1]).max().reshape(1)
        self._n_tokens = int(first[-1])
        self.workspace.fit(token=self._n_tokens)
        self._pointers |= self.workspace.pointers
        self.hold({"first": first, "longest": longest})
        self.kernel("tokens", "forward: tokens", x="x0")

    def kernel(self, name: str, title: str, **names: str) -> None:
        """Run a kernel; ``names`` are of the arrays that are not called as the kernel calls them."""
        start = time.perf_counter()
        kernel = self._kernels[name]
        called = [names.get(argument, argument) for argument in kernel.arguments]
        arguments = [self._pointers[self._shared.get(name, name)] for name in called]
        if kernel.axis == "token":
            bounds = self._bounds(self._n_tokens, kernel.work)
        else:
            bounds = self._topology.split(self._n_parts(self._topology.n_edges * kernel.work))
        run_ranges(kernel.run, arguments, bounds)
        self._add_time(title, start)

    def linear(self, source: str, weight: Tensor, target: str, title: str, add: str = "") -> None:
        """target = source @ weight, or that added to another array."""
        start = time.perf_counter()
        x, out, more = self._rows(source), self._rows(target), self._rows(add) if add else None

        def multiply(low: int, high: int) -> None:
            if more is None:
                torch.mm(x[low:high], weight, out=out[low:high])
            else:
                torch.addmm(more[low:high], x[low:high], weight, out=out[low:high])

        run_ranges(multiply, (), self._bounds(x.shape[0], weight.numel()))
        self._add_time(title, start)

    def products(self, target: Tensor, title: str, *pairs: tuple[str, str]) -> None:
        """target = Σ leftᵀ @ right over the pairs: the gradient of a weight."""
        start = time.perf_counter()
        rows = [(self._rows(left), self._rows(right)) for left, right in pairs]

        wide = target.shape[0] > target.shape[1]  # faster with the narrower of the two transposed
        out = target.T if wide else target

        def multiply(low: int, high: int) -> None:
            for k, (left, right) in enumerate(rows):
                if wide:
                    left, right = right, left
                torch.addmm(out[low:high], left[:, low:high].T, right, beta=min(k, 1), out=out[low:high])

        run_ranges(multiply, (), self._bounds(out.shape[0], len(pairs) * rows[0][0].numel()))
        self._add_time(title, start)

    def copy(self, source: str, target: str, title: str) -> None:
        """target = source, unless they are the same array."""
        if self._shared.get(source, source) != self._shared.get(target, target):
            start = time.perf_counter()
            self._rows(target).copy_(self._rows(source))
            self._add_time(title, start)

    def clear(self, name: str) -> None:
        """Zeros in an array."""
        self._rows(name).zero_()

    def take_atoms(self, source: str, target: str, title: str) -> None:
        """target (N, d) = rows of the atoms' own tokens."""
        start = time.perf_counter()
        torch.index_select(self._rows(source), 0, self._held["first"][:-1], out=self._rows(target))
        self._add_time(title, start)

    def add_to_atoms(self, source: str, target: str, title: str) -> None:
        """Add (N, d) to the rows of the atoms' own tokens."""
        start = time.perf_counter()
        self._rows(target).index_add_(0, self._held["first"][:-1], self._rows(source))
        self._add_time(title, start)

    def _n_parts(self, work: int) -> int:
        return max(1, min(self.n_threads, work // WORK_PER_THREAD))

    def _bounds(self, n_rows: int, work_per_row: int) -> list[int]:
        parts = self._n_parts(n_rows * work_per_row)
        return [n_rows * k // parts for k in range(parts + 1)]

    def _rows(self, name: str) -> Tensor:
        return self.workspace.rows(self._shared.get(name, name))

    def _add_time(self, title: str, start: float) -> None:
        if self._seconds is not None:
            self._seconds[title] = self._seconds.get(title, 0.0) + time.perf_counter() - start
