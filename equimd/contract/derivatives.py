"""Forces, stress and Jacobian against differences of energies and forces."""

from collections.abc import Callable

import numpy as np

from equimd.contract.structures import Predicted, Structure, deformed
from equimd.contract.subject import NotApplicable, Part, Rounding, Subject, largest

# Steps in Å, or strains; the best is chosen for each direction.
_STEPS = (2e-2, 7e-3, 2e-3, 5e-4)
_OFFSETS, _WEIGHTS = np.array([-2, -1, 1, 2]), np.array([1.0, -8.0, 8.0, -1.0]) / 12
_N_DIRECTIONS = 3
# Of the largest force (or stress): networks that are strained where they were never trained bend on a scale of 0.01 Å.
_RELATIVE = 2e-4
_WHY = "five times what the differences themselves are uncertain by, or 2e-4 of the largest value"
# Of the largest second derivative: differences of float32 forces leave 1e-4.
_ASYMMETRY = 2e-3


def gradient(subject: Subject, structure: Structure, base: Predicted, rounding: Rounding) -> list[Part]:
    """Forces along random directions are minus the slope of the energy."""
    scale = max(largest(base.forces), 1e-3)
    parts = []
    for direction in _directions(structure, _N_DIRECTIONS, 17):
        slope, error = _slope(subject, lambda x, d=direction: _moved(structure, x * d), np.sqrt(rounding.energy))
        value = abs(float((base.forces * direction).sum()) + slope)
        parts.append(Part("forces", value, max(5 * error, _RELATIVE * scale), "eV/Å", _WHY))
    return parts


def stress(subject: Subject, structure: Structure, base: Predicted, rounding: Rounding) -> list[Part]:
    """Stress along random strains is the slope of the energy over the volume."""
    if not structure.pbc.all():
        raise NotApplicable("the structure is not periodic in three directions")
    if base.stress is None:
        raise NotApplicable("the calculator gives no stress")
    rng, volume = np.random.default_rng(29), structure.volume
    scale = max(largest(base.stress), 0.1 * largest(base.forces) * len(base.forces) / volume, 1e-6)
    parts = []
    for _ in range(_N_DIRECTIONS):
        strain = rng.normal(size=(3, 3))
        strain = (strain + strain.T) / np.linalg.norm(strain + strain.T)
        slope, error = _slope(subject, lambda x, e=strain: deformed(structure, x * e), np.sqrt(rounding.energy))
        value = abs(float((base.stress * strain).sum()) - slope / volume)
        parts.append(Part("stress", value, max(5 * error / volume, _RELATIVE * scale), "eV/Å³", _WHY))
    return parts


def jacobian(subject: Subject, structure: Structure, base: Predicted, rounding: Rounding) -> list[Part]:
    """∂F_i/∂x_j = ∂F_j/∂x_i between random directions: so it is if the forces come from an energy."""
    directions = _directions(structure, 4, 31)
    found = np.array([[_change(subject, structure, d, step) for d in directions] for step in _STEPS[:3]])
    products = np.einsum("ain,sbin->sab", directions, found)  # a second derivative for each pair, at each step
    uncertain = [largest(products[k + 1] - products[k]) + 2 * np.sqrt(rounding.force) / _STEPS[k + 1] for k in (0, 1)]
    error = min(uncertain)
    best = products[1 + uncertain.index(error)]
    value = largest(best - best.T)
    tolerance = max(5 * error, _ASYMMETRY * largest(best))
    why = "five times what the differences are uncertain by, or 2e-3 of the largest second derivative"
    return [Part("second derivatives", value, tolerance, "eV/Å²", why)]


def _slope(subject: Subject, along: Callable[[float], Structure], rounding: float) -> tuple[float, float]:
    """The slope of the energy along a path at 0, and how uncertain it is: differences of fourth order, best step."""
    slopes = []
    for step in _STEPS:
        energies = np.array([p.energy for p in subject.many([along(k * step) for k in _OFFSETS])])
        slopes.append(float(_WEIGHTS @ (energies - energies.mean())) / step)
    # The error of each is at least that of the next, which is many times smaller; rounding grows the other way.
    changes = np.abs(np.diff(slopes))
    uncertain = np.maximum(changes / 4, 2 * rounding / np.array(_STEPS[1:]))
    best = int(np.argmin(uncertain))
    return slopes[best + 1], float(uncertain[best])


def _change(subject: Subject, structure: Structure, direction: np.ndarray, step: float) -> np.ndarray:
    """How the forces change along a direction, (N, 3) in eV/Å²."""
    forces = [p.forces for p in subject.many([_moved(structure, k * step * direction) for k in _OFFSETS])]
    return np.tensordot(_WEIGHTS, np.array(forces), 1) / step


def _directions(structure: Structure, n: int, seed: int) -> np.ndarray:
    directions = np.random.default_rng(seed).normal(size=(n, *structure.positions.shape))
    return directions / np.linalg.norm(directions, axis=(1, 2), keepdims=True)


def _moved(structure: Structure, by: np.ndarray) -> Structure:
    return structure._replace(positions=structure.positions + by)
