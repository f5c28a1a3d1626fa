"""The transformer family: symmetries it has and lacks, derivatives, and the cutoff."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from equimd.errors import InputError
from equimd.graph import AtomGraph, batch_graphs, graph_from_arrays
from equimd.models.transformer import TransformerPotential, TransformerSettings, neighbour_layout

CUTOFF = 3.0
SMALL = {"cutoff": CUTOFF, "cutoff_width": 1.0, "d_model": 16, "n_heads": 2, "d_feedforward": 24, "n_radial": 4}
NO_CELL, NO_PBC, ALL_PBC = np.zeros((3, 3)), np.zeros(3, bool), np.ones(3, bool)
TRICLINIC = np.array([[3.1, 0.2, 0.0], [0.6, 3.4, -0.3], [0.1, 0.5, 2.9]])  # smaller than twice the cutoff


def potential(seed: int = 0, **settings: object) -> TransformerPotential:
    torch.manual_seed(seed)
    model = TransformerPotential(TransformerSettings(**{**SMALL, **settings}), (1, 6, 8), {1: -1.0, 6: -2.0, 8: -3.0})
    model.set_scale_shift({1: 1.0, 6: 2.0, 8: 1.5}, {1: 0.1, 6: 0.2, 8: 0.3})
    return model.double()


def molecule(n: int = 7, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Atoms on a jittered grid, 0.9 Å apart at least, with neighbours on both sides of the cutoff."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(3)] * 3, indexing="ij"), axis=-1).reshape(-1, 3) * 1.5
    positions = grid[rng.permutation(27)[:n]] + rng.uniform(-0.3, 0.3, (n, 3))
    return positions, rng.choice([1, 6, 8], n)


def graph(positions: np.ndarray, numbers: np.ndarray, cell=NO_CELL, pbc=NO_PBC, cutoff: float = CUTOFF) -> AtomGraph:
    return graph_from_arrays(positions, np.asarray(numbers), cell, pbc, cutoff)


def cases() -> list:
    positions, numbers = molecule()
    crystal = np.random.default_rng(1).uniform(0, 1, (3, 3)) @ TRICLINIC
    return [
        pytest.param(positions, numbers, NO_CELL, NO_PBC, id="molecule"),
        pytest.param(crystal, np.array([1, 6, 8]), TRICLINIC, ALL_PBC, id="periodic"),
    ]


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(("positions", "numbers", "cell", "pbc"), cases())
def test_translation_and_permutation(positions, numbers, cell, pbc, direct):
    model = potential(direct_forces=direct)
    reference = model(graph(positions, numbers, cell, pbc))
    order = np.random.default_rng(2).permutation(len(numbers))
    moved = model(graph(positions[order] + [5.0, -3.0, 1.3], numbers[order], cell, pbc))
    assert torch.allclose(moved.energy, reference.energy, rtol=0, atol=1e-10)
    assert torch.allclose(moved.forces, reference.forces[torch.from_numpy(order)], rtol=0, atol=1e-10)
    assert not torch.allclose(moved.forces, reference.forces, rtol=0, atol=1e-2)  # the order does matter


@pytest.mark.parametrize("direct", [False, True])
def test_it_is_not_invariant_to_rotations(direct):
    positions, numbers = molecule()
    model = potential(direct_forces=direct)
    rotation = Rotation.random(rng=np.random.default_rng(0)).as_matrix()
    plain, turned = model(graph(positions, numbers)), model(graph(positions @ rotation.T, numbers))
    assert abs(plain.energy - turned.energy) > 1e-3
    assert (plain.forces - turned.forces @ torch.from_numpy(rotation)).abs().max() > 1e-2


@pytest.mark.parametrize(("positions", "numbers", "cell", "pbc"), cases())
def test_forces_are_minus_the_gradient(positions, numbers, cell, pbc):
    model, h = potential(), 1e-5
    forces = model(graph(positions, numbers, cell, pbc)).forces.numpy()
    for atom, axis in [(0, 0), (1, 2), (2, 1)]:
        step = np.zeros_like(positions)
        step[atom, axis] = h
        up, down = (model(graph(positions + s, numbers, cell, pbc)).energy.item() for s in (step, -step))
        assert -(up - down) / (2 * h) == pytest.approx(forces[atom, axis], abs=1e-7)


def test_stress_is_the_strain_derivative():
    positions, numbers = np.random.default_rng(1).uniform(0, 1, (3, 3)) @ TRICLINIC, np.array([1, 6, 8])
    model, h = potential(), 1e-5
    stress = model(graph(positions, numbers, TRICLINIC, ALL_PBC), stress=True).stress[0].numpy()
    numeric = np.zeros((3, 3))
    for a in range(3):
        for b in range(3):
            energy = []
            for sign in (1, -1):
                strain = np.eye(3)
                strain[a, b] += sign * h
                energy.append(model(graph(positions @ strain, numbers, TRICLINIC @ strain, ALL_PBC)).energy.item())
            numeric[a, b] = (energy[0] - energy[1]) / (2 * h) / np.linalg.det(TRICLINIC)
    np.testing.assert_allclose(stress, numeric, atol=1e-8)
    assert np.abs(stress - stress.T).max() > 1e-4  # not invariant, so neither symmetric


def crossing(model: TransformerPotential, eps: float) -> tuple[float, float]:
    """Jump of energy and forces as one atom crosses the cutoff of another by ±eps."""
    predictions = []
    for r in (CUTOFF - eps, CUTOFF + eps):
        positions = np.array([[0.0, 0.0, 0.0], [0.9, 0.5, 0.0], [r, 0.0, 0.0]])
        predictions.append(model(graph(positions, np.array([6, 1, 8]))))
    inside, outside = predictions
    return abs(inside.energy - outside.energy).item(), (inside.forces - outside.forces).abs().max().item()


def test_continuous_at_the_cutoff(monkeypatch):
    for direct in (False, True):
        for eps in (1e-4, 1e-6):  # only the ordinary slopes remain: some eV/Å and eV/Å²
            energy, force = crossing(potential(direct_forces=direct), eps)
            assert energy < 10 * eps
            assert force < 100 * eps
    # Without the cutoff weights the same measure sees the jump.
    monkeypatch.setattr("equimd.models.transformer.cosine_cutoff", lambda r, cutoff, width: torch.ones_like(r))
    energy, force = crossing(potential(), 1e-6)
    assert energy > 1e-3
    assert force > 1e-3


@pytest.mark.parametrize(("positions", "numbers", "cell", "pbc"), cases())
def test_edges_beyond_the_cutoff_contribute_nothing(positions, numbers, cell, pbc):
    model = potential()
    plain, skin = (graph(positions, numbers, cell, pbc, cutoff) for cutoff in (CUTOFF, CUTOFF + 0.8))
    assert skin.n_edges > plain.n_edges
    a, b = model(plain), model(skin)
    assert torch.allclose(a.energy, b.energy, rtol=0, atol=1e-11)
    assert torch.allclose(a.forces, b.forces, rtol=0, atol=1e-11)
    shorter = graph(positions, numbers, cell, pbc, CUTOFF - 0.8)  # while edges within it do
    assert not torch.allclose(a.energy, model(shorter).energy, rtol=0, atol=1e-6)


@pytest.mark.parametrize("distance", [CUTOFF - 1e-9, CUTOFF, CUTOFF + 1e-9, CUTOFF - 1.0])
def test_second_derivatives_are_finite_at_the_cutoff(distance):
    positions = np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.2], [distance, 0.0, 0.0]])
    model = potential()
    prediction = model(graph(positions, np.array([6, 1, 8]), cutoff=CUTOFF + 0.5), create_graph=True)
    prediction.forces.square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) > 20
    assert all(torch.isfinite(g).all() for g in gradients)


def test_parameter_gradients_of_a_force_loss():
    """d(force loss)/dθ against finite differences: the double backward that training relies on."""
    positions, numbers = molecule()
    model, frame, h = potential(), graph(positions, numbers, cutoff=CUTOFF + 0.5), 1e-5

    def loss() -> torch.Tensor:
        prediction = model(frame, create_graph=True)
        return prediction.forces.square().sum() + prediction.energy.sum()

    loss().backward()
    for parameter in model.parameters():
        if parameter.grad is None or not parameter.grad.abs().max() > 0:
            continue
        k = int(parameter.grad.abs().argmax())
        values = []
        for sign in (1, -2):
            parameter.data.view(-1)[k] += sign * h
            values.append(loss().item())
        parameter.data.view(-1)[k] += h
        assert (values[0] - values[1]) / (2 * h) == pytest.approx(parameter.grad.view(-1)[k].item(), rel=1e-5)


@pytest.mark.parametrize("direct", [False, True])
def test_batch_equals_single(direct):
    model = potential(direct_forces=direct)
    crystal = np.random.default_rng(1).uniform(0, 1, (3, 3)) @ TRICLINIC
    frames = [
        graph(*molecule()),
        graph(crystal, np.array([1, 6, 8]), TRICLINIC, ALL_PBC),
        graph(np.zeros((1, 3)), np.array([8])),
        graph(*molecule(4, seed=3)),
    ]
    batch = model(batch_graphs(frames))
    singles = [model(frame) for frame in frames]
    assert torch.allclose(batch.energy, torch.cat([p.energy for p in singles]), rtol=0, atol=1e-11)
    assert torch.allclose(batch.forces, torch.cat([p.forces for p in singles]), rtol=0, atol=1e-11)


@pytest.mark.parametrize("direct", [False, True])
def test_isolated_atoms(direct):
    model = potential(direct_forces=direct)
    for positions, numbers in [([[0.0, 0, 0]], [8]), ([[0.0, 0, 0], [50.0, 0, 0]], [8, 6])]:
        prediction = model(graph(np.array(positions), np.array(numbers)), create_graph=True)
        assert torch.isfinite(prediction.energy).all()
        (prediction.energy.sum() + prediction.forces.square().sum()).backward()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
        if not direct:
            assert (prediction.forces == 0).all()


def test_direct_forces_are_no_gradient():
    positions, numbers = molecule()
    direct = potential(direct_forces=True)
    forces = direct(graph(positions, numbers)).forces
    assert forces.sum(0).abs().max() > 1e-3  # a gradient would sum to zero
    assert potential()(graph(positions, numbers)).forces.sum(0).abs().max() < 1e-12
    with pytest.raises(TypeError, match="no direct-force head"):
        potential().network_with_forces(graph(positions, numbers), torch.zeros(1, 3))


def test_layout_is_kept_until_the_edges_change():
    positions, numbers = molecule()
    frame = graph(positions, numbers)
    first = neighbour_layout(frame)
    frame.positions = frame.positions + 0.01
    assert neighbour_layout(frame) is first
    frame.edge_index = frame.edge_index.clone()
    assert neighbour_layout(frame) is not first
    swap = first.reverse
    assert torch.equal(swap[swap], torch.arange(len(swap)))
    frame.edge_index, frame.edge_shifts = frame.edge_index[:, 1:], frame.edge_shifts[1:]
    with pytest.raises(InputError, match="reverse"):
        neighbour_layout(frame)


def test_edges_in_any_order():
    positions, numbers = np.random.default_rng(1).uniform(0, 1, (3, 3)) @ TRICLINIC, np.array([1, 6, 8])
    model, frame = potential(), graph(positions, numbers, TRICLINIC, ALL_PBC)
    reference = model(frame)
    order = torch.randperm(frame.n_edges, generator=torch.Generator().manual_seed(0))
    frame.edge_index, frame.edge_shifts = frame.edge_index[:, order], frame.edge_shifts[order]
    shuffled = model(frame)
    assert torch.allclose(shuffled.energy, reference.energy, rtol=0, atol=1e-11)
    assert torch.allclose(shuffled.forces, reference.forces, rtol=0, atol=1e-11)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="n_heads must divide d_model"):
        TransformerSettings(d_model=10, n_heads=4)
    with pytest.raises(ValueError, match="cutoff_width"):
        TransformerSettings(cutoff=3.0, cutoff_width=4.0)
