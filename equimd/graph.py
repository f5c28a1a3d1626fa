"""AtomGraph: the one tensor type a model sees, and its batching.

Conventions (stated once, here): edge ``e`` has the receiver (centre) ``i = edge_index[0, e]`` and the sender
(neighbour) ``j = edge_index[1, e]``; its vector is ``r_ij = x_j − x_i + S_ij @ cell``; rows of ``cell`` are lattice
vectors. Edges are sorted by receiver. Both directions of every pair are present.
"""

import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from equimd.errors import InputError
from equimd.neighbors import neighbor_list, used_cell

T = TypeVar("T")

# Per-atom, per-edge and per-system fields, in the order in which they are batched.
_ATOM_KEYS = ("positions", "atomic_numbers", "forces")
_EDGE_KEYS = ("edge_shifts",)
_SYSTEM_KEYS = ("cell", "pbc", "energy", "stress")
_DERIVED = "_derived"


class AtomGraph:
    """Atoms and directed edges of one structure or of a batch of S structures.

    positions (N, 3) float64 Å; atomic_numbers (N,) int64; cell (S, 3, 3) float64 Å; pbc (S, 3) bool;
    edge_index (2, E) int64 as [receiver, sender]; edge_shifts (E, 3) float64, integers S_ij;
    batch (N,) int64, the structure each atom belongs to; n_systems int.
    Labels, NaN where absent: energy (S,) eV float64; forces (N, 3) eV/Å float64; stress (S, 3, 3) eV/Å³ float64.
    A batch that was rotated and whose stress is known in part also holds rotations and unrotated_stress (S, 3, 3).

    ``graph["positions"]`` is ``graph.positions``. ``torch_geometric.data.Data(**graph.to_dict())`` makes a graph of
    that package.
    """

    positions: Tensor
    atomic_numbers: Tensor
    edge_index: Tensor
    edge_shifts: Tensor
    cell: Tensor
    pbc: Tensor
    batch: Tensor
    energy: Tensor
    forces: Tensor
    stress: Tensor
    rotations: Tensor
    unrotated_stress: Tensor
    n_systems: int

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)

    def to_dict(self) -> dict[str, Any]:
        """Its fields, without what was derived from the edges."""
        return {key: value for key, value in self.__dict__.items() if key != _DERIVED}

    def keys(self) -> list[str]:
        """Names of its fields."""
        return list(self.to_dict())

    def __getitem__(self, key: str) -> Any:
        return self.to_dict()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        setattr(self, key, value)

    def __contains__(self, key: str) -> bool:
        return key in self.to_dict()

    def __repr__(self) -> str:
        return f"AtomGraph(n_systems={self.n_systems}, n_atoms={self.n_atoms}, n_edges={self.n_edges})"

    def __copy__(self) -> "AtomGraph":
        return AtomGraph(**self.to_dict())

    def __deepcopy__(self, memo: Any) -> "AtomGraph":
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickled as bytes, see ``as_bytes``, and without what was derived from the edges."""
        return _graph_from_bytes, (as_bytes(self.to_dict()),)

    def to(self, device: torch.device | str) -> "AtomGraph":
        """The graph on a device: itself if it is there."""
        if self.edge_index.device == torch.device(device):
            return self
        return self._each(lambda tensor: tensor.to(device))

    def clone(self) -> "AtomGraph":
        """A graph that shares no tensor with this one."""
        return self._each(torch.clone)

    def _each(self, function: Callable[[Tensor], Tensor]) -> "AtomGraph":
        fields = self.to_dict().items()
        return AtomGraph(**{key: function(value) if isinstance(value, Tensor) else value for key, value in fields})

    @property
    def n_atoms(self) -> int:
        """Number of atoms N over all structures."""
        return int(self.positions.shape[0])

    @property
    def n_edges(self) -> int:
        """Number of directed edges E."""
        return int(self.edge_index.shape[1])

    @property
    def volume(self) -> Tensor:
        """Cell volumes (S,) in Å³; positive for left-handed cells too, zero without a cell."""
        return torch.linalg.det(self.cell).abs()


def as_bytes(content: Any) -> bytes:
    """Pickled by Python's own pickler.

    That of ``multiprocessing`` would move every tensor in it, with torch imported, into memory that both processes then
    write to: the sender's tensors too.
    """
    return pickle.dumps(content, pickle.HIGHEST_PROTOCOL)


def _graph_from_bytes(content: bytes) -> AtomGraph:
    return AtomGraph(**pickle.loads(content))


def make_graph(
    positions: Tensor,
    atomic_numbers: Tensor,
    edge_index: Tensor,
    edge_shifts: Tensor,
    cell: Tensor | None = None,
    pbc: Tensor | None = None,
    **labels: Tensor,
) -> AtomGraph:
    """One structure as an AtomGraph; ``cell`` (3, 3), ``pbc`` (3,); labels energy (), forces (N, 3), stress (3, 3)."""
    n = positions.shape[0]
    f64 = {"dtype": torch.float64, "device": positions.device}
    nan = float("nan")
    graph = AtomGraph(
        positions=positions.to(torch.float64),
        atomic_numbers=atomic_numbers.to(torch.int64),
        edge_index=edge_index.to(torch.int64),
        edge_shifts=edge_shifts.to(torch.float64),
        cell=(torch.zeros(3, 3, **f64) if cell is None else cell.to(torch.float64)).reshape(1, 3, 3),
        pbc=(torch.zeros(3, dtype=torch.bool, device=positions.device) if pbc is None else pbc).reshape(1, 3),
        energy=labels.get("energy", torch.full((1,), nan, **f64)).to(torch.float64).reshape(1),
        forces=labels.get("forces", torch.full((n, 3), nan, **f64)).to(torch.float64),
        stress=labels.get("stress", torch.full((1, 3, 3), nan, **f64)).to(torch.float64).reshape(1, 3, 3),
        batch=torch.zeros(n, dtype=torch.int64, device=positions.device),
    )
    graph.n_systems = 1
    return graph


def graph_from_arrays(
    positions: np.ndarray, numbers: np.ndarray, cell: np.ndarray, pbc: np.ndarray, cutoff: float, **labels: Any
) -> AtomGraph:
    """One structure as an AtomGraph with every edge within ``cutoff`` Å; arrays and labels as in ``make_graph``.

    Raises InputError for positions, or cell vectors of periodic directions, that are not finite.
    """
    pbc = np.asarray(pbc, dtype=bool)
    cell = used_cell(cell, pbc)
    edge_index, shifts = neighbor_list(positions, cell, pbc, cutoff)
    return make_graph(
        torch.from_numpy(np.array(positions, dtype=np.float64)),
        torch.from_numpy(np.array(numbers, dtype=np.int64)),
        torch.from_numpy(edge_index),
        torch.from_numpy(shifts),
        torch.from_numpy(cell),
        torch.from_numpy(np.array(pbc)),
        **{key: torch.from_numpy(np.array(value, dtype=np.float64)) for key, value in labels.items()},
    )


def batch_graphs(graphs: Sequence[AtomGraph]) -> AtomGraph:
    """Concatenate graphs into one: atoms are counted on in ``edge_index``, structures in ``batch``."""
    if len(graphs) == 1:
        return graphs[0]
    first = graphs[0]
    n_atoms = torch.tensor([g.n_atoms for g in graphs], device="cpu")
    n_systems = torch.tensor([g.n_systems for g in graphs], device="cpu")
    atom_offsets = (n_atoms.cumsum(0) - n_atoms).tolist()
    system_offsets = (n_systems.cumsum(0) - n_systems).tolist()
    cat = {key: torch.cat([g[key] for g in graphs]) for key in _ATOM_KEYS + _EDGE_KEYS + _SYSTEM_KEYS if key in first}
    out = AtomGraph(
        edge_index=torch.cat([g.edge_index + k for g, k in zip(graphs, atom_offsets, strict=True)], dim=1),
        batch=torch.cat([g.batch + k for g, k in zip(graphs, system_offsets, strict=True)]),
        **cat,
    )
    out.n_systems = int(n_systems.sum())
    return out


def select_systems(graph: AtomGraph, systems: Tensor) -> AtomGraph:
    """The structures ``systems`` (K,), ascending and none of them twice, as a batch of their own; K may be zero."""
    place = torch.full((graph.n_systems,), -1, device=systems.device)
    place[systems] = torch.arange(len(systems), device=systems.device)
    atoms = place[graph.batch] >= 0
    edges = atoms[graph.edge_index[0]]
    out = AtomGraph(edge_index=(atoms.cumsum(0) - 1)[graph.edge_index[:, edges]], batch=place[graph.batch[atoms]])
    for key in set(graph.keys()) - {"edge_index", "batch", "n_systems"}:
        out[key] = graph[key][atoms if key in _ATOM_KEYS else edges if key in _EDGE_KEYS else systems]
    out.n_systems = len(systems)
    return out


def derived(graph: AtomGraph, key: str, build: Callable[[], T]) -> T:
    """What a network derives from the edges alone (sort orders, padded layouts): built once per edge list.

    Kept outside the graph's fields, so that batching and copying do not see it; rebuilt when ``edge_index`` is another
    tensor.
    """
    store = graph.__dict__.setdefault(_DERIVED, {})
    held = store.get(key)
    if held is None or held[0] is not graph.edge_index:
        held = store[key] = (graph.edge_index, build())
    return held[1]


def has_reverse_edges(graph: AtomGraph) -> bool:
    """Whether the graph holds the reverse of every edge, as neighbour lists do; found out once per edge list."""
    return derived(graph, "has_reverse_edges", lambda: _has_reverse_edges(graph))


def _has_reverse_edges(graph: AtomGraph) -> bool:
    """By comparing sums of hashes of (i, j, S) and of (j, i, −S)."""

    def total(i: Tensor, j: Tensor, shifts: Tensor) -> int:
        mixed = i * 0x2545F491 + j * 0x1B873593
        for axis, factor in enumerate((0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35)):
            mixed = mixed + shifts[:, axis] * factor
        for _ in range(2):
            mixed = (mixed ^ (mixed >> 29)) * 0x1CE4E5B9BF58476D
        return int(mixed.sum())

    i, j = graph.edge_index
    shifts = graph.edge_shifts.to(torch.int64)
    return total(i, j, shifts) == total(j, i, -shifts)


def reverse_edges(graph: AtomGraph) -> Tensor:
    """The edge (E,) int64 that leads back, (j, i, −S), for every edge (i, j, S); found once per edge list.

    Raises InputError where one is missing.
    """
    return derived(graph, "reverse_edges", lambda: _reverse_edges(graph))


def _reverse_edges(graph: AtomGraph) -> Tensor:
    """By sorting one integer per directed edge, and those of the edges back."""
    (i, j), shifts, n_atoms = graph.edge_index, graph.edge_shifts.to(torch.int64), graph.n_atoms
    base = 2 * int(shifts.abs().max()) + 1 if len(i) else 1
    image = (shifts[:, 0] * base + shifts[:, 1]) * base + shifts[:, 2]
    key, order = torch.sort((i * n_atoms + j) * base**3 + image)
    back_key, back_order = torch.sort((j * n_atoms + i) * base**3 - image)
    if not torch.equal(key, back_key):
        raise InputError("the edge list lacks the reverse of an edge; both directions of every pair are accepted")
    reverse = torch.empty_like(order)
    reverse[order] = back_order
    return reverse


def edge_vectors(graph: AtomGraph, dtype: torch.dtype) -> Tensor:
    """Edge vectors r_ij (E, 3) in Å, formed in float64 from float64 positions and cell, then cast to ``dtype``.

    The vector of the reverse edge is the exact negative, to the last bit.
    """
    i, j = graph.edge_index
    vectors = graph.positions[j] - graph.positions[i]
    if bool(graph.pbc.any()):
        # Term by term: a matrix product may round the rows of an edge and of its reverse differently.
        cell = graph.cell[graph.batch[i]] if graph.n_systems > 1 else graph.cell
        for axis in range(3):
            vectors = vectors + graph.edge_shifts[:, axis, None] * cell[:, axis]
    return vectors.to(dtype)
