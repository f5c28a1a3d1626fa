"""The text of one compiled kernel, written line by line: its arrays, buffers, constants and helper functions."""

import math
from typing import NamedTuple

from equimd.kernels.codegen import Constants

NODE, EDGE, DEEP, DEEPER = (" " * n for n in (8, 12, 16, 20))
"""Indentation of a line that is executed for every atom, for every edge, and in loops within."""


class KernelSource(NamedTuple):
    """text of a module in the language of ``translate``; the arrays that its function takes, in order.

    phases: what the array ``cycles`` counts, in a kernel with clocks.
    """

    text: str
    arguments: tuple[str, ...]
    phases: tuple[str, ...] = ()


class Source:
    """Lines of one kernel and the arrays it names: the arguments come in the order of first mention.

    With ``clocks``, the kernel adds to ``cycles`` what passed between the marks that are set in it.
    """

    def __init__(self, dtype: str, n_channels: int = 0, clocks: bool = False) -> None:
        self.dtype, self.n_channels, self.clocks = dtype, n_channels, clocks
        self.phases: list[str] = []
        self.epilogue: list[str] = []  # what comes after the loop over atoms
        self.lines: list[str] = []
        self.functions: dict[tuple[int, int, int, int], str] = {}
        self.arrays: dict[str, tuple[str, int]] = {}
        self.scratch: dict[str, int] = {}
        self.prologue: list[str] = []  # what comes before the loop over atoms
        self.constants = Constants()

    def array(self, name: str, row: int = 0, dtype: str = "") -> str:
        """An argument: a table with ``row`` numbers a row, or a flat one; of the kernel's dtype, or of another."""
        self.arrays.setdefault(name, (dtype or self.dtype, row))
        return name

    def buffer(self, name: str, size: int) -> str:
        """Memory of the kernel's own."""
        self.scratch[name] = size
        return name

    def add(self, *lines: str, indent: str = NODE) -> None:
        """Lines of the kernel's loop over atoms."""
        self.lines += [indent + line for line in lines]

    def mark(self, phase: str, indent: str = NODE) -> None:
        """The time since the mark before belongs to this phase."""
        if not self.clocks:
            return
        if phase not in self.phases:
            self.phases.append(phase)
        k = self.phases.index(phase)
        self.add("now = read_cycles()", f"spent[{k}] += now - last", "last = now", indent=indent)

    def number(self, value: float) -> str:
        """The name of a constant of the kernel's dtype."""
        sign = "-" if value < 0 else ""
        return sign + self.constants.name(abs(value))

    def text(self) -> str:
        """The module."""
        arrays = [f"{name}: {dtype}[{f':, {row}' if row else ':'}]" for name, (dtype, row) in self.arrays.items()]
        buffers = [f"    {name} = empty({size}, {self.dtype})" for name, size in self.scratch.items()]
        return "\n".join(
            [
                *(
                    matmul_source(name, rows, self.n_channels, n_in, n_out, stride, self.dtype)
                    for (rows, n_in, n_out, stride), name in self.functions.items()
                ),
                f"ZERO = {self.dtype}(0)",
                f"ONE = {self.dtype}(1)",
                *(f"{name} = {self.dtype}({value})" for value, name in self.constants.names.items()),
                f"def kernel({', '.join(arrays)}, low: int64, high: int64):",
                *buffers,
                *self.prologue,
                "    for n in range(low, high):",
                *self.lines,
                *self.epilogue,
                "",
            ]
        )

    def result(self) -> "KernelSource":
        """The module, and what it takes to call it."""
        if self.phases:
            self.array("cycles", dtype="int64")
            self.prologue += [f"    spent = zeros({len(self.phases)}, int64)", "    last = read_cycles()"]
            self.epilogue += [f"    for k in range({len(self.phases)}):", "        cycles[k] += spent[k]"]
        return KernelSource(self.text(), tuple(self.arrays), tuple(self.phases))


def matmul_source(name: str, n_rows: int, n_channels: int, n_in: int, n_out: int, stride: int, dtype: str) -> str:
    """A function that kernels call.

    Several rows of W are taken at once, so that a target is loaded and stored less often than it is added to.
    """
    array = f"{dtype}[:]"
    block = math.gcd(n_in, {1: 8, 3: 4, 5: 4}.get(n_rows, 2))
    rows, columns = range(n_rows), range(block)
    lines = [f"v{m}_{u} = source[{m * n_channels + u} + q]" for m in rows for u in columns]
    lines.append(f"base = q * {stride}")
    lines.append(f"for c in range({n_out}):")
    lines += [f"    w{u} = weight[base + {u * stride} + c]" for u in columns]
    for m in rows:
        products = " + ".join(f"v{m}_{u} * w{u}" for u in columns)
        lines.append(f"    target[{m * n_channels} + c] += {products}")
    return "\n".join(
        [
            f"def {name}(target: {array}, t: int64, source: {array}, s: int64, weight: {array}, offset: int64):",
            "    target, source, weight = target[t:], source[s:], weight[offset:]",
            f"    for q in range(0, {n_in}, {block}):",
            *(" " * 8 + line for line in lines),
        ]
    )
