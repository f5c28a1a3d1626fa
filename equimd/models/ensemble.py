"""Mean and spread of several potentials of the same species.

The spread of independently trained members is the usual measure of extrapolation, and averaging lowers their symmetry
errors along with their other errors, roughly as one over the square root of their number or faster.
"""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from equimd.errors import InputError
from equimd.graph import AtomGraph
from equimd.kernels.ambient import in_plain_torch
from equimd.models.potential import Potential, PotentialSettings, Prediction


class Spread(NamedTuple):
    """Standard deviations over the members (with M − 1): energy (S,) eV, forces (N, 3) eV/Å per component."""

    energy: Tensor
    forces: Tensor


class EnsemblePotential(Potential):
    """The mean of M ≥ 2 potentials as one potential: the gradient of the mean energy is the mean of the forces.

    Members may differ in architecture, cutoff and isolated-atom energies, not in species, precision or device, nor in
    whether their forces are direct. Raises InputError where they do.
    """

    family: ClassVar[str] = "ensemble"

    @in_plain_torch
    def __init__(self, members: Sequence[Potential]) -> None:
        if len(members) < 2:
            raise InputError(f"an ensemble of {len(members)} members has no spread; at least 2 are needed")
        first = members[0]
        for k, member in enumerate(members):
            for what in ("species", "dtype", "device", "direct_forces"):
                if getattr(member, what) != getattr(first, what):
                    raise InputError(
                        f"{what} of ensemble member {k} is {getattr(member, what)}; member 0 has {getattr(first, what)}"
                    )
        # Energies come from the members complete, in eV: scale 1, shift 0, repulsion included.
        settings = PotentialSettings(cutoff=max(m.cutoff for m in members), zbl=False)
        mean = {z: sum(m.isolated_atom_energies[z] for m in members) / len(members) for z in first.species}
        super().__init__(settings, first.species, mean)
        self.members = nn.ModuleList(members)
        self.direct_forces = first.direct_forces
        self.to(dtype=first.dtype, device=first.device)

    def forward(self, graph: AtomGraph, *, stress: bool = False, create_graph: bool = False) -> Prediction:
        """The mean of the members' predictions, each by the fastest way it has."""
        predictions = [m(graph, stress=stress, create_graph=create_graph) for m in self._members()]
        energy, energies, forces = (torch.stack([p[k] for p in predictions]).mean(0) for k in range(3))  # type: ignore
        stresses = [p.stress for p in predictions if p.stress is not None]
        return Prediction(energy, energies, forces, torch.stack(stresses).mean(0) if stresses else None)

    def network(self, graph: AtomGraph, vectors: Tensor) -> Tensor:
        """Mean atomic energies (N,) in eV relative to isolated atoms."""
        return torch.stack([m.atomic_energies(graph, vectors) for m in self._members()]).mean(0)

    def network_with_forces(self, graph: AtomGraph, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Mean atomic energies (N,) in eV and mean direct forces (N, 3) in eV/Å."""
        energies, forces = zip(*(m.atomic_energies_and_forces(graph, vectors) for m in self._members()), strict=True)
        return torch.stack(energies).mean(0), torch.stack(forces).mean(0)

    @in_plain_torch
    def spread(self, graph: AtomGraph) -> Spread:
        """How far the members disagree about ``graph``; energies without their isolated atoms."""
        predictions = [m(graph) for m in self._members()]
        relative = torch.stack([p.energies for p in predictions])
        zeros = torch.zeros(len(predictions), graph.n_systems, dtype=relative.dtype, device=relative.device)
        energy = zeros.index_add(1, graph["batch"], relative)
        return Spread(energy.std(0), torch.stack([p.forces for p in predictions]).std(0))

    def _members(self) -> list[Potential]:
        return [m for m in self.members if isinstance(m, Potential)]
