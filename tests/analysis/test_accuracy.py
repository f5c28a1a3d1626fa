import json

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.calculators.singlepoint import SinglePointCalculator

from equimd.analysis.accuracy import AccuracyResult, evaluate_accuracy
from equimd.calculators.forcefield import as_force_field
from equimd.errors import InputError


def frame(name="CH3CH2OH", energy=None, force=None, seed=0):
    """A molecule whose labels are Lennard-Jones minus a known error."""
    atoms = molecule(name)
    atoms.rattle(0.05, seed=seed)
    exact = as_force_field(lennard_jones()).evaluate([atoms])
    labels = {}
    if energy is not None:
        labels["energy"] = exact.energies[0] - energy
    if force is not None:
        labels["forces"] = exact.forces[0] - force
    atoms.calc = SinglePointCalculator(atoms, **labels)
    return atoms


def lennard_jones():
    return LennardJones(sigma=1.0, epsilon=0.05, rc=12.0)


def test_known_errors_are_recovered():
    frames = [frame(energy=0.9, force=0.1), frame("H2O", energy=-0.6, force=-0.3)]
    result = evaluate_accuracy(lennard_jones(), frames)
    assert result.energy.mae == pytest.approx(0.75)
    assert result.energy.rmse == pytest.approx(np.sqrt((0.81 + 0.36) / 2))
    assert result.energy_per_atom.mae == pytest.approx((0.1 + 0.2) / 2)
    assert result.energy_shift_per_atom == pytest.approx((0.1 - 0.2) / 2)
    # Pooled over atoms: 9 with 0.1 and 3 with 0.3.
    assert result.force.mae == pytest.approx((9 * 0.1 + 3 * 0.3) / 12)
    assert result.force.rmse == pytest.approx(np.sqrt((9 * 0.01 + 3 * 0.09) / 12))
    assert result.force_per_element["C"].mae == pytest.approx(0.1)
    assert result.force_per_element["O"].mae == pytest.approx(0.2)
    assert result.stress is None


def test_missing_labels_are_left_out():
    frames = [frame(energy=0.9), frame(force=0.1), molecule("H2O")]
    result = evaluate_accuracy(lennard_jones(), frames, batch_size=2)
    assert (result.n_frames, result.n_energies, result.n_forces) == (3, 1, 1)
    assert result.energy.mae == pytest.approx(0.9)
    assert result.force.mae == pytest.approx(0.1)
    only_forces = evaluate_accuracy(lennard_jones(), [frame(force=0.1)])
    assert only_forces.energy is None
    assert np.isnan(only_forces.energy_shift_per_atom)
    assert json.loads(only_forces.to_json())["energy_shift_per_atom"] is None


def test_no_labels_at_all_are_refused():
    nan = molecule("H2O")
    nan.calc = SinglePointCalculator(nan, energy=float("nan"), forces=np.full((3, 3), np.nan))
    for atoms in (molecule("H2O"), nan):
        with pytest.raises(InputError, match="none of 1 frames has labels"):
            evaluate_accuracy(lennard_jones(), [atoms])


def test_stale_labels_and_live_calculators_are_no_labels():
    moved, live = frame(energy=0.1, force=0.1), molecule("H2O")
    moved.positions[0] += 0.1
    live.calc = lennard_jones()
    live.get_forces()
    for atoms in (moved, live):
        with pytest.raises(InputError, match="none of 1 frames has labels"):
            evaluate_accuracy(lennard_jones(), [atoms])


def test_stress_and_a_reference_calculator():
    crystal = bulk("Cu", cubic=True)
    crystal.rattle(0.1, seed=0)
    exact = as_force_field(EMT()).evaluate([crystal])
    same = evaluate_accuracy(EMT(), crystal, reference=EMT())
    assert same.stress.mae == 0.0
    crystal.calc = SinglePointCalculator(crystal, stress=exact.stresses[0] - 0.01)
    result = evaluate_accuracy(EMT(), [crystal])
    assert result.stress.rmse == pytest.approx(0.01)
    assert result.n_stresses == 1
    assert result.force is None


def test_stress_is_given_in_gpa_too():
    crystal = bulk("Cu", cubic=True)
    stress = as_force_field(EMT()).evaluate([crystal]).stresses[0]
    crystal.calc = SinglePointCalculator(crystal, stress=stress - 0.01)
    result = evaluate_accuracy(EMT(), [crystal])
    assert result.stress_gpa.mae == pytest.approx(1.6021766, rel=1e-6)  # 1 eV/Å³ is 160.2 GPa


def grouped(*names, key="config_type"):
    frames = [frame(energy=0.9 * (k + 1), force=0.1 * (k + 1)) for k in range(len(names))]
    for atoms, name in zip(frames, names, strict=True):
        if name is not None:
            atoms.info[key] = name
    return frames


def test_errors_by_group_with_counts():
    frames = [*grouped("bulk", "slab", "bulk", None), frame(force=0.7), molecule("H2O")]
    frames[4].info["Config_Type"] = "slab"  # in any case
    frames[5].info["config_type"] = "bulk"  # without labels
    result = evaluate_accuracy(lennard_jones(), frames)
    assert result.group_key == "config_type"
    assert list(result.by_group) == ["", "bulk", "slab"]
    bulk_frames, slab = result.by_group["bulk"], result.by_group["slab"]
    assert (bulk_frames.n_frames, bulk_frames.n_energies, bulk_frames.n_forces) == (3, 2, 2)
    assert bulk_frames.force.mae == pytest.approx((0.1 + 0.3) / 2)
    assert bulk_frames.force.rmse == pytest.approx(np.sqrt((0.01 + 0.09) / 2))
    assert bulk_frames.energy_per_atom.mae == pytest.approx((0.1 + 0.3) / 2)
    assert (slab.n_energies, slab.n_forces) == (1, 2)
    assert slab.force.mae == pytest.approx((0.2 + 0.7) / 2)
    assert result.by_group[""].force.mae == pytest.approx(0.4)
    assert AccuracyResult.model_validate_json(result.to_json()) == result


def test_names_that_number_the_frames_group_nothing():
    assert evaluate_accuracy(lennard_jones(), grouped("a", "b", "c", key="label")).by_group == {}
    assert set(evaluate_accuracy(lennard_jones(), grouped("a", "b", "b", key="label")).by_group) == {"a", "b"}
    assert set(evaluate_accuracy(lennard_jones(), grouped("a", "b")).by_group) == {"a", "b"}  # config_type always does
    assert evaluate_accuracy(lennard_jones(), grouped(None, None)).group_key is None


def test_a_force_error_of_zero_is_suspicious():
    frames = [frame(force=0.0), frame(force=0.0, seed=1), frame(force=0.1, seed=2)]
    result = evaluate_accuracy(lennard_jones(), frames)
    assert "2 of 3 labelled frames is zero to rounding" in result.suspicious
    assert "the potential's own predictions" in result.suspicious
    # Negative twins: a small error, and forces that vanish on both sides.
    assert evaluate_accuracy(lennard_jones(), [frame(force=1e-4)]).suspicious is None
    alone = Atoms("H", positions=[[0, 0, 0]])
    alone.calc = SinglePointCalculator(alone, forces=np.zeros((1, 3)))
    assert evaluate_accuracy(lennard_jones(), [alone]).suspicious is None


def test_json_has_the_promised_fields_and_can_be_read_again():
    done = []
    result = evaluate_accuracy(
        lennard_jones(), [frame(energy=0.1, force=0.1)] * 3, batch_size=2, progress=lambda *a: done.append(a)
    )
    assert done == [(2, 3), (3, 3)]
    data = json.loads(result.to_json())
    assert {"n_frames", "energy_per_atom", "energy", "force", "stress", "schema_version"} <= set(data)
    assert set(data["force"]) == {"mae", "rmse"}
    assert AccuracyResult.model_validate_json(result.to_json()) == result
