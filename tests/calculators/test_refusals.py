"""Structures that mean nothing: refused by every way in, every time; what is to be ignored is ignored."""

import numpy as np
import pytest
import torch
import toys
from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import PropertyNotImplementedError
from network_problems import make_potential
from test_ase_calculator import calculator, crystal, ethanol, with_info, with_moments

from equimd.calculators.ase import EquimdCalculator
from equimd.errors import InputError
from equimd.frames import check_plausible, check_structure, read_list
from equimd.graph import edge_vectors, graph_from_arrays
from equimd.md import MDSettings, run_md


def box(symbols: str, positions, cell) -> Atoms:
    return Atoms(symbols, positions, cell=cell, pbc=True)


REFUSED_AGAIN = {
    "one place": Atoms("H2", [[0, 0, 0], [0, 0, 0.01]]),
    "its own image": box("H", [[0, 0, 0]], [0.05, 9, 9]),
    "dummy box": box("OH2", [[0, 0, 0], [0.9, 0, 0], [0, 0.9, 0]], [1, 1, 1]),
    "position": Atoms("H2", [[0, 0, 0], [0, 0, np.nan]]),
    "cell": box("H2", [[0, 0, 0], [0, 0, 1]], [9, np.inf, 9]),
    "charge": with_info(charge=1),
    "charge that is no number": with_info(charge=np.nan),
    "moments that are no numbers": with_moments(np.nan),
    "element": Atoms("U"),
}


@pytest.mark.parametrize("before", [None, "other atoms", "same elements"])
@pytest.mark.parametrize("atoms", REFUSED_AGAIN.values(), ids=REFUSED_AGAIN.keys())
@pytest.mark.parametrize("kind", [toys.ToyPotential, toys.DirectForces])
def test_what_is_refused_once_is_refused_again(kind, atoms, before):
    calc = calculator(kind)
    if before == "other atoms":
        calc.get_forces(crystal())
    elif before == "same elements" and len(atoms) < 4 and set(atoms.symbols) <= {"H", "O"}:
        spread = Atoms(atoms.numbers, 3.0 * np.arange(3 * len(atoms)).reshape(-1, 3), cell=[30] * 3, pbc=atoms.pbc)
        calc.get_forces(spread)
    for _ in range(3):
        with pytest.raises(InputError):
            calc.get_potential_energy(atoms)
        assert not calc.results
    assert calc.get_potential_energy(ethanol()) == calculator(kind).get_potential_energy(ethanol())


def test_what_is_refused_once_is_refused_again_by_compiled_networks():
    atoms = Atoms("OH2", [[0, 0, 0], [0.9, 0, 0], [0, 0.9, 0]])
    calc = EquimdCalculator(make_potential(), device="cpu", dtype="float64", self_check=False)
    calc.get_forces(atoms)
    assert calc.potential.has_frozen_network
    atoms.positions[2] = atoms.positions[1] + [0.01, 0, 0]
    for _ in range(3):
        with pytest.raises(InputError, match="atoms 1 and 2 are 0.01 Å apart"):
            calc.get_forces(atoms)


@pytest.mark.parametrize("vector", [[0, 0, np.inf], [np.nan] * 3, [0, np.nan, 9.0], [0, 0, 0], [0, 0, -np.inf]])
@pytest.mark.parametrize("make", [None, "frozen", "average", "canonical"])
def test_a_direction_that_is_not_periodic_is_ignored_whatever_it_holds(vector, make):
    slab = crystal(pbc=(True, True, False))
    wanted = slab.copy()
    slab.cell[2], wanted.cell[2] = vector, [0.0, 0.0, 50.0]
    if make == "frozen":
        slab.numbers, wanted.numbers = np.full((2, len(slab)), 8)
        calc = EquimdCalculator(make_potential(), device="cpu", dtype="float64", self_check=False)
    else:
        calc = calculator(symmetrize=make)
    energy, forces = calc.get_potential_energy(wanted), calc.get_forces(wanted)
    assert np.abs(forces).max() > 0.01
    calc.reset()
    assert calc.get_potential_energy(slab) == pytest.approx(energy, abs=1e-9)
    np.testing.assert_allclose(calc.get_forces(slab), forces, atol=1e-9)
    calls = calc._evaluator.n_calls
    calc.get_forces(slab)
    assert calc._evaluator.n_calls == calls  # NaN is no change
    with pytest.raises(PropertyNotImplementedError):  # no vector, no volume
        calc.get_stress(slab)
    several = calc.evaluate([slab, wanted])
    np.testing.assert_allclose(several.forces[0], forces, atol=1e-9)
    assert several.stresses[0] is None
    assert several.stresses[1] is not None
    turned = calc.evaluate_rotated(slab, np.eye(3)[None])
    np.testing.assert_allclose(turned.forces[0], forces, atol=1e-9)
    assert turned.stresses[0] is None
    graph = graph_from_arrays(slab.positions, slab.numbers, slab.cell.array, slab.pbc, 3.5)
    assert torch.isfinite(edge_vectors(graph, torch.float64)).all()
    check_structure(slab)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_periodic_direction_must_be_finite(value):
    atoms = crystal()
    atoms.cell[2, 0] = value
    calc = calculator()
    for call in (
        calc.get_forces,
        lambda a: calc.evaluate([a]),
        lambda a: calc.evaluate_rotated(a, np.eye(3)[None]),
        lambda a: graph_from_arrays(a.positions, a.numbers, a.cell.array, a.pbc, 3.0),
        check_structure,
    ):
        with pytest.raises(InputError, match="cell is"):
            call(atoms)


@pytest.mark.parametrize("wrong", [np.full((3, 3), np.nan), 2 * np.eye(3), np.diag([1.0, 1.0, np.inf])])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_rotations_that_are_none_are_refused(wrong):
    with pytest.raises(InputError, match="rotations times their transposes"):
        calculator().evaluate_rotated(ethanol(), wrong[None])


DUMMY = {
    "CRYST1 1 1 1": box("COH4", 0.7 * np.arange(18).reshape(6, 3), [1, 1, 1]),
    "two hydrogens": box("H2", [[0, 0, 0], [0, 0, 0.74]], [1, 1, 1]),
    "skewed": box("O", [[0, 0, 0]], [[9, 0, 0], [9, 1.0, 0], [0, 0, 9]]),
    "one direction": Atoms("C", cell=[1.2, 9, 9], pbc=(True, False, False)),
}


@pytest.mark.parametrize("atoms", DUMMY.values(), ids=DUMMY.keys())
def test_atoms_inside_their_own_images_are_refused(atoms):
    calc = calculator()
    for call in (calc.get_forces, lambda a: calc.evaluate([a]), check_structure):
        with pytest.raises(InputError, match="from its own periodic image.*set pbc=False") as caught:
            call(atoms)
        assert "\n" not in str(caught.value)
    assert any("own periodic image" in message for message in check_plausible([atoms]))


DENSE = {
    "aluminium": bulk("Al"),
    "diamond": bulk("C", "diamond", a=3.567),
    "iron at 360 GPa": bulk("Fe", "hcp", a=2.1, c=3.4),
    "caesium at 200 GPa": bulk("Cs", "fcc", a=4.1),
    "hydrogen at 500 GPa": box("H2", [[0, 0, 0], [0.6, 0.6, 0.75]], [1.2, 1.2, 3.0]),
    "molecular hydrogen": box("H2", [[0, 0, 0], [0, 0, 0.74]], [1.7, 1.7, 2.5]),
}


@pytest.mark.parametrize("atoms", DENSE.values(), ids=DENSE.keys())
def test_dense_crystals_are_accepted(atoms):
    check_structure(atoms)
    assert not any("own periodic image" in message for message in check_plausible([atoms]))
    species = tuple(set(atoms.numbers.tolist()))
    calc = EquimdCalculator(toys.ToyPotential(species=species), device="cpu", dtype="float64", self_check=False)
    calc.get_forces(atoms)


@pytest.mark.parametrize("third", [np.inf, np.nan])
def test_md_of_a_slab_whose_third_vector_means_nothing(third, tmp_path):
    runs = []
    for vector in ([0, 0, 0], [third] * 3):
        slab = crystal(pbc=(True, True, False))
        slab.cell[2] = vector
        path = tmp_path / f"{len(runs)}.h5"
        run_md(slab, calculator(), MDSettings(steps=2, stride=1, ensemble="nve"), path)
        runs.append(read_list(path))
    for frame, wanted in zip(*runs[::-1], strict=True):
        assert frame.get_potential_energy() == wanted.get_potential_energy()
        assert np.array_equal(frame.positions, wanted.positions)
