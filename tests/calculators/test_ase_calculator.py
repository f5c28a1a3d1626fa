"""EquimdCalculator: ASE's conventions, its cache, its batches, what it refuses and what it leaves alone."""

import copy
import pickle

import numpy as np
import pytest
import torch
import toys
from ase import Atoms, units
from ase.build import molecule
from ase.calculators.calculator import PropertyNotImplementedError, all_properties
from ase.constraints import FixAtoms
from ase.io import read, write
from ase.md.verlet import VelocityVerlet
from ase.stress import voigt_6_to_full_3x3_stress

from equimd.calculators.ase import EquimdCalculator
from equimd.calculators.forcefield import ForceField, as_force_field, evaluate_rotated, rotated_frame
from equimd.errors import InputError
from equimd.models.selfcheck import SelfCheckError
from equimd.rotations import random_rotations, rotate_back_vectors, rotate_vectors

TRICLINIC = np.array([[7.0, 0.4, -0.3], [1.1, 6.5, 0.2], [-0.7, 0.8, 7.5]])


def calculator(kind=toys.ToyPotential, dtype="float64", **options):
    options.setdefault("self_check", False)
    return EquimdCalculator(kind(), device="cpu", dtype=dtype, **options)


def ethanol() -> Atoms:
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, rng=np.random.default_rng(0))
    return atoms


def crystal(seed: int = 0, pbc=True) -> Atoms:
    rng = np.random.default_rng(seed)
    grid = np.array([[x, y, z] for x in (0.1, 0.4, 0.7) for y in (0.2, 0.7) for z in (0.1, 0.6)])
    positions = (grid + 0.05 * rng.random(grid.shape)) @ TRICLINIC
    return Atoms(numbers=rng.choice([1, 6, 8], len(grid)), positions=positions, cell=TRICLINIC, pbc=pbc)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("atoms", [ethanol(), crystal()], ids=["molecule", "crystal"])
def test_results_are_ases_own(atoms, dtype):
    atoms.calc = calculator(dtype=dtype)
    forces = atoms.get_forces()
    results = atoms.calc.results
    assert set(results) <= set(all_properties)
    assert type(results["energy"]) is float
    assert results["energy"] == results["free_energy"] == atoms.get_potential_energy(force_consistent=True)
    assert forces.shape == (len(atoms), 3)
    assert forces.dtype == np.float64
    assert results["energies"].sum() == pytest.approx(results["energy"], abs=1e-9)
    atoms.get_properties(["energy", "forces"])  # fails for names or shapes that ASE does not know
    assert ("stress" in results) == bool(atoms.pbc.any())


def test_stress_is_voigt_of_the_raw_tensor_which_is_kept():
    atoms = crystal()
    atoms.calc = calculator()
    stress, raw = atoms.get_stress(), atoms.calc.stress_tensor
    assert raw.shape == (3, 3)
    assert np.abs(raw - raw.T).max() > 1e-6  # the toy is not invariant
    wanted = [raw[0, 0], raw[1, 1], raw[2, 2], raw[1, 2] + raw[2, 1], raw[0, 2] + raw[2, 0], raw[0, 1] + raw[1, 0]]
    np.testing.assert_allclose(stress, np.array(wanted) / [1, 1, 1, 2, 2, 2], rtol=1e-12)
    np.testing.assert_allclose(atoms.get_stress(voigt=False), voigt_6_to_full_3x3_stress(stress))
    assert "stress_tensor" not in atoms.calc.results


def test_stress_has_ases_sign_order_and_unit():
    """Against ASE's own finite differences of the energy: eV/Å³, tension positive, xx yy zz yz xz xy."""
    from ase.calculators.fd import calculate_numerical_stress

    atoms = crystal()
    atoms.calc = calculator()
    wanted = calculate_numerical_stress(atoms, eps=1e-5)
    np.testing.assert_allclose(atoms.get_stress(), wanted, atol=1e-6 * np.abs(wanted).max())


def test_forces_have_ases_sign():
    from ase.calculators.fd import calculate_numerical_forces

    atoms = crystal()
    atoms.calc = calculator()
    wanted = calculate_numerical_forces(atoms, eps=1e-5)
    np.testing.assert_allclose(atoms.get_forces(), wanted, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("atoms", [ethanol(), crystal(pbc=False)], ids=["no cell", "not periodic"])
def test_stress_where_there_is_none_is_not_implemented(atoms):
    atoms.calc = calculator()
    with pytest.raises(PropertyNotImplementedError, match="stress"):
        atoms.get_stress()
    atoms.get_forces()


def test_stress_of_direct_forces_is_computed_only_when_asked_for():
    atoms = crystal()
    atoms.calc = calculator(toys.DirectForces)
    atoms.get_forces()
    assert "stress" not in atoms.calc.results
    assert atoms.get_stress().shape == (6,)
    np.testing.assert_allclose(atoms.calc.stress_tensor, calculator().evaluate([atoms]).stresses[0])


def test_unknown_property_is_not_implemented():
    with pytest.raises(PropertyNotImplementedError, match="dipole"):
        calculator().get_property("dipole", ethanol())


# --- cache -----------------------------------------------------------------------------------------------------------


def counted(atoms):
    """Number of model calls that one more query of all properties takes."""
    before = atoms.calc._evaluator.n_calls
    atoms.get_forces()
    atoms.get_potential_energy()
    atoms.get_potential_energies()
    if atoms.pbc.any():
        atoms.get_stress()
    return atoms.calc._evaluator.n_calls - before


def test_one_model_call_answers_everything():
    atoms = crystal()
    atoms.calc = calculator()
    assert counted(atoms) == 1
    assert counted(atoms) == 0


CHANGES = {
    "position": lambda a: a.positions.__setitem__((0, 0), a.positions[0, 0] + 1e-13),
    "cell": lambda a: a.set_cell(a.cell * 1.0001, scale_atoms=False),
    "pbc": lambda a: a.set_pbc((True, True, False)),
    "number": lambda a: a.numbers.__setitem__(0, 7 - a.numbers[0] if a.numbers[0] in (1, 6) else 1),
    "more atoms": lambda a: a.append("H"),
    "fewer atoms": lambda a: a.__delitem__(0),
    "initial charges": lambda a: a.set_initial_charges([0.1, -0.1] + [0.0] * (len(a) - 2)),
    "initial moments": lambda a: a.set_initial_magnetic_moments([1, -1] + [0] * (len(a) - 2)),
    "charge": lambda a: a.info.__setitem__("charge", 0),
    "multiplicity": lambda a: a.info.__setitem__("multiplicity", 1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_cache_sees(change):
    atoms = crystal()
    atoms.calc = calculator()
    counted(atoms)
    change(atoms)
    assert atoms.calc.check_state(atoms)
    assert counted(atoms) == 1
    fresh = atoms.copy()
    fresh.calc = calculator()
    np.testing.assert_allclose(atoms.get_forces(), fresh.get_forces(), atol=1e-12)
    assert atoms.get_potential_energy() == pytest.approx(fresh.get_potential_energy(), abs=1e-10)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.info.__setitem__("comment", "a"),
        lambda a: a.set_tags(1),
        lambda a: a.set_velocities(np.ones((len(a), 3))),
        lambda a: a.set_masses(np.ones(len(a))),
    ],
    ids=["comment", "tags", "velocities", "masses"],
)
def test_cache_ignores(change):
    atoms = crystal()
    atoms.calc = calculator()
    counted(atoms)
    change(atoms)
    assert counted(atoms) == 0


def test_a_charge_that_appears_is_refused_even_at_known_positions():
    atoms = ethanol()
    atoms.calc = calculator()
    atoms.get_forces()
    atoms.info["charge"] = 1
    with pytest.raises(InputError, match="total charge is 1 e"):
        atoms.get_forces()
    del atoms.info["charge"]
    atoms.get_forces()


def test_results_handed_out_are_copies():
    atoms = crystal()
    atoms.calc = calculator()
    forces = atoms.get_forces()
    forces *= 0
    assert np.abs(atoms.get_forces()).max() > 0


def test_nothing_is_left_after_a_failure():
    atoms = ethanol()
    atoms.calc = calculator()
    good = atoms.get_potential_energy()
    saved = atoms.positions[0, 0]
    atoms.positions[0, 0] = np.nan
    with pytest.raises(InputError, match="positions of atom 0"):
        atoms.get_potential_energy()
    assert not atoms.calc.results
    atoms.positions[0, 0] = saved
    assert atoms.get_potential_energy() == good


def test_reset_drops_the_neighbour_list():
    atoms = crystal()
    atoms.calc = calculator()
    atoms.get_forces()
    builds = atoms.calc._evaluator.list.n_builds
    atoms.calc.reset()
    assert not atoms.calc.results
    atoms.get_forces()
    assert atoms.calc._evaluator.list.n_builds == builds + 1


# --- the Verlet list and the graph that is reused ---------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("atoms", [ethanol(), crystal(), crystal(pbc=(True, False, True))], ids=["free", "3d", "2d"])
def test_walk_equals_fresh_calculators_to_the_last_bit(atoms, wrap):
    rng = np.random.default_rng(1)
    atoms.calc = calculator(dtype="float32")
    for _ in range(25):
        atoms.positions += 0.03 * rng.normal(size=atoms.positions.shape)
        if wrap:
            atoms.wrap()
        fresh = calculator(dtype="float32", skin=0.0)
        assert np.array_equal(atoms.get_forces(), fresh.get_forces(atoms))
        assert atoms.get_potential_energy() == fresh.get_potential_energy(atoms)
    assert atoms.calc._evaluator.list.n_builds < 25


def test_molecular_dynamics_reuses_the_graph():
    atoms = ethanol()
    atoms.calc = calculator()
    atoms.get_forces()
    graph = atoms.calc._evaluator._kept[1]
    VelocityVerlet(atoms, 0.1 * units.fs).run(5)
    assert atoms.calc._evaluator._kept[1] is graph
    assert atoms.calc._evaluator.n_calls == 6
    assert atoms.calc._evaluator.list.n_builds == 1


def test_constraints_do_not_reach_the_forces_of_the_calculator():
    atoms = crystal()
    atoms.calc = calculator()
    free = atoms.get_forces()
    atoms.set_constraint(FixAtoms([0]))
    assert not atoms.get_forces()[0].any()
    np.testing.assert_array_equal(atoms.get_forces(apply_constraint=False), free)


# --- nothing is touched ----------------------------------------------------------------------------------------------


def test_atoms_are_not_changed():
    atoms = crystal()
    atoms.positions += 100.0  # outside the cell, not to be wrapped in place
    atoms.info["note"] = [1, 2]
    before = copy.deepcopy(atoms)
    calc = calculator()
    calc.get_stress(atoms)
    calc.evaluate([atoms])
    calc.evaluate_rotated(atoms, random_rotations(3, 0).rotations)
    assert atoms == before
    assert atoms.info == before.info
    assert set(atoms.arrays) == set(before.arrays)
    assert atoms.calc is None


def test_no_global_state():
    def state():
        return torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.initial_seed()

    before, numpy_before = state(), np.random.get_state()[1].copy()  # noqa: NPY002
    atoms = crystal()
    atoms.calc = calculator(dtype="float64", self_check=True)
    atoms.get_stress()
    assert state() == before
    assert np.array_equal(numpy_before, np.random.get_state()[1])  # noqa: NPY002


def test_the_potential_given_is_copied():
    potential = toys.ToyPotential()
    potential.train()
    calc = EquimdCalculator(potential, device="cpu", dtype="float64")
    assert potential.dtype == torch.float32
    assert potential.training
    energy = calc.get_potential_energy(ethanol())
    potential.scale *= 2.0
    calc.reset()
    assert calc.get_potential_energy(ethanol()) == energy


def test_calculators_do_not_share_anything():
    first, second = calculator(), calculator()
    first.get_potential_energy(ethanol())
    assert not second.results
    assert first.parameters is not second.parameters


# --- batches ---------------------------------------------------------------------------------------------------------


def assert_equal(evaluation, calc, frames, tolerance=1e-10):
    for k, frame in enumerate(frames):
        single = frame.copy()
        single.calc = calc
        assert evaluation.energies[k] == pytest.approx(single.get_potential_energy(), abs=tolerance)
        np.testing.assert_allclose(evaluation.forces[k], single.get_forces(), atol=tolerance)
        if frame.pbc.any():
            single.get_stress()
            np.testing.assert_allclose(evaluation.stresses[k], calc.stress_tensor, atol=tolerance)
        else:
            assert evaluation.stresses[k] is None


@pytest.mark.parametrize("max_edges", [None, 1, 150])
def test_evaluate_equals_one_by_one(max_edges):
    calc = calculator()
    frames = [ethanol(), crystal(0), molecule("H2O"), crystal(1), Atoms("O"), crystal(2, pbc=(True, True, False))]
    assert_equal(calc.evaluate(frames, max_edges), calculator(), frames)
    calls = calc._evaluator.n_calls
    assert calls == (len(frames) if max_edges == 1 else calls)
    assert calls > 1 or max_edges is None


def test_evaluate_nothing():
    evaluation = calculator().evaluate([])
    assert evaluation.energies.shape == (0,)
    assert evaluation.forces == evaluation.stresses == []


def test_evaluate_leaves_the_cache_alone():
    atoms = crystal()
    atoms.calc = calculator()
    atoms.get_stress()
    atoms.calc.evaluate([ethanol(), crystal(3)])
    assert counted(atoms) == 0


@pytest.mark.parametrize("max_edges", [None, 1])
@pytest.mark.parametrize("frame", [ethanol(), crystal(), crystal(pbc=(True, False, True))], ids=["free", "3d", "2d"])
def test_evaluate_rotated_equals_rotated_frames(frame, max_edges):
    rotations = random_rotations(5, seed=2, inversion=True).rotations
    assert (np.linalg.det(rotations) < 0).any()
    calc = calculator()
    got = calc.evaluate_rotated(frame, rotations, max_edges)
    assert_equal(got, calculator(), [rotated_frame(frame, r) for r in rotations])
    # Not vacuous: the toy is not invariant, so the copies differ, and turning back does not bring them together.
    back = rotate_back_vectors(np.array(got.forces), rotations)
    assert np.abs(back - back.mean(axis=0)).max() > 1e-3


def test_rotated_predictions_of_an_invariant_potential_turn_with_the_frame():
    calc = EquimdCalculator(toys.ToyPotential(anisotropy=0.0), device="cpu", dtype="float64")
    rotations = random_rotations(4, seed=3).rotations
    got = calc.evaluate_rotated(crystal(), rotations)
    forces = calc.get_forces(crystal())
    np.testing.assert_allclose(got.forces, rotate_vectors(forces, rotations), atol=1e-12)
    np.testing.assert_allclose(got.stresses, rotations @ calc.stress_tensor @ rotations.swapaxes(1, 2), atol=1e-13)


def test_rotation_in_single_precision_keeps_the_digits():
    """Positions far from the origin are rotated in float64: the noise stays that of the network."""
    frame = ethanol()
    frame.positions += 300.0
    rotations = random_rotations(8, seed=4).rotations
    calc = EquimdCalculator(toys.ToyPotential(anisotropy=0.0), device="cpu", dtype="float32")
    forces = rotate_back_vectors(np.array(calc.evaluate_rotated(frame, rotations).forces), rotations)
    spread = np.sqrt(np.square(forces - forces.mean(axis=0)).mean() / np.square(forces).mean())
    assert 0 < spread < 1e-6
    rounded = [rotated_frame(frame, r) for r in rotations]
    for copy_ in rounded:
        copy_.positions = copy_.positions.astype(np.float32)
    noisy = rotate_back_vectors(np.array(calc.evaluate(rounded).forces), rotations)
    assert np.abs(noisy - noisy.mean(axis=0)).max() > 5 * np.abs(forces - forces.mean(axis=0)).max()


@pytest.mark.parametrize("rotations", [np.eye(3), np.zeros((2, 2, 2))])
def test_rotations_of_another_shape_are_refused(rotations):
    with pytest.raises(InputError, match=r"\(K, 3, 3\) is accepted"):
        calculator().evaluate_rotated(ethanol(), rotations)


def test_it_is_a_force_field():
    calc = calculator()
    assert isinstance(calc, ForceField)
    assert as_force_field(calc) is calc
    assert (calc.name, calc.device, calc.dtype, calc.family) == ("transformer", "cpu", "float64", "transformer")
    calc.synchronize()
    assert 1.0 < calc.peak_memory() < 1e6
    assert len(evaluate_rotated(calc, ethanol(), random_rotations(3, 0).rotations).forces) == 3


def test_with_dtype_is_another_calculator_with_the_same_weights():
    single = calculator(dtype="float32")
    double = single.with_dtype("float64")
    assert (single.dtype, double.dtype) == ("float32", "float64")
    a, b = single.get_forces(crystal()), double.get_forces(crystal())
    assert 0 < np.abs(a - b).max() < 1e-5
    np.testing.assert_array_equal(double.with_dtype("float32").get_forces(crystal()), a)
    assert single.results["forces"] is not double.results["forces"]
    with pytest.raises(InputError, match="dtype is 'half'"):
        single.with_dtype("half")


# --- symmetrised -----------------------------------------------------------------------------------------------------


def equivariance_error(calc, frame):
    rotations = random_rotations(4, seed=9).rotations
    back = rotate_back_vectors(np.array(calc.evaluate_rotated(frame, rotations).forces), rotations)
    return np.abs(back - back.mean(axis=0)).max()


def test_symmetrised_calculators():
    frame = ethanol()
    plain = equivariance_error(calculator(), frame)
    averaged = equivariance_error(calculator(symmetrize={"mode": "average", "degree": 7}), frame)
    assert averaged < 0.02 * plain
    assert equivariance_error(calculator(symmetrize="canonical"), frame) < 1e-8 * plain
    random = calculator(symmetrize="random")
    first = random.get_forces(frame)
    np.testing.assert_array_equal(random.get_forces(frame), first)  # the cache holds
    random.reset()
    assert np.abs(random.get_forces(frame) - first).max() > 1e-3
    assert random.family == "transformer"


def test_symmetrised_calculator_keeps_its_mode_in_another_precision():
    single = calculator(symmetrize="canonical", dtype="float32")
    double = single.with_dtype("float64")
    np.testing.assert_allclose(single.get_forces(ethanol()), double.get_forces(ethanol()), atol=1e-4)
    assert equivariance_error(double, ethanol()) < 1e-8


def test_unknown_symmetrisation_is_refused():
    with pytest.raises(InputError, match="symmetrize is 'sometimes'"):
        calculator(symmetrize="sometimes")


# --- what it refuses -------------------------------------------------------------------------------------------------


def nan_positions():
    atoms = ethanol()
    atoms.positions[3, 1] = np.nan
    return atoms


def with_info(**info):
    atoms = ethanol()
    atoms.info.update(info)
    return atoms


def with_charges():
    atoms = ethanol()
    atoms.set_initial_charges([1.0] + [0.0] * 8)
    return atoms


def with_moments(first=1.0):
    atoms = ethanol()
    atoms.set_initial_magnetic_moments([first] + [0.0] * 8)
    return atoms


BAD = {
    "element": (Atoms("HCl", [[0, 0, 0], [0, 0, 1.3]]), "does not know Cl; it knows H, C, O"),
    "element 0": (Atoms("XH", [[0, 0, 0], [0, 0, 1.3]]), "does not know X"),
    "nan": (nan_positions(), "positions of atom 3"),
    "empty": (Atoms(), "has no atoms"),
    "one place": (Atoms("OH2", [[0, 0, 0], [0, 0, 1], [0, 0, 1.01]]), "atoms 1 and 2 are 0.01 Å apart"),
    "same place": (Atoms("H2", [[0, 0, 1], [0, 0, 1]]), "atoms 0 and 1 are 0 Å apart"),
    "through the boundary": (
        Atoms("H2", [[0, 0, 0], [0, 0, 4.95]], cell=[5, 5, 5], pbc=True),
        "atoms 0 and 1 are 0.05 Å apart",
    ),
    "no cell": (Atoms("H", pbc=True), "cell vector 0 is zero"),
    "charge": (with_info(charge=-1), "total charge is -1 e; the potential was trained on 0 e"),
    "charge under another name": (with_info(REF_Charge=-1), "total charge is -1 e (REF_Charge)"),
    "spin under another name": (with_info(total_spin=3), "spin multiplicity is 3 (total_spin)"),
    "initial charges": (with_charges(), "total charge is 1 e"),
    "multiplicity": (with_info(multiplicity=3), "spin multiplicity is 3; the potential was trained on 1"),
    "spin": (with_info(spin=2), "spin multiplicity is 2"),
    "moments": (with_moments(), "spin multiplicity is 2"),
}


@pytest.mark.parametrize("call", ["get_forces", "evaluate", "evaluate_rotated"])
@pytest.mark.parametrize(("atoms", "says"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_in_one_line(atoms, says, call):
    calc = calculator()
    arguments = {
        "get_forces": (atoms,),
        "evaluate": ([crystal(), atoms],),
        "evaluate_rotated": (atoms, np.eye(3)[None]),
    }[call]
    with pytest.raises(InputError) as caught:
        getattr(calc, call)(*arguments)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "info", [{}, {"charge": 0}, {"spin": 0}, {"spin": 1}, {"multiplicity": 1}, {"charge": 0, "spin": 1}]
)
def test_neutral_singlets_are_accepted(info):
    calculator().get_forces(with_info(**info))


def test_a_charge_that_comes_later_is_seen():
    atoms = with_info(total_charge=0)
    atoms.calc = calculator()
    atoms.get_forces()
    atoms.info["total_charge"] = 1
    with pytest.raises(InputError, match="total charge is 1 e"):
        atoms.get_forces()


def test_partial_charges_and_antiparallel_moments_are_accepted():
    atoms = ethanol()
    atoms.set_initial_charges([0.4, -0.4] + [0.0] * 7)
    atoms.set_initial_magnetic_moments([1.0, -1.0] + [0.0] * 7)
    calculator().get_forces(atoms)


@pytest.mark.parametrize("where", ["top", "recipe"])
def test_charged_radicals_are_accepted_where_the_data_were_such(where):
    potential = toys.ToyPotential()
    electrons = {"charge": -1, "multiplicity": 2}
    potential.header = electrons if where == "top" else {"recipe": {"data": electrons}}
    calc = EquimdCalculator(potential, device="cpu")
    calc.get_forces(with_info(charge=-1, multiplicity=2))
    with pytest.raises(InputError, match="total charge is 0 e; the potential was trained on -1 e"):
        calc.get_forces(with_info(charge=0))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "float16"}, "dtype is 'float16'; accepted are float32 and float64"),
        ({"device": "abacus"}, "device is 'abacus'"),
        ({"device": "meta"}, "device is 'meta'"),
        ({"device": "cuda:99"}, "CUDA devices here"),
        ({"skin": -0.1}, "skin is -0.1"),
    ],
)
def test_bad_options_are_refused(options, says):
    with pytest.raises(InputError, match=says):
        EquimdCalculator(toys.ToyPotential(), self_check=False, **options)


def test_something_that_is_no_potential_is_refused():
    with pytest.raises(InputError, match="potential is a int"):
        EquimdCalculator(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("broken", [toys.WrongForces, toys.HardCutoff, toys.BrokenSingle])
def test_self_check_runs_when_loading_unless_told_otherwise(broken):
    with pytest.raises(SelfCheckError, match="self-check failed"):
        EquimdCalculator(broken(), device="cpu")
    EquimdCalculator(broken(), device="cpu", self_check=False)


# --- ASE's other ways ------------------------------------------------------------------------------------------------


def test_copies_and_pickles():
    atoms = crystal()
    atoms.calc = calculator()
    forces = atoms.get_forces()
    for other in (copy.deepcopy(atoms.calc), pickle.loads(pickle.dumps(atoms.calc))):
        assert np.array_equal(other.get_forces(crystal()), forces)


def test_frames_are_written_with_their_results(tmp_path):
    atoms = crystal()
    atoms.calc = calculator()
    atoms.get_stress()
    for name in ("a.xyz", "a.traj", "a.json"):
        write(tmp_path / name, atoms)
        back = read(tmp_path / name)
        assert back.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
        np.testing.assert_allclose(back.get_forces(), atoms.get_forces(), atol=1e-6)
        np.testing.assert_allclose(back.get_stress(), atoms.get_stress(), atol=1e-6)


def test_energy_is_conserved_in_molecular_dynamics():
    atoms = crystal()
    atoms.calc = calculator()
    atoms.set_velocities(0.02 * np.random.default_rng(0).normal(size=(len(atoms), 3)))
    energies = []
    motion = VelocityVerlet(atoms, 0.5 * units.fs)
    motion.attach(lambda: energies.append(atoms.get_total_energy()))
    motion.run(60)
    kinetic = atoms.get_kinetic_energy()
    assert np.ptp(energies) < 1e-3 * kinetic


def test_a_stochastic_calculator_has_no_second_precision_to_measure_a_floor_with():
    from equimd.calculators.forcefield import in_precision

    model = toys.ToyPotential()
    plain = EquimdCalculator(model, self_check=False)
    stochastic = EquimdCalculator(model, symmetrize="random", self_check=False)
    assert in_precision(plain, "float64") is not None
    assert in_precision(stochastic, "float64") is None
