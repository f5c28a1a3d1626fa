"""Parts of a system by the potential, the rest by a force field: what openmm-ml promises of every potential."""

import numpy as np
import openmm
import pytest
from ase import Atoms
from ase.build import molecule
from openmm import app, unit
from openmm_systems import KJ_PER_MOL_IN_EV, ask, context_of, ethanol, isolated, save_potentials, system_of, topology_of
from openmmml import MLPotential

from equimd.calculators.ase import EquimdCalculator
from equimd.calculators.openmm_entry import EquimdPotentialImplFactory

OPTIONS = {"precision": "double", "device": "cpu", "selfCheck": False}
LENGTH = 20.0  # Å


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_potentials(tmp_path_factory.mktemp("potentials"))


@pytest.fixture(scope="module")
def potential(folder):
    return MLPotential("equimd", modelPath=folder / "transformer")


def waters(periodic: bool) -> Atoms:
    """Four molecules near each other, in the middle of the box."""
    atoms = Atoms(cell=[LENGTH] * 3, pbc=periodic)
    for k, place in enumerate(([-1.5, 0, 0], [1.6, 0.3, 0.2], [0.2, 3.1, 0.1], [0.1, 0.4, 3.2])):
        water = molecule("H2O")
        water.rotate(50.0 * k, "x")
        water.positions += np.array(place) + 10.0
        atoms += water
    return atoms


def water_topology(atoms: Atoms) -> app.Topology:
    topology = app.Topology()
    chain = topology.addChain()
    for k in range(0, len(atoms), 3):
        residue = topology.addResidue("HOH", chain)
        oxygen, *hydrogens = (
            topology.addAtom(name, app.Element.getBySymbol(symbol), residue)
            for name, symbol in zip(("O", "H1", "H2"), atoms.symbols[k : k + 3], strict=True)
        )
        for hydrogen in hydrogens:
            topology.addBond(oxygen, hydrogen)
    if atoms.pbc.any():
        topology.setUnitCellDimensions([LENGTH / 10] * 3 * unit.nanometer)
    return topology


def classical(atoms: Atoms, method=None, **options) -> openmm.System:
    if method is None:
        method = app.PME if atoms.pbc.any() else app.NoCutoff
    options = {"ewaldErrorTolerance": 1e-6, "useDispersionCorrection": False, "rigidWater": False} | options
    return app.ForceField("tip3p.xml").createSystem(water_topology(atoms), nonbondedMethod=method, **options)


def energy_of(system: openmm.System, atoms: Atoms, **parameters: float) -> float:
    context = context_of(system, atoms.positions)
    for name, value in parameters.items():
        context.setParameter(name, value)
    return ask(context)[0]


def own(folder, atoms: Atoms) -> float:
    """What the potential says of these atoms, in eV, by the other engine."""
    return EquimdCalculator(
        folder / "transformer", device="cpu", dtype="float64", self_check=False
    ).get_potential_energy(atoms)


# --- mechanical embedding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolate", [False, True])
@pytest.mark.parametrize("periodic", [False, True])
def test_energies_of_mechanical_embedding(folder, potential, periodic, interpolate):
    """E = E_MM(all) − E_MM(subset) + E_ML(subset), and the straight line to E_MM(all)."""
    atoms, subset = waters(periodic), list(range(6))
    everything = classical(atoms)
    mixed = potential.createMixedSystem(water_topology(atoms), everything, subset, interpolate=interpolate, **OPTIONS)
    mm, part = energy_of(everything, atoms), atoms[subset]
    alone = part.copy()
    alone.pbc = False
    wanted = mm - energy_of(classical(alone), alone) + own(folder, part)
    # The Ewald sum at its tolerance; nine digits of Coulomb's constant where openmmml interpolates.
    atol = 1e-5 if periodic else 1e-8
    assert abs(own(folder, part) - isolated(part)) > 0.01
    if not interpolate:
        assert energy_of(mixed, atoms) == pytest.approx(wanted, abs=atol, rel=0)
        return
    for share in (1.0, 0.25, 0.0):
        between = energy_of(mixed, atoms, lambda_interpolate=share)
        assert between == pytest.approx(share * wanted + (1 - share) * mm, abs=atol, rel=0)


@pytest.mark.parametrize("box_in_topology", [True, False])
@pytest.mark.parametrize("interpolate", [False, True])
def test_a_subset_is_periodic_if_the_system_is(folder, potential, interpolate, box_in_topology):
    """Molecules of the subset that are boxes apart see each other's images, whoever knows the box."""
    atoms, subset = waters(True), list(range(6))
    atoms.positions[3:6] += LENGTH * np.array([1.0, -2.0, 0.0])
    topology, everything = water_topology(atoms), classical(atoms)
    if not box_in_topology:
        topology.setPeriodicBoxVectors(None)
    before = topology.getPeriodicBoxVectors()
    mixed = potential.createMixedSystem(topology, everything, subset, interpolate=interpolate, forceGroup=0, **OPTIONS)
    assert topology.getPeriodicBoxVectors() == before
    whole = waters(True)
    wanted = potential.createMixedSystem(water_topology(whole), classical(whole), subset, **OPTIONS)
    assert energy_of(mixed, atoms) == pytest.approx(energy_of(wanted, whole), abs=1e-8, rel=0)
    # Negative twin: a potential that did not see images would give another energy.
    apart = atoms[subset]
    apart.pbc = False
    assert abs(own(folder, apart) - own(folder, whole[subset])) > 1e-2


@pytest.mark.parametrize("remove", [True, False])
def test_constraints_within_the_subset(potential, remove):
    atoms = waters(True)
    everything = classical(atoms, rigidWater=True)
    mixed = potential.createMixedSystem(
        water_topology(atoms), everything, range(6), removeConstraints=remove, **OPTIONS
    )
    pairs = {tuple(mixed.getConstraintParameters(k)[:2]) for k in range(mixed.getNumConstraints())}
    kept = {pair for pair in pairs if max(pair) < 6}
    assert everything.getNumConstraints() == 12
    assert len(kept) == (0 if remove else 6)
    assert len(pairs - kept) == 6


def test_the_force_has_its_group_and_its_period(potential):
    atoms = waters(True)
    mixed = potential.createMixedSystem(water_topology(atoms), classical(atoms), range(6), forceGroup=5, **OPTIONS)
    force = next(f for f in mixed.getForces() if f.getName() == "EquimdForce")
    assert force.getForceGroup() == 5
    assert force.usesPeriodicBoundaryConditions()
    assert list(force.getParticles()) == list(range(6))
    context = context_of(mixed, atoms.positions)
    groups = [context.getState(energy=True, groups={k}).getPotentialEnergy()._value for k in (0, 5)]
    assert sum(groups) == pytest.approx(context.getState(energy=True).getPotentialEnergy()._value, rel=1e-12)
    assert groups[1] != 0


def test_what_openmmml_asks_and_gives(potential):
    atoms = waters(True)
    topology, everything = water_topology(atoms), classical(atoms)
    assert "mechanical" in potential.getSupportedEmbeddings()
    assert potential._impl.getMLLongRange() is False
    with pytest.raises(ValueError, match="mlLongRange"):
        potential.createMixedSystem(topology, everything, range(3), mlLongRange=True, **OPTIONS)
    info = potential.createMixedSystem(topology, everything, range(3), returnInfo=True, **OPTIONS)
    assert set(info) == {"system", "topology", "oldToNew"}
    assert info["oldToNew"] == list(range(12))
    assert info["topology"].getNumAtoms() == info["system"].getNumParticles() == 12


# --- link atoms ------------------------------------------------------------------------------------------------------


def bonded_ethanol() -> tuple[Atoms, app.Topology, openmm.System]:
    """Ethanol whose classical part is one spring between the carbons and one between C and O."""
    atoms = ethanol()
    topology = topology_of(atoms)
    listed = list(topology.atoms())
    distances = atoms.get_all_distances()
    for i in range(9):
        for j in range(i):
            if distances[i, j] < (1.7 if {atoms.numbers[i], atoms.numbers[j]}.isdisjoint({1}) else 1.3):
                topology.addBond(listed[j], listed[i])
    system = openmm.System()
    for mass in atoms.get_masses():
        system.addParticle(mass)
    springs = openmm.HarmonicBondForce()
    springs.addBond(0, 1, 0.12, 1000.0)
    springs.addBond(1, 2, 0.13, 1000.0)
    system.addForce(springs)
    return atoms, topology, system


@pytest.mark.parametrize("interpolate", [False, True])
@pytest.mark.parametrize("distance", [None, 1.3])
def test_link_atoms(folder, potential, distance, interpolate):
    """A cut C–C bond is capped by hydrogen: at the covalent distance (0.75 + 0.32 Å) or where the user says."""
    atoms, topology, system = bonded_ethanol()
    methyl = [k for k in range(9) if atoms.get_distance(0, k) < 1.3]
    assert sorted(atoms.symbols[methyl]) == ["C", "H", "H", "H"]
    assert methyl[0] == 0
    options = {} if distance is None else {"linkAtomDistances": [(0, 1, distance * unit.angstrom)]}
    info = potential.createMixedSystem(
        topology, system, methyl, returnInfo=True, interpolate=interpolate, **options, **OPTIONS
    )
    direction = atoms.positions[1] - atoms.positions[0]
    length = np.linalg.norm(direction)

    def capped(positions: np.ndarray) -> Atoms:
        bond = positions[1] - positions[0]
        cap = positions[0] + (distance or 1.07) * bond / np.linalg.norm(bond)
        return Atoms([*atoms.symbols[methyl], "H"], np.concatenate([positions[methyl], [cap]]))

    def springs(positions: np.ndarray) -> float:
        ends = [np.linalg.norm(positions[1] - positions[0]) / 10, np.linalg.norm(positions[2] - positions[1]) / 10]
        return 500.0 * ((ends[0] - 0.12) ** 2 + (ends[1] - 0.13) ** 2) * KJ_PER_MOL_IN_EV

    assert length > 1.4
    context = context_of(info["system"], np.concatenate([atoms.positions, [[0, 0, 0]]]))
    context.computeVirtualSites()
    energy, forces = ask(context)
    wanted = own(folder, capped(atoms.positions)) + springs(atoms.positions)
    assert energy == pytest.approx(wanted, rel=1e-12)
    # The cap's force goes to the atoms that hold it: on the classical carbon, the slope of the whole energy.
    step = np.array([1e-4, -2e-4, 1.5e-4])
    ends = []
    for sign in (1, -1):
        moved = atoms.positions.copy()
        moved[1] += sign * step
        ends.append(own(folder, capped(moved)) + springs(moved))
    assert (ends[0] - ends[1]) / 2 == pytest.approx(-forces[1] @ step, abs=1e-9)  # third order in the step


# --- subsets in any kind of system -----------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", ["Reference", "CPU"])
@pytest.mark.parametrize("system_periodic", ["no", "before", "after"])
@pytest.mark.parametrize("box_in_topology", [True, False])
def test_a_subset_has_the_right_positions(folder, platform, system_periodic, box_in_topology):
    """Whoever is periodic, and whenever it became so; some atoms are several boxes away."""
    atoms, chosen = waters(box_in_topology), [3, 4, 5, 0, 1, 2]
    atoms.positions[chosen] += LENGTH * np.array([2.0, -3.0, 1.0])
    system = openmm.System()
    for mass in atoms.get_masses():
        system.addParticle(mass)
    system.setDefaultPeriodicBoxVectors(*(np.eye(3) * LENGTH / 10))
    others = openmm.NonbondedForce()
    others.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
    others.setCutoffDistance(0.9)
    for _ in atoms:
        others.addParticle(0.0, 0.1, 0.0)
    if system_periodic == "before":
        system.addForce(others)
    impl = EquimdPotentialImplFactory().createImpl("equimd", modelPath=folder / "transformer")
    impl.addForces(water_topology(atoms), system, chosen, 0, **OPTIONS)
    if system_periodic == "after":
        system.addForce(others)
    force = next(f for f in system.getForces() if f.getName() == "EquimdForce")
    periodic = box_in_topology or system_periodic == "before"
    assert force.usesPeriodicBoundaryConditions() == periodic
    # OpenMM 8.6.1 gives wrong positions of a subset to a force that is not periodic in a system that is.
    assert bool(list(force.getParticles())) == periodic
    context = openmm.Context(system, openmm.VerletIntegrator(0.0005), openmm.Platform.getPlatformByName(platform))
    context.setPositions(atoms.positions / 10)
    energy, forces = ask(context)
    part = atoms[chosen]
    part.pbc = periodic
    calc = EquimdCalculator(folder / "transformer", device="cpu", dtype="float64", self_check=False)
    # The CPU platform holds positions and forces in single precision.
    atol = 1e-4 if platform == "CPU" else 1e-9
    np.testing.assert_allclose(forces[chosen], calc.get_forces(part), rtol=0, atol=atol)
    assert energy == pytest.approx(calc.get_potential_energy(part), abs=atol, rel=0)
    assert not np.delete(forces, chosen, axis=0).any()


def test_energies_inside_a_collective_variable(folder):
    atoms = waters(True)
    system = system_of(atoms, folder / "transformer", precision="double")
    force = next(f for f in system.getForces() if f.getName() == "EquimdForce")
    collective = openmm.CustomCVForce("a*x")
    collective.addGlobalParameter("a", 2.0)
    collective.addCollectiveVariable("x", openmm.XmlSerializer.clone(force))
    outer = openmm.System()
    for mass in atoms.get_masses():
        outer.addParticle(mass)
    outer.setDefaultPeriodicBoxVectors(*(np.eye(3) * LENGTH / 10))
    outer.addForce(collective)
    assert outer.usesPeriodicBoundaryConditions()
    calc = EquimdCalculator(folder / "transformer", device="cpu", dtype="float64", self_check=False)
    energy, forces = ask(context_of(outer, atoms.positions))
    assert energy == pytest.approx(2 * calc.get_potential_energy(atoms), rel=1e-12)
    np.testing.assert_allclose(forces, 2 * calc.get_forces(atoms), atol=1e-9)


def test_a_translation_through_the_box_changes_nothing(folder):
    atoms = waters(True)
    context = context_of(system_of(atoms, folder / "transformer", precision="double"), atoms.positions)
    first = ask(context)[0]
    for k in (1, 2):
        context.setPositions((atoms.positions + 9.0 * k) / 10)
        assert ask(context)[0] - isolated(atoms) == pytest.approx(first - isolated(atoms), rel=1e-9)


# --- barostat --------------------------------------------------------------------------------------------------------


def test_molecules_that_a_barostat_sees(potential, folder):
    """What docs/openmm.md says: lone atoms in the subset, molecules elsewhere; one subset with interpolation."""
    atoms = waters(True)
    pure = system_of(atoms, folder / "transformer")
    mixed = [
        potential.createMixedSystem(water_topology(atoms), classical(atoms), range(6), interpolate=k, **OPTIONS)
        for k in (False, True)
    ]
    counts = [len(context_of(system, np.resize(atoms.positions, (12, 3))).getMolecules()) for system in (pure, *mixed)]
    assert counts == [12, 6 + 2, 1 + 2]


@pytest.mark.parametrize("rigid", [True, False])
def test_a_barostat_changes_the_box_that_is_evaluated(folder, rigid):
    atoms = waters(True)
    system = system_of(atoms, folder / "transformer", precision="double")
    barostat = openmm.MonteCarloBarostat(1.0, 300.0, 1, rigid)
    barostat.setRandomNumberSeed(1)
    system.addForce(barostat)
    context = context_of(system, atoms.positions)
    context.setVelocitiesToTemperature(300.0, 1)
    context.getIntegrator().step(20)
    state = context.getState(positions=True, energy=True)
    after = atoms.copy()
    after.set_cell(10 * state.getPeriodicBoxVectors(asNumpy=True)._value)
    after.positions = 10 * state.getPositions(asNumpy=True)._value
    assert abs(after.get_volume() / atoms.get_volume() - 1) > 1e-3
    calc = EquimdCalculator(folder / "transformer", device="cpu", dtype="float64", self_check=False)
    assert state.getPotentialEnergy()._value * KJ_PER_MOL_IN_EV == pytest.approx(
        calc.get_potential_energy(after), rel=1e-12
    )
