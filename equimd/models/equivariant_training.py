"""Training of the equivariant family: the evaluation with dual numbers that ``dual_training`` asks for.

Autograd differentiates it once. Radial functions are interpolated between knots, where the radial networks are
evaluated with their first two derivatives: distances enter through polynomials only.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from equimd.graph import AtomGraph, edge_vectors
from equimd.kernels.dual import Shares, convolve_dual
from equimd.kernels.dual_mixing import map_rows, mix_and_gate
from equimd.kernels.harmonics import moving_harmonics
from equimd.kernels.radial_table import Knots
from equimd.models.dual_training import Trainer, threads_of_torch
from equimd.models.potential import FrozenOutput, geometry_of, topology_of
from equimd.models.radial import safe_norm

if TYPE_CHECKING:
    from equimd.models.equivariant import EquivariantPotential

INTERVALS_PER_BASIS_FUNCTION = 24
"""Of the radial functions, whose waves are as short as the last basis function's, in training shorter still.

Gradients are then within 1e-5 of those without a table for random weights, within 5e-3 for water-equivariant's.
"""
FEWEST_BASIS_FUNCTIONS = 8
"""That count: the radial networks bend even a single one."""


class EquivariantTrainer(Trainer):
    """With the knots of the radial functions, and the compiled network."""

    def __init__(self, potential: "EquivariantPotential") -> None:
        self.potential: EquivariantPotential = potential
        n_intervals = INTERVALS_PER_BASIS_FUNCTION * max(potential.settings.n_bessel, FEWEST_BASIS_FUNCTIONS)
        self.knots = Knots(potential.radial_basis, potential.cutoff, n_intervals)
        self.jet = self.knots.jet.to(potential.dtype)
        self._network: Any = None

    def evaluate(self, graph: AtomGraph) -> tuple[FrozenOutput, list[Tensor]]:
        """What is held are the jets of the radial functions at the knots."""
        potential = self.potential
        with threads_of_torch(graph), torch.enable_grad():
            jets = [layer.radial.jet(self.jet) for layer in potential.interactions]
        tables = [self.knots.table(jet.detach() * potential.message_scale) for jet in jets]
        network = potential.frozen_weights(tables)
        if self._network is None:
            self._network = potential.compile_network(network)
        else:
            self._network.update(network)
        kind = potential.species_of(graph)
        return FrozenOutput(*self._network(geometry_of(graph), kind, potential.scale[kind], topology_of(graph))), jets

    def gradients(
        self, graph: AtomGraph, held: list[Tensor], factors: Tensor, directions: Tensor, parameters: list[Tensor]
    ) -> list[Tensor | None]:
        """By autograd, of outputs and their rates."""
        scale = self.potential.scale[self.potential.species_of(graph)]
        with torch.enable_grad():
            outputs, rates = self.outputs_and_rates(graph, directions, held).unbind(1)
            gradients = torch.autograd.grad(
                (outputs * factors.to(outputs)).sum() + (rates * scale).sum(),
                parameters,
                retain_graph=True,  # another loss of the same prediction may come
                allow_unused=True,
            )
        return list(gradients)

    def outputs_and_rates(self, graph: AtomGraph, directions: Tensor, jets: list[Tensor]) -> Tensor:
        """Outputs and their rates of change along the directions (E, 3) of the edge vectors, (N, 2)."""
        potential, topology = self.potential, topology_of(graph)
        with torch.no_grad():
            vectors = edge_vectors(graph, torch.float64)
            harmonics, shares = self._geometry(vectors, directions.to(vectors.dtype))
        start = potential.embedding[potential.species_of(graph)]
        x = torch.stack([start, torch.zeros_like(start)], dim=1).unsqueeze(2)  # (N, 2, 1, C)
        for layer, jet in zip(potential.interactions, jets, strict=True):
            table = jet.transpose(0, 1).flatten(0, 1)  # knot by knot
            h = map_rows(x, list(layer.up.weights), layer.irreps_in)
            message = convolve_dual(h, harmonics, table, shares, layer.plan, topology)
            x = mix_and_gate(message, x, list(layer.mix.weights), layer.plan)
        hidden, last = potential.readout_maps
        y = x.flatten(2) @ hidden.weight.T
        y = _silu(torch.stack([y[:, 0] + hidden.bias, y[:, 1]], dim=1))
        outputs, rates = (y @ last.weight.T).squeeze(2).unbind(1)
        return torch.stack([outputs + last.bias, rates], dim=1)

    def _geometry(self, vectors: Tensor, directions: Tensor) -> tuple[Tensor, Shares]:
        """Values and rates of harmonics (E, 2, S), and of shares in the knots."""
        potential = self.potential
        distances = safe_norm(vectors)
        units = vectors / distances.unsqueeze(1)
        lengthening = (units * directions).sum(dim=1)
        turning = (directions - units * lengthening.unsqueeze(1)) / distances.unsqueeze(1)
        *shares, interval = self.knots.moving_shares(distances, lengthening)
        harmonics = moving_harmonics(units, turning, potential.settings.l_max)
        inside = (distances <= potential.cutoff).view(-1, 1, 1)  # beyond, nothing is known of radial functions
        values = torch.stack(shares, dim=1) * inside
        moving = torch.stack(harmonics, dim=1) * potential.message_scale
        return moving.to(potential.dtype), Shares(values.to(potential.dtype), interval, step=3)


def _silu(y: Tensor) -> Tensor:
    """silu of dual numbers (N, 2, …)."""
    value, rate = y.unbind(1)
    s = torch.sigmoid(value)
    u = value * s
    return torch.stack([u, (s + u * (1 - s)) * rate], dim=1)
