"""AtomGraph: fields, edge vectors, and batching equal to torch_geometric's."""

import numpy as np
import pytest
import torch

from equimd.graph import (
    AtomGraph,
    batch_graphs,
    derived,
    edge_vectors,
    graph_from_arrays,
    make_graph,
    select_systems,
)
from equimd.neighbors import neighbor_list

CUTOFF = 4.0
CELL = np.array([[5.0, 0.4, -0.3], [1.1, 4.5, 0.2], [-0.7, 0.8, 6.0]])
FIELDS = (
    "positions",
    "atomic_numbers",
    "edge_index",
    "edge_shifts",
    "cell",
    "pbc",
    "energy",
    "forces",
    "stress",
    "batch",
)


def random_graph(
    seed: int, n: int = 6, pbc=(True, True, True), labels: bool = True, cutoff: float = CUTOFF
) -> AtomGraph:
    rng = np.random.default_rng(seed)
    extra = {}
    if labels:
        extra = {"energy": rng.normal(), "forces": rng.normal(size=(n, 3)), "stress": rng.normal(size=(3, 3))}
    cell = CELL if any(pbc) else np.zeros((3, 3))
    return graph_from_arrays(rng.random((n, 3)) @ CELL, rng.choice([1, 6, 8], n), cell, np.array(pbc), cutoff, **extra)


def test_fields_have_their_shapes_and_types():
    graph = random_graph(0)
    n, e = graph.n_atoms, graph.n_edges
    assert (n, graph.n_systems) == (6, 1)
    shapes = {
        "positions": (n, 3),
        "atomic_numbers": (n,),
        "edge_index": (2, e),
        "edge_shifts": (e, 3),
        "cell": (1, 3, 3),
        "pbc": (1, 3),
        "energy": (1,),
        "forces": (n, 3),
        "stress": (1, 3, 3),
        "batch": (n,),
    }
    integers, booleans = {"atomic_numbers", "edge_index", "batch"}, {"pbc"}
    for name, shape in shapes.items():
        dtype = torch.int64 if name in integers else torch.bool if name in booleans else torch.float64
        assert tuple(graph[name].shape) == shape, name
        assert graph[name].dtype == dtype, name


def test_absent_labels_are_nan():
    graph = random_graph(0, labels=False)
    assert all(graph[name].isnan().all() for name in ("energy", "forces", "stress"))


def test_edge_vectors_follow_the_stated_formula():
    graph = random_graph(1)
    edges, shifts = neighbor_list(graph.positions.numpy(), CELL, np.ones(3, dtype=bool), CUTOFF)
    x = graph.positions.numpy()
    wanted = x[edges[1]] - x[edges[0]] + shifts @ CELL
    np.testing.assert_allclose(edge_vectors(graph, torch.float64).numpy(), wanted, atol=1e-14)
    assert (edge_vectors(graph, torch.float64).norm(dim=1) <= CUTOFF).all()


def test_edge_vectors_are_formed_in_double_precision():
    """Far from the origin float32 positions would leave 6e-5 Å; the vectors carry float32's rounding only."""
    graph = random_graph(2)
    wanted = edge_vectors(graph, torch.float64)
    graph.positions = graph.positions + 1000.0
    single = edge_vectors(graph, torch.float32)
    assert single.dtype == torch.float32
    assert (single - wanted).abs().max() < 4e-7
    rounded = graph.positions.float()
    i, j = graph.edge_index
    naive = rounded[j] - rounded[i] + (graph.edge_shifts @ graph.cell[0]).float()
    assert (naive - wanted).abs().max() > 1e-5


def test_edge_and_its_reverse_are_exactly_opposite():
    """The Verlet filter and the transformer's layout rely on this to the last bit."""
    graph = random_graph(3)
    vectors = edge_vectors(graph, torch.float64)
    (i, j), s = graph.edge_index.tolist(), graph.edge_shifts.to(torch.int64).tolist()
    place = {(a, b, *c): k for k, (a, b, c) in enumerate(zip(i, j, s, strict=True))}
    back = [place[(b, a, *(-x for x in c))] for a, b, c in zip(i, j, s, strict=True)]
    assert torch.equal(vectors, -vectors[back])


GRAPHS = {
    "alike": lambda: [random_graph(k) for k in range(3)],
    "mixed sizes": lambda: [random_graph(k, n=k) for k in (1, 7, 3)],
    "mixed periodicity": lambda: [
        random_graph(0),
        random_graph(1, pbc=(False,) * 3),
        random_graph(2, pbc=(True, False, True)),
    ],
    "no edges among them": lambda: [random_graph(0), random_graph(1, n=1, pbc=(False,) * 3), random_graph(2)],
    "labels here and there": lambda: [random_graph(0), random_graph(1, labels=False)],
    "one": lambda: [random_graph(0)],
}


@pytest.mark.extra
@pytest.mark.parametrize("graphs", GRAPHS.values(), ids=GRAPHS.keys())
def test_batch_equals_that_of_torch_geometric(graphs):
    from torch_geometric.data import Batch, Data

    graphs = graphs()
    ours = batch_graphs(graphs)
    stripped = []
    for graph in graphs:
        fields = graph.to_dict()
        del fields["batch"]  # torch_geometric makes its own
        stripped.append(Data(**fields, num_nodes=graph.n_atoms))
    theirs = Batch.from_data_list(stripped)
    for name in FIELDS:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0, equal_nan=True, msg=name)
    assert ours.n_systems == len(graphs) == theirs.num_graphs
    assert ours.n_atoms == sum(g.n_atoms for g in graphs)


def test_batch_of_batches_is_the_batch():
    graphs = [random_graph(k, n=k + 2) for k in range(4)]
    flat = batch_graphs(graphs)
    nested = batch_graphs([batch_graphs(graphs[:2]), batch_graphs(graphs[2:])])
    for name in FIELDS:
        assert torch.equal(flat[name], nested[name]), name
    assert nested.n_systems == 4


def test_edge_vectors_of_a_batch_are_those_of_its_parts():
    graphs = GRAPHS["mixed periodicity"]()
    graphs[2].cell = graphs[2].cell * 1.1  # every structure has its own cell
    together = edge_vectors(batch_graphs(graphs), torch.float64)
    apart = torch.cat([edge_vectors(g, torch.float64) for g in graphs])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-14)


def test_batching_does_not_change_its_parts():
    graphs = [random_graph(0), random_graph(1)]
    before = [g.clone() for g in graphs]
    batch = batch_graphs(graphs)
    batch.positions += 1.0
    batch.edge_index += 1
    for graph, old in zip(graphs, before, strict=True):
        assert all(torch.equal(graph[name], old[name]) for name in FIELDS)


def test_arrays_are_copied():
    positions = np.random.default_rng(0).random((4, 3))
    graph = graph_from_arrays(positions, np.ones(4), np.zeros((3, 3)), np.zeros(3, dtype=bool), 3.0)
    graph.positions += 1.0
    assert positions.max() < 1.0


def test_volume_is_positive_for_left_handed_cells_and_zero_without():
    graph = random_graph(0)
    volume = float(graph.volume)
    assert volume == pytest.approx(abs(np.linalg.det(CELL)))
    graph.cell = -graph.cell
    assert float(graph.volume) == pytest.approx(volume)
    assert float(random_graph(0, pbc=(False,) * 3).volume) == 0.0


def test_make_graph_without_cell_or_edges():
    graph = make_graph(torch.zeros(1, 3), torch.tensor([8]), torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0, 3))
    assert (graph.n_atoms, graph.n_edges) == (1, 0)
    assert edge_vectors(graph, torch.float32).shape == (0, 3)


def test_derived_is_kept_until_the_edges_are_others():
    graph = random_graph(0)
    calls = []
    for _ in range(2):
        assert derived(graph, "key", lambda: calls.append(1) or len(calls)) == 1
    graph.positions = graph.positions + 1.0
    assert derived(graph, "key", lambda: 2) == 1
    graph.edge_index = graph.edge_index[:, :-2]
    assert derived(graph, "key", lambda: 3) == 3
    assert "_derived" not in batch_graphs([graph, random_graph(1)]).__dict__


def test_moving_to_a_device_keeps_the_number_of_systems():
    graph = batch_graphs([random_graph(0), random_graph(1)]).to("cpu")
    assert graph.n_systems == 2


@pytest.mark.parametrize("chosen", [[0, 2], [1], [0, 1, 2], []])
def test_structures_of_a_batch_as_a_batch(chosen):
    graphs = [random_graph(seed, n) for seed, n in ((0, 6), (1, 4), (2, 5))]
    part = select_systems(batch_graphs(graphs), torch.tensor(chosen, dtype=torch.int64))
    assert part.n_systems == len(chosen)
    if not chosen:
        assert part.n_atoms == part.n_edges == 0
        assert part.cell.shape == (0, 3, 3)
        return
    expected = batch_graphs([graphs[k] for k in chosen])
    for field in FIELDS:
        assert torch.equal(part[field], expected[field]), field
