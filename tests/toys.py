"""Small potentials with known properties, for tests that need no trained network."""

import torch
from torch import Tensor

from equimd.models.potential import Potential, PotentialSettings, Prediction
from equimd.models.radial import polynomial_cutoff, safe_norm

ISOLATED = {1: -13.6, 6: -1030.0, 8: -2040.0}


class ToyPotential(Potential):
    """Many-body and smooth: Σ_j f(r) e^{−r/2} (1 + z_i z_j/50), through a square root; optionally not invariant.

    ``anisotropy`` adds Σ_j f(r) x y / r², which changes under rotation.
    """

    family = "toy"

    def __init__(self, species=(1, 6, 8), cutoff: float = 4.0, anisotropy: float = 0.3, zbl: bool = False) -> None:
        settings = PotentialSettings(cutoff=cutoff, zbl=zbl)
        super().__init__(settings, tuple(species), {z: ISOLATED.get(z, -5.0 * z) for z in species})
        self.anisotropy = anisotropy
        self.family = "transformer" if anisotropy else "equivariant"

    def pair(self, vectors: Tensor) -> Tensor:
        r = safe_norm(vectors)
        value = torch.exp(-0.5 * r) + self.anisotropy * vectors[:, 0] * vectors[:, 1] / r.square()
        return polynomial_cutoff(r, self.cutoff) * value

    def network(self, graph, vectors: Tensor) -> Tensor:
        i, j = graph.edge_index
        z = graph.atomic_numbers.to(self.dtype)
        terms = self.pair(vectors).to(self.dtype) * (1.0 + z[i] * z[j] / 50.0)
        density = terms.new_zeros(graph.n_atoms).index_add(0, i, terms)
        return -torch.sqrt(density.square() + 1.0)


class DirectForces(ToyPotential):
    """Forces from a head of their own."""

    direct_forces = True

    def network_with_forces(self, graph, vectors: Tensor) -> tuple[Tensor, Tensor]:
        i = graph.edge_index[0]
        pull = (self.pair(vectors).unsqueeze(1) * vectors).to(self.dtype)
        return self.network(graph, vectors), pull.new_zeros(graph.n_atoms, 3).index_add(0, i, pull)


class WrongForces(ToyPotential):
    """Broken on purpose: forces are 1 % too large."""

    def forward(self, graph, *, stress: bool = False, create_graph: bool = False) -> Prediction:
        prediction = super().forward(graph, stress=stress, create_graph=create_graph)
        return prediction._replace(forces=1.01 * prediction.forces)


class WrongStress(ToyPotential):
    """Broken on purpose: the stress has the other sign."""

    def forward(self, graph, *, stress: bool = False, create_graph: bool = False) -> Prediction:
        prediction = super().forward(graph, stress=stress, create_graph=create_graph)
        return prediction if prediction.stress is None else prediction._replace(stress=-prediction.stress)


class HardCutoff(ToyPotential):
    """Broken on purpose: edges beyond the cutoff count."""

    def pair(self, vectors: Tensor) -> Tensor:
        return torch.exp(-0.5 * safe_norm(vectors))


class BrokenSingle(ToyPotential):
    """Broken on purpose: in float32 only, as a compiled kernel might be."""

    def pair(self, vectors: Tensor) -> Tensor:
        return super().pair(vectors) * (1.1 if self.dtype == torch.float32 else 1.0)


class OrderDependent(ToyPotential):
    """Broken on purpose: the first atom of a structure weighs more."""

    def network(self, graph, vectors: Tensor) -> Tensor:
        first = torch.ones(graph.n_atoms, dtype=self.dtype)
        first[torch.searchsorted(graph.batch, torch.arange(graph.n_systems))] = 2.0
        return super().network(graph, vectors) * first


class NotInvariant(ToyPotential):
    """Broken on purpose: calls itself equivariant and is not."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.family = "equivariant"
