"""What must hold between atoms that are far apart, come near each other, or are repeated."""

from typing import NamedTuple

import numpy as np

from equimd.contract.invariances import FAR, FAR_ENERGY, FAR_FORCE, allowing_for_distance
from equimd.contract.structures import Predicted, Structure, cluster, free, smooth_directions, supercell
from equimd.contract.subject import NotApplicable, Part, Rounding, Subject, Tolerances, compare, largest

_DISTANT = 20.0  # Å; the reach of networks with several layers is 15 to 25, and hardly anything is left at its end
_MOST_ATOMS = 1500
# 0.1 meV: a 250th of kT at 300 K, and a hundred times what float32 leaves of the energy of a molecule.
_JUMP = 1e-4
_N_REFINED = 40  # stretches that are looked at again, ten times finer each time
_FINEST = 1e-5  # of the path: what is still there is a jump, or bends within 0.1 mÅ
# Atoms with open shells keep an entropy of electrons in methods that occupy orbitals by temperature, such as GFN2-xTB:
# some kT for two atoms. The energy of an isolated atom, which may be forgotten, is many times larger.
_ADDITIVE = 0.2


def extensivity(subject: Subject, structure: Structure, base: Predicted, accepted: Tolerances) -> list[Part]:
    """Supercells, or two copies of a molecule far apart: each copy is what it was."""
    n = len(structure.numbers)
    if structure.is_periodic:
        larger = [supercell(structure, axis, 2) for axis in range(3) if structure.pbc[axis]]
    else:
        larger, accepted = [_pair(structure, 2 * FAR)], allowing_for_distance(accepted, n, 2 * FAR)
    parts = []
    for got in subject.many(larger):
        energy = got.energy / 2
        for copy in (got.forces[:n], got.forces[n:]):
            parts += compare(base, Predicted(energy, copy, got.stress), accepted)
    return parts


def locality(subject: Subject, structure: Structure, base: Predicted, accepted: Tolerances) -> list[Part]:
    """An atom moves: no force changes on atoms far away."""
    if structure.is_periodic:
        heights = 1 / np.linalg.norm(np.linalg.pinv(structure.cell), axis=0)
        axis = int(np.argmax(np.where(structure.pbc, heights, 0.0)))
        copies = int(np.ceil(2 * (_DISTANT + heights[axis]) / heights[axis]))
        whole = supercell(structure, axis, copies)
        if len(whole.numbers) > _MOST_ATOMS:
            raise NotApplicable(f"a supercell that is long enough has {len(whole.numbers)} atoms")
        separations = (whole.positions - whole.positions[0]) @ np.linalg.pinv(whole.cell)[:, axis]
        away = np.abs(separations - np.round(separations)) * copies * heights[axis] > _DISTANT
    else:
        whole = _pair(structure, FAR)
        away = np.arange(len(whole.numbers)) >= len(structure.numbers)
    moved = whole.positions.copy()
    moved[0] += [0.08, -0.06, 0.05]
    before, after = subject.many([whole, whole._replace(positions=moved)])
    change = largest((after.forces - before.forces)[away])
    reach = f"{_DISTANT:g} Å" if structure.is_periodic else f"{FAR:g} Å"
    why = f"{accepted.why}, or what electrostatics leave at {reach}"
    return [Part("forces", change, max(accepted.forces, 10 * FAR_FORCE), "eV/Å", why)]


def smoothness(
    subject: Subject, structure: Structure, base: Predicted, rounding: Rounding, n_points: int = 121
) -> list[Part]:
    """The energy along a path is the integral of the forces: a pair that crosses a cutoff makes no jump.

    If the two differ on a stretch, finer points are taken there: a bend comes out, however sharp, and a jump stays.
    """
    tolerance = max(_JUMP, 30 * float(np.sqrt(rounding.energy)))
    sizes = []
    if structure.is_periodic:
        sizes.append(_largest_jump(subject, *_collective(structure), n_points, tolerance))
    try:
        sizes.append(_largest_jump(subject, *_apart(cluster(structure)), n_points, tolerance))
    except NotApplicable:  # many calculators of crystals know no molecules
        if not structure.is_periodic:
            raise
    why = "0.1 meV, or 30 standard deviations of the rounding of the energy"
    return [Part("jump of the energy", max(sizes), tolerance, "eV", why)]


def _largest_jump(subject: Subject, start: Structure, rate: np.ndarray, n_points: int, tolerance: float) -> float:
    """In eV, along start + t · rate for t in 0…1; infinite if anything is not finite."""
    waiting = _jumps(subject, start, rate, np.linspace(0, 1, n_points))
    for _ in range(_N_REFINED):
        worst = max(waiting)
        if not worst.size > tolerance or worst.high - worst.low < _FINEST:
            break
        waiting.remove(worst)
        waiting += _jumps(subject, start, rate, np.linspace(worst.low, worst.high, 21))
    return max(waiting).size


class _Stretch(NamedTuple):
    """A part of a path, and by how much the energy changes there beyond the work of the forces, in eV."""

    size: float
    low: float
    high: float


def _jumps(subject: Subject, start: Structure, rate: np.ndarray, t: np.ndarray) -> list[_Stretch]:
    """|ΔE + ∫ F dx| of each two intervals of t by Simpson's rule; positions are start + t · rate."""
    found: list[Predicted] = []
    for k in range(0, len(t), 20):
        found += subject.many([start._replace(positions=start.positions + x * rate) for x in t[k : k + 20]])
    energies = np.array([p.energy for p in found])
    slopes = -np.array([(p.forces * rate).sum() for p in found]) * (t[1] - t[0])
    integrals = (slopes[:-2:2] + 4 * slopes[1:-1:2] + slopes[2::2]) / 3
    sizes = np.abs(np.diff(energies[::2]) - integrals)
    if not np.isfinite(sizes).all():
        return [_Stretch(np.inf, float(t[0]), float(t[0]))]
    return [_Stretch(*map(float, row)) for row in zip(sizes, t[:-2:2], t[2::2], strict=True)]


def far_dimer(subject: Subject, structure: Structure, base: Predicted, accepted: Tolerances) -> list[Part]:
    """Two atoms far apart: no force, an energy that stays as they go on, and that of two atoms."""
    parts = []
    for number in np.unique(structure.numbers):
        pairs = [free(np.array([[0.0, 0, 0], [0, 0.6 * r, 0.8 * r]]), np.array([number] * 2)) for r in (40.0, 60.0)]
        near, far = subject.many(pairs)
        alone = subject.alone(free(np.zeros((1, 3)), np.array([number])))
        force = max(largest(near.forces), largest(far.forces))
        parts += [
            Part("forces", force, max(accepted.forces, FAR_FORCE), "eV/Å", accepted.why),
            Part("energy", abs(near.energy - far.energy), max(2 * accepted.energy, FAR_ENERGY), "eV", accepted.why),
            Part("energy beyond two atoms", abs(far.energy - 2 * alone.energy), _ADDITIVE, "eV",
                 "open shells of self-consistent methods"),
        ]  # fmt: skip
    return parts


def _pair(molecule: Structure, distance: float) -> Structure:
    """A molecule, and a copy of it so far away."""
    away = np.array([0.48, 0.6, 0.64]) * (distance + float(np.ptp(molecule.positions, axis=0).max()))
    return free(np.concatenate([molecule.positions, molecule.positions + away]), np.tile(molecule.numbers, 2))


def _collective(structure: Structure) -> tuple[Structure, np.ndarray]:
    """All atoms move along lines of 0.3 Å: many pairs cross every cutoff. Where they start, and how far they go."""
    directions = 0.3 * smooth_directions(structure, 37)
    return structure._replace(positions=structure.positions - directions / 2), directions


def _apart(structure: Structure) -> tuple[Structure, np.ndarray]:
    """A molecule and a copy of it, from 2.5 Å between them to 12. Where they start, and how far each atom goes."""
    direction = np.array([0.48, 0.6, 0.64])
    extent = float(np.ptp(structure.positions @ direction))
    copy = structure.positions + (extent + 2.5) * direction
    start = free(np.concatenate([structure.positions, copy]), np.tile(structure.numbers, 2))
    return start, np.concatenate([np.zeros_like(copy), np.tile(9.5 * direction, (len(copy), 1))])
