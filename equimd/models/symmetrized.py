"""Symmetry restored at inference: group average, random frame, canonical frame, around any potential.

For a potential E that is not invariant and rotations g_k with weights w_k:

- *average*: Ē(x) = Σ w_k E(g_k x), F̄ = Σ w_k g_k⁻¹ F(g_k x), σ̄ = Σ w_k g_k⁻¹ σ(g_k x) g_k; forces and stress are exact
  gradients of the averaged energy. Exact invariance up to the degree that the quadrature integrates.
- *random*: one fresh rotation per call, E(g x) and g⁻¹ F(g x). As cheap as the potential itself, right on average;
  forces are stochastic, so conserved quantities lose their meaning and minimisers their convergence.
- *canonical*: a frame from the structure, E(R(x) x), with the gradient through R: exactly invariant, as cheap as the
  potential itself, conservative, and discontinuous (see ``inertia_frames``).
"""

import copy
import threading
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from equimd.errors import InputError
from equimd.graph import AtomGraph, derived
from equimd.kernels.ambient import in_plain_torch
from equimd.models.potential import Potential, PotentialSettings, Prediction
from equimd.models.radial import cosine_cutoff, safe_norm
from equimd.rotations import (
    GroupSample,
    quadrature,
    random_rotations,
    rotate_back_tensor,
    rotate_back_vectors,
    rotate_vectors,
)

MODES = ("average", "random", "canonical")
_BLOCK = 256  # random rotations that are drawn at once
_COUNTING = threading.Lock()  # threads that share a potential get a rotation each


class SymmetrizedPotential(Potential):
    """A potential whose symmetry is restored at inference; the wrapped one, ``inner``, is not changed.

    Args:
        inner: any potential.
        mode: "average", "random" or "canonical", see the module's text.
        degree: of the quadrature that *average* takes; its cost is that many rotations (24 for 3, 60 for 5, doubled by
            ``inversion``).
        inversion: symmetrise over O(3); otherwise over SO(3).
        n_rotations: *average* over this many random rotations instead of a quadrature.
        seed: of random rotations; call n of *random* uses ``random_rotation(n)``, whatever was called before.
        max_edges: rotated copies are evaluated together up to this many edges; bounds the memory, not the size.

    Raises InputError for an unknown mode.
    """

    family: ClassVar[str] = "symmetrized"

    @in_plain_torch
    def __init__(
        self,
        inner: Potential,
        mode: Literal["average", "random", "canonical"] = "average",
        *,
        degree: int = 5,
        inversion: bool = True,
        n_rotations: int | None = None,
        seed: int = 0,
        max_edges: int = 20_000,
    ) -> None:
        if mode not in MODES:
            raise InputError(f"symmetrize is {mode!r}; accepted are {', '.join(MODES)}")
        # Energies come from ``inner`` complete, in eV: scale 1, shift 0, repulsion included.
        settings = PotentialSettings(cutoff=inner.cutoff, zbl=False)
        super().__init__(settings, inner.species, inner.isolated_atom_energies)
        self.inner = inner
        self.direct_forces = inner.direct_forces
        self.mode, self.inversion, self.seed, self.max_edges = mode, inversion, seed, max_edges
        self.n_calls = 0  # recorded: the next call of *random* uses random_rotation(n_calls)
        if mode == "average":
            draw = n_rotations is not None
            self.sample = random_rotations(n_rotations, seed, inversion) if draw else quadrature(degree, inversion)
        self.to(dtype=inner.dtype, device=inner.device)

    def random_rotation(self, call: int) -> np.ndarray:
        """The rotation (3, 3) of the given call of mode *random*; a function of the seed."""
        block, k = divmod(call, _BLOCK)
        return random_rotations(_BLOCK, (self.seed << 32) + block, self.inversion).rotations[k]

    def forward(self, graph: AtomGraph, *, stress: bool = False, create_graph: bool = False) -> Prediction:
        """As for every potential; rotated copies of the structures share one neighbour list."""
        if self.mode == "canonical":
            return super().forward(graph, stress=stress, create_graph=create_graph)
        sample = self._next_sample()
        rotations = torch.from_numpy(sample.rotations).to(self.device)
        weights = torch.from_numpy(sample.weights).to(self.device)
        per_chunk = max(1, self.max_edges // max(1, graph.n_edges))
        total: list[Tensor] = []
        for r, w in zip(rotations.split(per_chunk), weights.split(per_chunk), strict=True):
            prediction = self.inner(_rotated_copies(graph, r), stress=stress, create_graph=create_graph)
            parts = _back_rotated_sums(prediction, r, w)
            total = [a + b for a, b in zip(total, parts, strict=True)] if total else parts
        energy, energies, forces = total[0], total[1], total[2].to(self.dtype)
        return Prediction(energy, energies, forces, total[3].to(self.dtype) if stress else None)

    def _next_sample(self) -> GroupSample:
        if self.mode == "average":
            return self.sample
        with _COUNTING:
            call, self.n_calls = self.n_calls, self.n_calls + 1
        rotation = self.random_rotation(call)
        return GroupSample(rotation[None], np.ones(1), "random", None, self.inversion)

    def network(self, graph: AtomGraph, vectors: Tensor) -> Tensor:
        """Atomic energies (N,) in eV of the rotated edge vectors (E, 3); the definition of the symmetrised energy."""
        energies = torch.zeros(graph.n_atoms, dtype=vectors.dtype, device=vectors.device)
        for rotations, weight in self._frames(graph, vectors):
            energies = energies + weight * self.inner.atomic_energies(graph, _rotate_edges(graph, vectors, rotations))
        return energies

    def network_with_forces(self, graph: AtomGraph, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Atomic energies (N,) in eV and forces (N, 3) in eV/Å from the inner potential's head, rotated back."""
        energies = torch.zeros(graph.n_atoms, dtype=vectors.dtype, device=vectors.device)
        forces = torch.zeros(graph.n_atoms, 3, dtype=vectors.dtype, device=vectors.device)
        for rotations, weight in self._frames(graph, vectors):
            e, f = self.inner.atomic_energies_and_forces(graph, _rotate_edges(graph, vectors, rotations))
            energies = energies + weight * e
            forces = forces + weight * rotate_back_vectors(f.unsqueeze(1), rotations[graph["batch"]]).squeeze(1)
        return energies, forces

    def _frames(self, graph: AtomGraph, vectors: Tensor) -> list[tuple[Tensor, float]]:
        """Rotations (S, 3, 3), one for each structure, with their weights."""
        if self.mode == "canonical":
            return [(inertia_frames(graph, vectors, self.cutoff, self.inversion), 1.0)]
        sample = self._next_sample()
        rotations = torch.from_numpy(sample.rotations).to(vectors)
        return [(r.expand(graph.n_systems, 3, 3), float(w)) for r, w in zip(rotations, sample.weights, strict=True)]


def _rotate_edges(graph: AtomGraph, vectors: Tensor, rotations: Tensor) -> Tensor:
    """Edge vectors (E, 3), each rotated by the rotation (S, 3, 3) of its structure."""
    system = graph["batch"][graph["edge_index"][0]]
    return rotate_vectors(vectors.unsqueeze(1), rotations[system]).squeeze(1)


def _rotated_copies(graph: AtomGraph, rotations: Tensor) -> AtomGraph:
    """K rotated copies of S structures as one graph of K·S; its edges are made once per edge list of ``graph``."""
    k = len(rotations)
    # What is kept has edges alone, and is not written to: another thread may be here with the same graph.
    copies = copy.copy(derived(graph, f"copies_{k}", lambda: _copies(graph, k)))
    copies.atomic_numbers, copies.pbc = graph.atomic_numbers.repeat(k), graph.pbc.repeat(k, 1)
    copies.positions = rotate_vectors(graph.positions.expand(k, -1, -1), rotations).reshape(-1, 3)
    copies.cell = rotate_vectors(graph.cell.expand(k, -1, -1, -1), rotations.unsqueeze(1)).reshape(-1, 3, 3)
    return copies


def _copies(graph: AtomGraph, k: int) -> AtomGraph:
    number = torch.arange(k, device=graph["batch"].device)
    copies = AtomGraph(
        edge_index=graph["edge_index"].repeat(1, k) + graph.n_atoms * number.repeat_interleave(graph.n_edges),
        edge_shifts=graph.edge_shifts.repeat(k, 1),
        batch=graph["batch"].repeat(k) + graph.n_systems * number.repeat_interleave(graph.n_atoms),
    )
    copies.n_systems = k * graph.n_systems
    derived(copies, "copies", lambda: None)  # makes room for what is derived, which shallow copies share
    return copies


def _back_rotated_sums(prediction: Prediction, rotations: Tensor, weights: Tensor) -> list[Tensor]:
    """Σ_k w_k of energy (S,), energies (N,), forces (N, 3) and stress (S, 3, 3) if there is one; float64."""
    k = len(rotations)
    forces = rotate_back_vectors(prediction.forces.to(torch.float64).view(k, -1, 3), rotations)
    parts = [prediction.energy.view(k, -1), prediction.energies.view(k, -1), forces]
    if prediction.stress is not None:
        stress = prediction.stress.to(torch.float64).view(k, -1, 3, 3)
        parts.append(rotate_back_tensor(stress, rotations.unsqueeze(1)))
    return [torch.tensordot(weights, part, dims=1) for part in parts]


def inertia_frames(graph: AtomGraph, vectors: Tensor, cutoff: float, inversion: bool = True) -> Tensor:
    """A frame R (S, 3, 3) for each structure from its edge vectors (E, 3): R(g x) = R(x) g⁻¹.

    The rows of R are the eigenvectors e_a of M = Σ_ij f_ij Z_i Z_j r_ij r_ijᵀ, f the cutoff function, by ascending
    eigenvalue, with the sign for which t_a = Σ_i Z_i (u_i · e_a)³ > 0, u_i = Σ_j f_ij Z_j r_ij. Over SO(3) the third is
    the cross product of the others. R depends smoothly on the structure (the gradient passes through it) but jumps
    where two eigenvalues cross and where a t_a changes sign; close to a crossing forces grow as one over the gap.
    Where two eigenvalues agree within 10⁻⁵ of the largest (linear molecules, spherical and symmetric tops, cubic
    crystals) there is no frame and the structure is taken as it stands: nothing is symmetrised.
    """
    i, j = graph["edge_index"]
    r = vectors.to(torch.float64)
    z = graph.atomic_numbers.to(torch.float64)
    f = cosine_cutoff(safe_norm(r), cutoff, cutoff)
    new = {"dtype": torch.float64, "device": r.device}
    outer = (f * z[i] * z[j])[:, None, None] * r[:, :, None] * r[:, None, :]
    moment = torch.zeros(graph.n_systems, 3, 3, **new).index_add(0, graph["batch"][i], outer)
    values = torch.linalg.eigvalsh(moment.detach())
    degenerate = (values.diff(dim=1).amin(1) <= 1e-5 * values[:, 2])[:, None, None]
    fixed = torch.diag(torch.arange(1.0, 4.0, **new))
    axes = torch.linalg.eigh(torch.where(degenerate, fixed, moment)).eigenvectors.transpose(1, 2)
    with torch.no_grad():
        u = torch.zeros(graph.n_atoms, 3, **new).index_add(0, i, (f * z[j])[:, None] * r)
        cubes = z[:, None] * rotate_vectors(u.unsqueeze(1), axes[graph["batch"]]).squeeze(1) ** 3
        t = torch.zeros(graph.n_systems, 3, **new).index_add(0, graph["batch"], cubes)
        signs = torch.where(t < 0, -1.0, 1.0).to(torch.float64)[:, :, None]
    frames = axes * signs
    if not inversion:
        frames = torch.cat([frames[:, :2], torch.linalg.cross(frames[:, 0], frames[:, 1]).unsqueeze(1)], dim=1)
    return torch.where(degenerate, torch.eye(3, **new), frames).to(vectors.dtype)
