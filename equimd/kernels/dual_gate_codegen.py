"""Python source of the gate of dual numbers, and of its derivative.

z (N, 2, D_z, C) holds values and rates of change of what the linear maps made: the even scalar, the gates, then the
other irreps in their order. y (N, 2, D, C) is what ``models.equivariant.InteractionLayer`` makes of them: silu on the
even scalar, tanh on the odd one, every l > 0 times a sigmoid of a scalar of its own. With f' and f'' for the first two
derivatives of such a function of v, and a and b for the gradients by its value f and its rate f'·v̇, the gradients are
a f' + b f'' v̇ by v, and b f' by v̇.
"""

from collections.abc import Sequence
from typing import NamedTuple

from equimd.kernels.network_codegen import SIGMOID_GAIN, SILU_GAIN, TANH_GAIN
from equimd.kernels.plan import Irrep, irreps_dim
from equimd.kernels.source import NODE, KernelSource, Source


def n_gates(irreps: Sequence[Irrep]) -> int:
    """Irreps that have a gate: those with l > 0."""
    return sum(l > 0 for l, _ in irreps)  # noqa: E741


def dim_gated(irreps: Sequence[Irrep]) -> int:
    """Rows D_z before the gate."""
    return irreps_dim(irreps) + n_gates(irreps)


def row_before_gate(irreps: Sequence[Irrep], k: int) -> int:
    """First row in z of the k-th irrep; gates follow the even scalar, which is the first."""
    return irreps_dim(irreps[:k]) + (n_gates(irreps) if k else 0)


class _Scalar(NamedTuple):
    """A scalar that a function is taken of: the feature in row ``to``, or what multiplies rows of z into rows of y."""

    source: int
    lines: list[str]  # from v to f, f1 and f2: the function and its first two derivatives
    to: int | None
    multiplied: list[tuple[int, int]]


def forward_source(irreps: Sequence[Irrep], n_channels: int, dtype: str) -> KernelSource:
    """Source of z → y."""
    s, z, y = Source(dtype, n_channels), dim_gated(irreps), irreps_dim(irreps)
    c = n_channels
    s.array("z", 2 * z * c), s.array("y", 2 * y * c)
    s.add("zn, yn = z[n], y[n]")
    for scalar in _scalars(s, irreps):
        body = _function(scalar, z, c)
        if scalar.to is not None:
            body += [f"yn[{scalar.to * c} + c] = f", f"yn[{(y + scalar.to) * c} + c] = f1 * r"]
        for source, to in scalar.multiplied:
            body += [f"u = zn[{source * c} + c]", f"yn[{to * c} + c] = u * f"]
            body += [f"yn[{(y + to) * c} + c] = zn[{(z + source) * c} + c] * f + u * (f1 * r)"]
        _channels(s, body)
    return s.result()


def backward_source(irreps: Sequence[Irrep], n_channels: int, dtype: str) -> KernelSource:
    """Source of z and the gradient by y → the gradient by z."""
    s, z, y = Source(dtype, n_channels), dim_gated(irreps), irreps_dim(irreps)
    c = n_channels
    s.array("z", 2 * z * c), s.array("g_y", 2 * y * c), s.array("g_z", 2 * z * c)
    s.add("zn, gy, gz = z[n], g_y[n], g_z[n]")
    for scalar in _scalars(s, irreps):
        body = _function(scalar, z, c)
        if scalar.to is not None:
            body += [f"a = gy[{scalar.to * c} + c]", f"b = gy[{(y + scalar.to) * c} + c]"]
        else:
            body += ["a = ZERO", "b = ZERO"]
        for source, to in scalar.multiplied:
            body += [f"u = zn[{source * c} + c]", f"p = gy[{to * c} + c]", f"q = gy[{(y + to) * c} + c]"]
            body += [f"a += p * u + q * zn[{(z + source) * c} + c]", "b += q * u"]
            body += [f"gz[{source * c} + c] = p * f + q * (f1 * r)", f"gz[{(z + source) * c} + c] = q * f"]
        body += [f"gz[{scalar.source * c} + c] = a * f1 + b * (f2 * r)"]
        body += [f"gz[{(z + scalar.source) * c} + c] = b * f1"]
        _channels(s, body)
    return s.result()


def _scalars(s: Source, irreps: Sequence[Irrep]) -> list[_Scalar]:
    two, silu, sigmoid, tanh = (s.number(value) for value in (2, SILU_GAIN, SIGMOID_GAIN, TANH_GAIN))
    logistic = "t = ONE / (ONE + exp(-v))"
    scalars, gate, row = [], 0, 0
    for k, (l, p) in enumerate(irreps):  # noqa: E741
        source = row_before_gate(irreps, k)
        if (l, p) == (0, 1):
            lines = [logistic, f"f = {silu} * v * t", f"f1 = {silu} * t * (ONE + v * (ONE - t))"]
            lines += [f"f2 = {silu} * t * (ONE - t) * ({two} + v * (ONE - {two} * t))"]
            scalars.append(_Scalar(source, lines, row, []))
        elif l == 0:
            lines = [f"t = ONE - {two} / (ONE + exp({two} * v))", f"f = {tanh} * t"]
            lines += [f"f1 = {tanh} * (ONE - t * t)", f"f2 = -{two} * t * f1"]
            scalars.append(_Scalar(source, lines, row, []))
        else:
            gate += 1
            lines = [logistic, f"f = {sigmoid} * t", "f1 = f * (ONE - t)", f"f2 = f1 * (ONE - {two} * t)"]
            scalars.append(_Scalar(gate, lines, None, [(source + m, row + m) for m in range(2 * l + 1)]))
        row += 2 * l + 1
    return scalars


def _function(scalar: _Scalar, rates: int, c: int) -> list[str]:
    """v, its rate of change r, and the function."""
    return [f"v = zn[{scalar.source * c} + c]", f"r = zn[{(rates + scalar.source) * c} + c]", *scalar.lines]


def _channels(s: Source, body: Sequence[str]) -> None:
    s.add(f"for c in range({s.n_channels}):", *("    " + line for line in body), indent=NODE)
