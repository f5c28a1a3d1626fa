"""The text of one compiled kernel, written line by line: its arrays, buffers, constants and helper functions."""

import math
from typing import NamedTuple

from equimd.kernels.codegen import INTRINSICS, OPTIONS, VECTORS, Constants
from equimd.kernels.compiled import module_name

LANES = 16
"""Numbers in a vector of ``lanes``, which is imported by compiled kernels only: numba takes a second to load."""

NODE, EDGE, DEEP, DEEPER = (" " * n for n in (8, 12, 16, 20))
"""Indentation of a line that is executed for every atom, for every edge, and in loops within."""


class KernelSource(NamedTuple):
    """text of a module with a C function ``kernel``; the arrays it takes, in order; modules that it imports.

    phases: what the array ``cycles`` counts, in a kernel with clocks.
    """

    text: str
    arguments: tuple[str, ...]
    modules: tuple[str, ...]
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
        self.imports: list[str] = []
        self.prologue: list[str] = []  # what comes before the loop over atoms
        self.constants = Constants()

    def array(self, name: str, row: int = 0, kind: str = "REAL") -> str:
        """An argument: a table with ``row`` numbers a row, or a flat one."""
        self.arrays.setdefault(name, (kind, row))
        return name

    def buffer(self, name: str, size: int) -> str:
        """Memory of the kernel's own."""
        self.scratch[name] = size
        return name

    def use_lanes(self) -> None:
        """Import the vectors of ``lanes``; their exponential is called ``exp_lanes``."""
        names = "div, exp as exp_lanes, fma, load, maximum, mul, splat, splat_at, store, sub, total, transpose"
        self.imports = [f"from equimd.kernels.lanes import {names}  # {VECTORS}"]

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
        arguments = [f"p_{name}" for name in self.arrays]
        types = ", ".join(kind for kind, _ in self.arrays.values())
        views = [
            f"    {name} = carray(p_{name}, {f'(ROWS, {row})' if row else 'ROWS'})"
            for name, (_, row) in self.arrays.items()
        ]
        views += [f"    {name} = np.empty({size}, np.{self.dtype})" for name, size in self.scratch.items()]
        return "\n".join(
            [
                '"""Made by equimd.kernels.source; safe to delete."""\n',
                "import math\n",
                "import numpy as np",
                "from numba import carray, cfunc, types\n",
                f"from equimd.kernels.intrinsics import exp, use_widest_vectors  # {INTRINSICS}",
                *self.imports,
                *(f"from {module_name(source)} import matmul as {name}" for name, source in self._matmuls()),
                f"REAL = types.CPointer(types.{self.dtype})",
                "DOUBLE = types.CPointer(types.float64)",
                "INDEX = types.CPointer(types.int64)",
                "ROWS = 1 << 40",
                f"ZERO, ONE = np.{self.dtype}(0), np.{self.dtype}(1)",
                *(f"{name} = np.{self.dtype}({value})" for value, name in self.constants.names.items()),
                f"\n\n@cfunc(types.void({types}, types.int64, types.int64), cache=True, {OPTIONS})",
                f"def kernel({', '.join(arguments)}, low, high):",
                "    use_widest_vectors()",
                *views,
                *self.prologue,
                "    for n in range(low, high):",
                *self.lines,
                *self.epilogue,
                "",
            ]
        )

    def _matmuls(self) -> list[tuple[str, str]]:
        return [
            (name, matmul_source(rows, self.n_channels, n_in, n_out, stride, self.dtype))
            for (rows, n_in, n_out, stride), name in self.functions.items()
        ]

    def result(self) -> "KernelSource":
        """The module, and what it takes to compile and to call it."""
        if self.phases:
            self.array("cycles", kind="INDEX")
            self.imports.append(f"from equimd.kernels.intrinsics import read_cycles  # {INTRINSICS}")
            self.prologue += [f"    spent = np.zeros({len(self.phases)}, np.int64)", "    last = read_cycles()"]
            self.epilogue += [f"    for k in range({len(self.phases)}):", "        cycles[k] += spent[k]"]
        modules = tuple(source for _, source in self._matmuls())
        return KernelSource(self.text(), tuple(self.arrays), modules, tuple(self.phases))


def matmul_source(n_rows: int, n_channels: int, n_in: int, n_out: int, stride: int, dtype: str) -> str:
    """A module with one function, compiled once for all kernels that call it.

    Several rows of W are taken at once, so that a target is loaded and stored less often than it is added to.
    """
    array = f"{dtype}[::1]"
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
            '"""Made by equimd.kernels.source; safe to delete."""\n',
            "from numba import njit\n",
            f"from equimd.kernels.intrinsics import use_widest_vectors  # {INTRINSICS}\n\n",
            # With its signature: numba would compile it anew for every literal that it is called with.
            f'@njit("void({array}, int64, {array}, int64, {array}, int64)", cache=True, {OPTIONS})',
            "def matmul(target, t, source, s, weight, offset):",
            "    use_widest_vectors()",
            "    target, source, weight = target[t:], source[s:], weight[offset:]  # so that no index can be negative",
            f"    for q in range(0, {n_in}, {block}):",
            *(" " * 8 + line for line in lines),
            "",
        ]
    )
