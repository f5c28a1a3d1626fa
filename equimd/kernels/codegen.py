"""Python source of the CPU kernels, written out for one plan, one channel count and one dtype.

Φ(x, Y, w, g) = Σ_{e,p} g[receiver, p] · w[e, p] · CG_p(x[sender], Y[e]) is linear in each of its arguments. The kernels
are its partial derivatives: ``forward`` is ∂Φ/∂g, ``grad_x`` ∂Φ/∂x, ``grad_y`` ∂Φ/∂Y, ``grad_w`` ∂Φ/∂w, and
``grad_yw`` the last two in one pass. Each walks edges sorted by receiver, forms the couplings
a_p[i, k] = Σ_j CG_p[i, j, k]·Y[j] as scalars, and lets the compiler vectorise loops over channels; the channel count is
a literal, because the distances between rows must be constants for the compiler to see that they do not overlap.
Several paths share one loop while it stays small: long loop bodies run out of registers, and compile slowly. Radial
weights, a row for every edge and path, come from beyond the caches: while an edge is computed, the next one's are
fetched.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from equimd.kernels.plan import ConvolutionPlan, Path

KINDS = ("forward", "grad_x", "grad_y", "grad_w", "grad_yw")
ARRAYS, INDICES = ("x", "y", "w", "g", "out", "out2"), ("order", "senders", "receivers", "ptr")
N_POINTERS = len(ARRAYS) + len(INDICES)
"""What every kernel takes; it leaves aside what it has no use for."""

TERMS_PER_LOOP = 20

_CACHE_LINE = 64  # bytes


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


@dataclass(frozen=True)
class _Body:
    """One kernel: lines for every node and edge, the bodies of its loops over channels, and what follows them.

    arrays: shape of a row of every argument. at_node: None for a kernel that walks a range of ``order`` instead of the
    edges of a range of nodes. streams: arrays with a row (P, C) for every edge.
    """

    arrays: dict[str, tuple[int, ...]]
    at_node: list[str] | None
    at_edge: list[str]
    loops: list[list[str]]
    after: list[str]
    streams: tuple[str, ...]


def kernel_source(kind: str, plan: ConvolutionPlan, n_channels: int, dtype: str) -> str:
    """A module with one C function ``kernel``; ``kind`` is one of KINDS, ``dtype`` is "float32" or "float64"."""
    constants = Constants()
    body = _BODIES[kind](plan, n_channels, constants)
    names = "".join(f"{name} = {dtype}({value})\n" for value, name in constants.names.items())
    row = plan.n_paths * n_channels
    step = _CACHE_LINE // {"float32": 4, "float64": 8}[dtype]
    fetches = [f"prefetch({name}, ahead + {k})" for k in range(0, row, step) for name in body.streams]
    lines: list[str] = []
    if body.at_node is None:
        depth = 1
        lines += ["last = high - 1", "for m in range(low, high):"]
    else:
        depth = 2
        lines += ["last = ptr[high] - 1", "for n in range(low, high):"]
        lines += _indented(1, [*body.at_node, "for m in range(ptr[n], ptr[n + 1]):"])
    lines += _indented(depth, ["e = order[m]", f"ahead = order[min(m + 1, last)] * {row}", *body.at_edge])
    for k, loop in enumerate(body.loops):  # a share of the fetches each: all at once would fill the queue for them
        share = slice(len(fetches) * k // len(body.loops), len(fetches) * (k + 1) // len(body.loops))
        lines += _indented(depth, [*fetches[share], f"for c in range({n_channels}):", *_indented(1, loop)])
    lines += _indented(depth, body.after)
    shapes = {name: ":" + "".join(f", {size}" for size in body.arrays.get(name, ())) for name in ARRAYS}
    arrays = [f"{name}: {dtype}[{shape}]" for name, shape in shapes.items()] + [f"{name}: int64[:]" for name in INDICES]
    head = [f"ZERO = {dtype}(0)", names + f"def kernel({', '.join(arrays)}, low: int64, high: int64):"]
    return "\n".join([*head, *_indented(1, lines), ""])


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


def load_harmonics(plan: ConvolutionPlan, source: str, first: int = 0, name: str = "y") -> list[str]:
    """Scalars y{j} of the edge ``e``, those that some path reads."""
    used = sorted({path.sh_offset + j for path in plan.paths for j in range(2 * path.l2 + 1)})
    return [f"{name}{j} = {source}[e, {first + j}]" for j in used]


def contraction(path: Path, constants: Constants) -> list[str]:
    """v{j} = Σ_ik CG[i, j, k] x{i} g{k} of one path: the gradients of harmonics and weights are made of these."""
    lines: list[str] = []
    sums: dict[int, list[str]] = {}
    for i, k, coupled in path_terms(path):
        lines.append(f"t{i}_{k} = x{path.in_offset + i} * g{path.out_offset + k}")
        for j, v in coupled:
            sums.setdefault(path.sh_offset + j, []).append(constants.term(v, f"t{i}_{k}"))
    return lines + [f"v{j} = {signed_sum(terms)}" for j, terms in sums.items()]


def couplings(
    plan: ConvolutionPlan, constants: Constants, harmonics: str, first: int = 0, names: tuple[str, str] = ("y", "a")
) -> list[str]:
    """Scalars a{p}_{i}_{k} = Σ_j CG[i, j, k] Y[j] of the edge ``e``, Y from the column ``first`` on."""
    lines = load_harmonics(plan, harmonics, first, names[0])
    return lines + [line for path in plan.paths for line in path_couplings(path, constants, names)]


def path_couplings(path: Path, constants: Constants, names: tuple[str, str] = ("y", "a")) -> list[str]:
    """The same of one path, from harmonics y{j}."""
    y, a = names
    lines = []
    for i, k, coupled in path_terms(path):
        value = signed_sum([constants.term(v, f"{y}{path.sh_offset + j}") for j, v in coupled])
        lines.append(f"{a}{path.weight_index}_{i}_{k} = {value}")
    return lines


def _indented(levels: int, lines: list[str]) -> list[str]:
    return ["    " * levels + line for line in lines]


def _loads(name: str, source: str, rows: list[int]) -> list[str]:
    return [f"{name}{row} = {source}[{row}, c]" for row in rows]


def _input_rows(paths: list[Path]) -> list[int]:
    return sorted({row for path in paths for row in range(path.in_rows.start, path.in_rows.stop)})


def _forward(plan: ConvolutionPlan, n_channels: int, constants: Constants) -> _Body:
    """out[n, p, k] = Σ_e w[e, p] Σ_i a[i, k] x[sender, i]."""
    bodies: list[list[str]] = []
    for paths in loops(plan):
        body = _loads("x", "node", _input_rows(paths))
        for path in paths:
            p = path.weight_index
            sums: dict[int, list[str]] = {}
            for i, k, _ in path_terms(path):
                sums.setdefault(k, []).append(f"+ a{p}_{i}_{k} * x{path.in_offset + i}")
            body.append(f"r = weight[{p}, c]")
            body += [f"to[{path.out_offset + k}, c] += r * ({signed_sum(terms)})" for k, terms in sums.items()]
        bodies.append(body)
    weights = (plan.n_paths, n_channels)
    return _Body(
        arrays={"x": (plan.dim_in, n_channels), "y": (plan.dim_sh,), "w": weights, "out": (plan.dim_out, n_channels)},
        at_node=["to = out[n]", "to[:] = ZERO"],
        at_edge=["node = x[senders[e]]", "weight = w[e]", *couplings(plan, constants, "y")],
        loops=bodies,
        after=[],
        streams=("w",),
    )


def _grad_x(plan: ConvolutionPlan, n_channels: int, constants: Constants) -> _Body:
    """gx[sender, i] += Σ_p Σ_k a[i, k] w[e, p] g[receiver, p, k].

    A walk along edges sorted by receiver, though it is senders that are written: rows of g are several times as long as
    those of x, and are read once this way.
    """
    bodies: list[list[str]] = []
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
        bodies.append(body)
    weights = (plan.n_paths, n_channels)
    return _Body(
        arrays={"y": (plan.dim_sh,), "w": weights, "g": (plan.dim_out, n_channels), "out": (plan.dim_in, n_channels)},
        at_node=None,
        at_edge=["node = g[receivers[e]]", "to = out[senders[e]]", "weight = w[e]", *couplings(plan, constants, "y")],
        loops=bodies,
        after=[],
        streams=("w",),
    )


def _grad_edge(plan: ConvolutionPlan, n_channels: int, constants: Constants, wrt_y: bool, wrt_w: bool) -> _Body:
    """gY[e, j] = Σ_c Σ_p w[e, p] v[p, j] (to ``out``) and gw[e, p] = Σ_j Y[j] v[p, j] (to ``out2``).

    v[p, j] = Σ_ik CG[i, j, k] x_i g_k needs no couplings, and serves both.
    """
    bodies: list[list[str]] = []
    for paths in loops(plan):
        body = _loads("x", "node", _input_rows(paths))
        for path in paths:
            p, rows = path.weight_index, range(path.sh_rows.start, path.sh_rows.stop)
            body += _loads("g", "grad", list(range(path.out_rows.start, path.out_rows.stop)))
            body += contraction(path, constants)
            if wrt_w:
                body.append(f"to[{p}, c] = " + " + ".join(f"y{j} * v{j}" for j in rows))
            if wrt_y:
                body += [f"r = weight[{p}, c]", *(f"s{j} += r * v{j}" for j in rows)]
        bodies.append(body)
    arrays: dict[str, tuple[int, ...]] = {"x": (plan.dim_in, n_channels), "g": (plan.dim_out, n_channels)}
    at_edge, after, streams = ["node = x[senders[e]]"], [], ()
    weights = (plan.n_paths, n_channels)
    if wrt_y:
        arrays |= {"w": weights, "out": (plan.dim_sh,)}
        at_edge += ["weight = w[e]", *(f"s{j} = ZERO" for j in range(plan.dim_sh))]
        after += [f"out[e, {j}] = s{j}" for j in range(plan.dim_sh)]
        streams += ("w",)
    if wrt_w:
        arrays |= {"y": (plan.dim_sh,), "out2": weights}
        at_edge += ["to = out2[e]", *load_harmonics(plan, "y")]
        streams += ("out2",)
    return _Body(arrays, ["grad = g[n]"], at_edge, bodies, after, streams)


_BODIES: dict[str, Callable[[ConvolutionPlan, int, Constants], _Body]] = {
    "forward": _forward,
    "grad_x": _grad_x,
    "grad_y": functools.partial(_grad_edge, wrt_y=True, wrt_w=False),
    "grad_w": functools.partial(_grad_edge, wrt_y=False, wrt_w=True),
    "grad_yw": functools.partial(_grad_edge, wrt_y=True, wrt_w=True),
}
