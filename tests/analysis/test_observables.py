import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule

from equimd.analysis.observables import (
    bond_length_distribution,
    bond_lengths,
    bonds_of,
    radial_distribution,
    temperature,
)
from equimd.analysis.stability import bond_stability
from equimd.errors import InputError


def set_temperature(atoms, kelvin, rng):
    width = np.sqrt(atoms.get_masses() * units.kB * kelvin)
    atoms.set_momenta(width[:, None] * rng.normal(size=(len(atoms), 3)))


def test_bonds_of_ethanol_and_across_a_cell():
    bonds = bonds_of(molecule("CH3CH2OH"))
    assert len(bonds) == 8
    water = molecule("H2O", cell=[6, 6, 6], pbc=True)
    water.positions += [0.0, 0.0, 5.8]
    before = bond_lengths([water], bonds_of(water))
    water.wrap()
    assert len(bonds_of(water)) == 2
    np.testing.assert_allclose(bond_lengths([water], bonds_of(water)), before)


def test_stability_finds_the_first_broken_bond():
    frames = [molecule("CH3CH2OH") for _ in range(10)]
    bond = bonds_of(frames[0])[3]
    for k in range(6, 10):
        frames[k].set_distance(bond[0], bond[1], frames[0].get_distance(*bond) + 0.6, fix=0)
    result = bond_stability(frames, interval_fs=100.0)
    assert not result.stable
    assert result.first_broken_ps == pytest.approx(0.6)
    assert result.largest_deviation >= 0.6 - 1e-9
    calm = bond_stability(frames[:6], interval_fs=100.0)
    assert calm.stable
    assert calm.first_broken_ps is None
    assert calm.n_bonds == 8
    assert bond_stability(frames, 100.0, tolerance=2.0).stable
    with pytest.raises(InputError, match="expected the same atoms"):
        bond_stability(frames, 100.0, reference=molecule("H2O"))


def test_radial_distribution_of_an_ideal_gas_is_one():
    rng = np.random.default_rng(0)
    frames = [Atoms("Ar200", positions=rng.uniform(0, 14, (200, 3)), cell=[14] * 3, pbc=True) for _ in range(10)]
    rdf = radial_distribution(frames, r_max=6.0, n_bins=12)
    g, error = np.array(rdf.density)[4:], np.array(rdf.stderr)[4:]
    assert (np.abs(g - 1) < 5 * error + 0.01).all()
    assert (error < 0.1).all()


def test_radial_distribution_counts_neighbours():
    copper = bulk("Cu", cubic=True) * (2, 2, 2)
    rdf = radial_distribution(copper, r_max=3.0, n_bins=30, pair=("Cu", "Cu"))
    edges = np.array(rdf.edges)
    shells = 4 / 3 * np.pi * np.diff(edges**3)
    n = len(copper)
    neighbours = np.sum(np.array(rdf.density) * shells) * (n - 1) / copper.get_volume()
    assert neighbours == pytest.approx(12.0)
    with pytest.raises(InputError, match="no pair"):
        radial_distribution(copper, pair=("Cu", "O"))
    with pytest.raises(InputError, match="fully periodic"):
        radial_distribution(molecule("H2O"))


def test_bond_length_distribution_is_normalised():
    frames = []
    for seed in range(20):
        frames.append(molecule("CH3CH2OH"))
        frames[-1].rattle(0.02, seed=seed)
    result = bond_length_distribution(frames, bonds_of(frames[0]))
    assert np.sum(np.array(result.density) * np.diff(result.edges)) == pytest.approx(1.0)


def test_temperature():
    standard, frames = molecule("CH3CH2OH"), []
    for seed in range(500):
        frames.append(standard.copy())
        set_temperature(frames[-1], 300, np.random.default_rng(seed))
    value, error = temperature(frames)
    assert abs(value - 300) < 4 * error
    assert error == pytest.approx(300 * np.sqrt(2 / 27 / 500), rel=0.3)
    assert temperature(frames, n_fixed=3).value == pytest.approx(value * 27 / 24)
    with pytest.raises(InputError, match="no momenta"):
        temperature([molecule("H2O")])
