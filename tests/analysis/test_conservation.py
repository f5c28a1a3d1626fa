import numpy as np
import pytest
from ase import units
from ase.build import molecule
from ase.calculators.calculator import Calculator
from ase.calculators.lj import LennardJones
from ase.calculators.singlepoint import SinglePointCalculator
from ase.md.verlet import VelocityVerlet

from equimd.analysis.conservation import jacobian_asymmetry, net_torque, nve_drift, nve_drift_of_frames
from equimd.calculators.forcefield import as_force_field
from equimd.errors import InputError
from equimd.testing import AnisotropicMock


def set_temperature(atoms, kelvin, rng):
    width = np.sqrt(atoms.get_masses() * units.kB * kelvin)
    atoms.set_momenta(width[:, None] * rng.normal(size=(len(atoms), 3)))


def lennard_jones():
    return LennardJones(sigma=1.0, epsilon=0.05, rc=12.0)


def ethanol():
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=0)
    return atoms


class Swirl(Calculator):
    """Forces that are no gradient: Lennard-Jones plus a rotation about z."""

    implemented_properties = ("energy", "forces")

    def calculate(self, atoms=None, properties=("energy",), system_changes=()):
        super().calculate(atoms, properties, system_changes)
        base = as_force_field(lennard_jones()).evaluate([self.atoms])
        swirl = np.cross([0.0, 0.0, 20.0], self.atoms.positions)
        self.results = {"energy": base.energies[0], "forces": base.forces[0] + swirl}


def test_units_of_the_drift():
    times = np.arange(0, 10_000, 10.0)  # fs
    energies = -5.0 + 9 * 1e-3 * times / 1000  # 9 atoms gain 9 meV per ps: 1 meV/atom/ps
    result = nve_drift(times, energies, n_atoms=9, kinetic_energies=np.sin(times))
    assert result.drift_mev_per_atom_per_ps == pytest.approx(1.0)
    assert result.stderr < 1e-9
    assert result.duration_ps == pytest.approx(9.99)
    assert result.relative_to_kinetic == pytest.approx(9e-3 * 9.99 / np.std(np.sin(times)))


def test_error_bar_covers_correlated_noise_without_drift():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(50):
        x = rng.normal(size=1_000)
        for t in range(1, len(x)):
            x[t] = 0.9 * x[t - 1] + 0.44 * x[t]
        result = nve_drift(np.arange(1_000.0), x, 9)
        inside += abs(result.drift_mev_per_atom_per_ps) < 2 * result.stderr
    # 95 % expected with a perfect error bar, 30 % with one that ignores the correlation.
    assert inside >= 38


def test_drift_of_lennard_jones_dynamics_is_zero_within_its_error():
    atoms = ethanol()
    atoms.positions *= 1.1
    set_temperature(atoms, 100, np.random.default_rng(0))
    atoms.calc = lennard_jones()
    frames = []

    def keep():
        copy = atoms.copy()
        copy.calc = SinglePointCalculator(copy, energy=atoms.get_potential_energy())
        frames.append(copy)

    dynamics = VelocityVerlet(atoms, timestep=0.25 * units.fs)
    dynamics.attach(keep, interval=4)
    dynamics.run(600)
    result = nve_drift_of_frames(frames, interval_fs=1.0)
    assert abs(result.drift_mev_per_atom_per_ps) < 4 * result.stderr + 0.05
    assert result.duration_ps == pytest.approx(0.15)
    assert result.relative_to_kinetic < 0.5


def test_jacobian_of_a_gradient_is_symmetric_and_of_a_swirl_is_not():
    assert jacobian_asymmetry(lennard_jones(), ethanol()) < 1e-4
    assert jacobian_asymmetry(AnisotropicMock(), ethanol()) < 1e-4
    assert jacobian_asymmetry(Swirl(), ethanol()) > 1e-2
    assert jacobian_asymmetry(Swirl(), ethanol(), max_atoms=2) > 1e-3


def test_torque_of_an_invariant_energy_is_zero_and_of_the_mock_is_not():
    atoms = ethanol()
    for calculator, low, high in ((lennard_jones(), 0.0, 1e-12), (AnisotropicMock(), 1e-4, 10.0)):
        forces = as_force_field(calculator).evaluate([atoms]).forces[0]
        assert low <= np.linalg.norm(net_torque(atoms.positions, forces)) <= high


def test_bad_series_are_refused():
    with pytest.raises(InputError, match="not finite; the run has exploded"):
        nve_drift(np.arange(4), [0.0, 1.0, np.nan, 2.0], 3)
    with pytest.raises(InputError, match="n_atoms is 0"):
        nve_drift(np.arange(4), np.arange(4), 0)
    with pytest.raises(InputError, match="frame 0 has no energy"):
        nve_drift_of_frames([ethanol()] * 4, 1.0)
