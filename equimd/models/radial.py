"""Radial functions shared by both families: Bessel basis, smooth cutoffs, ZBL repulsion."""

import functools
import math

import torch
from torch import Tensor, nn

from equimd.models.elements import COVALENT_RADII
from equimd.units import BOHR, HARTREE


def safe_norm(vectors: Tensor) -> Tensor:
    """Lengths (E,) of vectors (E, 3)."""
    return vectors.square().sum(-1).sqrt()


class BesselBasis(nn.Module):
    """√(2/r_c) sin(nπr/r_c)/r for n = 1..n_basis (Gasteiger et al. 2020, eq. 7)."""

    frequencies: Tensor

    def __init__(self, cutoff: float, n_basis: int) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.register_buffer("frequencies", math.pi / cutoff * torch.arange(1, n_basis + 1))

    def forward(self, distances: Tensor) -> Tensor:
        """Basis values (E, n_basis) of distances (E,) in Å."""
        r = distances.unsqueeze(-1)
        return math.sqrt(2.0 / self.cutoff) * torch.sin(self.frequencies * r) / r


def polynomial_cutoff(distances: Tensor, cutoff: float | Tensor, p: int = 6) -> Tensor:
    """Smooth step (E,) from 1 at r = 0 to 0 at r = cutoff, flat there (Gasteiger et al. 2020, eq. 8)."""
    u = (distances / cutoff).clamp(max=1.0)
    # 1 − (p+1)(p+2)/2 uᵖ + p(p+2) uᵖ⁺¹ − p(p+1)/2 uᵖ⁺², factored so that nothing cancels near the cutoff.
    series = torch.full_like(u, p * (p + 1) / 2)
    for k in range(p - 1, 0, -1):
        series = series * u + k * (k + 1) / 2
    return (1.0 - u) ** 3 * series


def cosine_cutoff(distances: Tensor, cutoff: float, width: float) -> Tensor:
    """1 below cutoff − width, a C² smooth step to 0 at the cutoff: 1 − 10t³ + 15t⁴ − 6t⁵, t = (r − r_c + w)/w."""
    t = ((distances - cutoff + width) / width).clamp(0.0, 1.0)
    return 1.0 - t * t * t * (10.0 - 15.0 * t + 6.0 * t * t)


# Universal screening function of Ziegler, Biersack and Littmark (1985), Σ c·exp(−b·x) as (c, b).
_ZBL_SCREENING = ((0.18175, 3.19980), (0.50986, 0.94229), (0.28022, 0.40290), (0.02817, 0.20162))


def zbl_pair_energy(vectors: Tensor, z_i: Tensor, z_j: Tensor, cutoff: float) -> Tensor:
    """Screened nuclear repulsion (E,) in eV per pair, smoothly zero beyond the sum of covalent radii (as in MACE).

    Or beyond the ``cutoff`` in Å where that is less.
    """
    r = safe_norm(vectors)
    radii = torch.tensor(COVALENT_RADII, dtype=r.dtype, device=r.device)
    zi, zj = z_i.to(r.dtype), z_j.to(r.dtype)
    x = r / _zbl_length(zi, zj)
    phi = sum(c * torch.exp(-b * x) for c, b in _ZBL_SCREENING)
    return HARTREE * BOHR * zi * zj / r * phi * polynomial_cutoff(r, (radii[z_i] + radii[z_j]).clamp(max=cutoff))


def _zbl_length(z_i: Tensor, z_j: Tensor) -> Tensor:
    return 0.88534 * BOHR / (z_i**0.23 + z_j**0.23)


@functools.lru_cache(maxsize=16)
def zbl_parameters(species: tuple[int, ...], cutoff: float) -> tuple[tuple[tuple[float, float], ...], Tensor]:
    """What ``zbl_pair_energy`` is made of: the screening as pairs (c, b), and (S, S, 3) float64 by species.

    The last axis holds e² Z Z' in eV Å, the inverse screening length in Å⁻¹ and the reach in Å.
    """
    z = torch.tensor(species, dtype=torch.float64, device="cpu")
    radii = torch.tensor([COVALENT_RADII[k] for k in species], dtype=torch.float64, device="cpu")
    zi, zj = torch.meshgrid(z, z, indexing="ij")
    return _ZBL_SCREENING, torch.stack(
        [HARTREE * BOHR * zi * zj, 1 / _zbl_length(zi, zj), (radii[:, None] + radii).clamp(max=cutoff)], dim=-1
    )
