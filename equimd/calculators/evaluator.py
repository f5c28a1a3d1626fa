"""Evaluator: arrays in, arrays out; the one path from positions to predictions that every engine takes.

It keeps a Verlet list and a graph from step to step. A frozen network takes edges of the skin as they come, and passes
over them. Before any other they are dropped: for the cutoff r and the skin s they are a share 1 − (r/(r + s))³ of a
dense system's edges (25 % for 5 + 0.5 Å), each as dear as the others, while finding them costs one pass over edge
vectors. What is left is the very list, in the very order, that a fresh search gives, so predictions do not depend on
when the list was built. Where nothing is to be dropped (small molecules), or the same edges as before, the graph stays
and with it what networks derive from its edges.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from equimd.errors import InputError
from equimd.graph import AtomGraph, batch_graphs, edge_vectors, make_graph
from equimd.kernels.ambient import in_plain_torch
from equimd.neighbors import VerletList, check_images, neighbor_list, used_cell
from equimd.rotations import rotate_vectors

if TYPE_CHECKING:
    from equimd.models.potential import Potential, Prediction

MIN_DISTANCE = 0.1
"""Atoms closer than this, in Å, are taken to be at one place: a mistake in the input."""

MAX_EDGES = {"cpu": 20_000, "cuda": 200_000}
"""Directed edges that are evaluated as one batch; bounds the memory, not the size of a structure."""


@dataclass(frozen=True)
class Structure:
    """positions (N, 3) Å, numbers (N,), cell (3, 3) rows in Å, pbc (3,) bool.

    Cell vectors that are not finite become zero. Raises InputError for one of a periodic direction.
    """

    positions: np.ndarray
    numbers: np.ndarray
    cell: np.ndarray
    pbc: np.ndarray

    def __post_init__(self) -> None:
        """Ignore what directions say that are not periodic."""
        if not np.isfinite(self.cell).all():
            object.__setattr__(self, "cell", used_cell(self.cell, self.pbc))

    @property
    def has_stress(self) -> bool:
        """Whether stress is defined: something is periodic, and the cell has a volume."""
        return bool(self.pbc.any()) and 0 < abs(float(np.linalg.det(self.cell))) < np.inf


@dataclass(frozen=True)
class Outcome:
    """One structure: energy in eV, energies (N,) that sum to it, forces (N, 3) in eV/Å, stress (3, 3) in eV/Å³ or None.

    Energies contain the isolated atoms.
    """

    energy: float
    energies: np.ndarray
    forces: np.ndarray
    stress: np.ndarray | None


class Evaluator:
    """A potential that is asked for one structure after another, or for many at once.

    Several threads may ask one evaluator. Copies and pickles begin without a neighbour list.
    """

    def __init__(self, potential: "Potential", skin: float = 0.5) -> None:
        self.potential = potential
        self.n_calls = 0
        # By atomic number; NaN for elements that the potential does not know.
        self._isolated = np.full(max(potential.species) + 1, np.nan)
        for z, energy in potential.isolated_atom_energies.items():
            self._isolated[z] = energy
        self._begin(skin)

    def _begin(self, skin: float) -> None:
        """What belongs to one structure, and the lock of those who write to it."""
        self._lock = threading.RLock()
        self.list = VerletList(self.potential.cutoff, skin)
        self._numbers: np.ndarray | None = None
        self._full: AtomGraph | None = None  # None unless it has passed all checks
        self._kept: tuple[Tensor, AtomGraph] | None = None  # which edges of it, and the graph with these
        self._closest = np.inf  # Å, when the list was built

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to one structure, which two owners would both write to."""
        scratch = ("_lock", "list", "_numbers", "_full", "_kept", "_closest")
        return {name: value for name, value in self.__dict__.items() if name not in scratch} | {"skin": self.list.skin}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin anew."""
        vars(self).update(state)
        self._begin(vars(self).pop("skin"))

    def reset(self) -> None:
        """Forget the neighbour list and the graph."""
        with self._lock:
            self.list.reset()
            self._numbers = self._full = self._kept = None

    def check_numbers(self, numbers: np.ndarray) -> None:
        """Refuse an empty structure and elements that the potential was not trained on."""
        if len(numbers) == 0:
            raise InputError("the structure has no atoms; at least one is needed")
        low, high = int(numbers.min()), int(numbers.max())
        if low < 0 or high >= len(self._isolated) or np.isnan(self._isolated[numbers]).any():
            unknown = sorted({int(z) for z in numbers} - set(self.potential.species))
            raise InputError(
                f"the potential does not know {_symbols(unknown)}; it knows {_symbols(self.potential.species)}"
            )

    def isolated_energy(self, numbers: np.ndarray) -> float:
        """Energy of these atoms, each for itself, in eV."""
        return float(self._isolated[numbers].sum())

    @in_plain_torch
    def evaluate(self, structure: Structure, stress: bool = False) -> Outcome:
        """One structure, by the Verlet list; the call to repeat in a simulation."""
        with self._lock:
            graph = self._update(structure)
            return self._outcomes(self._forward(graph, stress), [structure])[0]

    @in_plain_torch
    def profile(self, structure: Structure, repeats: int = 10) -> dict[str, float]:
        """Median seconds of each part of one evaluation, on one thread; see ``Potential.profile``."""
        with self._lock:
            return self._profile(structure, repeats)

    def _profile(self, structure: Structure, repeats: int) -> dict[str, float]:
        self.evaluate(structure)
        n_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            whole = _median_seconds(lambda: self.evaluate(structure, structure.has_stress), repeats)
            parts = {"neighbours": _median_seconds(lambda: self._update(structure), repeats)}
        finally:
            torch.set_num_threads(n_threads)
        parts |= self.potential.profile(self._update(structure), repeats)
        return parts | {"everything else": max(0.0, whole - sum(parts.values()))}

    @in_plain_torch
    def evaluate_many(self, structures: Sequence[Structure], max_edges: int | None = None) -> list[Outcome]:
        """Independent structures in batches of at most ``max_edges`` edges; stress wherever it is defined."""
        out: list[Outcome] = []
        for graphs in self._batches(structures, self._edge_limit(max_edges)):
            chunk = structures[len(out) : len(out) + len(graphs)]
            prediction = self._forward(batch_graphs(graphs), any(s.has_stress for s in chunk))
            out.extend(self._outcomes(prediction, chunk))
        return out

    @in_plain_torch
    def evaluate_rotated(
        self, structure: Structure, rotations: np.ndarray, max_edges: int | None = None
    ) -> list[Outcome]:
        """K rotated copies, predictions in the rotated frame: one neighbour search, rotation in float64."""
        self.check_numbers(structure.numbers)
        edges, shifts = neighbor_list(structure.positions, structure.cell, structure.pbc, self.potential.cutoff)
        _check_distances(structure, edges, shifts)
        per_chunk = max(1, self._edge_limit(max_edges) // max(1, edges.shape[1]))
        out: list[Outcome] = []
        for start in range(0, len(rotations), per_chunk):
            graph = _rotated_copies(structure, edges, shifts, rotations[start : start + per_chunk])
            prediction = self._forward(graph.to(self.potential.device), structure.has_stress)
            out.extend(self._outcomes(prediction, [structure] * graph.n_systems))
        return out

    def _edge_limit(self, max_edges: int | None) -> int:
        return max_edges or MAX_EDGES.get(self.potential.device.type, MAX_EDGES["cpu"])

    def _forward(self, graph: AtomGraph, stress: bool) -> "Prediction":
        self.n_calls += 1
        try:
            return self.potential(graph, stress=stress)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"out of memory on {self.potential.device} with {graph.n_atoms} atoms and {graph.n_edges} edges; "
                "use fewer atoms, float32, a smaller max_edges or another device"
            ) from error

    def _outcomes(self, prediction: "Prediction", structures: Sequence[Structure]) -> list[Outcome]:
        """Split a prediction of S structures into S outcomes on the CPU; float64 throughout."""
        energy = prediction.energy.cpu().numpy()
        energies = prediction.energies.cpu().numpy()
        forces = prediction.forces.to(torch.float64).cpu().numpy()
        stress = None if prediction.stress is None else prediction.stress.to(torch.float64).cpu().numpy()
        out, start = [], 0
        for k, s in enumerate(structures):
            rows = slice(start, start + len(s.numbers))
            sigma = stress[k] if stress is not None and s.has_stress else None
            out.append(Outcome(float(energy[k]), energies[rows] + self._isolated[s.numbers], forces[rows], sigma))
            start = rows.stop
        return out

    def _batches(self, structures: Sequence[Structure], max_edges: int) -> Iterator[list[AtomGraph]]:
        graphs: list[AtomGraph] = []
        n_edges = 0
        for s in structures:
            self.check_numbers(s.numbers)
            edges, shifts = neighbor_list(s.positions, s.cell, s.pbc, self.potential.cutoff)
            _check_distances(s, edges, shifts)
            graph = _graph(s, edges, shifts)
            if graphs and n_edges + graph.n_edges > max_edges:
                yield graphs
                graphs, n_edges = [], 0
            graphs.append(graph.to(self.potential.device))
            n_edges += graph.n_edges
        if graphs:
            yield graphs

    def _update(self, s: Structure) -> AtomGraph:
        """The graph of this structure with the edges within the cutoff; as much as possible is kept."""
        if self._numbers is None or not np.array_equal(self._numbers, s.numbers):
            self.check_numbers(s.numbers)
            self.reset()
        edges, shifts, rebuilt = self.list.update(s.positions, s.cell, s.pbc)
        if rebuilt or self._full is None:
            self._full = None  # what is refused now is refused again
            self._closest = _check_distances(s, edges, shifts)
            self._numbers, self._kept = s.numbers.copy(), None
            self._full = _graph(s, edges, shifts).to(self.potential.device)
        else:
            self._full.positions.copy_(torch.from_numpy(np.ascontiguousarray(s.positions, dtype=np.float64)))
        # While the list is valid, no two atoms have come nearer by more than the skin.
        if self.potential.has_frozen_network and self._closest > MIN_DISTANCE + self.list.skin:
            return self._full
        squared = edge_vectors(self._full, torch.float64).square().sum(1)
        keep = squared <= self.potential.cutoff**2
        if squared.numel() and float(squared.min()) < MIN_DISTANCE**2:
            _check_distances(s, edges, shifts)
        if self._kept is None or not torch.equal(keep, self._kept[0]):
            self._kept = keep, _without(self._full, keep)
        return self._kept[1]


def _median_seconds(call: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def _graph(s: Structure, edges: np.ndarray, shifts: np.ndarray) -> AtomGraph:
    return make_graph(
        torch.tensor(s.positions, dtype=torch.float64),  # a copy: the graph's positions are written to
        torch.tensor(s.numbers, dtype=torch.int64),
        torch.from_numpy(edges),
        torch.from_numpy(shifts),
        torch.tensor(s.cell, dtype=torch.float64),
        torch.tensor(s.pbc, dtype=torch.bool),
    )


def _without(full: AtomGraph, keep: Tensor) -> AtomGraph:
    """The graph with some edges only, on the same position tensor."""
    if bool(keep.all()):
        return full
    assert full.edge_index is not None
    edges, shifts = full.edge_index[:, keep], full.edge_shifts[keep]
    return make_graph(full.positions, full.atomic_numbers, edges, shifts, full.cell[0], full.pbc[0])


def _rotated_copies(s: Structure, edges: np.ndarray, shifts: np.ndarray, rotations: np.ndarray) -> AtomGraph:
    """K rotated copies as one graph: positions and cell rotated in float64, the edges repeated."""
    k, n, e = len(rotations), len(s.numbers), edges.shape[1]
    offsets = n * torch.arange(k).repeat_interleave(e)
    graph = AtomGraph(
        positions=torch.from_numpy(np.ascontiguousarray(rotate_vectors(s.positions, rotations))).reshape(k * n, 3),
        atomic_numbers=torch.from_numpy(s.numbers.astype(np.int64)).repeat(k),
        cell=torch.from_numpy(np.ascontiguousarray(rotate_vectors(s.cell, rotations))),
        pbc=torch.from_numpy(s.pbc).expand(k, 3),
        edge_index=torch.from_numpy(edges).repeat(1, k) + offsets,
        edge_shifts=torch.from_numpy(shifts).to(torch.float64).repeat(k, 1),
        batch=torch.arange(k).repeat_interleave(n),
    )
    graph.n_systems = k
    return graph


def _check_distances(s: Structure, edges: np.ndarray, shifts: np.ndarray) -> float:
    """Refuse two atoms at one place, and cells smaller than atoms; the shortest distance in Å."""
    check_images(s.numbers, s.cell, s.pbc)
    if edges.shape[1] == 0:
        return np.inf
    shift = shifts @ s.cell if s.pbc.any() else 0.0
    squared = np.square(s.positions[edges[1]] - s.positions[edges[0]] + shift).sum(axis=1)
    worst = int(squared.argmin())
    if squared[worst] < MIN_DISTANCE**2:
        i, j = sorted(int(k) for k in edges[:, worst])
        what = f"atoms {i} and {j} are" if i != j else f"atom {i} and its periodic image are"
        raise InputError(f"{what} {squared[worst] ** 0.5:.3g} Å apart; at least {MIN_DISTANCE} Å is accepted")
    return float(squared[worst] ** 0.5)


def _symbols(numbers: Sequence[int]) -> str:
    from ase.data import chemical_symbols

    return ", ".join(chemical_symbols[z] if 0 <= z < len(chemical_symbols) else f"element {z}" for z in numbers)
