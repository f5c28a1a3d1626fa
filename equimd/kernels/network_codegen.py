"""Python source of the kernels that evaluate a whole equivariant network, atom by atom, with frozen weights.

Five kinds, all walking a range of atoms and the edges of each:

- ``geometry``: distances, directions, harmonics, places in the radial tables, screened nuclear repulsion;
- ``forward``: the convolution of one layer, its linear map with skip, its gate, and the first linear map of the next
  layer; for the last layer the read-out instead, and the gradient back to the convolution;
- ``backward``: from the gradient of a layer's convolution to that of its harmonics and distances, and on to the
  gradient of the convolution before;
- ``gradient``: from harmonics and distances to edge vectors; and ``scatter``, from there to forces and virial.

Radial weights are quintic polynomials of the distance, interval by interval, evaluated where they are used: what they
cost in memory is their table. Both directions of a pair share distance and weights, and their harmonics differ by
(−1)^l: so ``backward`` walks the edges into an atom only, and finds there what the edges out of it need.
Features lie as rows of C channels; C and all offsets are literals, so that the compiler sees what overlaps.
"""

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

from equimd.kernels.codegen import Constants, couplings, loops, path_terms, signed_sum
from equimd.kernels.compiled import module_name
from equimd.kernels.harmonics import recursion_matrix
from equimd.kernels.plan import ConvolutionPlan, Irrep, irreps_dim
from equimd.kernels.plan import Path as CouplingPath

SILU_GAIN, SIGMOID_GAIN, TANH_GAIN = 1.6790, 1.8468, 1.5927
"""Second-moment normalisation of silu, sigmoid and tanh for unit-variance inputs, as e3nn's ``normalize2mom``."""

Screening: TypeAlias = tuple[tuple[float, float], ...]
"""φ(x) = Σ c·exp(−b·x) as pairs (c, b); empty for none."""

N_COEFFICIENTS = 6
"""Coefficients of a radial polynomial: value, slope and curvature at both ends of the interval."""

_OPTIONS = 'error_model="numpy", fastmath={"reassoc", "contract", "nsz", "arcp"}'  # NaN and infinity stay what they are
_NODE, _EDGE = " " * 8, " " * 12


@dataclass(frozen=True)
class LayerShape:
    """What the source of a layer depends on; hashable.

    plan: of the convolution. is_last: a read-out follows instead of another layer. is_first: nothing lies before.
    """

    plan: ConvolutionPlan
    n_channels: int
    is_first: bool
    is_last: bool

    @property
    def irreps_out(self) -> tuple[Irrep, ...]:
        """Irreps of the gated output; the first is the even scalar."""
        return self.plan.irreps_out

    @property
    def n_gates(self) -> int:
        """Irreps that have a gate: those with l > 0."""
        return sum(l > 0 for l, _ in self.irreps_out)  # noqa: E741

    @property
    def work(self) -> int:
        """Multiply-adds per edge of the convolution with its radial weights, one direction."""
        return self.n_channels * (self.plan.n_terms + N_COEFFICIENTS * self.plan.n_paths)

    @property
    def z_rows(self) -> list[int]:
        """First row in z of every output irrep: scalar, gates, sigmoid of the scalar, then the others."""
        rows, row = [0], 2 + self.n_gates
        for l, _ in self.irreps_out[1:]:  # noqa: E741
            rows.append(row)
            row += 2 * l + 1
        return rows

    @property
    def n_z(self) -> int:
        """Rows of z."""
        return irreps_dim(self.irreps_out) + self.n_gates + 1

    @property
    def n_in(self) -> int:
        """Rows of the input."""
        return self.plan.dim_in

    @property
    def n_out(self) -> int:
        """Rows of the gated output."""
        return irreps_dim(self.irreps_out)

    def mix_shape(self, block: int) -> tuple[int, int]:
        """Fan-in and fan-out of the linear map of one output irrep: paths and skip → irrep (and gates)."""
        b = self.plan.blocks[block]
        fan_in = b.n_paths + ((b.l, b.p) in self.plan.irreps_in)
        return self.n_channels * fan_in, self.n_channels * (1 + self.n_gates if block == 0 else 1)

    def mix_offset(self, block: int) -> int:
        """Where the matrix of an output irrep begins in the flat array of all of them."""
        return sum(math.prod(self.mix_shape(k)) for k in range(block))


class KernelSource(NamedTuple):
    """text of a module with a C function ``kernel``; the arrays it takes, in order; modules that it imports."""

    text: str
    arguments: tuple[str, ...]
    modules: tuple[str, ...]


class _Source:
    """Lines of one kernel and the arrays it names: the arguments come in the order of first mention."""

    def __init__(self, dtype: str, n_channels: int = 0) -> None:
        self.dtype, self.n_channels = dtype, n_channels
        self.lines: list[str] = []
        self.functions: dict[tuple[int, int, int, int], str] = {}
        self.arrays: dict[str, tuple[str, int]] = {}
        self.scratch: dict[str, int] = {}
        self.constants = Constants()

    def array(self, name: str, row: int = 0, kind: str = "REAL") -> str:
        """An argument: a table with ``row`` numbers a row, or a flat one."""
        self.arrays.setdefault(name, (kind, row))
        return name

    def buffer(self, name: str, size: int) -> str:
        """Memory of the kernel's own."""
        self.scratch[name] = size
        return name

    def add(self, *lines: str, indent: str = _NODE) -> None:
        self.lines += [indent + line for line in lines]

    def number(self, value: float) -> str:
        """The name of a constant of the kernel's dtype."""
        sign = "-" if value < 0 else ""
        return sign + self.constants.name(abs(value))

    def text(self) -> str:
        arguments = [f"p_{name}" for name in self.arrays]
        types = ", ".join(kind for kind, _ in self.arrays.values())
        views = [
            f"    {name} = carray(p_{name}, {f'(ROWS, {row})' if row else 'ROWS'})"
            for name, (_, row) in self.arrays.items()
        ]
        views += [f"    {name} = np.empty({size}, np.{self.dtype})" for name, size in self.scratch.items()]
        return "\n".join(
            [
                '"""Made by equimd.kernels.network_codegen; safe to delete."""\n',
                "import math\n",
                "import numpy as np",
                "from numba import carray, cfunc, types\n",
                f"from equimd.kernels.intrinsics import exp  # {_intrinsics_digest()}",
                *(f"from {module_name(source)} import matmul as {name}" for name, source in self._matmuls()),
                f"REAL = types.CPointer(types.{self.dtype})",
                "DOUBLE = types.CPointer(types.float64)",
                "INDEX = types.CPointer(types.int64)",
                "ROWS = 1 << 40",
                f"ZERO, ONE = np.{self.dtype}(0), np.{self.dtype}(1)",
                *(f"{name} = np.{self.dtype}({value})" for value, name in self.constants.names.items()),
                f"\n\n@cfunc(types.void({types}, types.int64, types.int64), cache=True, {_OPTIONS})",
                f"def kernel({', '.join(arguments)}, low, high):",
                *views,
                "    for n in range(low, high):",
                *self.lines,
                "",
            ]
        )

    def _matmuls(self) -> list[tuple[str, str]]:
        return [
            (name, matmul_source(rows, self.n_channels, n_in, n_out, stride, self.dtype))
            for (rows, n_in, n_out, stride), name in self.functions.items()
        ]

    def result(self) -> "KernelSource":
        return KernelSource(self.text(), tuple(self.arrays), tuple(source for _, source in self._matmuls()))


@functools.cache
def _intrinsics_digest() -> str:
    """So that compiled files are made anew when what they import has changed."""
    return hashlib.sha256(Path(__file__).with_name("intrinsics.py").read_bytes()).hexdigest()[:12]


def geometry_source(l_max: int, dtype: str, n_species: int, repulsion: Screening) -> KernelSource:
    """Source of ``geometry``.

    Reads positions (N, 3), shifts (E, 3), cell (S, 3, 3) and batch (N,); writes vectors (E, 3), sh (E, (l_max+1)²),
    place (E,) in −½…½, interval (E,) or −1 beyond the cutoff, and, if there is one, derivative slope (E,) and energy
    repulsion (N,) of the screened nuclear repulsion. ``scales`` is (cutoff, first knot, 1/width of an interval, number
    of intervals).
    """
    s = _Source(dtype)
    dim = (l_max + 1) ** 2
    s.array("order", kind="INDEX"), s.array("other", kind="INDEX"), s.array("ptr", kind="INDEX")
    s.array("positions", 3, "DOUBLE"), s.array("shifts", 3, "DOUBLE"), s.array("cell", 9, "DOUBLE")
    s.array("batch", kind="INDEX"), s.array("vectors", 3, "DOUBLE"), s.array("scales", kind="DOUBLE")
    s.array("sh", dim), s.array("place"), s.array("interval", kind="INDEX")
    s.add("box = cell[batch[n]]")
    if repulsion:
        s.array("kind", kind="INDEX"), s.array("pairs", 3, "DOUBLE")
        s.array("slope", kind="DOUBLE"), s.array("repulsion", kind="DOUBLE")
        s.add("total = 0.0")
    s.add("for m in range(ptr[n], ptr[n + 1]):")
    s.add("e = order[m]", "there = positions[other[e]]", indent=_EDGE)
    for k in range(3):  # term by term and in this order, so that the reverse edge is the exact negative
        terms = "".join(f" + shifts[e, {axis}] * box[{3 * axis + k}]" for axis in range(3))
        s.add(f"vectors[e, {k}] = there[{k}] - positions[n, {k}]{terms}", indent=_EDGE)
    s.add(*_unit_vector(), indent=_EDGE)
    if repulsion:
        s.add(*_repulsion(n_species, repulsion), indent=_EDGE)
    s.add("if r > scales[0]:", "    interval[e] = -1", "    continue", indent=_EDGE)
    s.add("position = (r - scales[1]) * scales[2]", indent=_EDGE)
    s.add("k = min(max(int(position), 0), int(scales[3]) - 1)", indent=_EDGE)
    s.add("interval[e] = k", "place[e] = position - k - 0.5", indent=_EDGE)
    s.add(*_harmonics(l_max), indent=_EDGE)
    s.add(*(f"sh[e, {j}] = y{j}" for j in range(dim)), indent=_EDGE)
    if repulsion:
        s.add("repulsion[n] = total")
    return s.result()


def gradient_source(l_max: int, dtype: str, repulsion: bool) -> KernelSource:
    """Source of ``gradient``: g_sh (E, (l_max+1)²), g_r (E,) and slope (E,) → gradient (E, 3)."""
    s = _Source(dtype)
    dim = (l_max + 1) ** 2
    s.array("order", kind="INDEX"), s.array("ptr", kind="INDEX")
    s.array("vectors", 3, "DOUBLE"), s.array("scales", kind="DOUBLE"), s.array("interval", kind="INDEX")
    s.array("g_sh", dim), s.array("g_r"), s.array("gradient", 3, "DOUBLE")
    if repulsion:
        s.array("slope", kind="DOUBLE")
    s.add("for m in range(ptr[n], ptr[n + 1]):")
    s.add("e = order[m]", *_unit_vector(), indent=_EDGE)
    s.add(f"along = {'slope[e]' if repulsion else '0.0'}", "d0 = d1 = d2 = 0.0", indent=_EDGE)
    s.add("if interval[e] >= 0:", indent=_EDGE)
    inner = ["along += g_r[e] * scales[2]", *_harmonics(l_max), *_harmonics_backward(l_max)]
    inner += ["radial = gu0 * u0 + gu1 * u1 + gu2 * u2"]
    inner += [f"d{k} = (gu{k} - radial * u{k}) / r" for k in range(3)]
    s.add(*inner, indent=_EDGE + "    ")
    s.add(*(f"gradient[e, {k}] = along * u{k} + d{k}" for k in range(3)), indent=_EDGE)
    return s.result()


def scatter_source() -> KernelSource:
    """Source of ``scatter``, to be run over all atoms at once: gradient → forces and virial.

    forces (N, 3), F_i = Σ_j (g_ij − g_ji), and virial (S, 3, 3), Σ r_ij ⊗ g_ij, are zero before.
    """
    s = _Source("float64")
    s.array("order", kind="INDEX"), s.array("other", kind="INDEX"), s.array("ptr", kind="INDEX")
    s.array("vectors", 3, "DOUBLE"), s.array("gradient", 3, "DOUBLE"), s.array("batch", kind="INDEX")
    s.array("forces", 3, "DOUBLE"), s.array("virial", 9, "DOUBLE")
    s.add("own, w = forces[n], virial[batch[n]]", "for m in range(ptr[n], ptr[n + 1]):")
    s.add("e = order[m]", "theirs, g, v = forces[other[e]], gradient[e], vectors[e]", indent=_EDGE)
    s.add("for a in range(3):", "    own[a] += g[a]", "    theirs[a] -= g[a]", indent=_EDGE)
    s.add("    for b in range(3):", "        w[3 * a + b] += v[a] * g[b]", indent=_EDGE)
    return s.result()


def _unit_vector() -> list[str]:
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


def forward_source(shape: LayerShape, dtype: str) -> KernelSource:
    """Source of ``forward`` for one layer."""
    s = _Source(dtype, shape.n_channels)
    plan, c = shape.plan, shape.n_channels
    s.buffer("to", plan.dim_out * c)
    s.add("to[:] = ZERO")
    _edge_loop(s, shape)
    s.add("source = h[other[e]]", *_powers(), indent=_EDGE)
    _radial(s, plan, derivative=False)
    s.add(*couplings(plan, s.constants, "sh"), indent=_EDGE)
    for paths in loops(plan):
        body = _loads("source", paths, c)
        for path in paths:
            p = path.weight_index
            body.append(f"r{p} = w[{p * c} + c]")
            sums: dict[int, list[str]] = {}
            for i, k, _ in path_terms(path):
                sums.setdefault(k, []).append(f"+ a{p}_{i}_{k} * x{path.in_offset + i}")
            for k, terms in sums.items():
                body.append(f"to[{(path.out_offset + k) * c} + c] += r{p} * ({signed_sum(terms)})")
        _channels(s, c, body, _EDGE)
    s.array("z", shape.n_z * c), s.array("x", shape.n_in * c), s.array("mix")
    s.add("zn = z[n]", "xn = x[n]", "zn[:] = ZERO")
    for k, block in enumerate(plan.blocks):
        fan_in, fan_out = shape.mix_shape(k)
        width = 2 * block.l + 1
        z, offset = shape.z_rows[k], shape.mix_offset(k)
        for p in range(block.n_paths):
            row = block.offset + p * width
            _matmul(s, width, "zn", z, "to", row, "mix", offset + p * c * fan_out, c, fan_out, fan_out)
        if fan_in > block.n_paths * c:
            row = _row_of(plan, (block.l, block.p))
            _matmul(s, width, "zn", z, "xn", row, "mix", offset + block.n_paths * c * fan_out, c, fan_out, fan_out)
    s.array("x_next", shape.n_out * c)
    s.add("xo = x_next[n]")
    _gate(s, shape)
    if shape.is_last:
        _read_out(s, shape)
        _mix_backward(s, shape, "")
    else:
        s.array("h_next", shape.n_out * c), s.array("up_next")
        s.add("ho = h_next[n]", "ho[:] = ZERO")
        row = 0
        for k, (l, _) in enumerate(shape.irreps_out):  # noqa: E741
            _matmul(s, 2 * l + 1, "ho", row, "xo", row, "up_next", k * c * c, c, c, c)
            row += 2 * l + 1
    return s.result()


def backward_source(shape: LayerShape, before: LayerShape | None, dtype: str) -> KernelSource:
    """Source of ``backward`` for one layer; ``before`` is the layer that feeds it."""
    s = _Source(dtype, shape.n_channels)
    plan, c = shape.plan, shape.n_channels
    if before is not None:
        s.buffer("gh", shape.n_in * c)
        s.add("gh[:] = ZERO")
    s.array("g_to", plan.dim_out * c), s.array("g_sh", plan.dim_sh), s.array("g_r")
    s.add("own = g_to[n]")
    _edge_loop(s, shape)
    s.add("source = h[other[e]]", *_powers(), indent=_EDGE)
    if before is not None:
        s.add("theirs = g_to[other[e]]", indent=_EDGE)
    _radial(s, plan, derivative=True)
    s.add(*couplings(plan, s.constants, "sh"), indent=_EDGE)
    s.add("slope = ZERO", *(f"s{j} = ZERO" for j in range(plan.dim_sh)), indent=_EDGE)
    for paths in loops(plan):
        body = _loads("source", paths, c)
        back: dict[int, list[str]] = {}
        for path in paths:
            p, o = path.weight_index, path.out_offset
            body += [f"g{o + k} = own[{(o + k) * c} + c]" for k in range(2 * path.l3 + 1)]
            body.append(f"r{p} = w[{p * c} + c]")
            sums: dict[int, list[str]] = {}
            products = []
            for i, k, coupled in path_terms(path):
                body.append(f"t{p}_{i}_{k} = x{path.in_offset + i} * g{o + k}")
                products.append(f"+ a{p}_{i}_{k} * t{p}_{i}_{k}")
                for j, v in coupled:
                    sums.setdefault(path.sh_offset + j, []).append(s.constants.term(v, f"t{p}_{i}_{k}"))
            body.append(f"slope += dw[{p * c} + c] * ({signed_sum(products)})")
            body += [f"s{j} += r{p} * ({signed_sum(terms)})" for j, terms in sums.items()]
            if before is not None:
                body += [f"b{o + k} = r{p} * theirs[{(o + k) * c} + c]" for k in range(2 * path.l3 + 1)]
                sign = "-" if path.l2 % 2 else "+"
                for i, k, _ in path_terms(path):
                    back.setdefault(path.in_offset + i, []).append(f"{sign} a{p}_{i}_{k} * b{o + k}")
        body += [f"gh[{row * c} + c] += {signed_sum(terms)}" for row, terms in back.items()]
        _channels(s, c, body, _EDGE)
    op = "=" if shape.is_last else "+="
    s.add(f"g_r[e] {op} slope", *(f"g_sh[e, {j}] {op} s{j}" for j in range(plan.dim_sh)), indent=_EDGE)
    if before is not None:
        s.array("g_skip", shape.n_in * c), s.array("up_back"), s.buffer("gx", before.n_out * c)
        s.add("gs = g_skip[n]")
        _channels(s, shape.n_in * c, ["gx[c] = gs[c]"], _NODE)
        row = 0
        for k, (l, _) in enumerate(plan.irreps_in):  # noqa: E741
            _matmul(s, 2 * l + 1, "gx", row, "gh", row, "up_back", k * c * c, c, c, c)
            row += 2 * l + 1
        s.array("z_before", before.n_z * c)
        s.add("zn = z_before[n]")
        _mix_backward(s, before, "_before")
    return s.result()


def _edge_loop(s: _Source, shape: LayerShape) -> None:
    """The head of the loop over edges within the cutoff; ``table`` holds (coefficient, path, channel) a row."""
    plan, c = shape.plan, shape.n_channels
    s.array("order", kind="INDEX"), s.array("other", kind="INDEX"), s.array("ptr", kind="INDEX")
    s.array("interval", kind="INDEX"), s.array("place"), s.array("sh", plan.dim_sh)
    s.array("h", shape.n_in * c), s.array("table", N_COEFFICIENTS * plan.n_paths * c)
    s.add("for m in range(ptr[n], ptr[n + 1]):")
    s.add("e = order[m]", "k = interval[e]", "if k < 0:", "    continue", "tab = table[k]", indent=_EDGE)


def _powers() -> list[str]:
    lines = ["q1 = place[e]"]
    return lines + [f"q{k} = q{k - 1} * q1" for k in range(2, N_COEFFICIENTS)]


def _radial(s: _Source, plan: ConvolutionPlan, derivative: bool) -> None:
    """w, the radial weights of the edge, (path, channel); and dw, by the place in the interval."""
    size = plan.n_paths * s.n_channels
    rows = [f"tab[{k * size} + c]" for k in range(N_COEFFICIENTS)]
    s.buffer("w", size)
    body = ["w[c] = " + " + ".join([rows[0], *(f"q{k} * {rows[k]}" for k in range(1, N_COEFFICIENTS))])]
    if derivative:
        s.buffer("dw", size)
        slopes = [f"{s.number(k)} * q{k - 1} * {rows[k]}" for k in range(2, N_COEFFICIENTS)]
        body.append("dw[c] = " + " + ".join([rows[1], *slopes]))
    _channels(s, size, body, _EDGE)


def _loads(name: str, paths: Sequence[CouplingPath], c: int) -> list[str]:
    rows = sorted({row for p in paths for row in range(p.in_rows.start, p.in_rows.stop)})
    return [f"x{row} = {name}[{row * c} + c]" for row in rows]


def _channels(s: _Source, count: int, body: Sequence[str], indent: str) -> None:
    s.add(f"for c in range({count}):", *("    " + line for line in body), indent=indent)


def _matmul(
    s: _Source,
    n_rows: int,
    target: str,
    target_row: int,
    source: str,
    source_row: int,
    weight: str,
    offset: int,
    n_in: int,
    n_out: int,
    stride: int,
) -> None:
    """``target += source @ W`` for ``n_rows`` rows of C channels, W[q, c] at ``offset + q·stride + c``."""
    s.array(weight)
    c = s.n_channels
    name = s.functions.setdefault((n_rows, n_in, n_out, stride), f"matmul_{n_rows}_{n_in}_{n_out}_{stride}")
    s.add(f"{name}({target}, {target_row * c}, {source}, {source_row * c}, {weight}, {offset})")


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
            '"""Made by equimd.kernels.network_codegen; safe to delete."""\n',
            "from numba import njit\n\n",
            # With its signature: numba would compile it anew for every literal that it is called with.
            f'@njit("void({array}, int64, {array}, int64, {array}, int64)", cache=True, {_OPTIONS})',
            "def matmul(target, t, source, s, weight, offset):",
            "    target, source, weight = target[t:], source[s:], weight[offset:]  # so that no index can be negative",
            f"    for q in range(0, {n_in}, {block}):",
            *(" " * 8 + line for line in lines),
            "",
        ]
    )


def _gate(s: _Source, shape: LayerShape) -> None:
    """zn → xo: silu on the even scalar, tanh on the odd one, every l > 0 times a sigmoid of a scalar of its own.

    zn keeps what the gradient needs: the sigmoid of the scalar, the gates after the sigmoid, tanh of the odd scalar.
    """
    c = shape.n_channels
    silu, sigmoid, tanh = (s.number(v) for v in (SILU_GAIN, SIGMOID_GAIN, TANH_GAIN))
    body = ["v = zn[c]", "f = ONE / (ONE + exp(-v))"]
    body += [f"zn[{(1 + shape.n_gates) * c} + c] = f", f"xo[c] = {silu} * v * f"]
    _channels(s, c, body, _NODE)
    gate, row = 0, 1
    for k, (l, _) in enumerate(shape.irreps_out[1:], start=1):  # noqa: E741
        z = shape.z_rows[k]
        if l == 0:
            body = [f"v = ONE - {s.number(2)} / (ONE + exp({s.number(2)} * zn[{z * c} + c]))"]
            body += [f"zn[{z * c} + c] = v", f"xo[{row * c} + c] = {tanh} * v"]
        else:
            gate += 1
            body = [f"v = {sigmoid} / (ONE + exp(-zn[{gate * c} + c]))", f"zn[{gate * c} + c] = v"]
            body += [f"xo[{(row + m) * c} + c] = zn[{(z + m) * c} + c] * v" for m in range(2 * l + 1)]
        _channels(s, c, body, _NODE)
        row += 2 * l + 1


def _read_out(s: _Source, shape: LayerShape) -> None:
    """A network with one hidden layer on the scalar; ``gx`` is the gradient of ``seed`` times its output."""
    c = shape.n_channels
    s.array("bias"), s.array("hidden"), s.array("hidden_back"), s.array("weights")
    s.array("seed"), s.array("output", kind="DOUBLE")
    s.buffer("y", c), s.buffer("gx", shape.n_out * c)
    _channels(s, c, ["y[c] = bias[c]"], _NODE)
    _matmul(s, 1, "y", 0, "xo", 0, "hidden", 0, c, c, c)
    s.add(f"total = bias[{c}]", "scale = seed[n]")
    body = ["f = ONE / (ONE + exp(-y[c]))", "total += weights[c] * y[c] * f"]
    _channels(s, c, [*body, "y[c] = scale * weights[c] * f * (ONE + y[c] * (ONE - f))"], _NODE)
    s.add("output[n] = total", "gx[:] = ZERO")
    _matmul(s, 1, "gx", 0, "y", 0, "hidden_back", 0, c, c, c)


def _mix_backward(s: _Source, shape: LayerShape, suffix: str) -> None:
    """gx, the gradient of the gated output, back through gate, linear map and skip into g_to and g_skip of ``suffix``.

    What the gate left in zn is read; ``mix_back`` holds the transposed matrices.
    """
    c, plan = shape.n_channels, shape.plan
    silu, sigmoid, tanh = (s.number(v) for v in (SILU_GAIN, 1 / SIGMOID_GAIN, TANH_GAIN))
    s.buffer("gz", shape.n_z * c)
    body = [f"f = zn[{(1 + shape.n_gates) * c} + c]", f"gz[c] = gx[c] * {silu} * f * (ONE + zn[c] * (ONE - f))"]
    _channels(s, c, body, _NODE)
    gate, row = 0, 1
    for k, (l, _) in enumerate(shape.irreps_out[1:], start=1):  # noqa: E741
        z = shape.z_rows[k]
        if l == 0:
            body = [f"v = zn[{z * c} + c]", f"gz[{z * c} + c] = gx[{row * c} + c] * {tanh} * (ONE - v * v)"]
        else:
            gate += 1
            width = range(2 * l + 1)
            body = [f"v = zn[{gate * c} + c]"]
            body += [f"gz[{(z + m) * c} + c] = gx[{(row + m) * c} + c] * v" for m in width]
            inner = " + ".join(f"gx[{(row + m) * c} + c] * zn[{(z + m) * c} + c]" for m in width)
            body.append(f"gz[{gate * c} + c] = ({inner}) * v * (ONE - v * {sigmoid})")
        _channels(s, c, body, _NODE)
        row += 2 * l + 1
    g_to, g_skip, back = f"g_to{suffix}", f"g_skip{suffix}", f"mix_back{suffix}"
    s.array(g_to, plan.dim_out * c), s.array(back)
    s.add(f"gt = {g_to}[n]", "gt[:] = ZERO")
    if not shape.is_first:
        s.array(g_skip, shape.n_in * c)
        s.add(f"gk = {g_skip}[n]", "gk[:] = ZERO")
    for k, block in enumerate(plan.blocks):
        fan_in, fan_out = shape.mix_shape(k)
        width = 2 * block.l + 1
        z, offset = shape.z_rows[k], shape.mix_offset(k)
        for p in range(block.n_paths):
            row = block.offset + p * width
            _matmul(s, width, "gt", row, "gz", z, back, offset + p * c, fan_out, c, fan_in)
        if fan_in > block.n_paths * c and not shape.is_first:
            row = _row_of(plan, (block.l, block.p))
            _matmul(s, width, "gk", row, "gz", z, back, offset + block.n_paths * c, fan_out, c, fan_in)


def _row_of(plan: ConvolutionPlan, irrep: Irrep) -> int:
    """First input row of an irrep."""
    return irreps_dim(plan.irreps_in[: plan.irreps_in.index(irrep)])
