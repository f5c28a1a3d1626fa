"""The fused transformer is the transformer: every output, against autograd on padded arrays."""

import copy
import pickle

import numpy as np
import pytest
import torch
from network_problems import CUTOFF, both, largest_difference, make_graph, make_transformer

from equimd import kernels
from equimd.graph import batch_graphs, graph_from_arrays
from equimd.kernels import token_run

EXACT = 1e-12  # other order of summation


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
def test_equals_autograd_in_float64(settings):
    assert largest_difference(*both(make_transformer(**settings), make_graph())) < EXACT


@pytest.mark.parametrize("settings", SETTINGS[:5], ids=str)
def test_equals_autograd_in_float32(settings):
    potential = make_transformer(torch.float32, **settings)
    fast, slow = both(potential, make_graph())
    with kernels.using("reference"):
        exact = copy.deepcopy(potential).to(torch.float64)(make_graph(), stress=True)
    # As near to float64 as autograd in float32 is.
    assert largest_difference(fast, exact) < max(3e-6, 2 * largest_difference(slow, exact))


@pytest.mark.parametrize("n", [1, 2, 15, 16, 40])
def test_any_number_of_neighbours(n):
    """Up to 24 within the cutoff of an atom, in blocks of 16 tokens; one atom alone has its own token only."""
    graph = make_graph(n, length=2.2 * n ** (1 / 3) + 1.0, pbc=False)
    assert largest_difference(*both(make_transformer(), graph, stress=False)) < EXACT


def test_edges_beyond_the_cutoff_have_no_token():
    potential = make_transformer()
    near, far = make_graph(), make_graph(cutoff=CUTOFF + 1.5)
    assert far.n_edges > near.n_edges
    assert largest_difference(potential(far, stress=True), potential(near, stress=True)) < EXACT


def test_an_edge_at_the_cutoff_counts_nothing():
    numbers, cell, pbc = np.array([8, 1, 1]), np.zeros((3, 3)), np.zeros(3, dtype=bool)
    positions = np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, CUTOFF, 0.0]])
    graph = graph_from_arrays(positions, numbers, cell, pbc, CUTOFF + 0.1)
    prediction = make_transformer()(graph)
    assert torch.isfinite(prediction.forces).all()
    assert torch.equal(prediction.forces[2], torch.zeros(3, dtype=torch.float64))


def test_batch_is_its_parts_and_sizes_may_change():
    potential, parts = make_transformer(), [make_graph(n, seed=n) for n in (12, 3, 27)]
    together = potential(batch_graphs(parts), stress=True)
    for k, part in enumerate(parts):
        alone = potential(part, stress=True)
        torch.testing.assert_close(together.energy[k : k + 1], alone.energy, rtol=0, atol=1e-10)
        torch.testing.assert_close(together.stress[k : k + 1], alone.stress, rtol=0, atol=1e-10)


def test_threads_do_not_matter(set_threads, monkeypatch):
    potential, graph = make_transformer(), make_graph(27, length=7.0)
    alone = potential(graph, stress=True)
    monkeypatch.setattr(token_run, "WORK_PER_THREAD", 1)
    set_threads(3)
    assert largest_difference(potential(graph, stress=True), alone) < EXACT
    assert torch.get_num_threads() == 3


def test_new_weights_are_noticed():
    potential, graph = make_transformer(), make_graph()
    before = potential(graph)
    potential.transformers[0][1].up.weight.mul_(1.5)
    after, reference = both(potential, graph, stress=False)
    assert largest_difference(after, reference) < EXACT
    assert largest_difference(after, before) > 1e-3


@pytest.mark.parametrize("name", ["attention_back", "swiglu_back", "norm_back", "receive_back", "tokens_back"])
def test_a_kernel_that_is_left_out_is_noticed(name, monkeypatch):
    run = token_run.Run.kernel

    def skipping(self, kernel, *args, **names):
        if kernel != name:
            run(self, kernel, *args, **names)

    monkeypatch.setattr(token_run.Run, "kernel", skipping)
    assert largest_difference(*both(make_transformer(), make_graph())) > 1e-3


def test_profile_names_every_part():
    seconds = make_transformer().profile(make_graph(), repeats=3)
    parts = {part.split(": ")[-1] for part in seconds if ": block" in part}
    assert parts == {"norm", "linear", "attention", "swiglu"}
    assert {part.split(": ")[0] for part in seconds} == {"forward", "backward"}
    assert min(seconds.values()) > 0


def test_is_for_frozen_weights_and_gradients_only():
    assert not make_transformer(direct_forces=True).has_frozen_network
    potential = make_transformer()
    assert potential.has_frozen_network
    potential.messages[0].weight.requires_grad_()
    assert not potential.has_frozen_network


def test_works_in_and_after_inference_mode():
    potential, graph = make_transformer(), make_graph()
    with torch.inference_mode():
        first = potential(graph)
    assert largest_difference(potential(graph), first) == 0.0


def test_copies_and_pickles_without_compiled_code():
    potential, graph = make_transformer(), make_graph()
    expected = potential(graph)
    for twin in (copy.deepcopy(potential), pickle.loads(pickle.dumps(potential))):
        assert largest_difference(twin(graph), expected) < EXACT


def test_wrong_arrays_are_refused():
    potential, graph = make_transformer(), make_graph()
    graph.positions = graph.positions.float()
    with pytest.raises(ValueError, match="positions must be"):
        potential(graph)
