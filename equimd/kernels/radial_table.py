"""Radial functions as piecewise polynomials: quintic, with continuous second derivatives."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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


class Knots:
    """Equidistant distances at which functions are met with slope and curvature.

    basis: (E,) → (E, n) float64, differentiable twice. jet: (3, K + 1, n) float64, value, width · slope and
    width² · curvature of the basis at the knots; middles: (K, n), its values half-way between them.
    """

    def __init__(self, basis: Callable[[Tensor], Tensor], cutoff: float, n_intervals: int) -> None:
        self.n_intervals = n_intervals
        self.width = (cutoff - _FIRST) / n_intervals
        knots = torch.linspace(_FIRST, cutoff, n_intervals + 1, dtype=torch.float64, device="cpu")
        value, slope, curvature = _derivatives(basis, knots)
        self.jet = torch.stack([value, self.width * slope, self.width**2 * curvature])
        with torch.no_grad():
            self.middles = basis(knots[:-1] + 0.5 * self.width)

    def moving_shares(self, distances: Tensor, rates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How much of the six numbers at both ends of its interval each distance (E,) takes, (E, 6); which interval.

        Between the two, how fast the shares change while the distances do by ``rates`` (E,).
        """
        position = (distances - _FIRST) / self.width
        interval = position.to(torch.int64).clamp(0, self.n_intervals - 1)
        t, change = position - interval - 0.5, rates / self.width
        powers, slopes = [torch.ones_like(t)], [torch.zeros_like(t)]
        for q in range(1, 6):
            slopes.append(q * powers[-1] * change)
            powers.append(powers[-1] * t)
        monomials = _monomials().to(t)
        return torch.stack(powers, dim=1) @ monomials, torch.stack(slopes, dim=1) @ monomials, interval

    def table(self, jet: Tensor) -> "RadialTable":
        """The polynomials between the knots of functions with this jet (3, K + 1, …); the error is not known."""
        data = jet.transpose(0, 1)
        both = torch.cat([data[:-1], data[1:]], dim=1)
        coefficients = torch.einsum("qp,kp...->kq...", _monomials().to(jet), both)
        return RadialTable(coefficients, _FIRST, 1.0 / self.width, math.nan)


def tabulate(
    networks: Sequence[Callable[[Tensor], Tensor]],
    basis: Callable[[Tensor], Tensor],
    cutoff: float,
    tolerance: float,
    n_intervals: int = 64,
) -> list[RadialTable]:
    """Tables of functions of a basis, on common intervals, as few (64, 91, 128, …) as will do.

    Args:
        networks: Each takes a jet (3, K, n), see ``Knots``, to the jet of its function, (3, K, …).
        basis: As for ``Knots``.
        cutoff: Where the last interval ends, in Å.
        tolerance: The largest ``RadialTable.error``.
        n_intervals: With which to begin.

    Raises:
        ValueError: if 4096 intervals are not enough.
    """
    while True:
        knots = Knots(basis, cutoff, n_intervals)
        with torch.no_grad():
            tables = [_hermite(network, knots) for network in networks]
        worst = max(table.error for table in tables)
        if worst <= tolerance:
            return tables
        n_intervals = round(n_intervals * 2**0.5)
        if not (worst < math.inf and n_intervals <= _MAX_INTERVALS):
            raise ValueError(
                f"radial functions are not met to {tolerance:g} by {_MAX_INTERVALS} intervals ({worst:.2g})"
            )


def _hermite(network: Callable[[Tensor], Tensor], knots: Knots) -> RadialTable:
    table = knots.table(network(knots.jet))
    coefficients = table.coefficients
    still = torch.zeros_like(knots.middles)
    middle = network(torch.stack([knots.middles, still, still]))[0]
    error = float((coefficients[:, 0] - middle).abs().max() / middle.abs().max().clamp(min=1e-300))
    return replace(table, error=error)


def _derivatives(basis: Callable[[Tensor], Tensor], r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values, slopes and curvatures (E, n) of functions (E,) → (E, n)."""
    with torch.inference_mode(False), torch.enable_grad():
        r = r.clone().requires_grad_()
        value = basis(r)
        slopes, curvatures = [], []
        for column in value.unbind(1):
            (slope,) = torch.autograd.grad(column.sum(), r, create_graph=True)
            slopes.append(slope)
            curvatures.append(torch.autograd.grad(slope.sum(), r, retain_graph=True)[0])
    return value.detach(), torch.stack(slopes, dim=1).detach(), torch.stack(curvatures, dim=1)


@functools.cache
def _monomials() -> Tensor:
    """From value, slope and curvature at both ends of −½ … ½ to coefficients of 1, t, … t⁵, (6, 6) float64."""
    return torch.linalg.inv(_conditions())


def _conditions() -> Tensor:
    """Value, slope and curvature at t = −½ and ½ of the monomials 1 … t⁵, (6, 6)."""
    q = torch.arange(6, dtype=torch.float64, device="cpu")
    rows = []
    for t in (-0.5, 0.5):
        base = torch.tensor(t, dtype=torch.float64, device="cpu")
        rows.append(base**q)
        rows.append(q * base ** (q - 1).clamp(min=0))
        rows.append(q * (q - 1) * base ** (q - 2).clamp(min=0))
    return torch.stack(rows)
