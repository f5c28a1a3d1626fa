"""Constraints hold in every ensemble that accepts them, and temperatures count the degrees of freedom that are left."""

import numpy as np
import pytest
from ase.build import molecule
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms, FixBondLengths, FixCartesian, FixInternals, FixSymmetry, Hookean
from test_run import Springs, copper, settings

from equimd.errors import InputError
from equimd.frames import labels_of, read_list
from equimd.md import iterate_md, run_md
from equimd.units import KB_EV_PER_K

SEVERAL = [FixAtoms([0, 1, 2]), FixAtoms([2]), FixCartesian([2, 3], (True, False, True))]  # 3 · 3 + 2 components


def mean_temperature(constraints, calculator, n_free: int, **changes) -> float:
    """From the kinetic energies of a run, by hand; and the run's own temperature must agree."""
    atoms = copper()
    atoms.set_constraint(constraints)
    chosen = settings(steps=2500, timestep_fs=4.0, friction_per_fs=0.02, stride=10, temperature_K=500, **changes)
    kinetic = [frame.get_kinetic_energy() for _, frame in iterate_md(atoms, calculator, chosen)][40:]
    return 2 * np.mean(kinetic) / (n_free * KB_EV_PER_K)


@pytest.mark.parametrize(("constraints", "n_free"), [(FixAtoms([0, 1, 2, 3]), 12), (SEVERAL, 13)])
def test_langevin_heats_what_is_free_to_the_temperature(constraints, n_free):
    # 12 degrees of freedom spread by 41 %; 210 frames, each about one relaxation time after the last: 2.8 %
    assert mean_temperature(constraints, Springs(), n_free) == pytest.approx(500, rel=0.09)


def test_the_temperature_of_the_file_counts_what_is_free(tmp_path):
    atoms = copper()
    atoms.set_constraint(SEVERAL)
    result = run_md(atoms, Springs(), settings(stride=1), tmp_path / "a.xyz")
    frames = read_list(tmp_path / "a.xyz")
    by_hand = [2 * frame.get_kinetic_energy() / (13 * KB_EV_PER_K) for frame in frames]
    np.testing.assert_allclose([frame.info["temperature_K"] for frame in frames], by_hand, rtol=1e-4)  # 8 decimals
    assert result.mean_temperature_K == pytest.approx(np.mean(by_hand), rel=1e-4)


def test_nve_leaves_the_drift_of_the_whole_out_of_the_temperature(tmp_path):
    """As a run that goes on from the last frame of a thermostat has it, which moves the centre of mass."""
    atoms = copper()
    given = np.random.default_rng(1).normal(size=(8, 3))
    given -= given.mean(axis=0)
    atoms.set_momenta(given)
    first = run_md(atoms, EMT(), settings("nve", steps=0), tmp_path / "rest.h5").mean_temperature_K
    atoms.set_momenta(given + 2.0)
    assert run_md(atoms, EMT(), settings("nve", steps=0), tmp_path / "moving.h5").mean_temperature_K == pytest.approx(
        first
    )
    by_hand = 2 * atoms.get_kinetic_energy() / (24 * KB_EV_PER_K)
    assert run_md(atoms, EMT(), settings("nvt", steps=0), tmp_path / "nvt.h5").mean_temperature_K == pytest.approx(
        by_hand
    )
    assert by_hand > 2 * first


@pytest.mark.parametrize("ensemble", ["nve", "nvt"])
def test_fixed_atoms_and_directions_stay_where_they_are(tmp_path, ensemble):
    atoms = copper()
    atoms.set_momenta(np.ones((8, 3)))  # also of the fixed ones, as a trajectory of another program may have it
    atoms.set_constraint(SEVERAL)
    run_md(atoms, EMT(), settings(ensemble), tmp_path / "a.h5")
    for frame in read_list(tmp_path / "a.h5"):
        moved = frame.positions - atoms.positions
        assert not moved[:3].any()
        assert not moved[3, [0, 2]].any()
        assert not frame.get_momenta()[:3].any()
    assert np.abs(moved[3:, 1]).min() > 1e-5


@pytest.mark.parametrize("ensemble", ["nve", "nvt"])
def test_bond_lengths_stay(ensemble):
    water = molecule("H2O")
    water.set_constraint(FixBondLengths([(0, 1), (0, 2), (1, 2)]))
    before = water.get_all_distances()
    for _, frame in iterate_md(water, Springs(), settings(ensemble, timestep_fs=1.0)):
        np.testing.assert_allclose(frame.get_all_distances(), before, atol=1e-6)  # of ASE's iteration


def test_frames_keep_what_holds_and_labels_are_the_calculators_own():
    atoms = copper()
    atoms.set_constraint([FixAtoms([0]), Hookean(4, 5, rt=0.1, k=3.0)])
    _, frame = list(iterate_md(atoms, EMT(), settings("nve", steps=9)))[-1]
    assert [type(c).__name__ for c in frame.constraints] == ["FixAtoms", "Hookean"]
    bare = frame.copy()
    bare.set_constraint()
    bare.calc = EMT()
    # rounding: the list of neighbours is in another order; the spring adds 9 eV and 8 eV/Å
    assert labels_of(frame)["energy"] == pytest.approx(bare.get_potential_energy(), abs=1e-10)
    np.testing.assert_allclose(labels_of(frame)["forces"], bare.get_forces(), atol=1e-10)


@pytest.mark.parametrize(
    ("ensemble", "constraint", "says"),
    [
        ("npt", lambda a: FixAtoms([0]), "constraint FixAtoms, but npt moves all atoms with the cell"),
        ("nvt", lambda a: FixSymmetry(a), "constraint FixSymmetry, which MD cannot keep"),
        ("nvt", lambda a: FixInternals(bonds=[[2.5, [0, 1]]]), "constraint FixInternals, which MD cannot keep"),
        ("nve", lambda a: FixAtoms(range(8)), "leave no atom free"),
    ],
)
def test_constraints_that_would_not_hold_are_refused(tmp_path, ensemble, constraint, says):
    pytest.importorskip("spglib") if "Symmetry" in says else None
    atoms = copper()
    atoms.set_constraint(constraint(atoms))
    with pytest.raises(InputError, match=says):
        run_md(atoms, EMT(), settings(ensemble), tmp_path / "a.h5")
    assert not list(tmp_path.iterdir())
