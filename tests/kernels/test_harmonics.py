"""Spherical harmonics that move, against e3nn and finite differences."""

import pytest
import torch
from e3nn import o3

from equimd.kernels.harmonics import moving_harmonics, spherical_harmonics


@pytest.mark.parametrize("l_max", [0, 1, 2, 3])
def test_moving_harmonics(l_max: int):
    generator = torch.Generator().manual_seed(1)
    vectors = torch.nn.functional.normalize(torch.randn(20, 3, generator=generator, dtype=torch.float64), dim=1)
    rates = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    rates -= vectors * (vectors * rates).sum(1, keepdim=True)  # a unit vector can only turn
    values, changes = moving_harmonics(vectors, rates, l_max)
    expected = o3.spherical_harmonics(list(range(l_max + 1)), vectors, normalize=True, normalization="component")
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-12)
    step = 1e-5
    ahead, behind = (spherical_harmonics(vectors + sign * step * rates, l_max) for sign in (1, -1))
    # The second-order error of the difference is 1e-10 times third derivatives of some tens.
    torch.testing.assert_close(changes, (ahead - behind) / (2 * step), rtol=0, atol=1e-7)
    if l_max:
        assert float((changes - (ahead - behind) / (4 * step)).abs().max()) > 1e-3
