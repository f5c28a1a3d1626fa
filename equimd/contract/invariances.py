"""Descriptions of the same physics, for which predictions must be the same."""

import numpy as np

from equimd.contract.structures import (
    Predicted,
    Structure,
    boxes,
    cluster,
    descriptions_of_the_cell,
    free,
    reordered,
    turned,
    turned_back,
)
from equimd.contract.subject import NotApplicable, Part, Subject, Tolerances, compare
from equimd.rotations import random_rotations

# Interactions of dipoles of a few eÅ at this distance (Å) are below these (eV, eV/Å).
FAR = 60.0
FAR_ENERGY, FAR_FORCE = 1e-4, 1e-5
_N_ROTATIONS = 4


def rotation(subject: Subject, structure: Structure, base: Predicted, accepted: Tolerances) -> list[Part]:
    """Proper rotations of atoms and cell: the energy stays, forces and stress turn along."""
    return _turn(subject, structure, base, accepted, random_rotations(_N_ROTATIONS, 13, inversion=False).rotations)


def inversion(subject: Subject, structure: Structure, base: Predicted, accepted: Tolerances) -> list[Part]:
    """x → −x for atoms and cell, alone: what rotations break is not counted here."""
    return _turn(subject, structure, base, accepted, -np.eye(3)[None])


def _turn(
    subject: Subject, structure: Structure, base: Predicted, accepted: Tolerances, turns: np.ndarray
) -> list[Part]:
    found = subject.many([turned(structure, turn) for turn in turns])
    pairs = zip(found, turns, strict=True)
    return [part for got, turn in pairs for part in compare(base, turned_back(got, turn), accepted)]


def translation(subject: Subject, structure: Structure, base: Predicted, accepted: Tolerances) -> list[Part]:
    """All atoms moved by the same vector: nothing changes."""
    moves = np.array([[7.3, -11.9, 4.7], [-0.37, 0.91, 0.53]])
    found = subject.many([structure._replace(positions=structure.positions + move) for move in moves])
    return [part for got in found for part in compare(base, got, accepted)]


def lattice_translation(subject: Subject, structure: Structure, base: Predicted, accepted: Tolerances) -> list[Part]:
    """Single atoms moved by lattice vectors: nothing changes."""
    if not structure.is_periodic:
        raise NotApplicable("the structure has no lattice")
    rng = np.random.default_rng(19)
    changed = []
    for reach in (1, 3):
        steps = rng.integers(-reach, reach + 1, size=structure.positions.shape) * structure.pbc
        steps[0] = np.where(structure.pbc, reach, 0)
        changed.append(structure._replace(positions=structure.positions + steps @ structure.cell))
    return [part for got in subject.many(changed) for part in compare(base, got, accepted)]


def permutation(subject: Subject, structure: Structure, base: Predicted, accepted: Tolerances) -> list[Part]:
    """Atoms in another order: forces are in that order, and nothing else changes."""
    n = len(structure.numbers)
    orders = [np.random.default_rng(23).permutation(n), np.arange(n)[::-1]]
    found = subject.many([reordered(structure, order) for order in orders])
    back = [got._replace(forces=got.forces[np.argsort(order)]) for got, order in zip(found, orders, strict=True)]
    return [part for got in back for part in compare(base, got, accepted)]


def cell_orientation(subject: Subject, structure: Structure, base: Predicted, accepted: Tolerances) -> list[Part]:
    """The same lattice by other vectors (permuted, left-handed, not reduced), atoms in the cell or outside."""
    if not structure.is_periodic:
        raise NotApplicable("the structure has no cell")
    found = subject.any_of(descriptions_of_the_cell(structure))
    return [part for got in found for part in compare(base, got, accepted)]


def neighbors(subject: Subject, structure: Structure, base: Predicted, accepted: Tolerances) -> list[Part]:
    """A few atoms without a cell, in huge periodic boxes, and in a cell that is not periodic: all the same."""
    small = cluster(structure)
    without = subject.alone(small)
    loose = allowing_for_distance(accepted, len(small.numbers), FAR)
    return [part for got in subject.any_of(boxes(small, FAR)) for part in compare(without, got, loose)]


def allowing_for_distance(accepted: Tolerances, n_atoms: int, distance: float) -> Tolerances:
    """Tolerances for copies of a molecule that are so far (Å) from each other."""
    return accepted._replace(
        energy=max(accepted.energy, FAR_ENERGY / n_atoms),
        forces=max(accepted.forces, FAR_FORCE),
        why=f"{accepted.why}, or interactions of dipoles {distance:g} Å apart",
    )


def isolated_atom(subject: Subject, structure: Structure, base: Predicted, accepted: Tolerances) -> list[Part]:
    """One atom alone, of each element: the energy is finite, and no force acts."""
    parts = []
    for number in np.unique(structure.numbers):
        alone = subject.alone(free(np.array([[0.3, -0.2, 0.1]]), np.array([number])))
        force = np.abs(alone.forces).max() if np.isfinite(alone.energy) else np.nan
        parts.append(Part("force", float(force), accepted.forces, "eV/Å", accepted.why))
    return parts
