"""The same structure again: among others, after others, and along a path."""

import contextlib

import numpy as np

from equimd.contract.structures import Predicted, Structure, smooth_directions, without_last_atom
from equimd.contract.subject import Part, Refused, Rounding, Subject, Tolerances, compare, largest

_PATH = 12  # steps of 0.06 Å: together they are longer than any Verlet skin
# What an NVE run can notice: 0.01 meV per atom.
_ENERGY_PER_ATOM = 1e-5
# Pairs that end at a cutoff where next to nothing is left make jumps of this size, which nobody notices.
_UNNOTICED = 1e-9


def batch(subject: Subject, structure: Structure, base: Predicted, accepted: Tolerances) -> list[Part]:
    """A structure among others, in any order: what it is alone."""
    small, other = without_last_atom(structure), structure._replace(positions=structure.positions * 1.01)
    alone = [base, subject.alone(small), subject.alone(other)]
    parts = []
    for order in ([0, 1, 2], [2, 0, 1, 0]):
        found = subject.many([[structure, small, other][k] for k in order])
        parts += [part for k, got in zip(order, found, strict=True) for part in compare(alone[k], got, accepted)]
    return parts


def repeatability(
    subject: Subject, structure: Structure, base: Predicted, accepted: Tolerances, rounding: Rounding
) -> list[Part]:
    """Evaluated again, at the end of a path, and after another structure: the same; and how finely the energy is given.

    Along a path a calculator may keep its list of neighbours; another structure makes it forget.
    """
    parts = compare(base, subject.alone(structure), accepted)
    directions = smooth_directions(structure, 41)
    path = [structure._replace(positions=structure.positions + 0.06 * k * directions) for k in range(_PATH, -1, -1)]
    for step in path:
        along = subject.alone(step)
    parts += compare(base, along, accepted)
    middle = path[_PATH // 2]
    for step in path[::-1][: _PATH // 2 + 1]:
        along = subject.alone(step)
    with contextlib.suppress(Refused):
        subject.alone(without_last_atom(structure))
    parts += compare(subject.alone(middle), along, accepted)
    return [*parts, _resolution(base, rounding)]


def _resolution(base: Predicted, rounding: Rounding) -> Part:
    """The rounding of the energy: it may be as coarse as that of the forces, but no coarser than MD notices."""
    scale = max(largest(base.forces), 1e-3)
    relative = np.sqrt(rounding.force) / scale
    size = max(abs(base.energy), scale)
    tolerance = min(max(1e-13, 1e3 * relative) * size, _ENERGY_PER_ATOM * len(base.forces))
    tolerance = max(tolerance, _UNNOTICED)
    why = "a thousand times the relative rounding of the forces, at most 0.01 meV per atom"
    return Part("rounding of the energy", float(np.sqrt(rounding.energy)), tolerance, "eV", why)
