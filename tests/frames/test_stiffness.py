"""Forces in Hartree/Bohr are told from small forces by the bonds."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator

from equimd.frames import check_plausible
from equimd.frames.stiffness import LEAST, bond_stiffness


def springs(rest: Atoms, amplitude: float, k: float, n: int = 20, strain: float = 0.0) -> list[Atoms]:
    """Frames whose atoms are held where they are by springs of k eV/Å²."""
    rng = np.random.default_rng(0)
    frames = []
    for _ in range(n):
        atoms = rest.copy()
        if strain:
            atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain * rng.normal(size=(3, 3))), scale_atoms=True)
        shifts = amplitude * rng.normal(size=(len(atoms), 3))
        atoms.positions += shifts
        atoms.calc = SinglePointCalculator(atoms, energy=-5.0 * len(atoms), forces=-k * shifts)
        frames.append(atoms)
    return frames


METHANOL, INP = molecule("CH3OH"), bulk("InP", "zincblende", a=5.87, cubic=True)


@pytest.mark.parametrize(("rest", "amplitude", "k"), [(METHANOL, 0.05, 20.0), (INP, 0.1, 4.0)])
def test_forces_in_hartree_per_bohr(rest, amplitude, k):
    frames = springs(rest, amplitude, k)
    assert bond_stiffness(frames)[0] > LEAST
    assert check_plausible(frames) == []
    for atoms in frames:
        atoms.calc.results["forces"] /= 51.4
    assert bond_stiffness(frames)[0] < LEAST
    (message,) = check_plausible(frames)
    assert "is it in Hartree/Bohr (then" in message


@pytest.mark.parametrize("strain", [0.0, 0.03])
def test_small_forces_of_crystals_near_their_minimum(strain):
    frames = springs(INP, 0.003, 4.0, strain=strain)
    assert 0.005 < np.sqrt(np.mean([atoms.get_forces() ** 2 for atoms in frames])) < 0.04
    assert check_plausible(frames) == []


def test_no_bond_is_no_evidence():
    argon = bulk("Ar", cubic=True)
    assert bond_stiffness(springs(argon, 0.2, 0.1)) is None
    assert bond_stiffness(springs(METHANOL, 0.05, 20.0, n=2)) is None
    assert bond_stiffness([molecule("H2O")]) is None
