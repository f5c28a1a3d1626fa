"""Python source of the GPU kernels in the language of triton, for one plan, one channel count and one dtype.

The kernels are those of ``codegen``. A program is one warp: it takes one node, a block of channels, one or two of them
per lane, and a share of the paths; it walks the edges of the node and keeps its sums in registers. No two programs
write to the same place, so nothing is atomic and the order of every sum is fixed. Where the channels are too few for
the warp, its lanes are several edges side by side, whose sums are added at the end.

Paths are shared out where their rows of the output are more than there are registers for. Weights and output rows are
read by one share each, features and harmonics by all that need them. What a program adds to the gradient of the
harmonics, a sum over its own channels and paths, goes to a place of its own.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from equimd.kernels.codegen import Constants, path_couplings, path_terms, signed_sum
from equimd.kernels.plan import ConvolutionPlan, Path

WARP = 32
ROWS_PER_SHARE = 40  # of the output: as many registers, or twice as many, in "forward" and in the gradients of edges

OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}
"""With which triton compiles the kernels."""

_MODULE = '''"""Made by equimd.kernels.triton_codegen; safe to delete."""

import triton
import triton.language as tl

{shares}
@triton.jit
def kernel(x, y, w, g, out, out2, order, other, ptr):
    node, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, end = tl.load(ptr + node), tl.load(ptr + node + 1)
    first = part // {n_shares} * {channels}
{calls}
'''
_SHARE = """
{decorator}
def share{number}(x, y, w, g, out, out2, order, other, begin, end, node, part, first):
    lane = tl.arange(0, {lanes})
    channel = first + lane % {channels}
{lines}

"""
_CALL = """    if part % {n_shares} == {number}:
        share{number}(x, y, w, g, out, out2, order, other, begin, end, node, part, first)"""


class Tile(NamedTuple):
    """What a program takes at once: channels side by side, of one edge or of several."""

    channels: int
    edges: int

    @property
    def lanes(self) -> int:
        """Length of a vector."""
        return self.channels * self.edges


class Share(NamedTuple):
    """Paths of one program, and the rows it sums over the edges of its node."""

    paths: list[Path]
    rows: list[int]


def make_tile(n_channels: int, dtype: str) -> Tile:
    """A warp of one float64 or two float32 per lane, where there are channels enough; the one that pads least."""
    if n_channels < WARP:
        channels = 1 << (n_channels - 1).bit_length()
        return Tile(channels, WARP // channels)
    sizes = (WARP,) if dtype == "float64" else (2 * WARP, WARP)
    return Tile(min(sizes, key=lambda size: math.ceil(n_channels / size) * size), 1)


def make_shares(plan: ConvolutionPlan, kind: str) -> list[Share]:
    """The paths by ROWS_PER_SHARE rows of the output; paths from one input irrep stay together in "grad_x"."""
    by_input = sorted(plan.paths, key=lambda path: (path.in_offset, path.sh_offset))
    if kind == "grad_x":
        starts = [sum(2 * l + 1 for l, _ in plan.irreps_in[:k]) for k in range(len(plan.irreps_in) + 1)]  # noqa: E741
        units = [
            Share([path for path in by_input if path.in_offset == start], list(range(start, stop)))
            for start, stop in zip(starts, starts[1:], strict=False)
        ]
    else:
        units = [Share([path], list(range(path.out_rows.start, path.out_rows.stop))) for path in by_input]
    shares = [Share([], [])]
    for unit in units:
        if shares[-1].rows and sum(2 * path.l3 + 1 for path in shares[-1].paths + unit.paths) > ROWS_PER_SHARE:
            shares.append(Share([], []))
        shares[-1] = Share(shares[-1].paths + unit.paths, shares[-1].rows + unit.rows)
    return shares


def n_parts(kind: str, plan: ConvolutionPlan, n_channels: int, dtype: str) -> int:
    """Programs for each node: blocks of channels times shares of the paths."""
    return math.ceil(n_channels / make_tile(n_channels, dtype).channels) * len(make_shares(plan, kind))


def kernel_source(kind: str, plan: ConvolutionPlan, n_channels: int, dtype: str) -> str:
    """A module with one triton function ``kernel``; ``kind`` is one of KINDS, ``dtype`` is "float32" or "float64".

    Its arguments are x, y, w, g, out, out2, the edges in order of their node, the nodes at their other ends, and where
    the edges of each node begin; its grid is (nodes, ``n_parts``). Gradients of the harmonics come in parts,
    (E, n_parts, D_sh).
    """
    tile, shares = make_tile(n_channels, dtype), make_shares(plan, kind)
    names = {
        "n_shares": len(shares),
        "channels": tile.channels,
        "lanes": tile.lanes,
        # The time that triton takes for a function grows as the square of its length.
        "decorator": "@triton.jit" if len(shares) == 1 else "@triton.jit(noinline=True)",
    }
    functions, calls = [], []
    for number, share in enumerate(shares):
        lines = _Lines(plan, n_channels, dtype, n_parts(kind, plan, n_channels, dtype))
        _BODIES[kind](lines, share)
        functions.append(_SHARE.format(number=number, lines="\n".join(lines.text()), **names))
        calls.append(_CALL.format(number=number, **names))
    return _MODULE.format(shares="".join(functions), calls="\n".join(calls), **names)


class _Lines:
    """Lines of one share: before the loop over edges, in it, and after it.

    In the loop ``e`` is the edge and ``n`` the node at its other end, or those of each lane; beyond the last edge, and
    beyond the last channel, lanes read zeros. All that an edge reads is loaded first, so that the loads overlap.
    """

    def __init__(self, plan: ConvolutionPlan, n_channels: int, dtype: str, n_parts: int) -> None:
        self.plan, self.n_channels, self.dtype, self.n_parts = plan, n_channels, dtype, n_parts
        self.tile = make_tile(n_channels, dtype)
        self.padded, self.several = n_channels % self.tile.channels != 0, self.tile.edges > 1
        self.constants = Constants()
        self.before: list[str] = []
        self.loop: list[str] = []
        self.after: list[str] = []

    def text(self) -> list[str]:
        """All of them, with constants, masks and the loop itself."""
        tile, c = self.tile, self.n_channels
        # Bare literals are float32 in triton.
        head = [f"{name} = tl.full((), {value}, tl.{self.dtype})" for value, name in self.constants.names.items()]
        if self.padded:
            head.append(f"real = channel < {c}")
        if not self.several:
            walk = ["for m in range(begin, end):"]
        else:
            walk = [
                f"for start in range(begin, end, {tile.edges}):",
                f"    m = start + lane // {tile.channels}",
                "    there = m < end",
                *(["    read = there & real"] if self.padded else []),
            ]
        walk += [f"    e, n = {self.of_edge('order + m', '0')}, {self.of_edge('other + m', '0')}"]
        lines = [*head, *self.before, *walk, *("    " + line for line in self.loop), *self.after]
        return ["    " + line for line in lines]

    def of_edge(self, pointer: str, nothing: str = "0.0") -> str:
        """Load of a number of the edge."""
        return f"tl.load({pointer}, mask=there, other={nothing})" if self.several else f"tl.load({pointer})"

    def of_channels(self, pointer: str, at_node: bool = False) -> str:
        """Load of numbers of the channels of the edge, or of the node."""
        mask = ("mask=real" if self.padded else "") if at_node else self.channel_mask()
        return f"tl.load({pointer}, {mask}, other=0.0)" if mask else f"tl.load({pointer})"

    def channel_mask(self) -> str:
        """Which lanes have an edge and a channel, where not all have."""
        if self.several:
            return "mask=read" if self.padded else "mask=there"
        return "mask=real" if self.padded else ""

    def rows(self, name: str, source: str, n_rows: int, rows: Iterable[int], at_node: bool = False) -> list[str]:
        """Loads of {name}{row} from an array (…, n_rows, C); ``source`` is "array + index"."""
        c = self.n_channels
        pointer = f"at_{name} = {source} * {n_rows * c} + channel"
        return [pointer, *(f"{name}{row} = {self.of_channels(f'at_{name} + {row * c}', at_node)}" for row in rows)]

    def features(self, paths: list[Path]) -> None:
        """Load the rows x{i} of the sender."""
        self.loop += self.rows("x", "x + n", self.plan.dim_in, _union(path.in_rows for path in paths))

    def weights(self, paths: list[Path]) -> None:
        """Load the weights w{p}."""
        self.loop += self.rows("w", "w + e", self.plan.n_paths, (path.weight_index for path in paths))

    def harmonics(self, paths: list[Path]) -> None:
        """Load y{j}."""
        self.loop.append(f"at_y = y + e * {self.plan.dim_sh}")
        self.loop += [f"y{j} = {self.of_edge(f'at_y + {j}')}" for j in _union(path.sh_rows for path in paths)]

    def sum_over_edges(self, rows: list[int], n_rows: int) -> None:
        """Sums o{row}, zero before the loop, written to rows of ``out`` after it."""
        tile, c = self.tile, self.n_channels
        self.before += [f"o{row} = tl.zeros(({tile.lanes},), tl.{self.dtype})" for row in rows]
        self.after.append(f"column = first + tl.arange(0, {tile.channels})")
        self.after.append(f"to = out + node * {n_rows * c} + column")
        mask = f", mask=column < {c}" if self.padded else ""
        for row in rows:
            total = f"o{row}"
            if self.several:
                total = f"tl.sum(tl.reshape(o{row}, ({tile.edges}, {tile.channels})), axis=0)"
            self.after.append(f"tl.store(to + {row * c}, {total}{mask})")

    def sum_over_channels(self, summed: set[int]) -> None:
        """Write s{j} of an edge, summed over channels, to this program's part of ``out``; zero where there is none."""
        tile, edge, mask = self.tile, "e", ""
        if self.several:
            self.loop.append(f"row = start + tl.arange(0, {tile.edges})")
            self.loop.append("edge = tl.load(order + row, mask=row < end, other=0)")
            edge, mask = "edge", ", mask=row < end"
        self.loop.append(f"to_y = out + ({edge} * {self.n_parts} + part) * {self.plan.dim_sh}")
        for j in range(self.plan.dim_sh):
            total = f"tl.sum(s{j}, axis=0)"
            if self.several:
                total = f"tl.sum(tl.reshape(s{j}, ({tile.edges}, {tile.channels})), axis=1)"
            self.loop.append(f"tl.store(to_y + {j}, {total if j in summed else '0.0'}{mask})")


def _union(slices: Iterable[slice]) -> list[int]:
    """Rows of any of the slices."""
    return sorted({row for rows in slices for row in range(rows.start, rows.stop)})


def _forward(lines: _Lines, share: Share) -> None:
    """out[n, p, k] = Σ_e w[e, p] Σ_i a[i, k] x[sender, i]."""
    lines.sum_over_edges(share.rows, lines.plan.dim_out)
    lines.features(share.paths)
    lines.weights(share.paths)
    lines.harmonics(share.paths)
    for path in share.paths:
        p = path.weight_index
        lines.loop += path_couplings(path, lines.constants)
        sums: dict[int, list[str]] = {}
        for i, k, _ in path_terms(path):
            sums.setdefault(path.out_offset + k, []).append(f"+ a{p}_{i}_{k} * x{path.in_offset + i}")
        lines.loop += [f"o{row} += w{p} * ({signed_sum(terms)})" for row, terms in sums.items()]


def _grad_x(lines: _Lines, share: Share) -> None:
    """gx[n, i] = Σ_e Σ_p Σ_k a[i, k] w[e, p] g[receiver, p, k]; ``node`` is a sender, ``n`` the receiver."""
    lines.sum_over_edges(share.rows, lines.plan.dim_in)
    lines.loop += lines.rows("g", "g + n", lines.plan.dim_out, _union(path.out_rows for path in share.paths))
    lines.weights(share.paths)
    lines.harmonics(share.paths)
    for path in share.paths:
        p, o = path.weight_index, path.out_offset
        lines.loop += path_couplings(path, lines.constants)
        sums: dict[int, list[str]] = {}
        for i, k, _ in path_terms(path):
            sums.setdefault(path.in_offset + i, []).append(f"+ a{p}_{i}_{k} * g{o + k}")
        lines.loop += [f"o{row} += w{p} * ({signed_sum(terms)})" for row, terms in sums.items()]


def _grad_edge(lines: _Lines, share: Share, wrt_y: bool, wrt_w: bool) -> None:
    """gY[e, j] = Σ_c Σ_p w[e, p] Σ_ik CG[i, j, k] x_i g_k (to ``out``), gw[e, p] = Σ_ik a[i, k] x_i g_k (``out2``)."""
    plan, c, mask = lines.plan, lines.n_channels, lines.channel_mask()
    lines.before += lines.rows("g", "g + node", plan.dim_out, share.rows, at_node=True)
    lines.features(share.paths)
    if wrt_y:
        lines.weights(share.paths)
    if wrt_w:
        lines.harmonics(share.paths)
    stores = [f"to_w = out2 + e * {plan.n_paths * c} + channel"] if wrt_w else []
    summed: set[int] = set()
    for path in share.paths:
        p = path.weight_index
        sums: dict[int, list[str]] = {}
        for i, k, coupled in path_terms(path):
            lines.loop.append(f"t{p}_{i}_{k} = x{path.in_offset + i} * g{path.out_offset + k}")
            for j, v in coupled:
                sums.setdefault(path.sh_offset + j, []).append(lines.constants.term(v, f"t{p}_{i}_{k}"))
        if wrt_w:
            lines.loop += path_couplings(path, lines.constants)
            products = [f"+ a{p}_{i}_{k} * t{p}_{i}_{k}" for i, k, _ in path_terms(path)]
            lines.loop.append(f"v{p} = {signed_sum(products)}")
            stores.append(f"tl.store(to_w + {p * c}, v{p}{', ' + mask if mask else ''})")
        if wrt_y:
            for j, terms in sums.items():
                lines.loop.append(f"s{j} {'+=' if j in summed else '='} w{p} * ({signed_sum(terms)})")
                summed.add(j)
    lines.loop += stores  # after all loads, which the compiler would not move before a store
    if wrt_y:
        lines.sum_over_channels(summed)


_BODIES: dict[str, Callable[[_Lines, Share], None]] = {
    "forward": _forward,
    "grad_x": _grad_x,
    "grad_y": functools.partial(_grad_edge, wrt_y=True, wrt_w=False),
    "grad_w": functools.partial(_grad_edge, wrt_y=False, wrt_w=True),
    "grad_yw": functools.partial(_grad_edge, wrt_y=True, wrt_w=True),
}
