"""Real spherical harmonics of unit vectors by recursion over l: few operations, differentiable to any order."""

import functools
import math

import torch
from torch import Tensor

from equimd.kernels.plan import clebsch_gordan


def spherical_harmonics(directions: Tensor, l_max: int) -> Tensor:
    """Harmonics (E, (l_max+1)²) of unit vectors (E, 3), component normalisation, e3nn's order and signs.

    Y_l = c_l · CG(Y_{l−1} ⊗ Y_1) with c_l such that |Y_l|² = 2l+1: one outer product and one matrix product per l,
    where the explicit polynomials would cost a dozen operations, each with two derivatives to come.
    """
    rows = [torch.ones_like(directions[:, :1])]
    if l_max >= 1:
        rows.append(math.sqrt(3.0) * directions)
    for degree in range(2, l_max + 1):
        matrix = recursion_matrix(degree).to(directions)
        outer = rows[-1].unsqueeze(2) * directions.unsqueeze(1)
        rows.append(outer.flatten(1) @ matrix)
    return torch.cat(rows, dim=1)


def moving_harmonics(directions: Tensor, rates: Tensor, l_max: int) -> tuple[Tensor, Tensor]:
    """``spherical_harmonics``, and how fast they change while the directions do by ``rates`` (E, 3)."""
    values, changes = [torch.ones_like(directions[:, :1])], [torch.zeros_like(directions[:, :1])]
    if l_max >= 1:
        values.append(math.sqrt(3.0) * directions)
        changes.append(math.sqrt(3.0) * rates)
    u, du = directions.unsqueeze(1), rates.unsqueeze(1)
    for degree in range(2, l_max + 1):
        matrix = recursion_matrix(degree).to(directions)
        y, dy = values[-1].unsqueeze(2), changes[-1].unsqueeze(2)
        values.append((y * u).flatten(1) @ matrix)
        changes.append((dy * u).addcmul_(y, du).flatten(1) @ matrix)
    return torch.cat(values, dim=1), torch.cat(changes, dim=1)


@functools.cache
def recursion_matrix(degree: int) -> Tensor:
    """Matrix ((2l−1)·3, 2l+1) that takes Y_{l−1} ⊗ u to Y_l, float64."""
    coefficients = torch.from_numpy(clebsch_gordan(degree - 1, 1, degree).copy()).flatten(0, 1)
    pole = _pole(degree)
    # At the pole (e3nn's y axis) only the middle component is non-zero, and it is +√(2l+1).
    value = (
        torch.outer(_pole(degree - 1), torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64, device="cpu")).flatten()
        @ coefficients
    )
    return coefficients * (pole[degree] / value[degree])


def _pole(degree: int) -> Tensor:
    """Y_l at e3nn's polar axis y: √(2l+1) in the middle component."""
    pole = torch.zeros(2 * degree + 1, dtype=torch.float64, device="cpu")
    pole[degree] = math.sqrt(2 * degree + 1)
    return pole
