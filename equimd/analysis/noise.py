"""The rounding of a force field that has no second precision to compare with, estimated from its own predictions.

Along a short line x + k·h·v through a structure, a smooth function is a polynomial of low degree, and what is left of
its differences of order m is rounding. For independent rounding of variance σ², the mean square of these differences is
σ² (2m)!/(m!)² (Hamming; Moré and Wild, SIAM J. Sci. Comput. 33, 1292 (2011)). The step is far above the spacing of
float32 numbers at a few Å, so that all digits of a float32 calculation change from point to point; and far below the
length over which forces bend, so that differences of sixth order of a float64 calculation are rounding, too. Broken
symmetry is as smooth as everything else along the line: it does not enter.
"""

from math import factorial
from typing import NamedTuple

import numpy as np
from ase import Atoms

from equimd.calculators.forcefield import ForceField, rotated_frame
from equimd.rotations import random_rotations

# Points of the line, their distance in Å per standard normal coordinate, and the order of the differences.
_POINTS, _STEP, _ORDER = 9, 3e-6, 6
# A pair that crosses a hard cutoff on the line makes a jump at its atoms, which is no rounding: the largest values of
# this fraction of the atoms are left out.
_LEFT_OUT = 0.1


class Noise(NamedTuple):
    """Mean square rounding of one frame: forces (eV/Å)², energy eV², stress (eV/Å³)², per component."""

    force: float
    energy: float
    stress: float | None


def estimate_noise(field: ForceField, frame: Atoms, seed: int = 0) -> Noise:
    """The rounding of ``field`` at one frame, from 18 evaluations.

    Between the points a rotated copy is evaluated: a self-consistent calculation that starts from its last wave
    function would otherwise start closer to its answer than it does in a measurement over rotations. And each point is
    rotated there and back, which rounds positions as a measurement does.
    """
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=(len(frame), 3))
    rotations = random_rotations(2 * _POINTS, seed).rotations
    energies, forces, stresses = [], [], []
    for k in range(_POINTS):
        field.evaluate([rotated_frame(frame, rotations[2 * k])])
        there = rotations[2 * k + 1]
        point = frame.copy()
        point.set_constraint()
        point.positions = frame.positions + (k - _POINTS // 2) * _STEP * direction
        got = field.evaluate([rotated_frame(rotated_frame(point, there), there.T)])
        energies.append(float(got.energies[0]))
        forces.append(got.forces[0])
        stresses.append(got.stresses[0])
    stress = None if any(s is None for s in stresses) else float(_variances(np.array(stresses)).mean())
    per_atom = np.sort(_variances(np.array(forces)).mean(axis=1))
    kept = len(per_atom) - int(_LEFT_OUT * len(per_atom))
    return Noise(float(per_atom[:kept].mean()), float(_variances(np.array(energies))), stress)


def _variances(values: np.ndarray) -> np.ndarray:
    """Variance along the line of what is not smooth in values (points, ...), of each component."""
    differences = np.diff(np.asarray(values, dtype=np.float64), n=_ORDER, axis=0)
    return (differences**2).mean(axis=0) * factorial(_ORDER) ** 2 / factorial(2 * _ORDER)
