"""Contexts of one System, in threads and in turns: each gets the answer to its own positions and box."""

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import openmm
import pytest
from openmm_systems import SETTINGS, ask, box, context_of, ethanol, isolated, save_potentials, system_of

from equimd.calculators import loading, openmm_force
from equimd.calculators.ase import EquimdCalculator
from equimd.calculators.openmm import EquimdForce

N_CONTEXTS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_potentials(tmp_path_factory.mktemp("potentials"))


def frames(k: int, count: int) -> list:
    """Structures for the k-th Context: each Context has a box of its own, and moves within the Verlet skin."""
    rng, out = np.random.default_rng(k), []
    for _ in range(count):
        atoms = box()
        atoms.set_cell(atoms.cell.array * (1.0 + 0.03 * k), scale_atoms=True)
        atoms.positions += rng.normal(scale=0.03, size=atoms.positions.shape)
        out.append(atoms)
    return out


def run(context: openmm.Context, structures: list) -> list[tuple[float, np.ndarray]]:
    out = []
    for atoms in structures:
        context.setPositions(atoms.positions / 10)
        context.setPeriodicBoxVectors(*(atoms.cell.array / 10))
        out.append(ask(context))
    return out


def compare(found: list, structures: list, calc: EquimdCalculator) -> None:
    for (energy, forces), atoms in zip(found, structures, strict=True):
        wanted = calc.get_forces(atoms)
        # Other order of summation, in float64.
        np.testing.assert_allclose(forces, wanted, rtol=0, atol=1e-10 * np.abs(wanted).max())
        relative = calc.get_potential_energy(atoms) - isolated(atoms)
        assert energy - isolated(atoms) == pytest.approx(relative, rel=1e-9)


@pytest.mark.parametrize("copied", [False, True], ids=["original", "copy"])
@pytest.mark.parametrize("family", SETTINGS)
def test_contexts_of_one_system_run_in_threads(folder, family, copied):
    system = system_of(box(), folder / family, precision="double")
    if copied:
        system = copy.deepcopy(system)
    contexts = [context_of(system, box().positions) for _ in range(N_CONTEXTS)]
    structures = [frames(k, 25) for k in range(N_CONTEXTS)]
    together = Barrier(N_CONTEXTS)

    def work(k: int) -> list:
        together.wait()
        return run(contexts[k], structures[k])

    with ThreadPoolExecutor(N_CONTEXTS) as pool:
        found = list(pool.map(work, range(N_CONTEXTS)))
    calc = EquimdCalculator(folder / family, device="cpu", dtype="float64", self_check=False)
    for k in range(N_CONTEXTS):
        compare(found[k], structures[k], calc)


def test_contexts_of_one_system_take_turns(folder):
    """In one thread: Contexts at the same positions in other boxes, asked for energy and forces in any order."""
    system = system_of(box(), folder / "transformer", precision="double")
    structures = []
    for k in range(N_CONTEXTS):
        atoms = box()
        atoms.set_cell(atoms.cell.array * (1.0 + 0.03 * k))
        structures.append(atoms)
    contexts = [context_of(system, atoms.positions) for atoms in structures]
    for context, atoms in zip(contexts, structures, strict=True):
        context.setPeriodicBoxVectors(*(atoms.cell.array / 10))
    calc = EquimdCalculator(folder / "transformer", device="cpu", dtype="float64", self_check=False)
    for _ in range(2):
        compare([ask(context) for context in contexts], structures, calc)
    energies = [context.getState(energy=True).getPotentialEnergy()._value for context in contexts]
    assert len(set(energies)) == N_CONTEXTS


def test_dynamics_in_threads_is_that_of_one_thread(folder):
    def trajectory(seed: int) -> np.ndarray:
        context = context_of(system, frames(seed, 1)[0].positions)
        context.setVelocitiesToTemperature(300.0, seed)
        context.getIntegrator().step(20)
        return context.getState(positions=True).getPositions(asNumpy=True)._value

    system = system_of(box(), folder / "equivariant", precision="double")
    alone = [trajectory(seed) for seed in (1, 2, 3)]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(trajectory, (1, 2, 3)))
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-9)  # nm; order of summation over 20 steps


def test_a_copy_that_many_threads_use_first_is_loaded_once(folder, monkeypatch):
    system = copy.deepcopy(system_of(ethanol(), folder / "transformer"))
    contexts = [context_of(system, ethanol().positions) for _ in range(4)]
    right, loaded, together = loading.resolve, [], Barrier(4)

    def resolve(*args):
        loaded.append(args)
        return right(*args)

    monkeypatch.setattr(loading, "resolve", resolve)

    def work(context: openmm.Context) -> float:
        together.wait()
        return ask(context)[0]

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(work, contexts))) == 1
    assert len(loaded) == 1


def test_lists_of_threads_that_ended_do_not_pile_up(folder, monkeypatch):
    monkeypatch.setattr(openmm_force, "_MAX_THREADS", 2)
    compute = EquimdForce(folder / "transformer", ethanol().numbers, device="cpu")
    together = Barrier(5)

    def work(_: int) -> object:
        together.wait()
        return compute.prepare()

    with ThreadPoolExecutor(5) as pool:
        made = list(pool.map(work, range(5)))  # held, so that no two can be at one place
        assert len({id(one) for one in made}) == 5
    assert len(compute._scratch) == 2


def test_positions_box_and_parameters_that_change_are_seen(folder):
    """Every way to change a Context between two questions."""
    atoms = box()
    system = system_of(atoms, folder / "transformer", precision="double")
    force = openmm.CustomExternalForce("k*x")
    force.addGlobalParameter("k", 0.0)
    force.addParticle(0, [])
    system.addForce(force)
    context = context_of(system, atoms.positions)
    calc = EquimdCalculator(folder / "transformer", device="cpu", dtype="float64", self_check=False)

    def check(other) -> None:
        compare([ask(context)], [other], calc)

    check(atoms)
    context.setParameter("k", 100.0)
    assert ask(context)[0] != pytest.approx(calc.get_potential_energy(atoms), rel=1e-9)
    context.setParameter("k", 0.0)
    check(atoms)
    moved = atoms.copy()
    moved.positions[0, 0] = np.nextafter(moved.positions[0, 0], np.inf) + 1e-9
    context.setPositions(moved.positions / 10)
    check(moved)
    state = context.getState(positions=True, velocities=True)
    larger = atoms.copy()
    larger.set_cell(1.1 * atoms.cell.array)
    context.setPositions(larger.positions / 10)
    context.setPeriodicBoxVectors(*(larger.cell.array / 10))
    check(larger)
    context.setState(state)
    check(moved)
    context.reinitialize(preserveState=True)
    check(moved)
    context.setPositions(np.full_like(atoms.positions, np.nan))
    with pytest.raises(openmm.OpenMMException, match="^InputError: "):
        ask(context)
    context.setPositions(atoms.positions / 10)
    check(atoms)
