"""Heads that only help to train: what they read and what they tell turns with the structure, or says nothing."""

import pytest
import torch
from network_problems import make_graph, make_potential, make_transformer

from equimd import kernels
from equimd.graph import batch_graphs, edge_vectors
from equimd.models.auxiliary import lacking, make_auxiliary
from equimd.models.equivariant import EquivariantSettings
from equimd.models.transformer import TransformerSettings
from equimd.rotations import random_rotations, rotate_vectors

ROUNDING = 1e-10  # of float64, through three layers of numbers of order one
SHAPES = {
    "equivariant": lambda: make_potential(n_layers=3, l_max=1, n_channels=4),
    "both parities": lambda: make_potential(n_layers=3, l_max=2, n_channels=4, parity=True),
    "normed": lambda: make_potential(n_layers=4, l_max=1, n_channels=4, rms_norm=True),
    "transformer": lambda: make_transformer(n_gnn_layers=2, n_attention_layers=1, d_model=8, d_feedforward=8),
}
EQUIVARIANT = [name for name in SHAPES if name != "transformer"]


@pytest.fixture(params=list(SHAPES))
def shape(request):
    return request.param


def problem(shape):
    """A potential, its heads for two vectors, a batch, its edge vectors and a vector told to each atom."""
    potential = SHAPES[shape]()
    torch.manual_seed(8)
    auxiliary = make_auxiliary(potential, 2)
    graph = batch_graphs([make_graph(), make_graph(5, pbc=False, seed=2)])
    return potential, auxiliary, graph, edge_vectors(graph, torch.float64), torch.randn(17, 3, dtype=torch.float64)


def read(potential, *arguments):
    with kernels.using("reference"), torch.no_grad():
        return potential.network_and_vectors(*arguments)


def turned(shape, turn_given=True, wrong=lambda auxiliary: None):
    """Largest change of outputs and of turned vectors, relative to the largest, over four of O(3)'s rotations."""
    potential, auxiliary, graph, vectors, given = problem(shape)
    wrong(auxiliary)
    outputs, heads = read(potential, graph, vectors, auxiliary, given)
    worst = torch.zeros(2)
    for matrix in random_rotations(4, 5).rotations:
        rotation = torch.from_numpy(matrix)
        told = rotate_vectors(given, rotation) if turn_given else given
        again, moved = read(potential, graph, rotate_vectors(vectors, rotation), auxiliary, told)
        change = torch.stack([(again - outputs).abs().max(), (moved - rotate_vectors(heads, rotation)).abs().max()])
        worst = torch.maximum(worst, change)
    return float(worst[0] / outputs.abs().max()), float(worst[1] / heads.abs().max())


@pytest.mark.parametrize("shape", EQUIVARIANT)
def test_vectors_turn_with_the_structure_and_what_is_told(shape):
    outputs, vectors = turned(shape)
    assert outputs < ROUNDING
    assert vectors < ROUNDING


@pytest.mark.parametrize("shape", EQUIVARIANT)
def test_they_would_not_if_the_told_were_not_turned(shape):
    outputs, vectors = turned(shape, turn_given=False)
    assert outputs > 1e-3
    assert vectors > 1e-3


@pytest.mark.parametrize("shape", EQUIVARIANT)
def test_another_order_of_components_is_noticed(shape):
    def cyclic(auxiliary):
        tell = auxiliary.tell
        auxiliary.tell = lambda given: tell(given[:, [1, 2, 0]])

    assert turned(shape, wrong=cyclic)[1] > 1e-3


def test_pseudo_vectors_are_noticed():
    def axial(auxiliary):
        before, after = auxiliary.rows_read
        auxiliary.rows_read = before + 3, after - 3

    assert turned("both parities", wrong=axial)[1] > 1e-3


def test_a_transformer_has_to_learn_rotations():
    assert turned("transformer")[1] > 1e-3


def test_zeros_tell_nothing(shape):
    potential, auxiliary, graph, vectors, given = problem(shape)
    with kernels.using("reference"), torch.no_grad():
        plain = potential.network(graph, vectors)
    silent, heads = read(potential, graph, vectors, auxiliary)
    zeros, heads_of_zeros = read(potential, graph, vectors, auxiliary, torch.zeros_like(given))
    assert torch.equal(silent, plain)
    assert torch.equal(zeros, plain)
    assert torch.equal(heads, heads_of_zeros)
    assert not torch.allclose(read(potential, graph, vectors, auxiliary, given)[0], plain, atol=1e-3)


def test_a_batch_is_its_structures(shape):
    potential, auxiliary, graph, vectors, given = problem(shape)
    outputs, heads = read(potential, graph, vectors, auxiliary, given)
    assert heads.shape == (17, 2, 3)
    alone = make_graph(5, pbc=False, seed=2)
    own, own_heads = read(potential, alone, edge_vectors(alone, torch.float64), auxiliary, given[12:])
    torch.testing.assert_close(own, outputs[12:], rtol=0, atol=ROUNDING)
    torch.testing.assert_close(own_heads, heads[12:], rtol=0, atol=ROUNDING)


def test_every_weight_of_the_heads_and_of_what_they_read_is_trained(shape):
    potential, auxiliary, graph, vectors, given = problem(shape)
    potential.requires_grad_()
    with kernels.using("reference"):
        _, heads = potential.network_and_vectors(graph, vectors, auxiliary, given)
    heads.square().sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in auxiliary.parameters())
    trunk = potential.layers[0] if shape != "transformer" else potential.transformers
    assert all(p.grad is not None for p in trunk.parameters())


def test_energies_are_those_of_a_prediction():
    potential, auxiliary, graph, vectors, _ = problem("transformer")
    outputs, _ = read(potential, graph, vectors, auxiliary)
    total, atomic = potential.energies_of(graph, vectors, outputs)
    with kernels.using("reference"):
        prediction = potential(graph)
    torch.testing.assert_close(total, prediction.energy, rtol=0, atol=1e-8)
    torch.testing.assert_close(atomic, prediction.energies, rtol=0, atol=1e-8)


def test_what_networks_lack():
    assert lacking(TransformerSettings(), told=True) is None
    assert lacking(EquivariantSettings(n_layers=2), told=False) is None
    assert lacking(EquivariantSettings(n_layers=3), told=True) is None
    for settings, told, said in (
        ({"l_max": 0}, False, "l_max is 0; at least 1"),
        ({"n_layers": 1}, False, "n_layers is 1; at least 2"),
        ({"n_layers": 2}, True, "n_layers is 2; at least 3"),
    ):
        problem = lacking(EquivariantSettings(**settings), told)
        assert problem is not None
        assert said in problem
