"""Symmetry restored at inference, against its definition and with what it must not achieve."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from equimd.errors import InputError
from equimd.graph import AtomGraph, batch_graphs, graph_from_arrays
from equimd.models.potential import Potential
from equimd.models.symmetrized import SymmetrizedPotential, inertia_frames
from equimd.models.transformer import TransformerPotential, TransformerSettings

CUTOFF = 3.0
SMALL = {"cutoff": CUTOFF, "d_model": 8, "n_heads": 2, "d_feedforward": 8, "n_radial": 3, "n_attention_layers": 1}
NO_CELL, NO_PBC, ALL_PBC = np.zeros((3, 3)), np.zeros(3, bool), np.ones(3, bool)
CELL = np.array([[3.9, 0.2, 0.0], [0.6, 4.1, -0.3], [0.1, 0.5, 3.7]])


def transformer(**settings: object) -> TransformerPotential:
    torch.manual_seed(0)
    model = TransformerPotential(TransformerSettings(**{**SMALL, **settings}), (1, 6, 8), {1: -1.0, 6: -2.0, 8: -3.0})
    return model.double().requires_grad_(False)


POSITIONS = np.array([[0.0, 0.1, 0.0], [1.3, 0.2, -0.3], [-0.4, 1.1, 0.5], [1.0, -0.8, 1.2], [2.1, 0.9, 1.0]])
NUMBERS = np.array([6, 8, 1, 1, 6])


def graph(positions: np.ndarray = POSITIONS, numbers=NUMBERS, cell=NO_CELL, pbc=NO_PBC) -> AtomGraph:
    return graph_from_arrays(positions, np.asarray(numbers), cell, pbc, CUTOFF)


def elements(n: int, improper: bool = True) -> np.ndarray:
    rotations = Rotation.random(n, rng=np.random.default_rng(1)).as_matrix()
    if improper:
        rotations[1::2] *= -1.0
    return rotations


def equivariance_error(model: Potential, cell=NO_CELL, pbc=NO_PBC, improper: bool = True) -> float:
    """RMS of back-rotated forces (and stress) about their mean over a few elements of O(3)."""
    forces, stresses = [], []
    for g in elements(4, improper):
        prediction = model(graph(POSITIONS @ g.T, cell=cell @ g.T, pbc=pbc), stress=bool(pbc.any()))
        forces.append(prediction.forces.numpy() @ g)
        if prediction.stress is not None:
            stresses.append(g.T @ prediction.stress[0].numpy() @ g)
    return float(max(np.std(a, axis=0).max() for a in (forces, stresses) if a))


@pytest.mark.parametrize(("cell", "pbc"), [(NO_CELL, NO_PBC), (CELL, ALL_PBC)])
def test_average_lowers_the_error_with_its_degree(cell, pbc):
    model = transformer()
    bare = equivariance_error(model, cell, pbc)
    errors = [equivariance_error(SymmetrizedPotential(model, "average", degree=d), cell, pbc) for d in (3, 5, 9)]
    assert bare > 0.1
    assert errors[0] < bare / 4
    assert errors[1] < errors[0] / 3
    assert errors[2] < errors[1] / 2


@pytest.mark.parametrize("settings", [{"mode": "average", "degree": 3}, {"mode": "canonical"}])
@pytest.mark.parametrize("inversion", [True, False])
def test_forces_and_stress_are_gradients(settings, inversion):
    model, h = SymmetrizedPotential(transformer(), inversion=inversion, **settings), 1e-5
    prediction = model(graph(cell=CELL, pbc=ALL_PBC), stress=True)
    for atom, axis in [(0, 0), (3, 2)]:
        step = np.zeros_like(POSITIONS)
        step[atom, axis] = h
        up, down = (model(graph(POSITIONS + s, cell=CELL, pbc=ALL_PBC)).energy.item() for s in (step, -step))
        assert -(up - down) / (2 * h) == pytest.approx(prediction.forces[atom, axis].item(), abs=1e-7)
    for a, b in [(0, 0), (0, 2)]:
        energy = []
        for sign in (1, -1):
            strain = np.eye(3)
            strain[a, b] += sign * h
            energy.append(model(graph(POSITIONS @ strain, cell=CELL @ strain, pbc=ALL_PBC)).energy.item())
        numeric = (energy[0] - energy[1]) / (2 * h) / np.linalg.det(CELL)
        assert numeric == pytest.approx(prediction.stress[0, a, b].item(), abs=1e-8)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("max_edges", [150, 100_000])
def test_copies_in_chunks_equal_the_definition(max_edges, direct):
    """Rotated copies of a batch against the sum over rotated edge vectors, one rotation at a time."""
    frames = batch_graphs([graph(), graph(cell=CELL, pbc=ALL_PBC), graph(POSITIONS[:1], NUMBERS[:1])])
    model = SymmetrizedPotential(transformer(direct_forces=direct), "average", degree=3, max_edges=max_edges)
    for _ in range(2):  # the second time on the kept copies
        fast = model(frames, stress=not direct)
        slow = Potential.forward(model, frames, stress=not direct)
        assert torch.allclose(fast.energy, slow.energy, rtol=0, atol=1e-11)
        assert torch.allclose(fast.forces, slow.forces, rtol=0, atol=1e-11)
        if not direct:
            assert torch.allclose(fast.stress[1], slow.stress[1], rtol=0, atol=1e-11)
        frames.positions = frames.positions + 0.01


def test_random_mode_is_random_recorded_and_right_on_average():
    frame, model = graph(), transformer()
    one, same = (SymmetrizedPotential(model, "random", seed=3) for _ in range(2))
    first, second = one(frame).forces, one(frame).forces
    assert (first - second).abs().max() > 1e-3  # not deterministic from call to call
    assert torch.equal(first, same(frame).forces)  # but reproducible from its seed
    assert (first - SymmetrizedPotential(model, "random", seed=4)(frame).forces).abs().max() > 1e-3
    g = one.random_rotation(1)
    by_hand = model(graph(POSITIONS @ g.T)).forces @ torch.from_numpy(g)
    assert torch.allclose(second, by_hand, rtol=0, atol=1e-12)
    assert one.n_calls == 2
    assert not np.array_equal(one.random_rotation(0), one.random_rotation(256))


def test_average_over_random_rotations():
    frame, model = graph(), transformer()
    exact = SymmetrizedPotential(model, "average", degree=9)(frame).forces
    few, many = (SymmetrizedPotential(model, n_rotations=n)(frame).forces for n in (4, 400))
    assert (many - exact).abs().max() < (few - exact).abs().max() / 3


@pytest.mark.parametrize(("cell", "pbc"), [(NO_CELL, NO_PBC), (CELL, ALL_PBC)])
def test_canonical_is_exact_for_an_asymmetric_structure(cell, pbc):
    model = transformer()
    assert equivariance_error(SymmetrizedPotential(model, "canonical"), cell, pbc) < 1e-11
    proper = SymmetrizedPotential(model, "canonical", inversion=False)
    assert equivariance_error(proper, cell, pbc, improper=False) < 1e-11
    assert equivariance_error(proper, cell, pbc) > 1e-4  # the mirror image has another frame


@pytest.mark.parametrize("inversion", [True, False])
def test_canonical_direct_forces(inversion):
    model = SymmetrizedPotential(transformer(direct_forces=True), "canonical", inversion=inversion)
    assert equivariance_error(model, improper=inversion) < 1e-11


def test_canonical_of_a_batch_equals_singles():
    frames = [graph(), graph(POSITIONS[::-1] * [1, -1, 1.1], NUMBERS), graph(POSITIONS[:1], NUMBERS[:1])]
    model = SymmetrizedPotential(transformer(), "canonical")
    batch, singles = model(batch_graphs(frames)), [model(frame) for frame in frames]
    assert torch.allclose(batch.forces, torch.cat([p.forces for p in singles]), rtol=0, atol=1e-11)


def test_no_frame_where_axes_are_equal():
    """Linear molecules and symmetric tops are taken as they stand: finite, and equal to the bare potential."""
    model = transformer()
    wrapped = SymmetrizedPotential(model, "canonical")
    triangle = np.array([[1.0, 0.0, 0.0], [-0.5, 0.75**0.5, 0.0], [-0.5, -(0.75**0.5), 0.0]])
    for positions, numbers in [(POSITIONS[:1], [6]), (POSITIONS[:2], [6, 8]), (triangle, [1, 1, 1])]:
        frame = graph(positions, numbers)
        assert torch.allclose(wrapped(frame).forces, model(frame).forces, rtol=0, atol=1e-12)


def test_frames_are_orthogonal_and_turn_with_the_structure():
    for inversion in (True, False):
        g = elements(1)[0]
        frames = []
        for positions in (POSITIONS, POSITIONS @ g.T):
            frame = graph(positions)
            vectors = frame.positions[frame.edge_index[1]] - frame.positions[frame.edge_index[0]]
            frames.append(inertia_frames(frame, vectors, CUTOFF, inversion)[0].numpy())
        np.testing.assert_allclose(frames[0] @ frames[0].T, np.eye(3), atol=1e-12)
        np.testing.assert_allclose(frames[1] @ g, frames[0], atol=1e-11)
        assert inversion or np.linalg.det(frames[0]) == pytest.approx(1.0)


def test_the_wrapper_leaves_the_potential_alone_and_keeps_its_precision():
    model = transformer().float()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    wrapped = SymmetrizedPotential(model, "average", degree=3)
    prediction = wrapped(graph())
    assert prediction.forces.dtype == torch.float32
    assert prediction.energy.dtype == torch.float64
    assert wrapped.double().dtype == wrapped.inner.dtype == torch.float64
    assert all(torch.equal(v.float(), before[k]) for k, v in model.state_dict().items())
    with pytest.raises(InputError, match="accepted are average, random, canonical"):
        SymmetrizedPotential(model, "mean")  # type: ignore[arg-type]
