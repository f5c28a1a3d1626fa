"""The fused network is the network: every output, against autograd through the reference kernels."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from network_problems import CUTOFF, both, largest_difference, make_graph, make_potential, make_transformer

from equimd import kernels
from equimd.errors import InputError
from equimd.graph import batch_graphs, graph_from_arrays, has_reverse_edges
from equimd.kernels import compiled
from equimd.kernels import network as fused_module
from equimd.models.equivariant import EquivariantPotential, EquivariantSettings

EXACT = 1e-10  # ten times the tolerance of the radial tables in float64


@pytest.mark.parametrize("l_max", [0, 1, 2, 3])
@pytest.mark.parametrize("parity", [False, True])
def test_equals_reference_in_float64(l_max, parity):
    """Irreps of unnatural parity come into being in the second layer, so the third is the first to read them."""
    potential = make_potential(l_max=l_max, parity=parity, n_layers=3 if parity and l_max < 3 else 2)
    assert largest_difference(*both(potential, make_graph())) < EXACT


@pytest.mark.parametrize("settings", [{}, {"n_channels": 5}, {"n_layers": 1}, {"n_layers": 3}, {"zbl": False}])
def test_equals_reference_in_float32(settings):
    potential = make_potential(torch.float32, **settings)
    fast, slow = both(potential, make_graph())
    assert fast.forces.dtype == fast.energies.dtype == torch.float64
    double = copy.deepcopy(potential).to(torch.float64)
    with kernels.using("reference"):
        exact = double(make_graph(), stress=True)
    # As near to float64 as the reference in float32 is.
    assert largest_difference(fast, exact) < max(3e-6, 2 * largest_difference(slow, exact))


@pytest.mark.parametrize(
    "graph",
    [
        make_graph(pbc=False),
        make_graph(n=1, length=9.0, pbc=False),
        make_graph(n=1, length=2.0),
        make_graph(n=8, length=40.0),
        batch_graphs([make_graph(n=5, seed=1), make_graph(n=1, length=9.0, pbc=False), make_graph(n=9, seed=2)]),
    ],
    ids=["molecule", "one atom", "one atom and its images", "all isolated", "batch"],
)
def test_equals_reference_for_every_kind_of_graph(graph):
    assert largest_difference(*both(make_potential(), graph)) < EXACT


def test_unnatural_irreps_everywhere():
    """Pseudo-scalars with their tanh gate appear in the fourth layer and are read by the fifth."""
    potential = make_potential(l_max=1, parity=True, n_layers=5, n_channels=3)
    assert (0, -1) in potential.layers[3].irreps_out
    assert (0, -1) in potential.layers[4].irreps_in
    assert largest_difference(*both(potential, make_graph())) < EXACT


def test_energies_without_stress_are_the_same():
    potential, graph = make_potential(), make_graph()
    assert potential(graph).stress is None
    assert torch.equal(potential(graph).forces, potential(graph, stress=True).forces)


def test_edges_beyond_the_cutoff_change_nothing():
    potential = make_potential(torch.float32)
    near, far = make_graph(), make_graph(cutoff=CUTOFF + 1.0)
    assert far.n_edges > near.n_edges
    a, b = potential(near, stress=True), potential(far, stress=True)
    assert torch.equal(a.energies, b.energies)
    assert torch.equal(a.forces, b.forces)
    assert torch.equal(a.stress, b.stress)


def test_repulsion_ends_at_the_cutoff():
    """Caesium's covalent radii reach beyond this cutoff."""
    torch.manual_seed(4)
    settings = EquivariantSettings(n_channels=4, n_layers=1, cutoff=3.0, avg_num_neighbors=2.0)
    potential = EquivariantPotential(settings, (55,), {55: -1.0}).to(torch.float64).requires_grad_(False)
    for distance, bound in ((2.5, True), (2.999, True), (3.001, False), (3.3, False)):
        positions = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, distance]])
        graph = graph_from_arrays(positions, np.array([55, 55]), np.zeros((3, 3)), np.zeros(3, bool), 4.0)
        fast, slow = both(potential, graph, stress=False)
        assert torch.allclose(fast.energies, slow.energies, rtol=1e-9, atol=1e-12)
        assert bool((fast.forces != 0).any()) is bound


@pytest.mark.parametrize("n", [2, 30])
def test_does_not_depend_on_threads(set_threads, monkeypatch, n):
    potential, graph = make_potential(torch.float32), make_graph(n=n, length=7.0)
    set_threads(1)
    expected = potential(graph, stress=True)
    monkeypatch.setattr(fused_module, "WORK_PER_THREAD", 1)
    for threads in (2, 3):
        set_threads(threads)
        got = potential(graph, stress=True)
        assert torch.equal(got.energies, expected.energies)
        assert torch.equal(got.forces, expected.forces)
        assert torch.equal(got.stress, expected.stress)


def test_forces_are_the_gradient_of_the_tabulated_energy():
    """And not of the untabulated one only: finite differences at a step where 10⁻⁹ shows."""
    potential, graph = make_potential(), make_graph()
    forces = potential(graph).forces
    move = torch.randn(graph.n_atoms, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    start, step = graph.positions.clone(), 1e-5

    def energy(scale):
        graph.positions.copy_(start + scale * move)
        return float(potential(graph).energies.sum())

    slope = (energy(step) - energy(-step)) / (2 * step)
    assert slope == pytest.approx(-float((move * forces).sum()), rel=1e-7)
    assert slope != pytest.approx(-0.999 * float((move * forces).sum()), rel=1e-7)


def _in_place(p):
    with torch.no_grad():
        p.layers[0].radial.out.weight.mul_(1.1)


def _new_data(p):
    p.embedding.data = 1.3 * p.embedding.data


def _assigned(p):
    p.load_state_dict({k: 0.9 * v for k, v in p.state_dict().items()}, assign=True)


def _new_module(p):
    p.readout[2] = torch.nn.Linear(8, 1, dtype=torch.float64).requires_grad_(False)


def _new_buffer(p):
    p.bessel.frequencies.mul_(1.1)


def _new_scale(p):
    p.set_scale_shift({1: 2.0, 8: 2.0}, {1: 0.0, 8: 0.0})


def _new_normalisation(p):
    p.message_scale *= 2


@pytest.mark.parametrize(
    "change", [_in_place, _new_data, _assigned, _new_module, _new_buffer, _new_scale, _new_normalisation]
)
def test_new_weights_are_seen(change):
    potential, graph = make_potential(), make_graph()
    before = potential(graph).energies
    change(potential)
    assert not torch.allclose(potential(graph).energies, before, rtol=1e-6)
    assert largest_difference(*both(potential, graph)) < EXACT


def test_new_precision_is_seen():
    potential, graph = make_potential(), make_graph()
    before = potential(graph)
    single = potential.to(torch.float32)
    assert 1e-12 < largest_difference(single(graph), before) < 1e-5


def test_new_species_are_seen():
    potential, graph = make_potential(), make_graph()
    potential(graph)
    graph.atomic_numbers = 9 - graph.atomic_numbers
    assert largest_difference(*both(potential, graph)) < EXACT


def test_lists_without_every_reverse_edge_take_the_other_way():
    potential, graph = make_potential(), make_graph()
    keep = torch.arange(graph.n_edges) % 3 > 0
    graph.edge_index, graph.edge_shifts = graph.edge_index[:, keep], graph.edge_shifts[keep]
    assert potential.has_frozen_network
    assert not has_reverse_edges(graph)
    fast, slow = both(potential, graph)
    assert largest_difference(fast, slow) < EXACT
    assert has_reverse_edges(make_graph())


def test_radial_functions_that_cannot_be_tabulated_are_evaluated():
    potential, graph = make_potential(torch.float32), make_graph()
    with torch.no_grad():
        potential.layers[0].radial.hidden[0].weight.mul_(200.0)
    with pytest.warns(RuntimeWarning, match="without tables"):
        assert not potential.has_frozen_network
    assert torch.isfinite(potential(graph).energies).all()


def test_tensors_of_inference_mode_take_the_other_way():
    with torch.inference_mode():
        assert not make_potential().has_frozen_network
    assert make_potential().has_frozen_network


def test_default_device_is_not_asked():
    potential, graph = make_potential(), make_graph()
    expected = potential(graph).energies
    before = torch.get_default_device()
    try:
        torch.set_default_device("meta")
        assert torch.equal(potential(graph).energies, expected)
        potential._fused = None
        assert torch.equal(potential(graph).energies, expected)
    finally:
        torch.set_default_device(before)


def test_graphs_can_be_copied_and_pickled_after_use():
    potential, graph = make_potential(), make_graph()
    expected = potential(graph).energies
    for other in (copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        assert torch.equal(potential(other).energies, expected)
    assert torch.equal(pickle.loads(pickle.dumps(potential))(graph).energies, expected)


def test_code_is_compiled_once_for_all_weights():
    potential, graph = make_potential(), make_graph()
    potential(graph)
    before = len(compiled._by_symbol)
    for _ in range(3):
        _in_place(potential)
        potential(graph)
    assert len(compiled._by_symbol) == before


def test_first_use_from_several_threads(tmp_path):
    """Nothing is compiled or tabulated before they meet."""
    script = tmp_path / "first_use.py"
    script.write_text(
        """
import sys
sys.path.insert(0, sys.argv[1])
from concurrent.futures import ThreadPoolExecutor
import torch
from network_problems import make_graph, make_potential
graph = make_graph()
shared = make_potential(torch.float32, l_max=1)
potentials = [shared, shared, make_potential(torch.float32, l_max=1), make_potential(torch.float32, l_max=1)]
with ThreadPoolExecutor(4) as pool:
    results = list(pool.map(lambda p: p(graph).energies, potentials))
assert all(torch.equal(r, results[0]) for r in results)
"""
    )
    environment = os.environ | {"EQUIMD_CACHE": str(tmp_path / "cache")}
    subprocess.run([sys.executable, script, Path(__file__).parents[1]], check=True, env=environment)


def test_copies_compute_for_themselves():
    potential, graph = make_potential(), make_graph()
    expected = potential(graph).energies
    other = copy.deepcopy(potential)
    assert torch.equal(other(graph).energies, expected)
    with torch.no_grad():
        other.embedding.mul_(2.0)
    assert not torch.equal(other(graph).energies, expected)
    assert torch.equal(potential(graph).energies, expected)


def test_one_potential_may_be_used_by_several_threads():
    from concurrent.futures import ThreadPoolExecutor

    potential = make_potential(torch.float32)
    graphs = [make_graph(n=n, seed=n) for n in (4, 9, 16, 25)]
    expected = [potential(g).forces for g in graphs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            got = list(pool.map(lambda g: potential(g).forces, graphs))
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_is_for_frozen_weights_only():
    potential, graph = make_potential(), make_graph()
    assert not make_potential(rms_norm=True).has_frozen_network
    potential.embedding.requires_grad_()
    assert not potential.has_frozen_network
    prediction = potential(graph, create_graph=True)
    prediction.forces.square().sum().backward()
    assert float(potential.embedding.grad.abs().max()) > 0


def test_derivatives_are_there_where_they_are_asked_for():
    potential = make_potential()
    potential.kernel_backend = "reference"
    with pytest.raises(TypeError, match="no frozen network"):
        potential.frozen_network(make_graph())
    potential.kernel_backend = "auto"
    assert potential(make_graph(), create_graph=True).forces.requires_grad


def test_arrays_that_do_not_fit_are_refused():
    potential, graph = make_potential(), make_graph()
    potential(graph)
    graph.edge_shifts = graph.edge_shifts[:-1]
    with pytest.raises(ValueError, match="shifts must be"):
        potential(graph)


def test_profile_names_every_part():
    potential, graph = make_potential(), make_graph(30)
    before = potential(graph)
    seconds = potential.profile(graph, repeats=3)
    parts = {part.split(": ")[-1] for part in seconds if ": layer" in part}
    assert parts == {"radial", "convolution", "linear", "gate", "read-out"}
    assert {part.split(": ")[1] for part in seconds} == {"geometry", "layer 0", "layer 1"}
    assert min(seconds.values()) > 0
    assert largest_difference(potential(graph), before) == 0.0


def test_profile_without_a_frozen_network_names_operations():
    seconds = make_potential().requires_grad_().profile(make_graph(), repeats=1)
    assert any("Convolve" in name for name in seconds)


def test_the_first_use_may_be_in_inference_mode():
    potential, graph = make_potential(), make_graph()
    with torch.inference_mode():
        first = potential(graph)
    assert largest_difference(potential(graph), first) == 0.0


@pytest.mark.parametrize("family", ["equivariant", "transformer"])
def test_an_unknown_element_is_refused(family):
    potential, graph = (make_potential if family == "equivariant" else make_transformer)(), make_graph()
    graph.atomic_numbers[3] = 26
    with pytest.raises(InputError, match="atomic number 26 is not among the species"):
        potential(graph)
