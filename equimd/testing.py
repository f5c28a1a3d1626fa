"""The shipped contract: oracles and checks that outside potentials and calculators can run, too.

``check_calculator`` and ``check_potential`` raise AssertionError with a line that says what does not hold.
``AnisotropicMock`` is a force field whose equivariance error is known in closed form.
"""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.lj import LennardJones
from scipy.special import eval_legendre

from equimd.errors import InputError

# A unit vector in no symmetry direction of the grids.
_AXIS = np.array([0.36, 0.48, 0.80])


class AnisotropicMock(Calculator):
    """Lennard-Jones plus multipole fields of l = 1, 2, 3 fixed in space, whose spread over rotations is closed-form.

    E = E_LJ + Σ_l c_l Σ_i Z_i r_i^l P_l(n·r̂_i), with r_i from the centroid, Z_i the atomic number, n a fixed axis and
    c_l in eV/Å^l. Solid harmonics of different l are orthogonal over the group and
    ⟨∇R_l(r_i)·∇R_l(r_j)⟩ = l (r_i r_j)^(l−1) P_(l−1)(cos γ_ij); their parity under inversion is (−1)^l. The forces are
    the exact gradient. Molecules only.
    """

    implemented_properties: ClassVar[list[str]] = ["energy", "forces"]

    def __init__(self, coefficients: Sequence[float] = (2e-3, 1e-3, 5e-4), **lennard_jones: float) -> None:
        super().__init__()
        if len(coefficients) != 3:
            raise InputError(f"coefficients has {len(coefficients)} values; expected 3, for l = 1, 2, 3")
        self.coefficients = tuple(float(c) for c in coefficients)
        self._lennard_jones = LennardJones(**({"sigma": 1.0, "epsilon": 0.05, "rc": 12.0} | lennard_jones))

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Energy (eV) and forces (N, 3) in eV/Å."""
        super().calculate(atoms, properties, system_changes)
        assert self.atoms is not None
        structure: Atoms = self.atoms.copy()
        if structure.pbc.any():
            raise InputError("AnisotropicMock was given a periodic structure; accepted are molecules")
        forces = self._lennard_jones.get_forces(structure)
        energy = float(self._lennard_jones.results["energy"])
        r, z = _from_centroid(structure)
        t, r2 = r @ _AXIS, (r * r).sum(-1)
        c1, c2, c3 = self.coefficients
        energy += float(z @ (c1 * t + c2 * (3 * t**2 - r2) / 2 + c3 * (5 * t**3 - 3 * r2 * t) / 2))
        along_axis = c1 + c2 * 3 * t + c3 * (15 * t**2 - 3 * r2) / 2
        along_r = -c2 - c3 * 3 * t
        gradient = z[:, None] * (along_axis[:, None] * _AXIS + along_r[:, None] * r)
        self.results = {"energy": energy, "forces": forces - (gradient - gradient.mean(0))}

    def spread_by_degree(self, atoms: Atoms) -> dict[int, np.ndarray]:
        """Closed form of ∫|a_i − ā_i|² (N,) in (eV/Å)² that degree l contributes, for l = 1, 2, 3."""
        r, z = _from_centroid(atoms)
        out = {}
        for degree, c in enumerate(self.coefficients, start=1):
            covariance = c**2 * np.outer(z, z) * degree * _solid(r, degree - 1)
            out[degree] = np.diag(covariance) - 2 * covariance.mean(1) + covariance.mean()
        return out

    def spread(self, atoms: Atoms) -> np.ndarray:
        """Closed form of ∫|a_i − ā_i|² (N,) in (eV/Å)²: what ``Decomposition.spread`` must be."""
        return np.sum(list(self.spread_by_degree(atoms).values()), axis=0)

    def spectrum(self, atoms: Atoms) -> dict[tuple[int, int], float]:
        """Closed form of the character spectrum: {(λ, parity): power summed over atoms, (eV/Å)²}."""
        return {(degree, (-1) ** degree): float(s.sum()) for degree, s in self.spread_by_degree(atoms).items()}

    def energy_variance(self, atoms: Atoms) -> float:
        """Closed form of the variance of the total energy over rotations, eV²."""
        r, z = _from_centroid(atoms)
        return sum(c**2 * float(z @ _solid(r, k) @ z) / (2 * k + 1) for k, c in enumerate(self.coefficients, start=1))


def _from_centroid(atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
    return atoms.positions - atoms.positions.mean(0), atoms.numbers.astype(float)


def _solid(r: np.ndarray, degree: int) -> np.ndarray:
    """(r_i r_j)^l P_l(cos γ_ij) (N, N), also where an atom sits at the centroid."""
    lengths = np.linalg.norm(r, axis=1)
    products = np.outer(lengths, lengths)
    cosines = np.divide(r @ r.T, products, out=np.zeros_like(products), where=products > 0)
    return products**degree * eval_legendre(degree, np.clip(cosines, -1.0, 1.0))
