"""Python source of the convolution of dual numbers: values and their rates of change along one direction.

With x, ẋ for features, Y, Ẏ for harmonics and w, ẇ for radial weights, and for every path the couplings a of Y and b of
Ẏ, the products of an edge are u_k = Σ_i a_ik x_i and v_k = Σ_i (a_ik ẋ_i + b_ik x_i), and

    out_k += w u_k,    rate of out_k += w v_k + ẇ u_k.

``forward`` is that, with w in the order in which edges are walked; ``grad_x`` and ``grad_w`` are its derivatives by x
and ẋ, and by w and ẇ. Value and rate lie side by side, so that each array has one address and the compiler sees what
overlaps. The rows of an output irrep lie m by m, then path by path (``row_of``): what one linear map takes next lies
side by side, too.
"""

from equimd.kernels.codegen import couplings, loops, path_terms, signed_sum
from equimd.kernels.plan import ConvolutionPlan, Path
from equimd.kernels.source import EDGE, NODE, KernelSource, Source

TERMS_PER_LOOP = 10


def forward_source(plan: ConvolutionPlan, n_channels: int, dtype: str) -> KernelSource:
    """Source of ``forward``: x (N, 2, D_in, C), sh (E, 2, S), w (E, 2, P, C) → out (N, 2, D_out, C), by receivers."""
    s, c = Source(dtype, n_channels), n_channels
    s.array("out", 2 * plan.dim_out * c)
    s.add("to = out[n]", "to[:] = ZERO")
    _edge_loop(s, plan)
    s.array("w", 2 * plan.n_paths * c)
    s.add("weight = w[m]", indent=EDGE)
    for paths in loops(plan, TERMS_PER_LOOP):
        body = _loads(paths, c, plan)
        for path in paths:
            p = path.weight_index
            body += [f"r = weight[{p * c} + c]", f"dr = weight[{(plan.n_paths + p) * c} + c]"]
            for k, (u, v) in _products(path).items():
                row = row_of(plan, path, k)
                body += [f"u = {u}", f"to[{row * c} + c] += r * u"]
                body += [f"to[{(plan.dim_out + row) * c} + c] += r * ({v}) + dr * u"]
        _channels(s, body)
    return s.result()


def grad_w_source(plan: ConvolutionPlan, n_channels: int, dtype: str) -> KernelSource:
    """Source of ``grad_w``: x, sh and g (N, 2, D_out, C) → g_w (E, 2, P, C), by receivers."""
    s, c = Source(dtype, n_channels), n_channels
    s.array("g", 2 * plan.dim_out * c), s.array("g_w", 2 * plan.n_paths * c)
    s.add("own = g[n]")
    _edge_loop(s, plan)
    s.add("to = g_w[m]", indent=EDGE)
    for paths in loops(plan, TERMS_PER_LOOP):
        body = _loads(paths, c, plan)
        for path in paths:
            p, values, rates = path.weight_index, [], []
            for k, (u, v) in _products(path).items():
                row = row_of(plan, path, k)
                body += [f"u = {u}", f"g{k} = own[{row * c} + c]", f"h{k} = own[{(plan.dim_out + row) * c} + c]"]
                body += [f"m{k} = u * g{k} + ({v}) * h{k}", f"o{k} = u * h{k}"]
                values.append(f"m{k}"), rates.append(f"o{k}")
            body += [f"to[{p * c} + c] = {' + '.join(values)}"]
            body += [f"to[{(plan.n_paths + p) * c} + c] = {' + '.join(rates)}"]
        _channels(s, body)
    return s.result()


def grad_x_source(plan: ConvolutionPlan, n_channels: int, dtype: str) -> KernelSource:
    """Source of ``grad_x``: sh, w and g (N, 2, D_out, C), added to g_x (N, 2, D_in, C); along a range of ``order``."""
    s, c = Source(dtype, n_channels), n_channels
    s.array("order", dtype="int64"), s.array("senders", dtype="int64"), s.array("receivers", dtype="int64")
    s.array("g", 2 * plan.dim_out * c), s.array("g_x", 2 * plan.dim_in * c), s.array("w", 2 * plan.n_paths * c)
    s.add("e = order[n]", "to, theirs, weight = g_x[senders[e]], g[receivers[e]], w[n]")
    s.add(*_couplings(s, plan))
    for paths in loops(plan, TERMS_PER_LOOP):
        body: list[str] = []
        values: dict[int, list[str]] = {}
        rates: dict[int, list[str]] = {}
        for path in paths:
            p = path.weight_index
            body += [f"r = weight[{p * c} + c]", f"dr = weight[{(plan.n_paths + p) * c} + c]"]
            for k in range(2 * path.l3 + 1):
                row = row_of(plan, path, k)
                body += [f"h = theirs[{(plan.dim_out + row) * c} + c]", f"m{row} = r * theirs[{row * c} + c] + dr * h"]
                body += [f"o{row} = r * h"]
            for i, k, _ in path_terms(path):
                to, row = path.in_offset + i, row_of(plan, path, k)
                values.setdefault(to, []).append(f"+ a{p}_{i}_{k} * m{row} + b{p}_{i}_{k} * o{row}")
                rates.setdefault(to, []).append(f"+ a{p}_{i}_{k} * o{row}")
        body += [f"to[{row * c} + c] += {signed_sum(terms)}" for row, terms in values.items()]
        body += [f"to[{(plan.dim_in + row) * c} + c] += {signed_sum(terms)}" for row, terms in rates.items()]
        _channels(s, body, NODE)
    return s.result()


def row_of(plan: ConvolutionPlan, path: Path, k: int) -> int:
    """Where the k-th component of a path is written: row m · paths + path of its irrep's block."""
    block = next(b for b in plan.blocks if path.out_offset in range(b.rows.start, b.rows.stop))
    return block.offset + k * block.n_paths + (path.out_offset - block.offset) // (2 * block.l + 1)


def _edge_loop(s: Source, plan: ConvolutionPlan) -> None:
    """The loop over the edges into an atom, with the features of the other end and the couplings."""
    s.array("order", dtype="int64"), s.array("senders", dtype="int64"), s.array("ptr", dtype="int64")
    s.array("x", 2 * plan.dim_in * s.n_channels)
    s.add("for m in range(ptr[n], ptr[n + 1]):")
    s.add("e = order[m]", "source = x[senders[e]]", *_couplings(s, plan), indent=EDGE)


def _couplings(s: Source, plan: ConvolutionPlan) -> list[str]:
    """Those of the harmonics, a, and of their rates, b."""
    s.array("sh", 2 * plan.dim_sh)
    lines = couplings(plan, s.constants, "sh")
    return lines + couplings(plan, s.constants, "sh", first=plan.dim_sh, names=("z", "b"))


def _loads(paths: list[Path], c: int, plan: ConvolutionPlan) -> list[str]:
    rows = sorted({row for p in paths for row in range(p.in_rows.start, p.in_rows.stop)})
    return [
        line
        for row in rows
        for line in (f"x{row} = source[{row * c} + c]", f"d{row} = source[{(plan.dim_in + row) * c} + c]")
    ]


def _products(path: Path) -> dict[int, tuple[str, str]]:
    """For every k that is coupled, the sums u_k and v_k."""
    p, sums = path.weight_index, {}
    for i, k, _ in path_terms(path):
        u, v = sums.setdefault(k, ([], []))
        row = path.in_offset + i
        u.append(f"+ a{p}_{i}_{k} * x{row}")
        v.append(f"+ a{p}_{i}_{k} * d{row} + b{p}_{i}_{k} * x{row}")
    return {k: (signed_sum(u), signed_sum(v)) for k, (u, v) in sums.items()}


def _channels(s: Source, body: list[str], indent: str = EDGE) -> None:
    s.add(f"for c in range({s.n_channels}):", *("    " + line for line in body), indent=indent)
