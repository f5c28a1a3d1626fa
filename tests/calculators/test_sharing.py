"""Calculators and potentials in several threads, in worker processes and in copies: nothing that changes is shared."""

import copy
import ctypes
import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
import toys
from ase import Atoms
from ase.build import molecule
from network_problems import make_graph, make_potential

from equimd.calculators.ase import EquimdCalculator
from equimd.calculators.evaluator import Evaluator, Structure
from equimd.models.ensemble import EnsemblePotential
from equimd.models.symmetrized import SymmetrizedPotential


def calculator(**options) -> EquimdCalculator:
    return EquimdCalculator(toys.ToyPotential(), device="cpu", dtype="float64", self_check=False, **options)


def rattled(n: int) -> list[Atoms]:
    frames = [molecule("CH3CH2OH") for _ in range(n)]
    for k, atoms in enumerate(frames):
        atoms.rattle(0.05, rng=np.random.default_rng(k))
    return frames


def sent(thing):
    """As multiprocessing hands it to a worker."""
    return pickle.loads(ForkingPickler.dumps(thing))


def tensors(thing, found=None, seen=None):
    """Every tensor that can be reached from an object; compiled functions hold none, but all of LLVM."""
    found, seen = ({}, set()) if found is None else (found, seen)
    if id(thing) in seen or isinstance(thing, ctypes._CFuncPtr):
        return found
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        found[thing.untyped_storage().data_ptr()] = thing
    elif isinstance(thing, dict):
        for value in thing.values():
            tensors(value, found, seen)
    elif isinstance(thing, list | tuple | set):
        for value in thing:
            tensors(value, found, seen)
    elif hasattr(thing, "__dict__") and not isinstance(thing, type):
        tensors(vars(thing), found, seen)
    return found


def in_use(kind):
    """Something that has computed, and so has whatever it keeps between calls."""
    if kind.startswith("calculator"):
        calc = calculator(symmetrize="average" if kind.endswith("average") else None)
        calc.get_forces(rattled(1)[0])
        return calc
    if kind == "graph":
        graph = make_graph(third=8)
        SymmetrizedPotential(toys.ToyPotential(), "average", degree=3)(graph)
        return graph
    if kind == "evaluator":
        atoms, evaluator = rattled(1)[0], Evaluator(toys.ToyPotential())
        evaluator.evaluate(Structure(atoms.positions, atoms.numbers, atoms.cell.array, atoms.pbc))
        return evaluator
    frozen = make_potential()
    potential = {
        "frozen": lambda: frozen,
        "average": lambda: SymmetrizedPotential(toys.ToyPotential(), "average", degree=3),
        "ensemble": lambda: EnsemblePotential([frozen, make_potential()]),
    }[kind]()
    potential(make_graph(third=8))
    return potential


KINDS = ["calculator", "calculator, average", "evaluator", "frozen", "average", "ensemble", "graph"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_shares_no_memory(kind):
    thing = in_use(kind)
    assert tensors(thing)
    other = sent(thing)
    for one in (thing, other):
        assert not any(tensor.is_shared() for tensor in tensors(one).values())
    assert not tensors(thing).keys() & tensors(other).keys()


def test_the_comparison_would_notice():
    """Negative twin: what torch does to a module that is not ours."""
    thing = torch.nn.Linear(2, 2)
    assert all(tensor.is_shared() for tensor in tensors(sent(thing)).values())


@pytest.mark.parametrize("copied", [sent, copy.deepcopy, copy.copy], ids=["pickle", "deepcopy", "copy"])
def test_copies_of_a_calculator_compute_apart(copied):
    first, second = rattled(2)
    calc = calculator()
    wanted = [calculator().get_forces(atoms) for atoms in (first, second)]
    calc.get_forces(first)
    other = copied(calc)
    assert not other.results
    assert other.atoms is None
    assert other.fingerprint() == calc.fingerprint()
    assert other._base is other.potential
    assert np.array_equal(other.get_forces(second), wanted[1])
    assert np.array_equal(calc.results["forces"], wanted[0])
    first.positions[0, 0] += 0.01  # within the skin: the graph that is kept is written to
    assert np.array_equal(calc.get_forces(first), calculator().get_forces(first))
    assert np.array_equal(other.get_forces(second), wanted[1])


@pytest.mark.parametrize("copied", [sent, copy.deepcopy, copy.copy], ids=["pickle", "deepcopy", "copy"])
@pytest.mark.parametrize("kind", ["frozen", "average", "ensemble"])
def test_copies_of_a_potential_predict_the_same(kind, copied):
    potential = in_use(kind)
    graph = make_graph(third=8)
    assert torch.equal(copied(potential)(graph).forces, potential(graph).forces)


def test_weights_of_a_copy_are_its_own():
    potential = make_potential()
    before = potential(make_graph()).energy.clone()
    for copied in (sent, copy.deepcopy):
        other = copied(potential)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.5)
        assert not torch.equal(other(make_graph()).energy, before)
        assert torch.equal(potential(make_graph()).energy, before)


def test_a_wrapped_calculator_keeps_its_parts_together():
    calc = sent(in_use("calculator, average"))
    assert calc._base is calc.potential.inner
    assert calc.with_dtype("float32").dtype == "float32"


def _forces(job):
    calc, atoms = job
    return calc.get_forces(atoms)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="there is no fork on Windows")
@pytest.mark.filterwarnings("ignore:This process .*is multi-threaded:DeprecationWarning")
def test_a_forked_pool_is_right_and_ends_after_openmp_was_used(set_threads):
    """OpenMP's threads do not survive a fork: a worker that asks for them waits for ever."""
    set_threads(2)
    torch.exp(torch.ones(1_000_000))  # starts them
    calc, frames = calculator(), rattled(6)
    calc.get_forces(frames[0])
    wanted = [calculator().get_forces(atoms) for atoms in frames]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map_async(_forces, [(calc, atoms) for atoms in frames]).get(timeout=60)
        threads = pool.apply_async(_large, (make_transformer_graph(),)).get(timeout=60)
    for got, right in zip(found, wanted, strict=True):
        assert np.array_equal(got, right)
    assert threads == 2  # the worker's setting is as it was


def make_transformer_graph():
    """Large enough for torch to share the work among threads: 32,768 elements are its least."""
    return make_graph(n=125, length=12.0, third=8)


def _large(graph):
    toys.ToyPotential()(graph)
    return torch.get_num_threads()


def test_threads_share_a_calculator():
    frames, calc = rattled(12), calculator()
    wanted = [calculator().get_forces(atoms) for atoms in frames]
    energies = [calculator().get_potential_energy(atoms) for atoms in frames]

    def work(k):
        atoms = frames[k].copy()
        atoms.calc = calc
        forces, energy = atoms.get_forces(), atoms.get_potential_energy()
        return np.array_equal(forces, wanted[k]) and energy == energies[k]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, [k % 12 for k in range(120)]))


def test_threads_share_an_evaluator():
    frames = rattled(8)
    structures = [Structure(a.positions, a.numbers, a.cell.array, a.pbc) for a in frames]
    evaluator = Evaluator(toys.ToyPotential())
    wanted = [Evaluator(toys.ToyPotential()).evaluate(s).energy for s in structures]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(evaluator.evaluate, structures * 10))
    assert [outcome.energy for outcome in found] == wanted * 10


@pytest.mark.parametrize("mode", ["average", "canonical"])
def test_threads_share_a_symmetrized_potential_and_a_graph(mode):
    potential = SymmetrizedPotential(toys.ToyPotential(), mode, **({"degree": 3} if mode == "average" else {}))
    graph = make_graph(third=8)
    wanted = potential(graph).forces
    potential.max_edges = graph.n_edges  # one rotation at a time, so that copies are made often
    one_by_one = potential(graph).forces
    torch.testing.assert_close(one_by_one, wanted, rtol=1e-5, atol=1e-6)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: potential(graph).forces, range(12)))
    assert all(torch.equal(forces, one_by_one) for forces in found)


def test_threads_make_calculators_of_one_potential():
    frames, potential = rattled(8), make_potential()
    waters = [Atoms("OH2", atoms.positions[:3]) for atoms in frames]

    def work(atoms):
        return EquimdCalculator(potential, device="cpu", self_check=False).get_potential_energy(atoms)

    wanted = [work(atoms) for atoms in waters]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, waters * 3)) == wanted * 3


def test_random_rotations_are_drawn_once_each():
    potential = SymmetrizedPotential(toys.ToyPotential(), "random")
    graph = make_graph(third=8)
    with ThreadPoolExecutor(4) as pool:
        found = {float(energy) for energy in pool.map(lambda _: potential(graph).energies.sum(), range(40))}
    assert potential.n_calls == 40
    assert len(found) == 40


def test_rotated_copies_notice_other_elements_on_the_same_edges():
    potential, graph = SymmetrizedPotential(toys.ToyPotential(), "average", degree=3), make_graph(third=8)
    before = potential(graph).energy
    graph.atomic_numbers = torch.ones_like(graph.atomic_numbers)
    after = potential(graph).energy
    fresh = make_graph(third=8)
    fresh.atomic_numbers = graph.atomic_numbers
    assert torch.equal(after, potential(fresh).energy)
    assert not torch.equal(before, after)
