import numpy as np
import pytest
import torch
from toys import ToyPotential
from training_samples import labelled_graph

from equimd.graph import edge_vectors
from equimd.rotations import rotate_tensor, rotate_vectors
from equimd.training.augment import epoch_rotations, rotate_graph
from equimd.training.loss import loss_terms
from equimd.training.sections import LossSection


def test_rotations_are_orthogonal_and_follow_from_seed_epoch_frame():
    few, many = epoch_rotations(5, 2, 7, 3, True), epoch_rotations(50, 2, 7, 3, True)
    assert np.array_equal(few, many[:5])
    assert not np.allclose(few, epoch_rotations(5, 2, 7, 4, True))
    assert not np.allclose(few, epoch_rotations(5, 2, 8, 3, True))
    assert not np.allclose(many[:, 0], many[:, 1])
    np.testing.assert_allclose(many @ many.swapaxes(-1, -2), np.broadcast_to(np.eye(3), many.shape), atol=1e-14)
    signs = np.linalg.det(many).round()
    assert set(signs.ravel()) == {-1.0, 1.0}
    assert np.all(np.linalg.det(epoch_rotations(50, 1, 7, 3, False)) > 0)


def test_rotations_are_uniform():
    rotations = epoch_rotations(20_000, 1, 0, 0, False)[:, 0]
    # Means of the Wigner matrices of l = 1 and of R_zz² = 1/3; standard errors are 0.004 and 0.002.
    np.testing.assert_allclose(rotations.mean(0), 0.0, atol=0.02)
    np.testing.assert_allclose((rotations**2).mean(0), 1 / 3, atol=0.01)


def test_an_invariant_potential_agrees_with_rotated_labels():
    potential = ToyPotential(anisotropy=0.0).double()
    graph = labelled_graph(potential)
    rotated = rotate_graph(graph, torch.from_numpy(epoch_rotations(2, 1, 0, 0, True)[:, 0]))
    prediction = potential(rotated, stress=True)
    section = LossSection(stress=1.0, kind="mse")
    terms = loss_terms(prediction, rotated, section, section)
    assert graph.forces.square().mean() > 1e-3
    assert graph.stress.square().mean() > 1e-6
    assert float(terms.total) < 1e-24  # squares of rounding


@pytest.mark.parametrize("forgotten", ["positions", "cell", "forces", "stress"])
def test_anything_left_unrotated_is_detected(forgotten):
    potential = ToyPotential(anisotropy=0.0).double()
    graph = labelled_graph(potential)
    rotated = rotate_graph(graph, torch.from_numpy(epoch_rotations(2, 1, 0, 0, True)[:, 0]))
    rotated[forgotten] = graph[forgotten]
    section = LossSection(stress=1.0, kind="mse")
    assert float(loss_terms(potential(rotated, stress=True), rotated, section, section).total) > 1e-6


def test_structures_rotate_as_rows():
    potential = ToyPotential().double()
    graph = labelled_graph(potential)
    rotations = torch.from_numpy(epoch_rotations(2, 1, 0, 0, True)[:, 0])
    rotated = rotate_graph(graph, rotations)
    first = graph.batch == 0
    torch.testing.assert_close(rotated.forces[first], rotate_vectors(graph.forces[first], rotations[0]))
    torch.testing.assert_close(rotated.stress[1], rotate_tensor(graph.stress[1], rotations[1]))
    lengths = edge_vectors(graph, torch.float64).norm(dim=1)
    torch.testing.assert_close(edge_vectors(rotated, torch.float64).norm(dim=1), lengths)
