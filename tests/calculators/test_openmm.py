"""OpenMM through openmmml's entry point: equal to the ASE calculator, memoised, in the user's frame."""

import tomllib
from functools import partial
from pathlib import Path

import numpy as np
import openmm
import pytest
import toys
from ase import Atoms
from openmm import unit
from openmm_systems import (
    PRECISION,
    SETTINGS,
    TOLERANCE,
    ask,
    box,
    context_of,
    ethanol,
    isolated,
    save_potentials,
    system_of,
    topology_of,
)
from openmmml import MLPotential

from equimd.calculators.ase import EquimdCalculator
from equimd.calculators.openmm import EquimdForce, engine_frame
from equimd.calculators.openmm_entry import EquimdPotentialImplFactory
from equimd.errors import InputError
from equimd.models.checkpoint import list_potentials
from equimd.models.selfcheck import SelfCheckError
from equimd.rotations import random_rotations, rotate_vectors

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_potentials(tmp_path_factory.mktemp("potentials"))


@pytest.mark.parametrize("precision", ["single", "double"])
@pytest.mark.parametrize("atoms", [ethanol(), box()], ids=["molecule", "box"])
@pytest.mark.parametrize("family", SETTINGS)
def test_equals_the_ase_calculator(folder, family, atoms, precision):
    context = context_of(system_of(atoms, folder / family, precision=precision), atoms.positions)
    energy, forces = ask(context)
    calc = EquimdCalculator(folder / family, device="cpu", dtype=PRECISION[precision], self_check=False)
    wanted = calc.get_forces(atoms)
    tolerance = TOLERANCE[precision]
    np.testing.assert_allclose(forces, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())
    relative = calc.get_potential_energy(atoms) - isolated(atoms)
    assert abs(relative) > 0.01  # eV: not a comparison of isolated atoms
    assert energy - isolated(atoms) == pytest.approx(relative, rel=tolerance)


def test_interaction_energy_leaves_out_the_isolated_atoms(folder):
    atoms = ethanol()
    system = system_of(atoms, folder / "equivariant", precision="double", returnEnergyType="interaction_energy")
    total = ask(context_of(system_of(atoms, folder / "equivariant", precision="double"), atoms.positions))[0]
    relative = ask(context_of(system, atoms.positions))[0]
    assert relative == pytest.approx(total - isolated(atoms), rel=1e-10)


def test_trajectories_of_both_engines_agree(folder):
    """Velocity Verlet in both, a few steps of a periodic box, molecules leaving through its faces."""
    from ase import units
    from ase.md.verlet import VelocityVerlet

    atoms = box()
    atoms.set_velocities(0.1 * np.random.default_rng(0).normal(size=(len(atoms), 3)))
    integrator = openmm.CustomIntegrator(0.0005)
    integrator.addPerDofVariable("x1", 0)
    integrator.addComputePerDof("v", "v+0.5*dt*f/m")
    integrator.addComputePerDof("x", "x+dt*v")
    integrator.addComputePerDof("v", "v+0.5*dt*f/m")
    system = system_of(atoms, folder / "transformer", precision="double")
    for k, mass in enumerate(atoms.get_masses()):
        system.setParticleMass(k, mass)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(atoms.positions / 10)
    context.setVelocities(atoms.get_velocities() * (1000 * units.fs / 10))
    integrator.step(20)
    atoms.calc = EquimdCalculator(folder / "transformer", device="cpu", dtype="float64", self_check=False)
    VelocityVerlet(atoms, 0.5 * units.fs).run(20)
    positions = 10 * context.getState(positions=True).getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    np.testing.assert_allclose(positions, atoms.positions, atol=1e-7)  # constants of the engines differ by 1e-9


def test_energy_and_forces_cost_one_call(folder):
    atoms = ethanol()
    compute = EquimdForce(folder / "equivariant", atoms.numbers, device="cpu")
    evaluator = compute.prepare()
    system = openmm.System()
    for mass in atoms.get_masses():
        system.addParticle(mass)
    system.addForce(openmm.PythonForce(compute))
    context = context_of(system, atoms.positions)
    before = evaluator.n_calls
    for _ in range(3):
        context.getState(energy=True)
        context.getState(forces=True)
    assert evaluator.n_calls == before + 1
    context.setPositions((atoms.positions + 0.01) / 10)
    context.getState(energy=True, forces=True)
    assert evaluator.n_calls == before + 2


def test_memory_sees_the_box(folder):
    atoms = box()
    context = context_of(system_of(atoms, folder / "equivariant", precision="double"), atoms.positions)
    before = ask(context)[0]
    context.setPeriodicBoxVectors(*(atoms.cell.array * 1.02 / 10))
    after = ask(context)[0]
    larger = atoms.copy()
    larger.set_cell(atoms.cell * 1.02, scale_atoms=False)
    calc = EquimdCalculator(folder / "equivariant", device="cpu", dtype="float64", self_check=False)
    assert after != before
    assert after == pytest.approx(calc.get_potential_energy(larger), rel=1e-12)


@pytest.mark.parametrize("atoms", [ethanol(), box()], ids=["molecule", "box"])
def test_periodicity_is_stated(folder, atoms):
    system = system_of(atoms, folder / "equivariant")
    force = next(f for f in system.getForces() if f.getName() == "EquimdForce")
    assert force.usesPeriodicBoundaryConditions() == bool(atoms.pbc.all())


def test_subset_of_the_atoms(folder):
    """The potential sees the chosen atoms only, in the order given; the others feel nothing from it."""
    atoms = ethanol()
    chosen = [8, 0, 2, 5]
    system = openmm.System()
    for mass in atoms.get_masses():
        system.addParticle(mass)
    factory = EquimdPotentialImplFactory()
    factory.createImpl("equimd", modelPath=folder / "transformer").addForces(
        topology_of(atoms), system, chosen, 3, precision="double", device="cpu", selfCheck=False
    )
    assert system.getForce(0).getForceGroup() == 3
    energy, forces = ask(context_of(system, atoms.positions))
    calc = EquimdCalculator(folder / "transformer", device="cpu", dtype="float64", self_check=False)
    part = atoms[chosen]
    np.testing.assert_allclose(forces[chosen], calc.get_forces(part), atol=1e-10)
    assert energy == pytest.approx(calc.get_potential_energy(part), rel=1e-12)
    assert not np.delete(forces, chosen, axis=0).any()


def test_mixed_system(folder):
    """openmmml's own embedding: bonds within the subset are the potential's."""
    atoms = ethanol()
    topology = topology_of(atoms)
    system = openmm.System()
    for mass in atoms.get_masses():
        system.addParticle(mass)
    bonds = openmm.HarmonicBondForce()
    bonds.addBond(0, 1, 0.15, 1000.0)
    system.addForce(bonds)
    mixed = MLPotential("equimd", modelPath=folder / "equivariant").createMixedSystem(
        topology, system, [0, 1, 2], device="cpu", selfCheck=False
    )
    forces = ask(context_of(mixed, atoms.positions))[1]
    assert np.abs(forces[:3]).max() > 0
    assert not forces[3:].any()


def test_interactions_are_short_ranged(folder):
    impl = EquimdPotentialImplFactory().createImpl("equimd", modelPath=folder / "equivariant")
    assert impl.getMLLongRange() is False


# --- frames ----------------------------------------------------------------------------------------------------------


CELLS = {
    "cubic": 6.0 * np.eye(3),
    "turned": 6.0 * random_rotations(2, 0, inversion=False).rotations[0],
    "triclinic": np.array([[6.0, 0.4, -0.3], [4.1, 5.5, 0.2], [-5.3, 4.8, 7.0]]),
    "left-handed": np.array([[2.1, 5.5, 0.2], [6.0, 0.4, -0.3], [-1.3, 0.8, 7.0]]),
    "inverted": -np.diag([5.0, 6.0, 7.0]),
}


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS.keys())
def test_engine_frame_is_reduced_and_spans_the_same_lattice(cell):
    box_vectors, rotation = engine_frame(cell)
    assert np.linalg.det(rotation) == pytest.approx(1.0)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-14)
    openmm.System().setDefaultPeriodicBoxVectors(*box_vectors)  # OpenMM's own check of the reduced form
    steps = box_vectors @ np.linalg.inv(rotate_vectors(cell, rotation))
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-12)
    assert abs(np.linalg.det(np.round(steps))) == pytest.approx(1.0)


def many_cells():
    """Cells whose reduction ends at a boundary (lattices of cubes, half vectors), long and flat ones, any others."""
    rng = np.random.default_rng(0)
    yield np.array([[-5, -5, 5], [-10, -10, 2.5], [-2.5, 0, -10]])
    hexagonal = np.array([[1, 0, 0], [-0.5, 0.75**0.5, 0], [0, 0, 1.3]])
    faces, body = np.ones((3, 3)) - np.eye(3), np.ones((3, 3)) - 2 * np.eye(3)
    for _ in range(200):
        yield 2.5 * rng.integers(-4, 5, (3, 3))
        yield rng.normal(size=(3, 3)) * 10 ** rng.uniform(-2, 3)
        for cell in (hexagonal, faces, body):
            yield cell * rng.uniform(1, 10) @ np.linalg.qr(rng.normal(size=(3, 3)))[0]
        flat = rng.normal(size=(3, 3))
        flat[2] = rng.integers(-5, 6) * flat[0] + rng.integers(-5, 6) / 2 * flat[1] + flat[2] * 10 ** -rng.uniform(0, 6)
        yield flat


def test_openmm_accepts_every_box_of_engine_frame():
    """Its test of the reduced form has no tolerance; in Å, and in nm after a division."""
    system, n_flat = openmm.System(), 0
    for cell in many_cells():
        try:
            box_vectors, rotation = engine_frame(cell)
        except InputError:  # rounding leaves some volume of vectors in one plane
            assert abs(np.linalg.det(cell)) < 1e-9 * np.linalg.norm(cell, axis=1).prod()
            n_flat += 1
            continue
        system.setDefaultPeriodicBoxVectors(*(box_vectors / 10))
        system.setDefaultPeriodicBoxVectors(*(box_vectors * unit.angstrom))
        turned = cell @ rotation.T
        steps = np.round(np.linalg.solve(turned.T, box_vectors.T).T)
        assert abs(np.linalg.det(steps)) == pytest.approx(1.0)
        # Rounding of whole multiples of the user's vectors.
        atol = 1e-14 * np.abs(steps).max() * np.abs(cell).max()
        np.testing.assert_allclose(steps @ turned, box_vectors, rtol=0, atol=atol)
    assert 0 < n_flat < 100


@pytest.mark.parametrize("cell", [np.ones((3, 3)), np.zeros((3, 3)), np.full((3, 3), np.nan), np.eye(2), np.ones(3)])
def test_cells_without_a_volume_are_refused(cell):
    with pytest.raises(InputError, match="three linearly independent vectors"):
        engine_frame(cell)


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS.keys())
def test_potential_that_is_not_invariant_is_evaluated_in_the_users_frame(folder, cell):
    atoms = box()
    atoms.set_cell(cell, scale_atoms=True)
    calc = EquimdCalculator(folder / "transformer", device="cpu", dtype="float64", self_check=False)
    wanted, energy = calc.get_forces(atoms), calc.get_potential_energy(atoms)
    box_vectors, rotation = engine_frame(cell)
    inside = atoms.copy()
    inside.set_cell(box_vectors)
    inside.positions = rotate_vectors(atoms.positions, rotation)
    system = system_of(inside, folder / "transformer", precision="double", rotation=rotation)
    got, forces = ask(context_of(system, inside.positions))
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(forces, rotate_vectors(wanted, rotation), atol=1e-10 * scale)
    assert got - isolated(atoms) == pytest.approx(energy - isolated(atoms), rel=1e-10)
    # Negative twin: without the rotation the transformer gives another answer wherever the frame was turned.
    plain = ask(context_of(system_of(inside, folder / "transformer", precision="double"), inside.positions))[1]
    assert (np.abs(plain - forces).max() > 1e-4 * scale) == (not np.allclose(rotation, np.eye(3)))


def test_unreduced_box_is_refused_by_openmm(folder):
    atoms = box()
    atoms.set_cell([[6.0, 0, 0], [4.1, 5.5, 0], [0, 0, 7.0]])
    with pytest.raises((openmm.OpenMMException, ValueError), match="reduced form"):
        system_of(atoms, folder / "equivariant")


# --- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"precision": "half"}, "precision is 'half'; accepted are single and double"),
        ({"returnEnergyType": "free"}, "returnEnergyType is 'free'"),
        ({"rotation": np.ones((3, 3))}, "an orthogonal 3×3 matrix"),
        ({"presicion": "single"}, "createSystem got presicion; did you mean precision?"),
        ({"return_energy_type": "energy"}, "did you mean returnEnergyType?"),
        ({"dtype": "float64"}, "did you mean precision?"),
        ({"spin": 1}, "did you mean multiplicity?"),
        ({"total_charge": 0}, "did you mean charge?"),
        ({"self_check": False}, "did you mean selfCheck?"),
        ({"rotations": np.eye(3)}, "did you mean rotation?"),
        ({"rotation": "x"}, "an orthogonal 3×3 matrix"),
        ({"skin": -1}, "skin is -1"),
        ({"skin": None}, "skin is None"),
        ({"skin": float("inf")}, "skin is inf"),
        ({"charge": "one"}, "charge is 'one'; a number"),
        ({"symmetrize": {"mode": "average", "degre": 3}}, "symmetrize has 'degre'"),
        ({"symmetrize": 5}, "symmetrize is 5"),
        ({"device": "abacus"}, "device is 'abacus'"),
        ({"charge": 1}, "total charge is 1 e"),
        ({"multiplicity": 2}, "spin multiplicity is 2"),
    ],
)
def test_bad_options_are_refused(folder, options, says):
    with pytest.raises(InputError, match=says):
        system_of(ethanol(), folder / "equivariant", **options)


def test_options_of_openmmml_and_none_are_accepted(folder):
    """openmmml's potentials ignore what is not theirs, and None is the default."""
    atoms = ethanol()
    plain = ask(context_of(system_of(atoms, folder / "equivariant"), atoms.positions))
    theirs = {"linkAtomDistances": [], "mlLongRange": False, "info": {}, "implementation": "x", "modelIndex": 0}
    other = system_of(atoms, folder / "equivariant", precision=None, device=None, charge=None, rotation=None, **theirs)
    energy, forces = ask(context_of(other, atoms.positions))
    assert energy == plain[0]
    np.testing.assert_array_equal(forces, plain[1])


@pytest.mark.parametrize(
    ("atoms", "says"),
    [
        ([0, -1], "atoms holds -1; accepted are whole numbers from 0 to 8"),
        ([0, 9], "atoms holds 9"),
        ([0, 1.5], "atoms holds 1.5"),
        (np.array([0.0, 1.0]), "atoms holds .*0.0"),
        ([True, False] + 7 * [False], "atoms holds True"),
        (np.ones(9, dtype=bool), "atoms holds .*True"),
        (["0"], "atoms holds '0'"),
        ([2, 0, 2], "atoms holds 2 more than once"),
        ([], "atoms is empty"),
    ],
)
@pytest.mark.parametrize("mixed", [False, True])
def test_indices_that_are_no_atoms_are_refused(folder, atoms, says, mixed):
    potential, structure = MLPotential("equimd", modelPath=folder / "transformer"), ethanol()
    topology, system = topology_of(structure), openmm.System()
    for mass in structure.get_masses():
        system.addParticle(mass)
    options = {"device": "cpu", "selfCheck": False}
    if mixed:
        add = partial(potential.createMixedSystem, topology, system, atoms, **options)
    else:
        add = partial(potential._impl.addForces, topology, system, atoms, 0, **options)
    with pytest.raises(InputError, match=says):
        add()


def test_whole_numbers_of_any_kind_are_indices(folder):
    atoms, energies = ethanol(), []
    for indices in ([0, 2], np.array([0, 2]), range(0, 3, 2), iter([0, 2])):
        system = openmm.System()
        for mass in atoms.get_masses():
            system.addParticle(mass)
        impl = EquimdPotentialImplFactory().createImpl("equimd", modelPath=folder / "transformer")
        impl.addForces(topology_of(atoms), system, indices, 0, device="cpu", selfCheck=False)
        energies.append(ask(context_of(system, atoms.positions))[0])
    assert len(set(energies)) == 1


def test_systems_of_another_size_are_refused(folder):
    atoms = ethanol()
    system = openmm.System()
    for _ in range(8):
        system.addParticle(1.0)
    with pytest.raises(InputError, match="the topology has 9 atoms and the system 8 particles"):
        MLPotential("equimd", modelPath=folder / "transformer")._impl.addForces(topology_of(atoms), system, None, 0)
    later = system_of(atoms, folder / "transformer")
    later.addParticle(1.0)
    with pytest.raises(openmm.OpenMMException, match="InputError: OpenMM gives 10 positions; .* for 9 atoms"):
        ask(context_of(later, np.concatenate([atoms.positions, [[9.0, 9.0, 9.0]]])))


def test_shipped_potentials_have_names_of_their_own(folder):
    """Each entry point is a shipped potential's name, as openmmml's own potentials have theirs."""
    name = list_potentials()[0]
    MLPotential.registerImplFactory(name, EquimdPotentialImplFactory())
    assert MLPotential(name)._impl.model == name
    with pytest.raises(InputError, match="takes no modelPath; write MLPotential.'equimd', modelPath=...."):
        MLPotential(name, modelPath=folder / "transformer")
    MLPotential.registerImplFactory("ethanol-equivarant", EquimdPotentialImplFactory())
    with pytest.raises(InputError, match="did you mean 'ethanol-equivariant'"):
        MLPotential("ethanol-equivarant")


def test_every_shipped_potential_has_an_entry_point():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    factory = "equimd.calculators.openmm_entry:EquimdPotentialImplFactory"
    assert project["entry-points"]["openmmml.potentials"] == dict.fromkeys(["equimd", *list_potentials()], factory)


def test_bad_structures_and_names_are_refused(folder):
    with pytest.raises(InputError, match="does not know Cl"):
        system_of(Atoms("HCl", [[0, 0, 0], [0, 0, 1.3]]), folder / "equivariant")
    with pytest.raises(InputError, match="no potential is called 'nothing'"):
        system_of(ethanol(), "nothing")
    with pytest.raises(InputError, match="needs modelPath"):
        MLPotential("equimd")
    with pytest.raises(InputError, match="got name_or_path"):
        MLPotential("equimd", modelPath="a", name_or_path="b")
    topology = topology_of(ethanol())
    topology.addAtom("M", None, next(topology.residues()))
    with pytest.raises(InputError, match=r"atom 9 \(M\) has no element"):
        MLPotential("equimd", modelPath=folder / "equivariant").createSystem(topology, device="cpu")


def test_errors_in_a_step_say_what_was_wrong(folder):
    atoms = ethanol()
    context = context_of(system_of(atoms, folder / "equivariant"), atoms.positions)
    atoms.positions[1] = atoms.positions[0]
    context.setPositions(atoms.positions / 10)
    with pytest.raises(
        openmm.OpenMMException, match="^InputError: atoms 0 and 1 are 0 Å apart; at least 0.1 Å is accepted$"
    ):
        context.getState(energy=True)


def test_self_check_is_on_by_default():
    with pytest.raises(SelfCheckError):
        MLPotential("equimd", modelPath=toys.WrongForces()).createSystem(topology_of(ethanol()), device="cpu")
