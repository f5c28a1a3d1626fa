import os

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from scipy.spatial.transform import Rotation

import equimd.references as references
from equimd.analysis.inputs import LabelSource, reference_labels
from equimd.errors import InputError
from equimd.references import (
    METHODS,
    LabelWarning,
    isolated_atom_energies,
    label,
    label_where_possible,
    reference_calculator,
)

pytest.importorskip("tblite")


def _ethanol(seed: int = 0) -> Atoms:
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=seed)
    return atoms


def _ice() -> Atoms:
    """Two water molecules in a small triclinic cell."""
    water = molecule("H2O")
    other = water.copy()
    other.rotate(70.0, (1.0, 2.0, 0.5))
    other.translate((0.3, 2.4, 2.1))
    atoms = water + other
    atoms.set_cell([[4.4, 0.0, 0.0], [0.6, 4.6, 0.0], [-0.4, 0.3, 4.9]])
    atoms.pbc = True
    return atoms


@pytest.mark.parametrize("name", METHODS)
def test_forces_are_minus_the_gradient_of_the_energy(name):
    atoms = _ethanol()
    atoms.calc = reference_calculator(name)
    forces = atoms.get_forces()
    step = 1e-3
    for atom, axis in ((0, 0), (2, 1), (3, 2)):
        energies = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions[atom, axis] += sign * step
            moved.calc = reference_calculator(name)
            energies.append(moved.get_potential_energy())
        # central differences: h²/6 times a third derivative of about 1e3 eV/Å³, 2e-4 eV/Å
        assert -(energies[0] - energies[1]) / (2 * step) == pytest.approx(forces[atom, axis], abs=5e-4)


def test_stress_is_the_strain_derivative_of_the_energy_with_tension_positive():
    atoms = label([_ice()], "gfn1-xtb")[0]
    stress = atoms.get_stress(voigt=False)
    step = 1e-3
    for a, b in ((0, 0), (2, 2), (0, 1), (1, 2)):
        energies = []
        for sign in (1, -1):
            strain = np.eye(3)
            strain[a, b] += sign * step / 2
            strain[b, a] += sign * step / 2
            strained = atoms.copy()
            strained.set_cell(atoms.cell.array @ strain, scale_atoms=True)
            energies.append(label([strained], "gfn1-xtb")[0].get_potential_energy())
        numerical = (energies[0] - energies[1]) / (2 * step) / atoms.get_volume()
        # differences of 1e-7 eV between self-consistent energies over 2e-3 and 100 Å³ are 5e-7; truncation dominates
        assert numerical == pytest.approx(stress[a, b], abs=2e-5)
    assert np.abs(stress).max() > 1e-3


@pytest.mark.parametrize("improper", [False, True])
def test_gfn2_is_equivariant(improper):
    atoms = _ethanol()
    rotation = Rotation.random(random_state=1).as_matrix() * (-1 if improper else 1)
    turned = atoms.copy()
    turned.positions = atoms.positions @ rotation.T
    first, second = label([atoms, turned], "gfn2-xtb")
    forces = first.get_forces()
    scale = np.sqrt(np.mean(forces**2))
    # rounding only: both self-consistent cycles take the same steps
    assert np.abs(second.get_forces() @ rotation - forces).max() < 1e-10 * scale
    assert np.abs(second.get_forces() - forces).max() > 0.1 * scale
    energy = first.get_potential_energy() - sum(
        isolated_atom_energies("gfn2-xtb", atoms.numbers)[number] for number in atoms.numbers
    )
    assert abs(second.get_potential_energy() - first.get_potential_energy()) < 1e-10 * abs(energy)


def test_label_keeps_order_and_structure_and_leaves_its_input_alone():
    frames = [_ethanol(seed) for seed in range(3)]
    frames[1].info["name"] = "second"
    done = []
    labelled = label(iter(frames), "gfn2-xtb", progress=done.append)
    assert done == [1, 2, 3]
    assert labelled[1].info["name"] == "second"
    for frame, result in zip(frames, labelled, strict=True):
        assert frame.calc is None
        np.testing.assert_array_equal(result.positions, frame.positions)
        assert set(result.calc.results) == {"energy", "forces"}
    assert len({result.get_potential_energy() for result in labelled}) == 3


def test_label_in_several_processes_gives_the_same_labels():
    frames = [_ethanol(seed) for seed in range(3)]
    one, two = label(frames, "gfn2-xtb"), label(frames, "gfn2-xtb", processes=2)
    for first, second in zip(one, two, strict=True):
        # threads sum in another order than one thread does
        np.testing.assert_allclose(second.get_forces(), first.get_forces(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("processes", [1, 2])
def test_frames_that_fail_are_left_out_by_name(processes):
    frames = [_ethanol(0), Atoms([102], positions=[(0, 0, 0)]), _ethanol(1)]
    with pytest.warns(LabelWarning, match=r"gfn2-xtb fails on 1 of 3 frames, .*\(frame 1: .*No support for elements"):
        labelled = label(frames, "gfn2-xtb", processes=processes)
    assert [len(atoms) for atoms in labelled] == [9, 9]
    assert labelled[1].get_potential_energy() == pytest.approx(label(frames[2:], "gfn2-xtb")[0].get_potential_energy())


def test_a_cycle_that_does_not_converge_costs_its_frame_alone():
    apart = molecule("H2O")
    apart.positions *= 12.0  # three atoms that share electrons at 11 Å
    with pytest.warns(LabelWarning, match=r"frame 0: .*SCF not converged"):
        labelled, failed = label_where_possible([apart, molecule("H2O")], "gfn2-xtb")
    assert [atoms.calc is None for atoms in labelled] == [True, False]
    assert list(failed) == [0]


def test_labels_that_are_not_finite_are_none(monkeypatch):
    class NotFinite:
        """A calculator whose forces are NaN."""

        def calculate(self, atoms, properties):
            """Set results."""
            self.results = {"energy": 0.0, "forces": np.full((len(atoms), 3), np.nan)}

    monkeypatch.setattr(references, "reference_calculator", lambda name: NotFinite())
    with pytest.raises(InputError, match=r"gfn2-xtb fails on all 2 frames \(frame 0: values of forces are not finite"):
        label([_ethanol(), _ethanol()], "gfn2-xtb")


def test_an_analysis_goes_on_without_the_labels_of_a_frame(monkeypatch):
    original = references._single_point
    monkeypatch.setattr(
        references, "_single_point", lambda atoms, name: "no" if len(atoms) == 3 else original(atoms, name)
    )
    with pytest.warns(LabelWarning):
        labels = reference_labels([molecule("H2O"), _ethanol()], None, LabelSource("gfn2-xtb"))
    assert labels[0] == (None, None, None)
    assert labels[1].forces is not None


def test_periodic_frames_have_a_stress():
    assert label([_ice()], "gfn1-xtb")[0].get_stress().shape == (6,)


def test_label_of_nothing_is_nothing():
    assert label([], "gfn2-xtb", processes=2) == []


def test_isolated_atoms_are_in_their_ground_state():
    energies = isolated_atom_energies("gfn2-xtb", [8, 1, 1, 6, 7])
    assert list(energies) == [1, 6, 7, 8]
    for number, multiplicity in {1: 2, 6: 3, 7: 4, 8: 3}.items():
        atom = Atoms(numbers=[number], positions=[(0, 0, 0)])
        atom.calc = reference_calculator("gfn2-xtb", multiplicity=multiplicity)
        assert energies[number] == atom.get_potential_energy()
    # atomisation energy of ethanol, 33.5 eV from heats of formation; GFN2 overbinds, but not by half
    atoms = molecule("CH3CH2OH")
    atoms.calc = reference_calculator("gfn2-xtb")
    bound = sum(energies[number] for number in atoms.numbers) - atoms.get_potential_energy()
    assert 30 < bound < 50


def test_charge_changes_the_energy():
    atoms = molecule("H2O")
    atoms.calc = reference_calculator("gfn2-xtb")
    neutral = atoms.get_potential_energy()
    atoms.calc = reference_calculator("gfn2-xtb", charge=1, multiplicity=2)
    assert atoms.get_potential_energy() - neutral > 5


def test_threads_of_the_caller_are_left_as_they_were(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    reference_calculator("gfn2-xtb")
    assert os.environ["OMP_NUM_THREADS"] == "3"
    monkeypatch.delenv("OMP_NUM_THREADS")
    reference_calculator("gfn2-xtb")
    assert "OMP_NUM_THREADS" not in os.environ


@pytest.mark.parametrize(
    "call",
    [
        lambda: reference_calculator("gfn3-xtb"),
        lambda: label([], "gfn3-xtb"),
        lambda: isolated_atom_energies("gfn3-xtb", [1]),
    ],
)
def test_an_unknown_name_is_refused_with_the_accepted_ones(call):
    with pytest.raises(ValueError, match="'gfn3-xtb'.*gfn1-xtb, gfn2-xtb"):
        call()


def test_other_bad_input_is_refused():
    with pytest.raises(ValueError, match="processes is 0"):
        label([_ethanol()], "gfn2-xtb", processes=0)
    with pytest.raises(ValueError, match="multiplicity is 0"):
        reference_calculator("gfn2-xtb", multiplicity=0)
    with pytest.raises(ValueError, match="atomic number 92; accepted: H, He"):
        isolated_atom_energies("gfn2-xtb", [92])
