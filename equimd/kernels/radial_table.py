"""Radial functions as piecewise polynomials: quintic, with continuous second derivatives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Where bond lengths begin to make sense; below, the first polynomial is continued.
_FIRST = 0.02
_MAX_INTERVALS = 4096


@dataclass(frozen=True)
class RadialTable:
    """Polynomials (K, 6, …) float64 in t = (r − first)·per_angstrom − k − ½ ∈ [−½, ½] on K intervals of equal width.

    error: the largest difference from the function in the middle of the intervals, relative to its largest value; where
    quintic interpolation is worst.
    """

    coefficients: Tensor
    first: float
    per_angstrom: float
    error: float

    @property
    def n_intervals(self) -> int:
        """Number of intervals K."""
        return int(self.coefficients.shape[0])

    def __call__(self, distances: Tensor) -> Tensor:
        """Values (E, …) at distances (E,) in Å; zero beyond the last knot is the caller's business."""
        position = (distances - self.first) * self.per_angstrom
        k = position.floor().clamp(0, self.n_intervals - 1)
        t = position - k - 0.5
        powers = t.unsqueeze(1) ** torch.arange(self.coefficients.shape[1], dtype=t.dtype)
        return torch.einsum("eq,eq...->e...", powers, self.coefficients[k.to(torch.int64)].to(t.dtype))


def tabulate(
    functions: Sequence[Callable[[Tensor], Tensor]], cutoff: float, tolerance: float, n_intervals: int = 64
) -> list[RadialTable]:
    """Tables of functions, (E,) float64 → (E, …) float64, on common intervals, as few (64, 91, 128, …) as will do.

    Value, slope and curvature are met at the knots (Hermite interpolation).

    Raises:
        ValueError: if 4096 intervals are not enough.
    """
    tables: list[RadialTable] = []
    for k, function in enumerate(functions):
        tables.append(_hermite(function, cutoff, n_intervals))
        while tables[k].error > tolerance:
            if n_intervals >= _MAX_INTERVALS:
                raise ValueError(
                    f"a radial function is not met to {tolerance:g} by {n_intervals} intervals ({tables[k].error:.2g})"
                )
            n_intervals = round(n_intervals * 2**0.5)
            tables[k] = _hermite(function, cutoff, n_intervals)
    return [
        table if table.n_intervals == n_intervals else _hermite(function, cutoff, n_intervals)
        for table, function in zip(tables, functions, strict=True)
    ]


def _hermite(function: Callable[[Tensor], Tensor], cutoff: float, n_intervals: int) -> RadialTable:
    knots = torch.linspace(_FIRST, cutoff, n_intervals + 1, dtype=torch.float64)
    width = (cutoff - _FIRST) / n_intervals

    def slope(r: Tensor) -> Tensor:
        return torch.func.jvp(function, (r,), (torch.ones_like(r),))[1]

    with torch.no_grad():
        value, first = function(knots), slope(knots)
        second = torch.func.jvp(slope, (knots,), (torch.ones_like(knots),))[1]
        data = torch.stack([value, width * first, width**2 * second], dim=1)  # (K + 1, 3, …)
        ends = torch.cat([data[:-1], data[1:]], dim=1)
        coefficients = torch.einsum("qp,kp...->kq...", torch.linalg.inv(_conditions()), ends)
        middle = function(knots[:-1] + 0.5 * width)
        error = float((coefficients[:, 0] - middle).abs().max() / middle.abs().max().clamp(min=1e-300))
    return RadialTable(coefficients, _FIRST, 1.0 / width, error)


def _conditions() -> Tensor:
    """Value, slope and curvature at t = −½ and ½ of the monomials 1 … t⁵, (6, 6)."""
    q = torch.arange(6, dtype=torch.float64)
    rows = []
    for t in (-0.5, 0.5):
        base = torch.tensor(t, dtype=torch.float64)
        rows.append(base**q)
        rows.append(q * base ** (q - 1).clamp(min=0))
        rows.append(q * (q - 1) * base ** (q - 2).clamp(min=0))
    return torch.stack(rows)
