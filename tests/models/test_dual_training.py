"""What a prediction for training holds is free again with it."""

import weakref

import pytest
from network_problems import make_graph, make_potential, make_transformer

FAMILIES = {"equivariant": make_potential, "transformer": make_transformer}


@pytest.mark.parametrize("differentiated", [True, False])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_prediction_is_freed(family, differentiated):
    potential, graph = FAMILIES[family]().requires_grad_(), make_graph()
    held = weakref.ref(graph)
    prediction = potential.predict_trainable(graph)
    if differentiated:
        prediction.forces.square().sum().backward()
    del graph
    assert held() is not None  # for another gradient of the same prediction
    del prediction
    assert held() is None
