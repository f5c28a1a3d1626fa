"""Compiled kernels that read radial weights of dual numbers from a table while it is trained, and add to its gradient.

Edge e takes shares b and ḃ of ``n_taken`` rows of the table, from ``interval[e] · step`` on:

    w[m] = Σ_q b[e, q] · table[interval[e]·step + q],    rate of w[m] = Σ_q ḃ[e, q] · table[interval[e]·step + q]

for the places m of a range of ``order``, e = order[m]. Path by path, so that the part of the table in use is small.
"""

import functools
from collections.abc import Callable

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
    arrays = f"shares: {dtype}[:, {2 * n_taken}], table: {dtype}[:, {width}], w: {dtype}[:, {2 * width}]"
    lines = [
        f"def kernel({arrays}, interval: int64[:], order: int64[:], low: int64, high: int64):",
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
