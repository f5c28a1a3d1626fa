"""Tables of radial functions: their accuracy is what they say, and their seams do not show."""

import math

import pytest
import torch

from equimd.kernels.radial_table import Knots, tabulate

CUTOFF = 5.0


def table_of(function, tolerance, n_intervals=64):
    """Of a function itself: the basis is the function, and the network passes it on."""
    flat = lambda r: function(r).flatten(1)  # noqa: E731
    return tabulate([lambda jet: jet.unflatten(2, (2, 4))], flat, CUTOFF, tolerance, n_intervals)[0]


def waves(r):
    """Bessel functions that end smoothly, (E, 2, 4)."""
    n = torch.arange(1, 9, dtype=r.dtype)
    return (torch.sin(n * math.pi / CUTOFF * r[:, None]) / r[:, None] * ((1 - r / CUTOFF) ** 3)[:, None]).view(-1, 2, 4)


@pytest.mark.parametrize("tolerance", [1e-8, 1e-11])
def test_error_is_within_the_tolerance_everywhere(tolerance):
    table = table_of(waves, tolerance)
    r = torch.linspace(0.1, CUTOFF, 20_001, dtype=torch.float64)
    error = float((table(r) - waves(r)).abs().max() / waves(r).abs().max())
    assert error <= 1.5 * tolerance  # largest near, not exactly in, the middle of an interval
    coarse = table_of(waves, 1.0, table.n_intervals // 3)
    assert float((coarse(r) - waves(r)).abs().max() / waves(r).abs().max()) > 2 * tolerance


def test_is_smooth_across_the_knots():
    table = table_of(waves, 1.0, 20)
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
    networks = [lambda jet: jet, lambda jet: jet[..., :1]]
    fast, slow = tabulate(networks, lambda r: torch.stack([torch.cos(r), torch.sin(40 * r)], dim=1), CUTOFF, 1e-9)
    assert fast.n_intervals == slow.n_intervals > 64
    assert max(fast.error, slow.error) <= 1e-9


def test_gives_up_on_a_function_with_a_step():
    with pytest.raises(ValueError, match="4096 intervals"):
        tabulate([lambda jet: jet], lambda r: torch.stack([torch.tanh(1e6 * (r - 2.0))], dim=1), CUTOFF, 1e-9)


def test_shares_interpolate():
    knots = Knots(lambda r: waves(r).flatten(1), CUTOFF, 100)
    r = torch.linspace(0.1, CUTOFF, 1001, dtype=torch.float64)
    shares, slopes, interval = knots.moving_shares(r, torch.full_like(r, 0.5))
    rows = knots.jet.transpose(0, 1).flatten(0, 1)[3 * interval[:, None] + torch.arange(6)]  # value, slope, curvature
    got = torch.einsum("eq,eqm->em", shares, rows)
    torch.testing.assert_close(knots.table(knots.jet)(r), got, rtol=0, atol=1e-12)
    assert float((got - waves(r).flatten(1)).abs().max()) < 1e-6
    assert float((got - waves(r + 1e-3).flatten(1)).abs().max()) > 1e-4
    (before, _, k), (after, _, m) = (knots.moving_shares(r + step, r) for step in (-5e-6, 5e-6))
    inside = (k == interval) & (m == interval)
    measured = 0.5 * (after - before) / 1e-5  # of a distance that grows by one half
    torch.testing.assert_close(slopes[inside], measured[inside], rtol=1e-6, atol=1e-5)  # slopes reach 15
