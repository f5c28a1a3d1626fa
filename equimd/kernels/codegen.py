"""Python source of the CPU kernels, written out for one plan, one channel count and one dtype.

Φ(x, Y, w, g) = Σ_{e,p} g[receiver, p] · w[e, p] · CG_p(x[sender], Y[e]) is linear in each of its arguments. The kernels
are its partial derivatives: ``forward`` is ∂Φ/∂g, ``grad_x`` ∂Φ/∂x, ``grad_y`` ∂Φ/∂Y, ``grad_w`` ∂Φ/∂w, and
``grad_yw`` the last two in one pass. Each walks a range of nodes and the edges of each node, forms the couplings
a_p[i, k] = Σ_j CG_p[i, j, k]·Y[j] as scalars, and lets the compiler vectorise loops over channels; the channel count is
a literal, because the distances between rows must be constants for the compiler to see that they do not overlap.
Several paths share one loop while it stays small: long loop bodies run out of registers, and compile slowly.
"""

import functools
from collections.abc import Callable, Iterator

from equimd.kernels.plan import ConvolutionPlan, Path

KINDS = ("forward", "grad_x", "grad_y", "grad_w", "grad_yw")
TERMS_PER_LOOP = 20

OPTIONS = 'error_model="numpy", fastmath={"reassoc", "contract", "nsz", "arcp"}'  # NaN and infinity stay what they are
"""Of everything that numba compiles here."""

_HEADER = '''"""Made by equimd.kernels.codegen; safe to delete."""

import numpy as np
from numba import carray, cfunc, types

REAL = types.CPointer(types.{dtype})
INDEX = types.CPointer(types.int64)
ROWS = 1 << 40  # the kernels know no sizes; indices are checked when the topology is made
ZERO = np.{dtype}(0)
{constants}

@cfunc(
    types.void(REAL, REAL, REAL, REAL, REAL, REAL, INDEX, INDEX, INDEX, types.int64, types.int64),
    cache=True,
    {options},
)
def kernel(p_x, p_y, p_w, p_g, p_out, p_out2, p_order, p_other, p_ptr, low, high):
    order = carray(p_order, ROWS)
    other = carray(p_other, ROWS)
    ptr = carray(p_ptr, ROWS)
'''


class Constants:
    """Numbers of the kernel's dtype, named once each: a literal would be float64 and widen the arithmetic."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}

    def term(self, value: float, factor: str) -> str:
        """``value · factor`` with its sign in front, to be joined into a sum."""
        sign = "+" if value > 0 else "-"
        if abs(abs(value) - 1) < 1e-14:  # round-off of wigner_3j
            return f"{sign} {factor}"
        return f"{sign} {self.name(abs(value))} * {factor}"

    def name(self, value: float) -> str:
        """The name of a positive number."""
        return self.names.setdefault(repr(float(value)), f"C{len(self.names)}")


def kernel_source(kind: str, plan: ConvolutionPlan, n_channels: int, dtype: str) -> str:
    """A module with one C function ``kernel``; ``kind`` is one of KINDS, ``dtype`` is "float32" or "float64"."""
    constants = Constants()
    body = _BODIES[kind](plan, n_channels, constants)
    names = "".join(f"{name} = np.{dtype}({value})\n" for value, name in constants.names.items())
    return _HEADER.format(dtype=dtype, constants=names, options=OPTIONS) + "\n".join(body) + "\n"


def path_terms(path: Path) -> Iterator[tuple[int, int, list[tuple[int, float]]]]:
    """(i, k, [(j, CG[i, j, k]), …]) for every pair (i, k) that some j couples."""
    for i in range(2 * path.l1 + 1):
        for k in range(2 * path.l3 + 1):
            coupled = [(int(j), float(path.cg[i, j, k])) for j in path.cg[i, :, k].nonzero()[0]]
            if coupled:
                yield i, k, coupled


def loops(plan: ConvolutionPlan, most: int = TERMS_PER_LOOP) -> list[list[Path]]:
    """Paths that share one loop over channels, ordered by input rows; of so many terms at most, or of one path."""
    groups: list[list[Path]] = []
    size = most
    for path in sorted(plan.paths, key=lambda p: (p.in_offset, p.sh_offset)):
        terms = sum(1 for _ in path_terms(path))
        if size + terms > most:
            groups.append([])
            size = 0
        groups[-1].append(path)
        size += terms
    return groups


def signed_sum(terms: list[str]) -> str:
    """Terms that begin with their sign, as one expression."""
    return " ".join(terms).removeprefix("+ ")


def _arrays(**rows: tuple[int, ...]) -> list[str]:
    """Views of the pointers p_NAME with the given shapes per row."""
    return [f"    {name} = carray(p_{name}, ({', '.join(map(str, ('ROWS', *shape)))}))" for name, shape in rows.items()]


def _walk(*at_node: str, at_edge: tuple[str, ...]) -> list[str]:
    """The two loops that every kernel has; ``e`` is the edge."""
    lines = ["    for n in range(low, high):"]
    lines += [" " * 8 + line for line in at_node]
    lines += ["        for m in range(ptr[n], ptr[n + 1]):", "            e = order[m]"]
    return lines + [" " * 12 + line for line in at_edge]


def couplings(
    plan: ConvolutionPlan, constants: Constants, harmonics: str, first: int = 0, names: tuple[str, str] = ("y", "a")
) -> list[str]:
    """Scalars a{p}_{i}_{k} = Σ_j CG[i, j, k] Y[j] of the edge ``e``, Y from the column ``first`` on."""
    used = sorted({path.sh_offset + j for path in plan.paths for j in range(2 * path.l2 + 1)})
    lines = [f"{names[0]}{j} = {harmonics}[e, {first + j}]" for j in used]
    return lines + [line for path in plan.paths for line in path_couplings(path, constants, names)]


def path_couplings(path: Path, constants: Constants, names: tuple[str, str] = ("y", "a")) -> list[str]:
    """The same of one path, from harmonics y{j}."""
    y, a = names
    lines = []
    for i, k, coupled in path_terms(path):
        value = signed_sum([constants.term(v, f"{y}{path.sh_offset + j}") for j, v in coupled])
        lines.append(f"{a}{path.weight_index}_{i}_{k} = {value}")
    return lines


def _loads(name: str, source: str, rows: list[int]) -> list[str]:
    return [f"{name}{row} = {source}[{row}, c]" for row in rows]


def _loop(n_channels: int, lines: list[str]) -> list[str]:
    return [f"            for c in range({n_channels}):", *(" " * 16 + line for line in lines)]


def _forward(plan: ConvolutionPlan, n_channels: int, constants: Constants) -> list[str]:
    """out[n, p, k] = Σ_e w[e, p] Σ_i a[i, k] x[sender, i]."""
    lines = _arrays(x=(plan.dim_in, n_channels), y=(plan.dim_sh,), w=(plan.n_paths, n_channels))
    lines += _arrays(out=(plan.dim_out, n_channels))
    lines += _walk("to = out[n]", "to[:] = ZERO", at_edge=("node = x[other[e]]", "weight = w[e]"))
    lines += [" " * 12 + line for line in couplings(plan, constants, "y")]
    for paths in loops(plan):
        body = _loads("x", "node", sorted({row for p in paths for row in range(p.in_rows.start, p.in_rows.stop)}))
        for path in paths:
            p = path.weight_index
            sums: dict[int, list[str]] = {}
            for i, k, _ in path_terms(path):
                sums.setdefault(k, []).append(f"+ a{p}_{i}_{k} * x{path.in_offset + i}")
            body.append(f"r = weight[{p}, c]")
            body += [f"to[{path.out_offset + k}, c] += r * ({signed_sum(terms)})" for k, terms in sums.items()]
        lines += _loop(n_channels, body)
    return lines


def _grad_x(plan: ConvolutionPlan, n_channels: int, constants: Constants) -> list[str]:
    """gx[n, i] = Σ_e Σ_p Σ_k a[i, k] w[e, p] g[receiver, p, k]; ``n`` are senders, ``other`` the receivers."""
    lines = _arrays(y=(plan.dim_sh,), w=(plan.n_paths, n_channels), g=(plan.dim_out, n_channels))
    lines += _arrays(out=(plan.dim_in, n_channels))
    lines += _walk("to = out[n]", "to[:] = ZERO", at_edge=("node = g[other[e]]", "weight = w[e]"))
    lines += [" " * 12 + line for line in couplings(plan, constants, "y")]
    for paths in loops(plan):
        body: list[str] = []
        sums: dict[int, list[str]] = {}
        for path in paths:
            p, o = path.weight_index, path.out_offset
            body.append(f"r = weight[{p}, c]")
            body += [f"g{o + k} = r * node[{o + k}, c]" for k in range(2 * path.l3 + 1)]
            for i, k, _ in path_terms(path):
                sums.setdefault(path.in_offset + i, []).append(f"+ a{p}_{i}_{k} * g{o + k}")
        body += [f"to[{row}, c] += {signed_sum(terms)}" for row, terms in sums.items()]
        lines += _loop(n_channels, body)
    return lines


def _grad_edge(plan: ConvolutionPlan, n_channels: int, constants: Constants, wrt_y: bool, wrt_w: bool) -> list[str]:
    """gY[e, j] = Σ_c Σ_p w[e, p] Σ_ik CG[i, j, k] x_i g_k (to ``out``), gw[e, p] = Σ_ik a[i, k] x_i g_k (``out2``)."""
    lines = _arrays(x=(plan.dim_in, n_channels), g=(plan.dim_out, n_channels))
    at_edge = ["node = x[other[e]]"]
    if wrt_y:
        lines += _arrays(w=(plan.n_paths, n_channels), out=(plan.dim_sh,))
        at_edge += ["weight = w[e]", *(f"s{j} = ZERO" for j in range(plan.dim_sh))]
    if wrt_w:
        lines += _arrays(y=(plan.dim_sh,), out2=(plan.n_paths, n_channels))
        at_edge.append("to = out2[e]")
    lines += _walk("grad = g[n]", at_edge=tuple(at_edge))
    if wrt_w:
        lines += [" " * 12 + line for line in couplings(plan, constants, "y")]
    for paths in loops(plan):
        body = _loads("x", "node", sorted({row for p in paths for row in range(p.in_rows.start, p.in_rows.stop)}))
        for path in paths:
            p = path.weight_index
            body += _loads("g", "grad", list(range(path.out_rows.start, path.out_rows.stop)))
            sums: dict[int, list[str]] = {}
            for i, k, coupled in path_terms(path):
                body.append(f"t{p}_{i}_{k} = x{path.in_offset + i} * g{path.out_offset + k}")
                for j, v in coupled:
                    sums.setdefault(path.sh_offset + j, []).append(constants.term(v, f"t{p}_{i}_{k}"))
            if wrt_w:
                products = [f"+ a{p}_{i}_{k} * t{p}_{i}_{k}" for i, k, _ in path_terms(path)]
                body.append(f"to[{p}, c] = {signed_sum(products)}")
            if wrt_y:
                body.append(f"r = weight[{p}, c]")
                body += [f"s{j} += r * ({signed_sum(terms)})" for j, terms in sums.items()]
        lines += _loop(n_channels, body)
    if wrt_y:
        lines += [f"            out[e, {j}] = s{j}" for j in range(plan.dim_sh)]
    return lines


_BODIES: dict[str, Callable[[ConvolutionPlan, int, Constants], list[str]]] = {
    "forward": _forward,
    "grad_x": _grad_x,
    "grad_y": functools.partial(_grad_edge, wrt_y=True, wrt_w=False),
    "grad_w": functools.partial(_grad_edge, wrt_y=False, wrt_w=True),
    "grad_yw": functools.partial(_grad_edge, wrt_y=True, wrt_w=True),
}
