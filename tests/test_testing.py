from typing import ClassVar

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones

from equimd.errors import InputError
from equimd.models.potential import Potential, PotentialSettings
from equimd.testing import AnisotropicMock, check_calculator, check_potential


def ethanol():
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=0)
    return atoms


# --- the mock (its closed form is tested where it is used, in analysis) ----------------------------------------------


def test_each_degree_contributes_by_itself():
    atoms, full = ethanol(), AnisotropicMock().spread_by_degree(ethanol())
    for degree, coefficients in ((1, (2e-3, 0, 0)), (2, (0, 1e-3, 0)), (3, (0, 0, 5e-4))):
        only = AnisotropicMock(coefficients)
        np.testing.assert_allclose(only.spread(atoms), full[degree], atol=1e-18)
        assert set(only.spectrum(atoms)) == {(1, -1), (2, 1), (3, -1)}
    with pytest.raises(InputError, match="coefficients has 2 values"):
        AnisotropicMock((1.0, 2.0))


def test_mock_refuses_periodic_structures():
    crystal = bulk("Cu")
    crystal.calc = AnisotropicMock()
    with pytest.raises(InputError, match="accepted are molecules"):
        crystal.get_forces()


# --- calculators -----------------------------------------------------------------------------------------------------


def test_sound_calculators_pass():
    check_calculator(AnisotropicMock(), ethanol())
    check_calculator(LennardJones(sigma=1.0, epsilon=0.05, rc=12.0), ethanol())
    crystal = bulk("Cu", cubic=True)
    crystal.rattle(0.1, seed=0)
    check_calculator(EMT(), crystal)


class Broken(Calculator):
    """A harmonic molecule with one fault."""

    implemented_properties: ClassVar = ["energy", "forces"]

    def __init__(self, fault):
        super().__init__()
        self.fault = fault

    def calculate(self, atoms=None, properties=("energy",), system_changes=tuple(all_changes)):
        super().calculate(atoms, properties, system_changes)
        fault, structure = self.fault, self.atoms
        r = structure.positions.copy()
        origin = 0.0 if fault == "translation" else r.mean(0)
        z = np.arange(len(r))[:, None] if fault == "permutation" else structure.numbers[:, None]
        d = r - origin
        energy, forces = 0.5 * float((z * d * d).sum()), -z * d + (0.0 if fault == "translation" else (z * d).mean(0))
        if fault == "gradient":
            forces = 1.02 * forces
        if fault == "shape":
            forces = forces.ravel()
        if fault == "finite":
            forces = forces * np.nan
        if fault == "alone":
            forces = forces + (len(r) == 1)
        if fault == "type":
            energy = np.array([energy])
        self.results = {"energy": energy, "forces": forces}
        if fault == "key":
            self.results["bond-orders"] = 1.0
        if fault == "mutation" and atoms is not None:
            atoms.info["touched"] = True


class Stale(Broken):
    def get_property(self, name, atoms=None, allow_calculation=True):
        if name in self.results and len(self.results["forces"]) == len(atoms):
            return self.results[name]
        return super().get_property(name, atoms, allow_calculation)


@pytest.mark.parametrize(
    ("calculator", "message"),
    [
        (Broken("gradient"), "minus the gradient of the energy"),
        (Broken("shape"), "shape"),
        (Broken("finite"), "not finite"),
        (Broken("alone"), "forces on one atom alone"),
        (Broken("type"), "energy is a ndarray, expected a float"),
        (Broken("key"), "keys that ASE does not know: \\['bond-orders'\\]"),
        (Broken("translation"), "forces after a translation"),
        (Broken("permutation"), "forces after a permutation"),
        (Stale(None), "changed the cached ones|results do not follow positions"),
    ],
)
def test_each_fault_is_named(calculator, message):
    with pytest.raises((AssertionError, ValueError), match=message):
        check_calculator(calculator, molecule("H2O"))


def test_the_same_without_a_fault_passes():
    check_calculator(Broken(None), molecule("H2O"))


# --- potentials ------------------------------------------------------------------------------------------------------


class Pair(Potential):
    """A smooth pair potential with one fault."""

    family = "pair"

    def __init__(self, fault=None):
        super().__init__(PotentialSettings(cutoff=4.0, zbl=False), (1, 8), {1: -10.0, 8: -70.0})
        self.fault = fault

    def network(self, graph, vectors):
        i, j = graph.edge_index
        r2 = (vectors**2).sum(-1)
        value = torch.where(r2 < self.cutoff**2, (1 - r2 / self.cutoff**2).clamp(min=0) ** 4, 0.0)
        value = value * graph.atomic_numbers[i] * graph.atomic_numbers[j] / 64
        if self.fault == "batch":
            value = value * graph.n_systems
        if self.fault == "permutation":
            first = torch.stack([(graph.batch == s).nonzero()[0, 0] for s in range(graph.n_systems)])
            value = value * (1 + 0.01 * (i - first[graph.batch[i]]))
        if self.fault == "translation":
            value = value * (1 + 0.01 * graph.edge_shifts.abs().sum(-1))
        if self.fault == "mutation":
            graph.positions += 1e-3
        return torch.zeros(graph.n_atoms, dtype=value.dtype).index_add(0, i, value)

    def forward(self, graph, *, stress=False, create_graph=False):
        got = super().forward(graph, stress=stress, create_graph=create_graph)
        if self.fault == "gradient":
            return got._replace(forces=1.01 * got.forces)
        if self.fault == "stress":
            return got._replace(stress=-got.stress if got.stress is not None else None)
        if self.fault == "alone" and graph.n_atoms == 1:
            return got._replace(forces=got.forces + float("nan"))
        if self.fault == "shape":
            return got._replace(energy=got.energy.sum())
        return got


def test_a_sound_potential_passes_and_is_not_touched():
    potential = Pair()
    check_potential(potential)
    assert potential.dtype == torch.float32


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("batch", "in a batch and alone"),
        ("permutation", "after a permutation"),
        ("translation", "after moving one atom by lattice vector"),
        ("mutation", "changed positions of its graph"),
        ("gradient", "forces and the numerical derivative"),
        ("stress", "stress and the numerical derivative"),
        ("alone", "not finite"),
        ("shape", "have shapes"),
    ],
)
def test_each_fault_of_a_potential_is_named(fault, message):
    with pytest.raises(AssertionError, match=message):
        check_potential(Pair(fault))
