"""Character spectrum: which angular momenta, of which parity, the equivariance error is made of.

For proper R, ``u_±(R) = ½[a(R) ± a(−R)]`` and the power in (λ, ±) is
``B = (2λ+1) ∬ χ_λ(R Q⁻¹) ⟨u_±(R), u_±(Q)⟩ dR dQ`` with the character ``χ_λ(θ) = sin((2λ+1)θ/2) / sin(θ/2)``. The
spread is the sum of all B except (0, +); (0, −) is pure chirality. Powers, in (eV/Å)², are summed over atoms.
"""

import numpy as np

from equimd.errors import InputError
from equimd.rotations import GroupSample


def character_spectrum(back_rotated: np.ndarray, group: GroupSample, l_max: int) -> dict[tuple[int, int], float]:
    """Power {(λ, parity): B} for λ ≤ ``l_max`` from predictions (K, N, 3) on an O(3) quadrature with inversion.

    Exact where the quadrature's degree is at least ``l_max`` plus the degree of a. Parity is +1 or −1.
    """
    if group.kind != "quadrature" or not group.inversion:
        raise InputError(
            f"the group is a {group.kind} sample, inversion {group.inversion}; expected an O(3) quadrature"
        )
    half = len(group) // 2  # proper elements first, then the same times −1
    proper, weights = group.rotations[:half], 2 * group.weights[:half]
    a = np.asarray(back_rotated, dtype=np.float64).reshape(len(group), -1)
    traces = np.einsum("kij,qij->kq", proper, proper)
    angles = np.arccos(np.clip((traces - 1) / 2, -1.0, 1.0))
    out = {}
    for parity in (1, -1):
        u = (a[:half] + parity * a[half:]) / 2
        gram = weights[:, None] * (u @ u.T) * weights
        for degree in range(l_max + 1):
            # χ_λ = 1 + 2 Σ_m cos(m θ): no division by sin(θ/2) at θ = 0.
            character = 1 + 2 * sum((np.cos(m * angles) for m in range(1, degree + 1)), np.zeros_like(angles))
            out[(degree, parity)] = float((2 * degree + 1) * np.sum(character * gram))
    return out
