"""A sound pair potential and the same with one fault each: what ``equimd check`` must catch, and by which row.

equimd check tests/contract/zoo.py:Sound cu.xyz
"""

from typing import ClassVar

import numpy as np
import torch
from ase.calculators.calculator import Calculator, all_changes

from equimd.neighbors import neighbor_list

CUTOFF = 4.2


def shifts_of(atoms, cutoff=CUTOFF):
    """i, j, shifts, vectors, distances of all pairs within the cutoff."""
    (i, j), shifts = neighbor_list(atoms.positions, atoms.cell.array, atoms.pbc, cutoff)
    vectors = atoms.positions[j] - atoms.positions[i] + shifts @ np.where(atoms.pbc[:, None], atoms.cell.array, 0)
    return i, j, shifts, vectors, np.linalg.norm(vectors, axis=1)


def edges_of(atoms, cutoff=CUTOFF):
    """i, j, vectors, distances of all pairs within the cutoff."""
    i, j, _, vectors, r = shifts_of(atoms, cutoff)
    return i, j, vectors, r


class Sound(Calculator):
    """E = ½ Σ f(r) with f = Z-dependent Morse-like wells times (1 − (r/c)²)⁴; an energy of each atom besides."""

    implemented_properties: ClassVar = ["energy", "forces", "stress"]

    def calculate(self, atoms=None, properties=("energy",), system_changes=tuple(all_changes)):
        super().calculate(atoms, properties, system_changes)
        self.results = self.evaluate(self.atoms)

    def edges(self, atoms):
        """The pairs."""
        return edges_of(atoms)

    def evaluate(self, atoms):
        """Energy, forces and, if there is a volume, stress."""
        i, j, vectors, r = self.edges(atoms)
        z = 0.05 + 0.001 * (atoms.numbers[i] + atoms.numbers[j])
        well = np.exp(-2 * (r - 1.6)) - 2 * np.exp(-(r - 1.6))
        slope = -2 * np.exp(-2 * (r - 1.6)) + 2 * np.exp(-(r - 1.6))
        x = np.clip(1 - (r / CUTOFF) ** 2, 0, None)
        f, df = z * well * x**4, z * (slope * x**4 - well * 8 * x**3 * r / CUTOFF**2)
        pull = (df / np.maximum(r, 1e-9))[:, None] * vectors
        forces = np.zeros((len(atoms), 3))
        np.add.at(forces, i, pull / 2)
        np.add.at(forces, j, -pull / 2)
        energy = 0.5 * float(f.sum()) - 2.0 * float(atoms.numbers.sum())
        results = {"energy": energy, "forces": forces}
        if atoms.pbc.all():
            virial = 0.5 * np.einsum("ea,eb->ab", vectors, pull)
            results["stress"] = voigt(virial / atoms.get_volume())
        return results


def voigt(tensor):
    """xx yy zz yz xz xy."""
    return np.array([tensor[0, 0], tensor[1, 1], tensor[2, 2], tensor[1, 2], tensor[0, 2], tensor[0, 1]])


class WrongTranspose(Sound):
    """Fractional coordinates by the transposed cell: right for cells with right angles only."""

    def edges(self, atoms):
        """The pairs."""
        copy = atoms.copy()
        if atoms.pbc.all():
            copy.positions = (atoms.positions @ np.linalg.inv(atoms.cell.array).T) @ atoms.cell.array
        return edges_of(copy)


class TransposedForces(Sound):
    """Forces turned by the transpose of what turned the positions."""

    def evaluate(self, atoms):
        """As of Sound."""
        c, s = np.cos(0.3), np.sin(0.3)
        turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
        results = super().evaluate(atoms)
        results["forces"] = results["forces"] @ turn
        return results


class DroppedVirial(Sound):
    """Half of the shear is lost."""

    def evaluate(self, atoms):
        """As of Sound."""
        results = super().evaluate(atoms)
        if "stress" in results:
            results["stress"][3:] *= 0.5
        return results


class MissingImage(Sound):
    """The nearest image of each pair only."""

    def edges(self, atoms):
        """The pairs."""
        i, j, vectors, r = edges_of(atoms)
        order = np.lexsort((r, j, i))
        first = np.ones(len(order), dtype=bool)
        first[1:] = (i[order][1:] != i[order][:-1]) | (j[order][1:] != j[order][:-1])
        kept = order[first]
        kept = kept[i[kept] != j[kept]]
        return i[kept], j[kept], vectors[kept], r[kept]


class OddTerm(Sound):
    """A pseudoscalar of each atom's neighbours, as of a kernel that lost half of its parities."""

    def evaluate(self, atoms):
        """As of Sound."""
        results = super().evaluate(atoms)
        i, j, vectors, r = edges_of(atoms)
        i, j = torch.from_numpy(i), torch.from_numpy(j)
        edges = torch.tensor(vectors, requires_grad=True)
        r = edges.norm(dim=1, keepdim=True)
        w = (1 - (r / CUTOFF) ** 2).clamp(min=0) ** 3 * edges
        arms = [torch.zeros(len(atoms), 3, dtype=torch.float64).index_add(0, i, w * r**k) for k in (-1, 0, 2)]
        energy = 1e-2 * torch.linalg.det(torch.stack(arms, 1)).sum()
        (pull,) = torch.autograd.grad(energy, edges)
        forces = torch.zeros(len(atoms), 3, dtype=torch.float64).index_add(0, i, pull).index_add(0, j, -pull)
        results["energy"] += energy.item()
        results["forces"] = results["forces"] + forces.numpy()
        results.pop("stress", None)
        return results


class Float32Sums(Sound):
    """The energy is summed in float32."""

    def evaluate(self, atoms):
        """As of Sound."""
        results = super().evaluate(atoms)
        results["energy"] = float(np.float32(results["energy"]))
        return results


class StaleList(Sound):
    """A list of neighbours with a skin of 0.1 Å, which is kept until an atom has moved by 1 Å or there are others."""

    kept = None

    def edges(self, atoms):
        """The pairs."""
        if self.kept is None or self.kept[0] != len(atoms) or np.abs(self.kept[1] - atoms.cell.array).max() > 1e-9:
            i, j, shifts, _, _ = shifts_of(atoms, CUTOFF + 0.1)
            self.kept = (len(atoms), atoms.cell.array.copy(), i, j, shifts, atoms.positions.copy())
        elif np.abs(atoms.positions - self.kept[5]).max() > 1.0:
            self.kept = None
            return self.edges(atoms)
        _, _, i, j, shifts, _ = self.kept
        vectors = atoms.positions[j] - atoms.positions[i] + shifts @ atoms.cell.array
        r = np.linalg.norm(vectors, axis=1)
        return i, j, vectors, r


class History(Sound):
    """The energy depends on what was evaluated before, as of a normalisation by running means."""

    last = 0

    def evaluate(self, atoms):
        """As of Sound."""
        results = super().evaluate(atoms)
        results["energy"] += 1e-2 * self.last
        self.last = len(atoms)
        return results


class AtomOrder(Sound):
    """The first atom counts more."""

    def evaluate(self, atoms):
        """As of Sound."""
        results = super().evaluate(atoms)
        results["energy"] += 0.1 * float((results["forces"] ** 2).sum(axis=1) @ np.arange(len(atoms)))
        return results


class Origin(Sound):
    """Atoms are held at the origin."""

    def evaluate(self, atoms):
        """As of Sound."""
        results = super().evaluate(atoms)
        results["energy"] += 5e-4 * float((atoms.positions**2).sum())
        results["forces"] = results["forces"] - 1e-3 * atoms.positions
        return results


class CellVectors(Sound):
    """The energy depends on where the first cell vector points."""

    def evaluate(self, atoms):
        """As of Sound."""
        results = super().evaluate(atoms)
        if atoms.pbc.all():
            results["energy"] += 1e-2 * atoms.cell.array[0, 0] / np.linalg.norm(atoms.cell.array[0])
        return results


class SignedVolume(Sound):
    """Stress by the determinant, which is negative for left-handed cells."""

    def evaluate(self, atoms):
        """As of Sound."""
        results = super().evaluate(atoms)
        if "stress" in results:
            results["stress"] *= np.sign(np.linalg.det(atoms.cell.array))
        return results


class DirectForces(Sound):
    """Forces with a share that is no gradient."""

    def evaluate(self, atoms):
        """As of Sound."""
        results = super().evaluate(atoms)
        f = results["forces"]
        results["forces"] = f + 0.02 * np.roll(f, 1, axis=1)
        return results


class HardCutoff(Sound):
    """Pairs end at 3.3 Å, where they still attract."""

    def edges(self, atoms):
        """The pairs."""
        return edges_of(atoms, 3.3)


class IgnoredPbc(Sound):
    """A cell makes it periodic, whatever pbc says."""

    def edges(self, atoms):
        """The pairs."""
        copy = atoms.copy()
        copy.pbc = atoms.cell.rank == 3
        return edges_of(copy)


class ClippedShifts(Sound):
    """Images up to the next cell only: atoms must be wrapped."""

    def edges(self, atoms):
        """The pairs."""
        i, j, shifts, vectors, r = shifts_of(atoms)
        kept = (np.abs(shifts) <= 2).all(axis=1)
        return i[kept], j[kept], vectors[kept], r[kept]


class MeanField(Sound):
    """Each atom feels all others, wherever they are."""

    def evaluate(self, atoms):
        """As of Sound."""
        results = super().evaluate(atoms)
        far = results["forces"].copy()
        results["forces"] = far + 0.1 * np.abs(far).sum(axis=0)
        return results


class NotExtensive(Sound):
    """An energy that is normalised by the number of atoms."""

    def evaluate(self, atoms):
        """As of Sound."""
        results = super().evaluate(atoms)
        results["energy"] += 0.01 * np.log(len(atoms))
        return results


class LoneAtomIsZero(Sound):
    """Without neighbours, the energy of the atom is forgotten."""

    def evaluate(self, atoms):
        """As of Sound."""
        results = super().evaluate(atoms)
        if len(atoms) == 1:
            results["energy"] = 0.0
        return results


class LoneAtomIsNaN(Sound):
    """0/0 without neighbours."""

    def evaluate(self, atoms):
        """As of Sound."""
        results = super().evaluate(atoms)
        if len(atoms) == 1:
            results["forces"] = np.full((1, 3), np.nan)
        return results


# The rows of which at least one must fail.
FAULTS = {
    WrongTranspose: {"rotation", "gradient", "cell_orientation", "lattice_translation"},
    TransposedForces: {"gradient", "rotation"},
    DroppedVirial: {"stress"},
    MissingImage: {"extensivity"},
    OddTerm: {"inversion"},
    Float32Sums: {"repeatability"},
    StaleList: {"repeatability"},
    History: {"batch", "repeatability"},
    AtomOrder: {"permutation"},
    Origin: {"translation"},
    CellVectors: {"cell_orientation"},
    SignedVolume: {"cell_orientation", "inversion"},
    DirectForces: {"jacobian"},
    HardCutoff: {"smoothness"},
    IgnoredPbc: {"neighbors"},
    ClippedShifts: {"lattice_translation"},
    MeanField: {"locality"},
    NotExtensive: {"extensivity"},
    LoneAtomIsZero: {"far_dimer"},
    LoneAtomIsNaN: {"isolated_atom"},
}
