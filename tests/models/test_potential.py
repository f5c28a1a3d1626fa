"""Energy, forces, stress and their conventions, derived once in the base class."""

import numpy as np
import pytest
import torch
import toys

from equimd.errors import InputError
from equimd.graph import batch_graphs, graph_from_arrays
from equimd.models.potential import Potential, PotentialSettings

CELL = np.array([[4.6, 0.4, -0.3], [1.1, 4.5, 0.2], [-0.7, 0.8, 5.0]])
STEP = 1e-4  # central differences: truncation about 1e-8 relative, rounding 1e-11 eV/Å in float64


class Case:
    """A structure whose positions and cell can be changed."""

    def __init__(self, seed=0, n=5, pbc=(True, True, True), cell=CELL, spread=1.0):
        rng = np.random.default_rng(seed)
        grid = np.array([[x, y, z] for x in (0.1, 0.6) for y in (0.2, 0.7) for z in (0.1, 0.6)])
        self.positions = (grid[rng.permutation(8)[:n]] + 0.08 * rng.random((n, 3))) @ CELL * spread
        self.numbers = rng.choice([1, 6, 8], n)
        self.cell, self.pbc = np.array(cell), np.array(pbc)

    def graph(self, positions=None, cell=None, cutoff=4.0):
        return graph_from_arrays(
            self.positions if positions is None else positions,
            self.numbers,
            self.cell if cell is None else cell,
            self.pbc,
            cutoff,
        )


def potential(**options):
    return toys.ToyPotential(**options).to(torch.float64)


CELLS = {
    "cubic": 5.0 * np.eye(3),
    "triclinic": CELL,
    "left-handed": CELL[[1, 0, 2]],
    "smaller than the cutoff": 0.8 * CELL,
}


@pytest.mark.parametrize("zbl", [False, True])
@pytest.mark.parametrize("pbc", [(True, True, True), (True, False, True), (False, False, False)])
def test_forces_are_minus_the_gradient_of_the_energy(pbc, zbl):
    model, case = potential(zbl=zbl), Case(pbc=pbc)
    forces = model(case.graph()).forces.numpy()
    for k in range(3 * len(case.numbers)):
        ends = []
        for sign in (1, -1):
            moved = case.positions.copy()
            moved.flat[k] += sign * STEP
            ends.append(float(model(case.graph(moved)).energy))
        assert forces.flat[k] == pytest.approx((ends[1] - ends[0]) / (2 * STEP), abs=1e-6 * np.abs(forces).max())


def strain_derivative(model, case):
    """V⁻¹ ∂E/∂ε_ab with r' = r (I + ε), all nine components."""
    wanted = np.zeros((3, 3))
    for a in range(3):
        for b in range(3):
            ends = []
            for sign in (1, -1):
                deform = np.eye(3)
                deform[a, b] += sign * STEP
                ends.append(float(model(case.graph(case.positions @ deform, case.cell @ deform)).energy))
            wanted[a, b] = (ends[0] - ends[1]) / (2 * STEP)
    return wanted / abs(np.linalg.det(case.cell))


@pytest.mark.parametrize("anisotropy", [0.0, 0.3])
@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS.keys())
def test_stress_is_the_strain_derivative_of_the_energy(cell, anisotropy):
    model, case = potential(anisotropy=anisotropy), Case(cell=cell)
    stress = model(case.graph(), stress=True).stress[0].numpy()
    wanted = strain_derivative(model, case)
    np.testing.assert_allclose(stress, wanted, atol=1e-6 * np.abs(wanted).max())
    # Antisymmetric where the potential is not invariant: the raw tensor keeps the torque.
    skew = np.abs(stress - stress.T).max() / np.abs(stress).max()
    assert skew > 1e-3 if anisotropy else skew < 1e-12


def test_stress_of_a_slab_with_vacuum():
    case = Case(pbc=(True, True, False))
    case.cell[2] = [0.0, 0.0, 30.0]
    model = potential()
    stress = model(case.graph(), stress=True).stress[0].numpy()
    np.testing.assert_allclose(stress, strain_derivative(model, case), atol=1e-9)


@pytest.mark.parametrize(("broken", "part"), [(toys.WrongForces, "forces"), (toys.WrongStress, "stress")])
def test_finite_differences_would_notice(broken, part):
    """Negative twin: the same comparison with 1 % wrong forces, with a stress of the other sign."""
    model, case = broken().to(torch.float64), Case()
    if part == "stress":
        stress = model(case.graph(), stress=True).stress[0].numpy()
        assert np.abs(stress - strain_derivative(model, case)).max() > np.abs(stress).max()
    else:
        forces = model(case.graph()).forces.numpy()
        k = int(np.abs(forces).argmax())
        moved = [case.positions.copy(), case.positions.copy()]
        moved[0].flat[k] += STEP
        moved[1].flat[k] -= STEP
        up, down = (float(model(case.graph(x)).energy) for x in moved)
        assert abs(forces.flat[k] + (up - down) / (2 * STEP)) > 1e-3 * abs(forces.flat[k])


def test_tension_is_positive():
    """A crystal that pulls its boundary inwards has positive stress in ASE's convention."""

    class Attraction(Potential):
        family = "toy"

        def network(self, graph, vectors):
            pair = vectors.square().sum(1)  # energy falls when the cell shrinks
            return vectors.new_zeros(graph.n_atoms).index_add(0, graph.edge_index[0], pair)

    model = Attraction(PotentialSettings(cutoff=4.0, zbl=False), (1,), {1: 0.0}).to(torch.float64)
    graph = graph_from_arrays(np.zeros((1, 3)), np.ones(1), 3.0 * np.eye(3), np.ones(3, dtype=bool), 3.5)
    stress = model(graph, stress=True).stress[0].numpy()
    np.testing.assert_allclose(stress, np.eye(3) * 2 * 2 * 9.0 / 27.0, atol=1e-12)


def test_batch_gives_what_its_parts_give():
    cases = [Case(0, n=3), Case(1, n=6), Case(2, n=4, cell=0.9 * CELL), Case(3, n=1)]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model = toys.ToyPotential().to(dtype)
        graphs = [case.graph() for case in cases]
        together = model(batch_graphs(graphs), stress=True)
        apart = [model(graph, stress=True) for graph in graphs]
        for k, name in enumerate(("energy", "energies", "forces", "stress")):
            wanted = torch.cat([prediction[k] for prediction in apart])
            torch.testing.assert_close(getattr(together, name), wanted, rtol=tolerance, atol=tolerance, msg=name)


def test_stress_without_a_cell_is_nan_and_spoils_nobody_else():
    molecule, crystal = Case(0, pbc=(False,) * 3, cell=np.zeros((3, 3))), Case(1)
    model = potential()
    stress = model(batch_graphs([molecule.graph(), crystal.graph()]), stress=True).stress
    assert stress[0].isnan().all()
    torch.testing.assert_close(stress[1:], model(crystal.graph(), stress=True).stress)


def test_totals_are_summed_in_double_precision():
    """10⁴ eV of isolated atoms do not cost the digits of the interaction."""
    model, case = toys.ToyPotential(), Case(n=8)
    prediction = model(case.graph())
    assert prediction.energy.dtype == prediction.energies.dtype == torch.float64
    isolated = sum(toys.ISOLATED[int(z)] for z in case.numbers)
    assert float(prediction.energy) - isolated == pytest.approx(float(prediction.energies.sum()), abs=1e-10)
    exact = float(potential()(case.graph()).energies.sum())
    assert float(prediction.energies.sum()) == pytest.approx(exact, rel=1e-6)


def test_isolated_atom_energies_survive_changes_of_precision():
    model = toys.ToyPotential(species=(1,)).to(torch.float16).to(torch.float32).to(torch.float64)
    assert model.isolated_atom_energies == {1: toys.ISOLATED[1]}


def test_scale_and_shift_act_per_species():
    model, case = potential(anisotropy=0.0), Case()
    plain = model(case.graph()).energies
    model.set_scale_shift({1: 2.0, 6: 3.0, 8: 4.0}, {1: 0.1, 6: 0.2, 8: 0.3})
    scale = torch.tensor([{1: 2.0, 6: 3.0, 8: 4.0}[int(z)] for z in case.numbers])
    shift = torch.tensor([{1: 0.1, 6: 0.2, 8: 0.3}[int(z)] for z in case.numbers])
    torch.testing.assert_close(
        model(case.graph()).energies, plain * scale + shift, check_dtype=False, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("stress", [False, True])
@pytest.mark.parametrize("kind", [toys.ToyPotential, toys.DirectForces])
def test_an_isolated_atom(kind, stress):
    model = kind().to(torch.float64)
    graph = graph_from_arrays(np.zeros((1, 3)), np.array([8]), np.eye(3) * 20, np.ones(3, dtype=bool), 4.0)
    prediction = model(graph, stress=stress)
    assert float(prediction.energy) == pytest.approx(toys.ISOLATED[8] - 1.0)
    assert not prediction.forces.any()
    assert prediction.forces.shape == (1, 3)
    assert (prediction.stress is not None) == stress
    assert not stress or not prediction.stress.any()


def test_direct_forces_come_from_their_head_and_stress_from_the_energy():
    model, case = toys.DirectForces().to(torch.float64), Case()
    prediction = model(case.graph(), stress=True)
    gradient = potential()(case.graph(), stress=True)
    assert (prediction.forces - gradient.forces).abs().max() > 1e-2
    torch.testing.assert_close(prediction.stress, gradient.stress)
    torch.testing.assert_close(prediction.energy, gradient.energy)


@pytest.mark.parametrize("stress", [False, True])
@pytest.mark.parametrize("kind", [toys.ToyPotential, toys.DirectForces])
def test_losses_on_every_output_reach_the_parameters(kind, stress):
    class Trainable(kind):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(1.3))

        def pair(self, vectors):
            return torch.tanh(self.weight * super().pair(vectors))

    model, case = Trainable().to(torch.float64), Case()
    names = ["energy", "energies", "forces"] + ["stress"] * stress

    def losses():
        out = model(case.graph(), stress=stress, create_graph=True)
        return {name: getattr(out, name).square().sum() for name in names}

    slopes = {name: torch.autograd.grad(loss, model.weight, retain_graph=True)[0] for name, loss in losses().items()}
    ends = []
    for weight in (1.3 + STEP, 1.3 - STEP):
        model.weight.data.fill_(weight)
        ends.append(losses())
    for name in names:
        wanted = (ends[0][name] - ends[1][name]).item() / (2 * STEP)
        assert wanted != 0
        assert float(slopes[name]) == pytest.approx(wanted, rel=1e-5), name


def test_predictions_carry_no_graph_unless_asked():
    model, case = potential(), Case()
    for context in (torch.no_grad(), torch.enable_grad(), torch.inference_mode(False)):
        with context:
            prediction = model(case.graph(), stress=True)
        assert not any(part.requires_grad for part in prediction)


def test_forces_sum_to_zero_though_nothing_is_invariant_under_rotation():
    forces = potential()(Case().graph()).forces
    assert forces.sum(0).abs().max() < 1e-12 * forces.abs().max() * 10


def test_graph_is_not_changed():
    graph = Case().graph()
    before = graph.clone()
    potential()(graph, stress=True)
    for name in ("positions", "cell", "edge_index", "edge_shifts", "atomic_numbers"):
        assert torch.equal(graph[name], before[name])
        assert not graph[name].requires_grad


def test_species_without_isolated_atom_energy_is_refused():
    class Nothing(Potential):
        family = "toy"

        def network(self, graph, vectors):
            raise AssertionError

    with pytest.raises(InputError, match="no isolated-atom energy for atomic number 8"):
        Nothing(PotentialSettings(), (1, 8), {1: -13.6})
