"""Compiled kernels that read radial weights of dual numbers from a table while it is trained, and add to its gradient.

Edge e takes shares b and ḃ of ``n_taken`` rows of the table, from ``interval[e] · step`` on:

    w[m] = Σ_q b[e, q] · table[interval[e]·step + q],    rate of w[m] = Σ_q ḃ[e, q] · table[interval[e]·step + q]

for the places m of a range of ``order``, e = order[m]. Path by path, so that the part of the table in use is small.
"""

import functools
from collections.abc import Callable

from equimd.kernels.codegen import INTRINSICS, OPTIONS
from equimd.kernels.compiled import compile_kernel

ARGUMENTS = ("shares", "table", "w", "interval", "order")
"""shares (E, 2, n_taken), table (rows, P, C), w (places, 2, P, C), interval and order (E,) int64; a range of places."""


@functools.lru_cache(maxsize=256)
def read_kernel(n_paths: int, n_channels: int, step: int, n_taken: int, dtype: str) -> Callable[..., None]:
    """shares, table → w."""
    taken = range(n_taken)
    body = [f"x{q} = row{q}[c]" for q in taken]
    body.append("to[c] = " + " + ".join(f"b{q} * x{q}" for q in taken))
    body.append(f"to[{n_paths * n_channels} + c] = " + " + ".join(f"d{q} * x{q}" for q in taken))
    return _kernel(body, n_paths, n_channels, step, n_taken, dtype)


@functools.lru_cache(maxsize=256)
def add_kernel(n_paths: int, n_channels: int, step: int, n_taken: int, dtype: str) -> Callable[..., None]:
    """shares, the gradient by w → added to the gradient by the table."""
    body = ["v = to[c]", f"h = to[{n_paths * n_channels} + c]"]
    body += [f"row{q}[c] += b{q} * v + d{q} * h" for q in range(n_taken)]
    return _kernel(body, n_paths, n_channels, step, n_taken, dtype)


def _kernel(body: list[str], n_paths: int, n_channels: int, step: int, n_taken: int, dtype: str) -> Callable[..., None]:
    width, taken = n_paths * n_channels, range(n_taken)
    lines = [
        '"""Made by equimd.kernels.interpolation; safe to delete."""\n',
        "from numba import carray, cfunc, types\n",
        f"from equimd.kernels.intrinsics import use_widest_vectors  # {INTRINSICS}",
        f"REAL, INDEX = types.CPointer(types.{dtype}), types.CPointer(types.int64)",
        "ROWS = 1 << 40\n\n",
        f"@cfunc(types.void(REAL, REAL, REAL, INDEX, INDEX, types.int64, types.int64), cache=True, {OPTIONS})",
        "def kernel(p_shares, p_table, p_w, p_interval, p_order, low, high):",
        "    use_widest_vectors()",
        f"    shares = carray(p_shares, (ROWS, {2 * n_taken}))",
        f"    table, w = carray(p_table, (ROWS, {width})), carray(p_w, (ROWS, {2 * width}))",
        "    interval, order = carray(p_interval, ROWS), carray(p_order, ROWS)",
        f"    for first in range(0, {width}, {n_channels}):",
        "        for m in range(low, high):",
        "            e = order[m]",
        f"            k = interval[e] * {step}",
        *(f"            row{q} = table[k + {q}]" for q in taken),
        *(f"            b{q}, d{q} = shares[e, {q}], shares[e, {n_taken + q}]" for q in taken),
        "            to = w[m]",
        f"            for c in range(first, first + {n_channels}):",
        *(f"                {line}" for line in body),
        "",
    ]
    return compile_kernel("\n".join(lines), len(ARGUMENTS))
