"""Python source of the kernels before and after a network: from positions to edges, from edges to forces.

- ``geometry``: distances, directions, harmonics, places in the radial tables, screened nuclear repulsion;
- ``gradient``: from harmonics and distances to edge vectors;
- ``scatter``: from there to forces and virial.

All walk a range of atoms and the edges into each.
"""

import math
from typing import TypeAlias

from equimd.kernels.harmonics import recursion_matrix
from equimd.kernels.source import EDGE, KernelSource, Source

Screening: TypeAlias = tuple[tuple[float, float], ...]
"""φ(x) = Σ c·exp(−b·x) as pairs (c, b); empty for none."""


def geometry_source(l_max: int, dtype: str, n_species: int, repulsion: Screening) -> KernelSource:
    """Source of ``geometry``.

    Reads positions (N, 3), shifts (E, 3), cell (S, 3, 3) and batch (N,); writes vectors (E, 3), sh (E, (l_max+1)²),
    place (E,) in −½…½, interval (E,) or −1 beyond the cutoff, and, if there is one, derivative slope (E,) and energy
    repulsion (N,) of the screened nuclear repulsion. ``scales`` is (cutoff, first knot, 1/width of an interval, number
    of intervals).
    """
    s = Source(dtype)
    dim = (l_max + 1) ** 2
    s.array("scales", dtype="float64"), s.array("sh", dim), s.array("place"), s.array("interval", dtype="int64")
    walk_distances(s, n_species, repulsion)
    s.add("if r > scales[0]:", "    interval[e] = -1", "    continue", indent=EDGE)
    s.add("position = (r - scales[1]) * scales[2]", indent=EDGE)
    s.add("k = min(max(int(position), 0), int(scales[3]) - 1)", indent=EDGE)
    s.add("interval[e] = k", "place[e] = position - k - 0.5", indent=EDGE)
    s.add(*_harmonics(l_max), indent=EDGE)
    s.add(*(f"sh[e, {j}] = y{j}" for j in range(dim)), indent=EDGE)
    if repulsion:
        s.add("repulsion[n] = total")
    return s.result()


def walk_distances(s: Source, n_species: int, repulsion: Screening) -> None:
    """The loops over atoms and edges, in which vectors are written, and u0, u1, u2 and r are direction and distance.

    The nuclear repulsion is accumulated in ``total``, for the caller to write at the end of the loop over edges.
    """
    s.array("order", dtype="int64"), s.array("other", dtype="int64"), s.array("ptr", dtype="int64")
    s.array("positions", 3, "float64"), s.array("shifts", 3, "float64"), s.array("cell", 9, "float64")
    s.array("batch", dtype="int64"), s.array("vectors", 3, "float64")
    s.add("box = cell[batch[n]]")
    if repulsion:
        s.array("kind", dtype="int64"), s.array("pairs", 3, "float64")
        s.array("slope", dtype="float64"), s.array("repulsion", dtype="float64")
        s.add("total = 0.0")
    s.add("for m in range(ptr[n], ptr[n + 1]):")
    s.add("e = order[m]", "there = positions[other[e]]", indent=EDGE)
    for k in range(3):  # term by term and in this order, so that the reverse edge is the exact negative
        terms = "".join(f" + shifts[e, {axis}] * box[{3 * axis + k}]" for axis in range(3))
        s.add(f"vectors[e, {k}] = there[{k}] - positions[n, {k}]{terms}", indent=EDGE)
    s.add(*unit_vector(), indent=EDGE)
    if repulsion:
        s.add(*_repulsion(n_species, repulsion), indent=EDGE)


def gradient_source(l_max: int, dtype: str, repulsion: bool) -> KernelSource:
    """Source of ``gradient``: g_sh (E, (l_max+1)²), g_r (E,) and slope (E,) → gradient (E, 3)."""
    s = Source(dtype)
    dim = (l_max + 1) ** 2
    s.array("order", dtype="int64"), s.array("ptr", dtype="int64")
    s.array("vectors", 3, "float64"), s.array("scales", dtype="float64"), s.array("interval", dtype="int64")
    s.array("g_sh", dim), s.array("g_r"), s.array("gradient", 3, "float64")
    if repulsion:
        s.array("slope", dtype="float64")
    s.add("for m in range(ptr[n], ptr[n + 1]):")
    s.add("e = order[m]", *unit_vector(), indent=EDGE)
    s.add(f"along = {'slope[e]' if repulsion else '0.0'}", "d0 = d1 = d2 = 0.0", indent=EDGE)
    s.add("if interval[e] >= 0:", indent=EDGE)
    inner = ["along += g_r[e] * scales[2]", *_harmonics(l_max), *_harmonics_backward(l_max)]
    inner += ["radial = gu0 * u0 + gu1 * u1 + gu2 * u2"]
    inner += [f"d{k} = (gu{k} - radial * u{k}) / r" for k in range(3)]
    s.add(*inner, indent=EDGE + "    ")
    s.add(*(f"gradient[e, {k}] = along * u{k} + d{k}" for k in range(3)), indent=EDGE)
    return s.result()


def scatter_source() -> KernelSource:
    """Source of ``scatter``, to be run over all atoms at once: gradient → forces and virial.

    forces (N, 3), F_i = Σ_j (g_ij − g_ji), and virial (S, 3, 3), Σ r_ij ⊗ g_ij, are zero before.
    """
    s = Source("float64")
    s.array("order", dtype="int64"), s.array("other", dtype="int64"), s.array("ptr", dtype="int64")
    s.array("vectors", 3, "float64"), s.array("gradient", 3, "float64"), s.array("batch", dtype="int64")
    s.array("forces", 3, "float64"), s.array("virial", 9, "float64")
    s.add("own, w = forces[n], virial[batch[n]]", "for m in range(ptr[n], ptr[n + 1]):")
    s.add("e = order[m]", "theirs, g, v = forces[other[e]], gradient[e], vectors[e]", indent=EDGE)
    s.add("for a in range(3):", "    own[a] += g[a]", "    theirs[a] -= g[a]", indent=EDGE)
    s.add("    for b in range(3):", "        w[3 * a + b] += v[a] * g[b]", indent=EDGE)
    return s.result()


def unit_vector() -> list[str]:
    """u0, u1, u2 and r of the edge ``e``."""
    lines = [f"u{k} = vectors[e, {k}]" for k in range(3)]
    return [*lines, "r = math.sqrt(u0 * u0 + u1 * u1 + u2 * u2)", *(f"u{k} /= r" for k in range(3))]


def _harmonics(l_max: int) -> list[str]:
    """Scalars y0, y1, … of the unit vector u0, u1, u2, in float64, by the recursion of ``harmonics``."""
    lines = ["y0 = 1.0"]
    if l_max >= 1:
        lines += [f"y{1 + k} = {math.sqrt(3.0)!r} * u{k}" for k in range(3)]
    for degree in range(2, l_max + 1):
        for row, terms in _recursion_terms(degree).items():
            lines.append(f"y{row} = " + " + ".join(f"{v!r} * y{a} * u{b}" for v, a, b in terms))
    return lines


def _harmonics_backward(l_max: int) -> list[str]:
    """gu0, gu1, gu2 from g_sh, by reversing the recursion."""
    lines = [f"h{j} = float(g_sh[e, {j}])" for j in range(1, (l_max + 1) ** 2)]
    lines.append("gu0 = gu1 = gu2 = 0.0")
    for degree in range(l_max, 1, -1):
        for row, terms in _recursion_terms(degree).items():
            for v, a, b in terms:
                lines.append(f"gu{b} += {v!r} * h{row} * y{a}")
                lines.append(f"h{a} += {v!r} * h{row} * u{b}")
    if l_max >= 1:
        lines += [f"gu{k} += {math.sqrt(3.0)!r} * h{1 + k}" for k in range(3)]
    return lines


def _recursion_terms(degree: int) -> dict[int, list[tuple[float, int, int]]]:
    """Y_row = Σ value · Y_a · u_b for the rows of one degree."""
    matrix = recursion_matrix(degree).numpy()
    terms: dict[int, list[tuple[float, int, int]]] = {}
    for k in range(2 * degree + 1):
        rows = [(float(matrix[i, k]), (degree - 1) ** 2 + int(i) // 3, int(i) % 3) for i in matrix[:, k].nonzero()[0]]
        terms[degree * degree + k] = rows
    return terms


def _repulsion(n_species: int, parts: Screening) -> list[str]:
    """e² Z Z' φ(r/a)/r · cutoff(r/reach) and its derivative; a row of ``pairs`` is (e² Z Z', 1/a, reach)."""
    return [
        f"pair = kind[n] * {n_species} + kind[other[e]]",
        "slope[e] = 0.0",
        "if r < pairs[pair, 2]:",
        "    inverse, reach = pairs[pair, 1], pairs[pair, 2]",
        *(f"    w{k} = {c!r} * math.exp(-{b!r} * r * inverse)" for k, (c, b) in enumerate(parts)),
        f"    phi = {' + '.join(f'w{k}' for k in range(len(parts)))}",
        f"    d_phi = -inverse * ({' + '.join(f'{b!r} * w{k}' for k, (_, b) in enumerate(parts))})",
        "    u = r / reach",
        "    f = (1 - u) ** 3 * (1 + u * (3 + u * (6 + u * (10 + u * (15 + u * 21)))))",
        "    d_f = -168 * u**5 * (1 - u) ** 2 / reach",
        "    total += 0.5 * pairs[pair, 0] * phi * f / r",
        "    slope[e] = 0.5 * pairs[pair, 0] * (d_phi * f + phi * d_f - phi * f / r) / r",
    ]
