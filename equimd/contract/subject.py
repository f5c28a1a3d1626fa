"""What is checked: predictions, their rounding, and how exactly two of them can be expected to agree."""

from collections.abc import Callable, Sequence
from math import factorial
from typing import NamedTuple

import numpy as np

from equimd.contract.structures import Predicted, Structure, turned
from equimd.errors import in_one_line
from equimd.rotations import random_rotations

Predict = Callable[[Sequence[Structure]], list[Predicted]]

# Points of the line, their distance in Å per standard normal coordinate, and the order of the differences.
_POINTS, _STEP, _ORDER = 9, 3e-6, 6
_LONG_STEP = 3e-4
# A pair that crosses a hard cutoff on the line makes a jump at its atoms, which is no rounding: the largest values of
# this fraction of the atoms are left out.
_LEFT_OUT = 0.1
# Two predictions of the same number differ by a few standard deviations of the rounding; heavy tails want some more.
_DEVIATIONS = 30.0
# Of the largest force: what float32 leaves of forces that nearly cancel is 1e-6 to 1e-5.
_RELATIVE = 2e-5


class NotApplicable(Exception):  # noqa: N818, it is no error
    """A check that means nothing for this structure or calculator; the message says why."""


class Refused(NotApplicable):
    """The calculator raised."""


class Part(NamedTuple):
    """A deviation of one quantity, what is accepted, its unit, and why that much is accepted."""

    quantity: str
    value: float
    tolerance: float
    unit: str
    why: str = ""

    @property
    def ratio(self) -> float:
        """Deviation over what is accepted; infinite for NaN."""
        ratio = self.value / self.tolerance
        return ratio if ratio == ratio else float("inf")


class Tolerances(NamedTuple):
    """Accepted between two predictions of the same physics: eV per atom, eV/Å, eV/Å³."""

    energy: float
    forces: float
    stress: float
    why: str


class Rounding(NamedTuple):
    """Mean square rounding of one structure: forces (eV/Å)², energy eV², stress (eV/Å³)², per component."""

    force: float
    energy: float
    stress: float | None


class Subject:
    """A calculator as a function of structures; whatever it raises becomes ``Refused``."""

    def __init__(self, predict: Predict) -> None:
        self._predict = predict

    def many(self, structures: Sequence[Structure]) -> list[Predicted]:
        """Predictions for structures given at once."""
        try:
            return self._predict(structures)
        except Exception as error:
            raise Refused(f"the calculator refuses: {in_one_line(error)}") from error

    def any_of(self, structures: Sequence[Structure]) -> list[Predicted]:
        """Predictions for those of the structures that the calculator takes, one by one; it must take one."""
        found: list[Predicted] = []
        for k, structure in enumerate(structures):
            try:
                found.append(self.alone(structure))
            except Refused:
                if not found and k == len(structures) - 1:
                    raise
        return found

    def alone(self, structure: Structure) -> Predicted:
        """The prediction for one structure."""
        return self.many([structure])[0]


def compare(base: Predicted, got: Predicted, accepted: Tolerances) -> list[Part]:
    """How far two predictions of the same physics are apart."""
    energy = abs(got.energy - base.energy) / len(base.forces)
    parts = [
        Part("energy", energy, accepted.energy, "eV/atom", accepted.why),
        Part("forces", largest(got.forces - base.forces), accepted.forces, "eV/Å", accepted.why),
    ]
    if base.stress is not None and got.stress is not None:
        parts.append(Part("stress", largest(got.stress - base.stress), accepted.stress, "eV/Å³", accepted.why))
    return parts


def measured_tolerances(base: Predicted, structure: Structure, rounding: Rounding) -> Tolerances:
    """From the rounding of the calculator and the size of its forces."""
    scale = max(largest(base.forces), 1e-3)
    deviations = [_DEVIATIONS * np.sqrt(x or 0.0) for x in rounding]
    n, stress = len(base.forces), 0.0
    if base.stress is not None:
        stress = _RELATIVE * (largest(base.stress) + scale * n / structure.volume)
    return Tolerances(
        max(_RELATIVE * scale, deviations[1] / n),
        max(_RELATIVE * scale, deviations[0]),
        max(stress, deviations[2], 1e-12),
        f"{_RELATIVE:g} of the largest force, or {_DEVIATIONS:g} standard deviations of the rounding",
    )


def estimate_rounding(
    predict: Callable[[Structure], Predicted], structure: Structure, seed: int = 0, step: float = _STEP
) -> Rounding:
    """The rounding of a calculator at one structure, from its own predictions along a short line; 18 evaluations.

    Along x + k·h·v a smooth function is a polynomial of low degree, and what is left of its differences of order m is
    rounding. For independent rounding of variance σ² the mean square of these differences is σ² (2m)!/(m!)² (Hamming;
    Moré and Wild, SIAM J. Sci. Comput. 33, 1292 (2011)). The step is far above the spacing of float32 numbers at a few
    Å, so that all digits of a float32 calculation change from point to point; and far below the length over which
    forces bend, so that differences of sixth order of a float64 calculation are rounding, too. Broken symmetry is as
    smooth as everything else along the line: it does not enter.

    Between the points a rotated copy is evaluated: a self-consistent calculation that starts from its last wave
    function would otherwise start closer to its answer than it does elsewhere. And each point is rotated there and
    back, which rounds positions as a measurement over rotations does. An energy of many eV in float32 does not change
    at all over such a step (Å): a longer one finds its rounding.
    """
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=structure.positions.shape)
    # Proper ones: some calculators refuse left-handed cells.
    rotations = random_rotations(2 * _POINTS, seed, inversion=False).rotations
    found: list[Predicted] = []
    for k in range(_POINTS):
        predict(turned(structure, rotations[2 * k]))
        there = rotations[2 * k + 1]
        point = structure._replace(positions=structure.positions + (k - _POINTS // 2) * step * direction)
        found.append(predict(turned(turned(point, there), there.T)))
    stresses = [p.stress for p in found if p.stress is not None]
    stress = float(_variances(np.array(stresses)).mean()) if len(stresses) == _POINTS else None
    per_atom = np.sort(_variances(np.array([p.forces for p in found])).mean(axis=1))
    kept = len(per_atom) - int(_LEFT_OUT * len(per_atom))
    energy = float(_variances(np.array([p.energy for p in found])))
    return Rounding(float(per_atom[:kept].mean()), energy, stress)


def energy_rounding(predict: Callable[[Structure], Predicted], structure: Structure) -> float:
    """Mean square rounding of the energy, eV², from a line long enough for energies of 10⁴ eV in float32."""
    return estimate_rounding(predict, structure, seed=1, step=_LONG_STEP).energy


def _variances(values: np.ndarray) -> np.ndarray:
    """Variance along the line of what is not smooth in values (points, ...), of each component."""
    differences = np.diff(np.asarray(values, dtype=np.float64), n=_ORDER, axis=0)
    return (differences**2).mean(axis=0) * factorial(_ORDER) ** 2 / factorial(2 * _ORDER)


def largest(values: np.ndarray) -> float:
    """The largest absolute value; NaN if any is."""
    return float(np.abs(values).max(initial=0.0))
