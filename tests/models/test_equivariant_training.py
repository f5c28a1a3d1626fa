"""Predictions for training have the gradient that autograd finds by differentiating forces."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from network_problems import CUTOFF, gradient_difference, gradients, loss, make_graph, make_potential

from equimd import kernels
from equimd.frames import read_list
from equimd.graph import batch_graphs, graph_from_arrays
from equimd.models import equivariant_training
from equimd.models.checkpoint import find_potential, load_checkpoint

# Radial functions are interpolated between knots: 192 intervals here; 64 leave 7e-6.
INTERPOLATED = 1e-5


def trainable(dtype=torch.float64, **settings):
    return make_potential(dtype, **settings).requires_grad_()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"l_max": 0},
        {"l_max": 1, "parity": True, "n_layers": 3},
        {"l_max": 3},
        {"n_layers": 1},
        {"zbl": False},
        {"n_bessel": 2},
    ],
    ids=str,
)
def test_gradient_is_that_of_autograd(settings):
    potential, graph = trainable(**settings), batch_graphs([make_graph(), make_graph(5, seed=2)])
    fast = potential.predict_trainable(graph, stress=True)
    slow = potential(graph, stress=True, create_graph=True)
    torch.testing.assert_close(fast.forces, slow.forces, rtol=0, atol=1e-6)
    torch.testing.assert_close(fast.stress, slow.stress, rtol=0, atol=1e-8)
    assert gradient_difference(gradients(potential, fast), gradients(potential, slow)) < INTERPOLATED


def test_gradient_in_float32():
    potential, graph = trainable(torch.float32), make_graph()
    fast, slow = potential.predict_trainable(graph), potential(graph, create_graph=True)
    # The sum over forces of float32 is good to some 1e-5.
    assert gradient_difference(gradients(potential, fast), gradients(potential, slow)) < 1e-4


def test_too_few_knots_are_noticed(monkeypatch):
    monkeypatch.setattr(equivariant_training, "INTERVALS_PER_BASIS_FUNCTION", 1)
    potential, graph = trainable(), make_graph()
    fast, slow = potential.predict_trainable(graph), potential(graph, create_graph=True)
    assert gradient_difference(gradients(potential, fast), gradients(potential, slow)) > 10 * INTERPOLATED


@pytest.mark.parametrize(
    ("intervals", "enough"), [(equivariant_training.INTERVALS_PER_BASIS_FUNCTION, True), (11, False)]
)
def test_knots_are_enough_for_trained_weights(monkeypatch, intervals, enough):
    """Training makes radial functions sharper; of the shipped ones, water's are the sharpest."""
    monkeypatch.setattr(equivariant_training, "INTERVALS_PER_BASIS_FUNCTION", intervals)
    folder = find_potential("water-equivariant")
    atoms = read_list(folder / "start.xyz")[0]
    potential = load_checkpoint(folder / "model.safetensors")[0].to(torch.float64).requires_grad_()
    graph = graph_from_arrays(atoms.positions, atoms.numbers, atoms.cell.array, atoms.pbc, potential.cutoff)
    fast, slow = potential.predict_trainable(graph), potential(graph, create_graph=True)
    # 24 leave 2e-3 eV/Å over all components together and 1e-3 of a gradient, 11 leave 7e-2 and 5e-2.
    assert (torch.dist(fast.forces, slow.forces).item() < 5e-3) == enough
    assert (gradient_difference(gradients(potential, fast), gradients(potential, slow)) < 5e-3) == enough


def test_weights_of_the_next_step_are_the_next():
    potential, graph = trainable(), make_graph()
    first = gradients(potential, potential.predict_trainable(graph))
    with torch.no_grad():
        for parameter in potential.parameters():
            parameter.mul_(1.1)
    fast, slow = potential.predict_trainable(graph), potential(graph, create_graph=True)
    torch.testing.assert_close(fast.forces, slow.forces, rtol=0, atol=1e-6)
    after = gradients(potential, fast)
    assert gradient_difference(after, gradients(potential, slow)) < INTERPOLATED
    assert gradient_difference(after, first) > 1e-2


def test_two_predictions_may_be_pending():
    potential, graphs = trainable(), [make_graph(seed=1), make_graph(7, seed=3)]
    together = [potential.predict_trainable(graph) for graph in graphs]
    alone = [gradients(potential, potential.predict_trainable(graph)) for graph in graphs]
    for prediction, expected in zip(together, alone, strict=True):
        assert gradient_difference(gradients(potential, prediction), expected) < 1e-12


def test_a_missing_rate_is_noticed(monkeypatch):
    """The negative twin: with harmonics that do not turn with the edge, forces are trained in a wrong direction."""
    right = equivariant_training.EquivariantTrainer._geometry

    def wrong(self, vectors, directions):
        harmonics, shares = right(self, vectors, directions)
        harmonics[:, 1] = 0.0
        return harmonics, shares

    monkeypatch.setattr(equivariant_training.EquivariantTrainer, "_geometry", wrong)
    potential, graph = trainable(), make_graph()
    fast, slow = potential.predict_trainable(graph), potential(graph, create_graph=True)
    assert gradient_difference(gradients(potential, fast), gradients(potential, slow)) > 1e-2


def test_frozen_parts_stay_as_they_are():
    potential, graph = trainable(), make_graph()
    potential.layers[0].requires_grad_(False)
    fast, slow = (
        gradients(potential, p) for p in (potential.predict_trainable(graph), potential(graph, create_graph=True))
    )
    assert fast["layers.0.up.weights.0"] is None
    assert gradient_difference(fast, slow) < INTERPOLATED


def test_autograd_takes_over():
    potential, graph = trainable(rms_norm=True), make_graph()
    assert torch.equal(potential.predict_trainable(graph).forces, potential(graph, create_graph=True).forces)
    potential = trainable()
    assert potential._trainable(graph) is not None
    with kernels.using("reference"):
        assert potential._trainable(graph) is None


def test_edges_beyond_the_cutoff_train_nothing():
    potential, near, far = trainable(), make_graph(), make_graph(cutoff=CUTOFF + 1.0)
    assert far.n_edges > near.n_edges
    wanted = gradients(potential, potential(near, create_graph=True))
    assert gradient_difference(gradients(potential, potential.predict_trainable(far)), wanted) < INTERPOLATED


def test_a_mixed_batch_without_cells_for_all():
    potential = trainable()
    batch = batch_graphs([make_graph(), make_graph(5, length=20.0, pbc=False, seed=2)])
    batch.cell[1] = 0.0
    for prediction in (
        potential.predict_trainable(batch, stress=True),
        potential(batch, stress=True, create_graph=True),
    ):
        assert torch.isnan(prediction.stress[1]).all()
        potential.zero_grad()
        prediction.stress[0].square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in potential.parameters() if p.grad is not None)


def test_a_regulariser_of_the_weights_may_be_added():
    potential, graph = trainable(), make_graph()
    potential.predict_trainable(graph)
    penalty = potential.embedding.square().sum()
    (loss(potential.predict_trainable(graph)) + penalty).backward()


def test_two_losses_of_one_prediction():
    potential, graph = trainable(), make_graph()
    prediction = potential.predict_trainable(graph)
    parts = [prediction.energies.square().sum(), prediction.forces.square().sum()]
    one, two = (torch.autograd.grad(part, potential.embedding, retain_graph=True)[0] for part in parts)
    both = torch.autograd.grad(sum(parts), potential.embedding)[0]
    torch.testing.assert_close(one + two, both)


@pytest.mark.parametrize("what", ["weights", "positions"])
def test_changes_before_the_gradient_are_refused(what):
    potential, graph = trainable(), make_graph()
    prediction = potential.predict_trainable(graph)
    with torch.no_grad():
        (potential.embedding if what == "weights" else graph.positions).mul_(1.1)
    with pytest.raises(RuntimeError, match="changed between a prediction and its gradient"):
        loss(prediction).backward()


def test_two_threads_may_train_two_potentials():
    graph, potentials = make_graph(), [trainable(), trainable()]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda p: [gradients(p, p.predict_trainable(graph)) for _ in range(5)], potentials))
    assert all(gradient_difference(g, results[0][0]) < 1e-12 for result in results for g in result)


def test_cannot_be_differentiated_twice():
    potential, graph = trainable(), make_graph()
    prediction = potential.predict_trainable(graph)
    (gradient,) = torch.autograd.grad(loss(prediction), potential.embedding, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|second time"):
        gradient.sum().backward()


def test_no_edges():
    potential, graph = trainable(), make_graph(1, length=20.0, pbc=False)
    fast, slow = potential.predict_trainable(graph), potential(graph, create_graph=True)
    assert gradient_difference(gradients(potential, fast), gradients(potential, slow)) < 1e-12


def test_copies_and_pickles_while_training():
    potential, graph = trainable(), make_graph()
    expected = potential.predict_trainable(graph).forces
    for twin in (copy.deepcopy(potential), pickle.loads(pickle.dumps(potential)), potential.to(torch.float64)):
        torch.testing.assert_close(twin.predict_trainable(graph).forces, expected, rtol=0, atol=1e-12)
