import pytest
import torch
from toys import ToyPotential
from training_samples import labelled_graph

from equimd.training.loss import active_weights, loss_terms
from equimd.training.sections import LastWeights, LossSection


def test_terms_are_means_per_component():
    potential = ToyPotential().double()
    graph = labelled_graph(potential)
    prediction = potential(graph, stress=True)
    graph.energy, graph.forces, graph.stress = graph.energy + 0.4, graph.forces + 0.2, graph.stress + 0.3
    section = LossSection(energy=2.0, forces=3.0, stress=5.0)
    terms = loss_terms(prediction, graph, section, section)
    assert float(terms.energy) == pytest.approx(0.1**2)  # 4 atoms in each structure
    assert float(terms.forces) == pytest.approx(0.2**2)
    assert float(terms.stress) == pytest.approx(0.3**2)
    assert float(terms.total) == pytest.approx(2 * 0.01 + 3 * 0.04 + 5 * 0.09)


def test_huber_is_square_then_linear():
    potential = ToyPotential().double()
    graph = labelled_graph(potential)
    prediction = potential(graph)
    section = LossSection(energy=0.0, kind="huber", huber_delta=0.1)
    small, large = graph.forces + 0.05, graph.forces + 0.5
    graph.forces = small
    assert float(loss_terms(prediction, graph, section, section).forces) == pytest.approx(0.05**2)
    graph.forces = large
    assert float(loss_terms(prediction, graph, section, section).forces) == pytest.approx(0.1 * (1.0 - 0.1))


def test_missing_labels_give_no_gradient():
    potential = ToyPotential().double()
    graph = labelled_graph(potential)
    graph.forces = graph.forces.clone() + 1.0
    graph.forces[graph.batch == 0] = float("nan")
    graph.energy = torch.full_like(graph.energy, float("nan"))
    prediction = potential(graph)
    forces = prediction.forces.clone().requires_grad_()
    section = LossSection()
    terms = loss_terms(prediction._replace(forces=forces), graph, section, section)
    terms.total.backward()
    assert float(terms.energy) == 0.0
    assert float(terms.forces) == pytest.approx(1.0)
    assert forces.grad is not None
    assert torch.all(forces.grad[graph.batch == 0] == 0)
    assert torch.all(forces.grad[graph.batch == 1] != 0)


def test_weights_switch_in_the_last_part():
    section = LossSection(energy=1.0, last=LastWeights(energy=50.0, fraction=0.25))
    assert active_weights(section, 0.74).energy == 1.0
    assert active_weights(section, 0.75).energy == 50.0
