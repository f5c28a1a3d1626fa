"""Entries that look like labels and are not read as any."""

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from equimd.frames import LabelKeys
from equimd.frames.unclaimed import looks_like, unclaimed_labels


def frame(info=None, arrays=None, **results) -> Atoms:
    atoms = Atoms("H2", [[0, 0, 0], [0, 0, 0.74]], cell=[5.0] * 3, pbc=True, info=info or {})
    for name, values in (arrays or {}).items():
        atoms.new_array(name, values)
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def test_forces_under_another_name_are_counted():
    frames = [frame({}, {"pbe_forces": np.ones((2, 3))}, energy=-1.0) for _ in range(36)]
    frames += [frame(energy=-1.0) for _ in range(4)]
    message = "36 of 40 frames have an array 'pbe_forces' of the shape of forces that is not read, and no forces;"
    assert unclaimed_labels(iter(frames)) == [f"{message} name it with data.keys forces=pbe_forces"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"REF_enregy": -1.0}, "1 of 1 frames have an info entry 'REF_enregy' of the shape of an energy"),
        ({"Etot": -1.0}, "'Etot' of the shape of an energy"),
        ({"E_dft": -1.0}, "'E_dft' of the shape of an energy"),
        ({"castep_stress": np.ones(6)}, "data.keys stress=castep_stress"),
        ({"dftVirial": np.ones((3, 3))}, "data.keys virial=dftVirial"),
        ({"forces": [1.0] * 6}, "store forces as a column"),
    ],
)
def test_entries_of_the_comment_line_by_name_and_shape(entry, message):
    [said] = unclaimed_labels([frame(entry)])
    assert message in said


def test_a_gradient_is_not_offered_as_forces():
    [said] = unclaimed_labels([frame({}, {"scf_gradient": np.ones((2, 3))})])
    assert "negative gradient" in said
    assert "data.keys" not in said


def test_other_levels_beside_the_labels_share_one_line_unless_a_name_was_asked_for():
    both = frame({"pbe_energy": -2.0, "mp2_energy": -3.0}, {}, energy=-1.0)
    [said] = unclaimed_labels([both, frame(energy=-1.0)])
    assert said.startswith("1 of 2 frames have 'pbe_energy', 'mp2_energy' beside the energy that is read")
    assert unclaimed_labels([both], LabelKeys(energy="energy")) == []


@pytest.mark.parametrize(
    "entry",
    [
        {"config_energy_weight": 1.0},
        {"energy_cutoff": 520.0},
        {"kinetic_energy": 1.0},
        {"energy_per_atom": -1.0},
        {"force_field": "MMFF94"},
        {"force_tolerance": 0.01},
        {"fermi_energy": 3.0},
        {"e_above_hull": 0.1},
        {"smiles": "[H][H]", "charge": 0, "spin": 1, "step": 3, "time_fs": 1.5, "temperature_K": 300.0},
        {"ragged_energy": [[1.0], [1.0, 2.0]]},
    ],
)
def test_settings_and_parts_of_energies_are_no_labels(entry):
    assert unclaimed_labels([frame(entry)]) == []


def test_what_ase_keeps_for_each_atom_is_no_label_and_labels_in_info_are_read():
    atoms = Atoms("H2", [[0, 0, 0], [0, 0, 0.74]], momenta=np.ones((2, 3)), magmoms=np.ones((2, 3)))
    assert unclaimed_labels([atoms]) == []
    atoms.info["REF_energy"], atoms.arrays["dft_forces"] = -1.0, np.ones((2, 3))
    assert unclaimed_labels([atoms]) == []


def test_a_stress_of_a_molecule_is_nothing_to_read():
    atoms = frame({"castep_stress": np.ones(6)})
    atoms.pbc = False
    assert unclaimed_labels([atoms]) == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [("MACE_forces", "forces"), ("pbe-d3.energy", "energy"), ("froces", "forces"), ("name", None), ("species", None)],
)
def test_names(name, kind):
    assert looks_like(name) == kind
