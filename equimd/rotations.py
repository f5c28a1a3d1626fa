"""THE convention for rotating structures and predictions, random O(3) elements, and exact quadratures.

A rotation R acts on rows: ``x' = x @ R.T``, ``cell' = cell @ R.T``, ``F' = F @ R.T``, ``σ' = R @ σ @ R.T``. R may be
improper. The back-rotation of a prediction made on the rotated structure applies R⁻¹ = R.T in the same way.
Works on numpy arrays and torch tensors alike, with K rotations along the leading axis where there are several.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.integrate import lebedev_rule
from scipy.spatial.transform import Rotation

from equimd.errors import InputError

# Lebedev orders whose weights are all positive (13, 25 and 27 are not).
_LEBEDEV_ORDERS = (3, 5, 7, 9, 11, 15, 17, 19, 21, 23, 29, 31, 35, 41, 47, 53, 59)
MAX_DEGREE = _LEBEDEV_ORDERS[-1]


def _transpose(a: Any) -> Any:
    return a.swapaxes(-1, -2)


def rotate_vectors(vectors: Any, rotations: Any) -> Any:
    """Rotate rows: vectors (..., N, 3) and rotations (3, 3) or (K, 3, 3) → (..., N, 3) or (K, N, 3)."""
    return vectors @ _transpose(rotations)


def rotate_back_vectors(vectors: Any, rotations: Any) -> Any:
    """Undo ``rotate_vectors``: a_k = g_k⁻¹ f(g_k x) for predictions ``vectors`` (K, N, 3) and rotations (K, 3, 3)."""
    return vectors @ rotations


def rotate_tensor(tensor: Any, rotations: Any) -> Any:
    """Rotate a rank-2 tensor such as stress: R σ Rᵀ, (3, 3) or (K, 3, 3)."""
    return rotations @ tensor @ _transpose(rotations)


def rotate_back_tensor(tensor: Any, rotations: Any) -> Any:
    """Undo ``rotate_tensor``: Rᵀ σ R, (3, 3) or (K, 3, 3)."""
    return _transpose(rotations) @ tensor @ rotations


@dataclass(frozen=True)
class GroupSample:
    """Rotations (K, 3, 3) with weights (K,) that sum to one, and what is known about them.

    kind is "random" or "quadrature"; degree is the highest l that a quadrature integrates exactly (None for random).
    """

    rotations: np.ndarray
    weights: np.ndarray
    kind: str
    degree: int | None
    inversion: bool

    def __len__(self) -> int:
        return len(self.weights)


def _with_inversion(rotations: np.ndarray) -> np.ndarray:
    return np.concatenate([rotations, -rotations])


def random_rotations(n: int, seed: int, inversion: bool = True) -> GroupSample:
    """``n`` elements drawn uniformly from O(3) (SO(3) without ``inversion``), equal weights."""
    if n < 2:
        raise InputError(f"n_rotations is {n}; a spread needs at least 2 rotations")
    rng = np.random.default_rng(seed)
    rotations = Rotation.random(n, rng=rng).as_matrix()
    if inversion:
        rotations = rotations * rng.choice([-1.0, 1.0], size=(n, 1, 1))
    return GroupSample(rotations, np.full(n, 1.0 / n), "random", None, inversion)


@lru_cache(maxsize=32)
def quadrature(degree: int, inversion: bool = True) -> GroupSample:
    """A rule on SO(3) or O(3) that integrates every Wigner function of l ≤ ``degree`` exactly.

    A Lebedev rule of order n ≥ ``degree`` for the axis times degree + 1 equal in-plane angles; for degree 3 and 5 the
    24 octahedral and 60 icosahedral rotations, which do the same with fewer elements.
    """
    if not 0 <= degree <= MAX_DEGREE:
        raise InputError(f"quadrature degree is {degree}; accepted are 0 to {MAX_DEGREE}")
    if degree <= 3:
        rotations, weights = Rotation.create_group("O").as_matrix(), np.full(24, 1 / 24)
    elif degree <= 5:
        rotations, weights = Rotation.create_group("I").as_matrix(), np.full(60, 1 / 60)
    else:
        rotations, weights = _lebedev_product(degree)
    if inversion:
        rotations, weights = _with_inversion(rotations), np.concatenate([weights, weights]) / 2
    return GroupSample(rotations, weights, "quadrature", degree, inversion)


def _lebedev_product(degree: int) -> tuple[np.ndarray, np.ndarray]:
    order = next(n for n in _LEBEDEV_ORDERS if n >= degree)
    points, point_weights = lebedev_rule(order)  # (3, P), (P,) with weights summing to 4π
    n_angles = degree + 1
    angles = 2 * np.pi * np.arange(n_angles) / n_angles
    x, y, z = points
    alpha, beta = np.arctan2(y, x), np.arccos(np.clip(z, -1.0, 1.0))
    eulers = np.stack(
        [np.repeat(alpha, n_angles), np.repeat(beta, n_angles), np.tile(angles, len(alpha))], axis=-1
    )  # R = Rz(α) Ry(β) Rz(γ)
    rotations = Rotation.from_euler("ZYZ", eulers).as_matrix()
    weights = np.repeat(point_weights / point_weights.sum(), n_angles) / n_angles
    return rotations, weights
