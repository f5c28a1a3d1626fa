"""Predictions of the transformer for training have the gradient that autograd finds by differentiating forces."""

import pytest
import torch
from network_problems import gradient_difference, gradients, make_graph, make_transformer

from equimd.graph import batch_graphs

EXACT = 1e-10


def trainable(dtype=torch.float64, **settings):
    return make_transformer(dtype, **settings).requires_grad_()


SETTINGS = [
    {},
    {"n_heads": 8},  # heads narrower than a vector
    {"n_heads": 1},  # and of two
    {"d_model": 24, "d_feedforward": 7, "n_radial": 1},
    {"d_atom_feedforward": 20},
    {"n_gnn_layers": 1},
    {"n_gnn_layers": 3, "n_attention_layers": 1},
    {"zbl": False},
    {"cutoff_width": 3.5},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gradient_is_that_of_autograd(settings):
    potential, graph = trainable(**settings), batch_graphs([make_graph(), make_graph(5, seed=2)])
    fast = potential.predict_trainable(graph, stress=True)
    slow = potential(graph, stress=True, create_graph=True)
    torch.testing.assert_close(fast.forces, slow.forces, rtol=0, atol=1e-10)
    torch.testing.assert_close(fast.stress, slow.stress, rtol=0, atol=1e-12)
    assert gradient_difference(gradients(potential, fast), gradients(potential, slow)) < EXACT
