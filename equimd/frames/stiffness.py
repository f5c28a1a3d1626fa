"""How stiff the bonds of a data set seem by its forces and its geometries: the evidence for forces in other units.

Frames with small forces may be close to equilibrium, or have their forces in Hartree/Bohr, a 51st of those in eV/Å.
Bonds tell these apart: with δ the standard deviation of a bond's length r over frames and F the RMS of a force
component, F/δ is about the bond's force constant k, and k r² is between 5 eV (sodium) and 70 eV (C-C) for whatever is
bonded; in Hartree/Bohr it comes out below 1.5.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from ase.geometry import find_mic

from equimd.frames.labels import labels_of

LEAST = 2.5
"""eV: F r²/δ below it is that of no bond."""
_BONDED = 1.25  # of the sum of covalent radii
_ENOUGH = 3  # frames of the same atoms, without which there is no spread of a bond
_MOST_ATOMS = 400  # all pairs of atoms are looked at


def bond_stiffness(frames: Iterable[Atoms]) -> tuple[float, int] | None:
    """F r²/δ in eV as forces and positions of labelled ``frames`` have it, and how many frames tell it.

    Frames of the same atoms in the same order are compared, after what a change of their cell does to all positions is
    taken out. None if no bond occurs in three frames, or none changes.
    """
    groups: dict[bytes, list[Atoms]] = {}
    for atoms in frames:
        if 1 < len(atoms) <= _MOST_ATOMS and labels_of(atoms)["forces"] is not None:
            groups.setdefault(atoms.numbers.tobytes() + atoms.pbc.tobytes(), []).append(atoms)
    squares, lengths, spreads, n_frames = [], [], [], 0
    for group in groups.values():
        if len(group) < _ENOUGH or not (bonds := _bond_lengths(group)).size:
            continue
        n_frames += len(group)
        squares += [float((labels_of(atoms)["forces"] ** 2).mean()) for atoms in group]
        lengths.append(bonds.mean(axis=0))
        spreads.append(bonds.std(axis=0))
    spread = float(np.sqrt(np.mean(np.concatenate(spreads) ** 2))) if spreads else 0.0
    if spread < 1e-3:  # Å: within what is printed
        return None
    return float(np.sqrt(np.mean(squares)) * np.mean(np.concatenate(lengths) ** 2) / spread), n_frames


def _bond_lengths(group: Sequence[Atoms]) -> np.ndarray:
    """Lengths (frames, bonds) in Å of the bonds of the first frame, in all frames, as if all had its cell."""
    first = group[0]
    i, j = np.triu_indices(len(first), 1)
    periodic = bool(first.pbc.any())
    frames = [one.positions for one in group]
    if first.pbc.all():
        frames = [one.cell.scaled_positions(one.positions) @ first.cell.array for one in group]

    def distances(positions: np.ndarray, places: np.ndarray | slice) -> np.ndarray:
        vectors = positions[j[places]] - positions[i[places]]
        if periodic and len(vectors):
            vectors = find_mic(vectors, first.cell, first.pbc)[0]  # pyright: ignore[reportArgumentType]
        return np.linalg.norm(vectors, axis=1)

    near = distances(frames[0], slice(None)) < _BONDED * (
        covalent_radii[first.numbers[i]] + covalent_radii[first.numbers[j]]
    )
    return np.array([distances(positions, near) for positions in frames])
