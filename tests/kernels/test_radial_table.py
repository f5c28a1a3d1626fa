"""Tables of radial functions: their accuracy is what they say, and their seams do not show."""

import math

import pytest
import torch

from equimd.kernels.radial_table import tabulate

CUTOFF = 5.0


def waves(r):
    """Bessel functions that end smoothly, (E, 2, 4)."""
    n = torch.arange(1, 9, dtype=r.dtype)
    return (torch.sin(n * math.pi / CUTOFF * r[:, None]) / r[:, None] * ((1 - r / CUTOFF) ** 3)[:, None]).view(-1, 2, 4)


@pytest.mark.parametrize("tolerance", [1e-8, 1e-11])
def test_error_is_within_the_tolerance_everywhere(tolerance):
    (table,) = tabulate([waves], CUTOFF, tolerance)
    r = torch.linspace(0.1, CUTOFF, 20_001, dtype=torch.float64)
    error = float((table(r) - waves(r)).abs().max() / waves(r).abs().max())
    assert error <= 1.5 * tolerance  # largest near, not exactly in, the middle of an interval
    coarse = tabulate([waves], CUTOFF, 1.0, n_intervals=table.n_intervals // 3)[0]
    assert float((coarse(r) - waves(r)).abs().max() / waves(r).abs().max()) > 2 * tolerance


def test_is_smooth_across_the_knots():
    (table,) = tabulate([waves], CUTOFF, 1.0, n_intervals=20)
    knots = table.first + torch.arange(1, 20, dtype=torch.float64) / table.per_angstrom
    width = 1 / table.per_angstrom
    rows = table.coefficients.flatten(2)
    q = torch.arange(6, dtype=torch.float64)

    def derivative(side, order):
        t = torch.tensor(side, dtype=torch.float64)
        factor = torch.ones_like(q)
        for k in range(order):
            factor = factor * (q - k)
        return torch.einsum("kqc,q->kc", rows, factor * t ** (q - order).clamp(min=0)) / width**order

    for order, equal in ((0, True), (1, True), (2, True), (3, False)):
        left, right = derivative(0.5, order)[:-1], derivative(-0.5, order)[1:]
        assert torch.allclose(left, right, rtol=1e-9, atol=1e-9) is equal
    assert len(knots) == len(rows) - 1


def test_functions_share_their_intervals():
    fast, slow = tabulate([lambda r: torch.sin(40 * r), lambda r: torch.cos(r)], CUTOFF, 1e-9)
    assert fast.n_intervals == slow.n_intervals > 64
    assert max(fast.error, slow.error) <= 1e-9


def test_gives_up_on_a_function_with_a_step():
    with pytest.raises(ValueError, match="4096 intervals|intervals"):
        tabulate([lambda r: (r > 2.0).to(r.dtype) + 0.0 * r], CUTOFF, 1e-9)
