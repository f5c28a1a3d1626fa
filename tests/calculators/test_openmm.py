"""OpenMM through openmmml's entry point: equal to the ASE calculator, memoised, serialisable, in the user's frame."""

import copy
import pickle
import subprocess
import sys

import numpy as np
import openmm
import pytest
import torch
import toys
from ase import Atoms
from ase.build import molecule
from openmm import unit
from openmm.app import Element, Topology
from openmmml import MLPotential

from equimd.calculators.ase import EquimdCalculator
from equimd.calculators.openmm import EquimdForce, engine_frame
from equimd.calculators.openmm_entry import EquimdPotentialImplFactory
from equimd.errors import InputError
from equimd.models.checkpoint import build_potential, save_checkpoint
from equimd.models.equivariant import EquivariantSettings
from equimd.models.selfcheck import SelfCheckError
from equimd.models.transformer import TransformerSettings
from equimd.rotations import random_rotations, rotate_vectors

KJ_PER_MOL_IN_EV = 0.010364269656262  # independent of equimd.units
SPECIES = (1, 6, 8)
SETTINGS = {
    "equivariant": EquivariantSettings(n_layers=2, n_channels=4, l_max=2, cutoff=3.5, avg_num_neighbors=10.0),
    "transformer": TransformerSettings(d_model=16, n_heads=2, d_feedforward=16, cutoff=3.5),
}
PRECISION = {"single": "float32", "double": "float64"}
TOLERANCE = {"single": 1e-6, "double": 1e-10}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a small potential of each family."""
    path = tmp_path_factory.mktemp("potentials")
    for name, settings in SETTINGS.items():
        with torch.random.fork_rng():
            torch.manual_seed(1)
            (path / name).mkdir()
            potential = build_potential(settings, SPECIES, toys.ISOLATED)
        save_checkpoint(path / name / "model.safetensors", potential, {})
    return path


def ethanol() -> Atoms:
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, rng=np.random.default_rng(0))
    return atoms


def box() -> Atoms:
    """Four molecules in a reduced triclinic box, shorter in one direction than twice the cutoff."""
    cell = np.array([[6.5, 0.0, 0.0], [1.5, 6.0, 0.0], [-0.7, 0.8, 6.2]])
    atoms = Atoms(cell=cell, pbc=True)
    for k, shift in enumerate(([0.5, 0.5, 0.5], [3.7, 0.8, 3.0], [1.0, 3.6, 3.4], [3.9, 3.8, 0.4])):
        water = molecule("H2O")
        water.rotate(40.0 * k, "x")
        water.positions += shift
        atoms += water
    return atoms


def topology_of(atoms: Atoms) -> Topology:
    topology = Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    for number in atoms.numbers:
        topology.addAtom("A", Element.getByAtomicNumber(int(number)), residue)
    if atoms.pbc.any():
        topology.setPeriodicBoxVectors((atoms.cell.array / 10) * unit.nanometer)
    return topology


def context_of(system: openmm.System, positions: np.ndarray) -> openmm.Context:
    # The reference platform computes in double precision; the others would round forces to single.
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(system, openmm.VerletIntegrator(0.0005), platform)
    context.setPositions(positions / 10)
    return context


def ask(context: openmm.Context) -> tuple[float, np.ndarray]:
    """Energy in eV and forces in eV/Å."""
    state = context.getState(energy=True, forces=True)
    energy = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole) * KJ_PER_MOL_IN_EV
    forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
    return energy, forces * KJ_PER_MOL_IN_EV / 10


def system_of(atoms, model, **options) -> openmm.System:
    options = {"device": "cpu", "selfCheck": False} | options
    return MLPotential("equimd", modelPath=model).createSystem(topology_of(atoms), **options)


def isolated(atoms: Atoms) -> float:
    return sum(toys.ISOLATED[int(z)] for z in atoms.numbers)


@pytest.fixture(autouse=True)
def _entry_point():
    """Registered by the entry point where equimd is installed; by hand where it only lies on the path."""
    MLPotential.registerImplFactory("equimd", EquimdPotentialImplFactory())


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


# --- serialisation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["xml", "copy", "pickle"])
def test_system_survives(folder, way, monkeypatch, tmp_path):
    atoms = box()
    # A relative path, then another working folder.
    monkeypatch.chdir(folder)
    system = system_of(atoms, "transformer", precision="double")
    monkeypatch.chdir(tmp_path)
    wanted = ask(context_of(system, atoms.positions))
    if way == "xml":
        text = openmm.XmlSerializer.serialize(system)
        assert len(text) < 20_000  # the potential itself is not in there
        other = openmm.XmlSerializer.deserialize(text)
    else:
        other = copy.deepcopy(system) if way == "copy" else pickle.loads(pickle.dumps(system))
    energy, forces = ask(context_of(other, atoms.positions))
    assert energy == wanted[0]
    np.testing.assert_array_equal(forces, wanted[1])


def test_system_is_read_by_another_process_without_an_import_of_ours(folder, tmp_path):
    atoms = ethanol()
    system = system_of(atoms, folder / "equivariant", precision="double")
    wanted = ask(context_of(system, atoms.positions))[0]
    (tmp_path / "system.xml").write_text(openmm.XmlSerializer.serialize(system))
    np.save(tmp_path / "x.npy", atoms.positions / 10)
    code = (
        "import numpy, openmm\n"
        "system = openmm.XmlSerializer.deserialize(open('system.xml').read())\n"
        "platform = openmm.Platform.getPlatformByName('Reference')\n"
        "context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)\n"
        "context.setPositions(numpy.load('x.npy'))\n"
        "print(context.getState(energy=True).getPotentialEnergy()._value)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert float(out.stdout) * KJ_PER_MOL_IN_EV == pytest.approx(wanted, rel=1e-12)


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
        ({"presicion": "single"}, "createSystem got presicion"),
        ({"device": "abacus"}, "device is 'abacus'"),
        ({"charge": 1}, "total charge is 1 e"),
        ({"multiplicity": 2}, "spin multiplicity is 2"),
    ],
)
def test_bad_options_are_refused(folder, options, says):
    with pytest.raises(InputError, match=says):
        system_of(ethanol(), folder / "equivariant", **options)


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
    with pytest.raises(openmm.OpenMMException, match="atoms 0 and 1 are 0 Å apart"):
        context.getState(energy=True)


def test_self_check_is_on_by_default():
    with pytest.raises(SelfCheckError):
        MLPotential("equimd", modelPath=toys.WrongForces()).createSystem(topology_of(ethanol()), device="cpu")
