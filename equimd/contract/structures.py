"""Structures as plain arrays, and other descriptions of the same physics."""

import itertools
from typing import NamedTuple

import numpy as np

from equimd.rotations import rotate_back_tensor, rotate_back_vectors, rotate_vectors

_ALIKE = 1.5  # Å: about the length of a bond


class Structure(NamedTuple):
    """Positions (N, 3) in Å, atomic numbers (N,), cell (3, 3) with rows as vectors in Å, pbc (3,)."""

    positions: np.ndarray
    numbers: np.ndarray
    cell: np.ndarray
    pbc: np.ndarray

    @property
    def is_periodic(self) -> bool:
        """Whether any direction is."""
        return bool(self.pbc.any())

    @property
    def volume(self) -> float:
        """Of the cell, in Å³."""
        return abs(float(np.linalg.det(self.cell)))


class Predicted(NamedTuple):
    """Energy in eV, forces (N, 3) in eV/Å, stress (3, 3) in eV/Å³ or None."""

    energy: float
    forces: np.ndarray
    stress: np.ndarray | None


def free(positions: np.ndarray, numbers: np.ndarray) -> Structure:
    """A structure without a cell."""
    return Structure(positions, numbers, np.zeros((3, 3)), np.zeros(3, dtype=bool))


def turned(structure: Structure, rotation: np.ndarray) -> Structure:
    """The structure and its cell, rotated; the rotation may be improper."""
    positions, cell = (rotate_vectors(x, rotation) for x in (structure.positions, structure.cell))
    return structure._replace(positions=positions, cell=cell)


def turned_back(predicted: Predicted, rotation: np.ndarray) -> Predicted:
    """A prediction for the rotated structure, as it is for the original if nothing depends on the orientation."""
    stress = None if predicted.stress is None else rotate_back_tensor(predicted.stress, rotation)
    return Predicted(predicted.energy, rotate_back_vectors(predicted.forces, rotation), stress)


def reordered(structure: Structure, order: np.ndarray) -> Structure:
    """The structure with its atoms in another order."""
    return structure._replace(positions=structure.positions[order], numbers=structure.numbers[order])


def deformed(structure: Structure, strain: np.ndarray) -> Structure:
    """r → r (1 + ε), positions and cell alike."""
    by = np.eye(3) + strain
    return structure._replace(positions=structure.positions @ by, cell=structure.cell @ by)


def supercell(structure: Structure, axis: int, copies: int) -> Structure:
    """Copies along one lattice vector, one whole copy after the other."""
    shifts = np.arange(copies)[:, None, None] * structure.cell[axis]
    cell = structure.cell.copy()
    cell[axis] *= copies
    numbers = np.tile(structure.numbers, copies)
    return Structure((structure.positions + shifts).reshape(-1, 3), numbers, cell, structure.pbc)


def descriptions_of_the_cell(structure: Structure) -> list[Structure]:
    """The same periodic structure with other lattice vectors: permuted, left-handed, not reduced; atoms elsewhere."""
    cell, pbc = structure.cell, structure.pbc
    axes = [k for k in range(3) if pbc[k]]
    orders = [[1, 2, 0], [1, 0, 2]]  # the second is left-handed
    found = [structure._replace(cell=cell[order], pbc=pbc[order]) for order in orders]
    mirrored = cell.copy()
    mirrored[axes[0]] *= -1
    found.append(structure._replace(cell=mirrored))
    if len(axes) > 1:
        sheared = cell.copy()
        sheared[axes[1]] += cell[axes[0]]
        found.append(structure._replace(cell=sheared))
    if len(axes) == 3:
        fractional = structure.positions @ np.linalg.inv(cell)
        found.append(structure._replace(positions=(fractional - np.floor(fractional)) @ cell))
    else:  # the vector of a direction that is not periodic means nothing
        longer = cell.copy()
        for k in set(range(3)) - set(axes):
            longer[k] = cell[k] * 1.5 if cell[k].any() else _normal(cell, axes) * 40.0
        found.append(structure._replace(cell=longer))
    return found


def boxes(molecule: Structure, margin: float) -> list[Structure]:
    """A molecule in periodic boxes far larger than itself, and in a cell that is not periodic."""
    extent = np.ptp(molecule.positions, axis=0) + margin
    box, away = np.diag(extent), np.diag(extent)
    away[1, 0], away[2, 0] = 0.3 * extent[0], -0.2 * extent[0]
    all_, none = np.ones(3, dtype=bool), np.zeros(3, dtype=bool)
    small = 0.5 * np.eye(3) + 0.1
    cells = [(box, all_), (away, all_), (box, np.array([True, False, False])), (small, none)]
    return [molecule._replace(cell=cell, pbc=pbc) for cell, pbc in cells]


def cluster(structure: Structure, n_atoms: int = 6) -> Structure:
    """A few atoms without a cell: a molecule as it is, of a periodic structure an atom and its nearest neighbours."""
    if not structure.is_periodic:
        return free(structure.positions, structure.numbers)
    ranges = [range(-1, 2) if periodic else range(1) for periodic in structure.pbc]
    shifts = np.array(list(itertools.product(*ranges)))
    positions = (structure.positions + (shifts @ structure.cell)[:, None, :]).reshape(-1, 3)
    numbers = np.tile(structure.numbers, len(shifts))
    nearest = np.argsort(np.linalg.norm(positions - structure.positions[0], axis=1), kind="stable")[:n_atoms]
    return free(positions[nearest] - structure.positions[0], numbers[nearest])


def without_last_atom(structure: Structure) -> Structure:
    """A structure of another size, with a vacancy; a single atom stays."""
    n = max(1, len(structure.numbers) - 1)
    return structure._replace(positions=structure.positions[:n], numbers=structure.numbers[:n])


def smooth_directions(structure: Structure, seed: int) -> np.ndarray:
    """A random unit vector for each atom (N, 3), alike for near atoms, so that atoms that move along do not collide."""
    away = structure.positions[None] - structure.positions[:, None]
    periodic = structure.cell[structure.pbc]
    away = away - np.round(away @ np.linalg.pinv(periodic)) @ periodic if len(periodic) else away
    near = np.exp(-(away**2).sum(axis=-1) / (2 * _ALIKE**2))
    directions = near @ np.random.default_rng(seed).normal(size=structure.positions.shape)
    return directions / np.linalg.norm(directions, axis=1, keepdims=True)


def _normal(cell: np.ndarray, axes: list[int]) -> np.ndarray:
    """A unit vector across the periodic vectors."""
    return np.linalg.svd(cell[axes])[2][-1]
