"""Predictions of the transformer for training have the gradient that autograd finds by differentiating forces."""

import copy

import pytest
import torch
from network_problems import CUTOFF, THREE, gradient_difference, gradients, loss, make_graph, make_transformer

from equimd import kernels
from equimd.graph import batch_graphs
from equimd.kernels import token_run

EXACT = 1e-10  # other order of summation, relative to the largest of each gradient


def trainable(dtype=torch.float64, **settings):
    return make_transformer(dtype, **settings).requires_grad_()


def by_both(potential, graph, stress=True):
    assert potential.trains_by_kernels
    fast = potential.predict_trainable(graph, stress=stress)
    slow = potential(graph, stress=stress, create_graph=True)
    return gradients(potential, fast), gradients(potential, slow)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"n_heads": 1},  # heads of two vectors
        {"d_model": 24, "d_feedforward": 7, "n_radial": 1},  # less than one
        {"d_atom_feedforward": 20},
        {"n_gnn_layers": 1},
        {"n_gnn_layers": 3, "n_attention_layers": 1},
        {"zbl": False},
        {"cutoff_width": 3.5},
    ],
    ids=str,
)
def test_gradient_is_that_of_autograd(settings):
    potential, graph = trainable(**settings), batch_graphs([make_graph(), make_graph(5, seed=2)])
    fast = potential.predict_trainable(graph, stress=True)
    slow = potential(graph, stress=True, create_graph=True)
    torch.testing.assert_close(fast.forces, slow.forces, rtol=0, atol=1e-10)
    torch.testing.assert_close(fast.stress, slow.stress, rtol=0, atol=1e-12)
    assert gradient_difference(gradients(potential, fast), gradients(potential, slow)) < EXACT


def test_gradient_with_three_elements():
    potential, graph = trainable(isolated=THREE), make_graph(third=6)
    assert gradient_difference(*by_both(potential, graph)) < EXACT


def test_gradient_in_float32():
    potential, graph = trainable(torch.float32), make_graph()
    exact = copy.deepcopy(potential).to(torch.float64)
    fast, slow = by_both(potential, graph)
    wanted = gradients(exact, exact(graph, stress=True, create_graph=True))
    # As near to float64 as autograd in float32 is.
    assert gradient_difference(fast, wanted) < max(1e-5, 2 * gradient_difference(slow, wanted))


def test_gradient_is_that_of_finite_differences():
    potential, graph, step = trainable(), make_graph(), 1e-5

    def value():
        with torch.no_grad():
            return float(loss(potential(graph, stress=True)))

    found = gradients(potential, potential.predict_trainable(graph, stress=True))
    for name in ("edge_embedding.weight", "transformers.0.1.qkv.weight", "messages.0.weight", "edge_heads.1.weight"):
        weight, direction = potential.get_parameter(name), torch.randn_like(found[name])
        values = []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                weight.add_(direction, alpha=sign * step)
            values.append(value())
            with torch.no_grad():
                weight.sub_(direction, alpha=sign * step)
        slope, wanted = float((found[name] * direction).sum()), (values[0] - values[1]) / (2 * step)
        assert abs(slope - wanted) < 1e-5 * float(found[name].norm() * direction.norm())  # truncation: step²


@pytest.mark.parametrize("n", [1, 2, 16, 40])
def test_any_number_of_neighbours(n):
    """Up to 24 within the cutoff of an atom, in blocks of 16 tokens; one atom alone has its own token only."""
    graph = make_graph(n, length=2.2 * n ** (1 / 3) + 1.0, pbc=False)
    assert gradient_difference(*by_both(trainable(), graph, stress=False)) < EXACT


KERNELS = (
    ["tokens_rates", "norm_rates", "attention_rates", "swiglu_rates", "atom_swiglu_rates", "receive", "receive_back"]
    + ["readout_rates", "readout_rates_last", "norm_rates_back", "attention_rates_back", "swiglu_rates_back"]
    + ["atom_swiglu_rates_back", "species_back"]
)


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_that_is_left_out_is_noticed(name, monkeypatch):
    run = token_run.Run.kernel

    def skipping(self, kernel, *args, **names):
        if kernel != name:
            run(self, kernel, *args, **names)

    potential, graph = trainable(d_atom_feedforward=20), make_graph()
    potential.predict_trainable(graph)
    rates = {kernel for kernel in potential._trainer._network._kernels if "rates" in kernel}
    assert rates == {kernel for kernel in KERNELS if "rates" in kernel}
    record = potential._trainer.evaluate(graph)[1]
    for array in record.run.workspace.tensors.values():  # no memory of a run before
        array.fill_(1)
    del record
    monkeypatch.setattr(token_run.Run, "kernel", skipping)
    assert not gradient_difference(*by_both(potential, graph)) < 1e-3


def test_edges_beyond_the_cutoff_train_nothing():
    potential, near, far = trainable(), make_graph(), make_graph(cutoff=CUTOFF + 1.0)
    assert far.n_edges > near.n_edges
    wanted = gradients(potential, potential(near, create_graph=True))
    assert gradient_difference(gradients(potential, potential.predict_trainable(far)), wanted) < EXACT


def test_a_mixed_batch_without_cells_for_all():
    potential = trainable()
    batch = batch_graphs([make_graph(), make_graph(5, length=20.0, pbc=False, seed=2), make_graph(1, pbc=False)])
    batch.cell[1:] = 0.0
    found = []
    for predict in (potential.predict_trainable, lambda *a, **k: potential(*a, create_graph=True, **k)):
        prediction = predict(batch, stress=True)
        assert torch.isnan(prediction.stress[1:]).all()
        potential.zero_grad()
        (prediction.stress[0].square().sum() * 1e3 + prediction.forces.square().sum()).backward()
        found.append({name: None if p.grad is None else p.grad.clone() for name, p in potential.named_parameters()})
    found[1] |= {name: torch.zeros_like(found[0][name]) for name, g in found[1].items() if g is None}  # of constants
    assert gradient_difference(*found) < EXACT


def test_weights_of_the_next_step_are_the_next():
    potential, graph = trainable(), make_graph()
    first = gradients(potential, potential.predict_trainable(graph))
    with torch.no_grad():
        for parameter in potential.parameters():
            parameter.mul_(1.1)
    fast, slow = by_both(potential, graph, stress=False)
    assert gradient_difference(fast, slow) < EXACT
    assert gradient_difference(fast, first) > 1e-2


def test_gradients_are_the_same_bit_for_bit():
    potential, graphs = trainable(torch.float32), [make_graph(), make_graph(27, length=7.0, seed=3)]
    first = [gradients(potential, potential.predict_trainable(graph)) for graph in graphs]
    twin = copy.deepcopy(potential)
    again = [gradients(twin, twin.predict_trainable(graph)) for graph in reversed(graphs)]
    for one, other in zip(first, reversed(again), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_two_predictions_may_be_pending_and_memory_is_used_again():
    potential, graphs = trainable(), [make_graph(seed=1), make_graph(7, seed=3)]
    alone = [gradients(potential, potential.predict_trainable(graph)) for graph in graphs]
    assert len(potential._trainer._network._spare) == 1
    together = [potential.predict_trainable(graph) for graph in graphs]
    assert len(potential._trainer._network._spare) == 0
    for prediction, expected in zip(together, alone, strict=True):
        assert gradient_difference(gradients(potential, prediction), expected) < EXACT
    del prediction, together
    assert len(potential._trainer._network._spare) == 2
    together = [potential.predict_trainable(graph) for graph in (*graphs, *graphs)]
    del together
    assert len(potential._trainer._network._spare) == 2  # not all that were ever pending at once


def test_two_losses_of_one_prediction():
    potential, graph = trainable(), make_graph()
    prediction, weight = potential.predict_trainable(graph), potential.messages[0].weight
    parts = [prediction.energies.square().sum(), prediction.forces.square().sum()]
    one, two = (torch.autograd.grad(part, weight, retain_graph=True)[0] for part in parts)
    torch.testing.assert_close(one + two, torch.autograd.grad(sum(parts), weight)[0])


def test_frozen_parts_stay_as_they_are():
    potential, graph = trainable(), make_graph()
    potential.transformers[0].requires_grad_(False)
    potential.edge_embedding.requires_grad_(False)
    fast, slow = by_both(potential, graph)
    assert fast["transformers.0.0.up.weight"] is None
    assert gradient_difference(fast, slow) < EXACT


def test_changes_before_the_gradient_are_refused():
    potential, graph = trainable(), make_graph()
    prediction = potential.predict_trainable(graph)
    with torch.no_grad():
        potential.messages[0].weight.mul_(1.1)
    with pytest.raises(RuntimeError, match="changed between a prediction and its gradient"):
        loss(prediction).backward()


def test_autograd_takes_over():
    graph, direct = make_graph(), trainable(direct_forces=True)
    assert torch.equal(direct.predict_trainable(graph).forces, direct(graph, create_graph=True).forces)
    potential = trainable()
    with kernels.using("reference"):
        assert not potential.trains_by_kernels
        assert torch.equal(potential.predict_trainable(graph).forces, potential(graph, create_graph=True).forces)


def test_threads_do_not_matter(set_threads, monkeypatch):
    potential, graph = trainable(), make_graph(27, length=7.0)
    alone = gradients(potential, potential.predict_trainable(graph))
    monkeypatch.setattr(token_run, "WORK_PER_THREAD", 1)
    set_threads(3)
    assert gradient_difference(gradients(potential, potential.predict_trainable(graph)), alone) < EXACT
    assert torch.get_num_threads() == 3


def test_training_takes_the_same_way():
    """Fifty steps by either gradient end at the same losses."""
    graphs = [make_graph(seed=k) for k in range(5)]
    labels = [
        torch.randn(graph.n_atoms, 3, generator=torch.Generator().manual_seed(k)) for k, graph in enumerate(graphs)
    ]
    ends = []
    for backend in ("auto", "reference"):
        potential = trainable(torch.float32)
        optimizer = torch.optim.AdamW(potential.parameters(), lr=1e-3)
        losses = []
        with kernels.using(backend):
            for step in range(50):
                prediction = potential.predict_trainable(graphs[step % 5])
                value = (prediction.forces - labels[step % 5]).square().mean() + prediction.energies.square().mean()
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                losses.append(float(value.detach()))
        ends.append(torch.tensor(losses))
    assert ends[0][-1] < 0.8 * ends[0][0]
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-2, atol=0)  # rounding grows from step to step
