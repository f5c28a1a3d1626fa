"""Python source of the kernels that evaluate an equivariant network, layer by layer, with frozen weights.

Two kinds, both walking a range of atoms and the edges into each:

- ``forward``: the convolution of one layer, its linear map with skip, its gate, and the first linear map of the next
  layer; for the last layer the read-out instead, and the gradient back to the convolution;
- ``backward``: from the gradient of a layer's convolution to that of its harmonics and distances, and on to the
  gradient of the convolution before.

Radial weights are quintic polynomials of the distance, interval by interval, evaluated where they are used: what they
cost in memory is their table. Both directions of a pair share distance and weights, and their harmonics differ by
(−1)^l: so ``backward`` walks the edges into an atom only, and finds there what the edges out of it need.
Features lie as rows of C channels; C and all offsets are literals, so that the compiler sees what overlaps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from equimd.kernels.codegen import contraction, couplings, load_harmonics, loops, path_terms, signed_sum
from equimd.kernels.plan import ConvolutionPlan, Irrep, Path, irreps_dim
from equimd.kernels.source import EDGE, NODE, KernelSource, Source

SILU_GAIN, SIGMOID_GAIN, TANH_GAIN = 1.6790, 1.8468, 1.5927
"""Second-moment normalisation of silu, sigmoid and tanh for unit-variance inputs, as e3nn's ``normalize2mom``."""

N_COEFFICIENTS = 6
"""Coefficients of a radial polynomial: value, slope and curvature at both ends of the interval."""


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


def forward_source(shape: LayerShape, dtype: str, clocks: bool = False) -> KernelSource:
    """Source of ``forward`` for one layer."""
    s = Source(dtype, shape.n_channels, clocks)
    plan, c = shape.plan, shape.n_channels
    s.buffer("to", plan.dim_out * c)
    s.add("to[:] = ZERO")
    _edge_loop(s, shape)
    s.add("source = h[other[e]]", *_powers(), indent=EDGE)
    _radial(s, plan, derivative=False)
    s.mark("radial", EDGE)
    s.add(*couplings(plan, s.constants, "sh"), indent=EDGE)
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
        _channels(s, c, body, EDGE)
    s.mark("convolution", EDGE)
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
    s.mark("linear")
    s.array("x_next", shape.n_out * c)
    s.add("xo = x_next[n]")
    _gate(s, shape)
    s.mark("gate")
    if shape.is_last:
        _read_out(s, shape)
        s.mark("read-out")
        _mix_backward(s, shape, "")
    else:
        s.array("h_next", shape.n_out * c), s.array("up_next")
        s.add("ho = h_next[n]", "ho[:] = ZERO")
        row = 0
        for k, (l, _) in enumerate(shape.irreps_out):  # noqa: E741
            _matmul(s, 2 * l + 1, "ho", row, "xo", row, "up_next", k * c * c, c, c, c)
            row += 2 * l + 1
        s.mark("linear")
    return s.result()


def backward_source(shape: LayerShape, before: LayerShape | None, dtype: str, clocks: bool = False) -> KernelSource:
    """Source of ``backward`` for one layer; ``before`` is the layer that feeds it."""
    s = Source(dtype, shape.n_channels, clocks)
    plan, c = shape.plan, shape.n_channels
    if before is not None:
        s.buffer("gh", shape.n_in * c)
        s.add("gh[:] = ZERO")
    s.array("g_to", plan.dim_out * c), s.array("g_sh", plan.dim_sh), s.array("g_r")
    s.add("own = g_to[n]")
    _edge_loop(s, shape)
    s.add("source = h[other[e]]", *_powers(), indent=EDGE)
    if before is not None:
        s.add("theirs = g_to[other[e]]", indent=EDGE)
    _radial(s, plan, derivative=True)
    s.mark("radial", EDGE)
    s.add(*(load_harmonics(plan, "sh") if before is None else couplings(plan, s.constants, "sh")), indent=EDGE)
    s.add("slope = ZERO", *(f"s{j} = ZERO" for j in range(plan.dim_sh)), indent=EDGE)
    for paths in loops(plan):
        body = _loads("source", paths, c)
        back: dict[int, list[str]] = {}
        for path in paths:
            p, o = path.weight_index, path.out_offset
            body += [f"g{o + k} = own[{(o + k) * c} + c]" for k in range(2 * path.l3 + 1)]
            body.append(f"r{p} = w[{p * c} + c]")
            body += contraction(path, s.constants)
            rows = range(path.sh_rows.start, path.sh_rows.stop)
            body.append(f"slope += dw[{p * c} + c] * ({' + '.join(f'y{j} * v{j}' for j in rows)})")
            body += [f"s{j} += r{p} * v{j}" for j in rows]
            if before is not None:
                body += [f"b{o + k} = r{p} * theirs[{(o + k) * c} + c]" for k in range(2 * path.l3 + 1)]
                sign = "-" if path.l2 % 2 else "+"
                for i, k, _ in path_terms(path):
                    back.setdefault(path.in_offset + i, []).append(f"{sign} a{p}_{i}_{k} * b{o + k}")
        body += [f"gh[{row * c} + c] += {signed_sum(terms)}" for row, terms in back.items()]
        _channels(s, c, body, EDGE)
    op = "=" if shape.is_last else "+="
    s.add(f"g_r[e] {op} slope", *(f"g_sh[e, {j}] {op} s{j}" for j in range(plan.dim_sh)), indent=EDGE)
    s.mark("convolution", EDGE)
    if before is not None:
        s.array("g_skip", shape.n_in * c), s.array("up_back"), s.buffer("gx", before.n_out * c)
        s.add("gs = g_skip[n]")
        _channels(s, shape.n_in * c, ["gx[c] = gs[c]"], NODE)
        row = 0
        for k, (l, _) in enumerate(plan.irreps_in):  # noqa: E741
            _matmul(s, 2 * l + 1, "gx", row, "gh", row, "up_back", k * c * c, c, c, c)
            row += 2 * l + 1
        s.mark("linear")
        s.array("z_before", before.n_z * c)
        s.add("zn = z_before[n]")
        _mix_backward(s, before, "_before")
    return s.result()


def _edge_loop(s: Source, shape: LayerShape) -> None:
    """The head of the loop over edges within the cutoff; ``table`` holds (coefficient, path, channel) a row."""
    plan, c = shape.plan, shape.n_channels
    s.array("order", dtype="int64"), s.array("other", dtype="int64"), s.array("ptr", dtype="int64")
    s.array("interval", dtype="int64"), s.array("place"), s.array("sh", plan.dim_sh)
    s.array("h", shape.n_in * c), s.array("table", N_COEFFICIENTS * plan.n_paths * c)
    s.add("for m in range(ptr[n], ptr[n + 1]):")
    s.add("e = order[m]", "k = interval[e]", "if k < 0:", "    continue", "tab = table[k]", indent=EDGE)


def _powers() -> list[str]:
    lines = ["q1 = place[e]"]
    return lines + [f"q{k} = q{k - 1} * q1" for k in range(2, N_COEFFICIENTS)]


def _radial(s: Source, plan: ConvolutionPlan, derivative: bool) -> None:
    """w, the radial weights of the edge, (path, channel); and dw, by the place in the interval."""
    size = plan.n_paths * s.n_channels
    rows = [f"tab[{k * size} + c]" for k in range(N_COEFFICIENTS)]
    s.buffer("w", size)
    body = ["w[c] = " + " + ".join([rows[0], *(f"q{k} * {rows[k]}" for k in range(1, N_COEFFICIENTS))])]
    if derivative:
        s.buffer("dw", size)
        slopes = [f"{s.number(k)} * q{k - 1} * {rows[k]}" for k in range(2, N_COEFFICIENTS)]
        body.append("dw[c] = " + " + ".join([rows[1], *slopes]))
    _channels(s, size, body, EDGE)


def _loads(name: str, paths: Sequence[Path], c: int) -> list[str]:
    rows = sorted({row for p in paths for row in range(p.in_rows.start, p.in_rows.stop)})
    return [f"x{row} = {name}[{row * c} + c]" for row in rows]


def _channels(s: Source, count: int, body: Sequence[str], indent: str) -> None:
    s.add(f"for c in range({count}):", *("    " + line for line in body), indent=indent)


def _matmul(
    s: Source,
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


def _gate(s: Source, shape: LayerShape) -> None:
    """zn → xo: silu on the even scalar, tanh on the odd one, every l > 0 times a sigmoid of a scalar of its own.

    zn keeps what the gradient needs: the sigmoid of the scalar, the gates after the sigmoid, tanh of the odd scalar.
    """
    c = shape.n_channels
    silu, sigmoid, tanh = (s.number(v) for v in (SILU_GAIN, SIGMOID_GAIN, TANH_GAIN))
    body = ["v = zn[c]", "f = ONE / (ONE + exp(-v))"]
    body += [f"zn[{(1 + shape.n_gates) * c} + c] = f", f"xo[c] = {silu} * v * f"]
    _channels(s, c, body, NODE)
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
        _channels(s, c, body, NODE)
        row += 2 * l + 1


def _read_out(s: Source, shape: LayerShape) -> None:
    """A network with one hidden layer on the scalar; ``gx`` is the gradient of ``seed`` times its output."""
    c = shape.n_channels
    s.array("bias"), s.array("hidden"), s.array("hidden_back"), s.array("weights")
    s.array("seed"), s.array("output", dtype="float64")
    s.buffer("y", c), s.buffer("gx", shape.n_out * c)
    _channels(s, c, ["y[c] = bias[c]"], NODE)
    _matmul(s, 1, "y", 0, "xo", 0, "hidden", 0, c, c, c)
    s.add(f"total = bias[{c}]", "scale = seed[n]")
    body = ["f = ONE / (ONE + exp(-y[c]))", "total += weights[c] * y[c] * f"]
    _channels(s, c, [*body, "y[c] = scale * weights[c] * f * (ONE + y[c] * (ONE - f))"], NODE)
    s.add("output[n] = total", "gx[:] = ZERO")
    _matmul(s, 1, "gx", 0, "y", 0, "hidden_back", 0, c, c, c)


def _mix_backward(s: Source, shape: LayerShape, suffix: str) -> None:
    """gx, the gradient of the gated output, back through gate, linear map and skip into g_to and g_skip of ``suffix``.

    What the gate left in zn is read; ``mix_back`` holds the transposed matrices.
    """
    c, plan = shape.n_channels, shape.plan
    silu, sigmoid, tanh = (s.number(v) for v in (SILU_GAIN, 1 / SIGMOID_GAIN, TANH_GAIN))
    s.buffer("gz", shape.n_z * c)
    body = [f"f = zn[{(1 + shape.n_gates) * c} + c]", f"gz[c] = gx[c] * {silu} * f * (ONE + zn[c] * (ONE - f))"]
    _channels(s, c, body, NODE)
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
        _channels(s, c, body, NODE)
        row += 2 * l + 1
    s.mark("gate")
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
    s.mark("linear")


def _row_of(plan: ConvolutionPlan, irrep: Irrep) -> int:
    """First input row of an irrep."""
    return irreps_dim(plan.irreps_in[: plan.irreps_in.index(irrep)])
