"""Training of the equivariant family: predictions whose gradient with respect to the weights takes one pass back.

For a loss L(E, F, σ) of energies, forces and stress, with b = ∂L/∂F and B = ∂L/∂(Vσ),

    dL/dθ = d/dθ [ Σ_i ∂L/∂E_i E_i + Σ_ij c_ij · ∂E/∂r_ij ],   c_ij = b_i − b_j + r_ij B,

where the bracket's factors are constants, and its last sum is the rate of change of E along c. So predictions come
from the compiled network (``kernels.network``), and their gradient from one evaluation with dual numbers, values and
rates of change side by side, which autograd differentiates once. Radial functions are interpolated between knots, where
the radial networks are evaluated with their first two derivatives: distances enter through polynomials only.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from equimd.graph import AtomGraph, edge_vectors
from equimd.kernels.dual import convolve_dual
from equimd.kernels.harmonics import moving_harmonics
from equimd.kernels.interpolation import Intervals, interpolate
from equimd.kernels.network_codegen import SIGMOID_GAIN, SILU_GAIN, TANH_GAIN
from equimd.kernels.radial_table import Knots
from equimd.kernels.threads import torch_on_one_thread
from equimd.models.potential import FrozenOutput, geometry_of, topology_of
from equimd.models.radial import safe_norm

if TYPE_CHECKING:
    from equimd.models.equivariant import EquivariantPotential, InteractionLayer

N_INTERVALS = 128
"""Of the radial functions, between no distance and the cutoff."""


MOST_ATOMS_ON_ONE_THREAD = 1000
"""Of a batch: with two threads, 192 atoms gain a quarter by it, 1,536 lose a tenth."""


class Trainer:
    """What a potential keeps from step to step: the knots, and the compiled network whose weights are written anew.

    One thread at a time may train a potential.
    """

    def __init__(self, potential: "EquivariantPotential") -> None:
        self.potential = potential
        self.knots = Knots(potential.radial_basis, potential.cutoff, N_INTERVALS)
        self.jet = self.knots.jet.to(potential.dtype)
        self._network: Any = None

    def predict(self, graph: AtomGraph) -> FrozenOutput:
        """Outputs, forces and virial; differentiable once with respect to the potential's parameters."""
        parameters = [p for p in self.potential.parameters() if p.requires_grad]
        return FrozenOutput(*_Predict.apply(self, graph, parameters, *parameters))  # pyright: ignore

    def evaluate(self, graph: AtomGraph, jets: list[Tensor]) -> FrozenOutput:
        """By the compiled network with the present weights; ``jets`` are those of the radial functions at the knots."""
        potential = self.potential
        network = potential.frozen_weights([self.knots.table(jet * potential.message_scale) for jet in jets])
        if self._network is None:
            self._network = potential.compile_network(network)
        else:
            self._network.update(network)
        kind = potential.species_of(graph)
        return FrozenOutput(*self._network(geometry_of(graph), kind, potential.scale[kind], topology_of(graph)))

    def outputs_and_rates(self, graph: AtomGraph, directions: Tensor, jets: list[Tensor]) -> Tensor:
        """Outputs and their rates of change along the directions (E, 3) of the edge vectors, (N, 2)."""
        potential, topology = self.potential, topology_of(graph)
        with torch.no_grad():
            vectors = edge_vectors(graph, torch.float64)
            harmonics, shares, intervals = self._geometry(vectors, directions.to(vectors.dtype))
        start = potential.embedding[potential.species_of(graph)]
        x = torch.stack([start, torch.zeros_like(start)], dim=1).unsqueeze(2)  # (N, 2, 1, C)
        for layer, jet in zip(potential.interactions, jets, strict=True):
            table = jet.transpose(0, 1).reshape(intervals.n_rows, -1)
            weights = interpolate(shares, table, intervals).view(topology.n_edges, 2, *layer.radial.shape)
            parts = list(x.split([2 * l + 1 for l, _ in layer.irreps_in], dim=2))  # noqa: E741
            h = torch.cat(layer.up(parts), dim=2)
            message = convolve_dual(h, harmonics, weights, layer.plan, topology)
            x = _gate(layer, layer.mix(layer.mix_inputs(message, parts)))
        hidden, last = potential.readout_maps
        y = x.flatten(2) @ hidden.weight.T
        y = _silu(torch.stack([y[:, 0] + hidden.bias, y[:, 1]], dim=1))
        outputs, rates = (y @ last.weight.T).squeeze(2).unbind(1)
        return torch.stack([outputs + last.bias, rates], dim=1)

    def _geometry(self, vectors: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Intervals]:
        """Values and rates of harmonics (E, 2, S), of shares in the knots (2E, 6), and the intervals of these."""
        potential = self.potential
        distances = safe_norm(vectors)
        units = vectors / distances.unsqueeze(1)
        lengthening = (units * directions).sum(dim=1)
        turning = (directions - units * lengthening.unsqueeze(1)) / distances.unsqueeze(1)
        *shares, interval = self.knots.moving_shares(distances, lengthening)
        harmonics = moving_harmonics(units, turning, potential.settings.l_max)
        inside = (distances <= potential.cutoff).view(-1, 1, 1)  # beyond, nothing is known of radial functions
        values = (torch.stack(shares, dim=1) * inside).flatten(0, 1)
        moving = torch.stack(harmonics, dim=1) * potential.message_scale
        intervals = self.knots.intervals(interval.repeat_interleave(2))
        return moving.to(potential.dtype), values.to(potential.dtype), intervals


def _threads_of_torch(graph: AtomGraph) -> AbstractContextManager[Any]:
    """On one thread where atoms are few: between kernels, operations are too short to share."""
    return torch_on_one_thread() if graph.n_atoms <= MOST_ATOMS_ON_ONE_THREAD else nullcontext()


class _Predict(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, trainer: Trainer, graph: AtomGraph, parameters: list[Tensor], *_: Tensor
    ) -> tuple[Tensor, ...]:
        with _threads_of_torch(graph), torch.enable_grad():
            jets = [layer.radial.jet(trainer.jet) for layer in trainer.potential.interactions]
        ctx.held = trainer, graph, parameters, jets
        ctx.versions = _versions(graph, parameters)
        ctx.set_materialize_grads(True)
        result = trainer.evaluate(graph, [jet.detach() for jet in jets])
        ctx.mark_non_differentiable(result.repulsion)
        return tuple(result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output: Tensor, _: Tensor, forces: Tensor, virial: Tensor) -> tuple[Tensor | None, ...]:
        trainer, graph, parameters, jets = ctx.held
        if ctx.versions != _versions(graph, parameters):
            raise RuntimeError("weights or positions were changed between a prediction and its gradient")
        output, forces, virial = output.detach(), forces.detach(), virial.detach()  # factors, not functions
        potential, (i, j) = trainer.potential, graph.edge_index
        moved = virial[graph.batch[i]]
        along = forces[i] - forces[j] + torch.einsum("ea,eab->eb", edge_vectors(graph, torch.float64), moved)
        scale = potential.scale[potential.species_of(graph)]
        with _threads_of_torch(graph), torch.enable_grad():
            outputs, rates = trainer.outputs_and_rates(graph, along, jets).unbind(1)
            gradients = torch.autograd.grad(
                (outputs * output.to(outputs)).sum() + (rates * scale).sum(),
                parameters,
                retain_graph=True,  # another loss of the same prediction may come
                allow_unused=True,
            )
        return None, None, None, *gradients


def _versions(graph: AtomGraph, parameters: list[Tensor]) -> list[int]:
    return [t._version for t in (graph.positions, graph.cell, *parameters)]


# The gate, once more: ``InteractionLayer._gate`` is of numbers, this of dual numbers. The tests hold them together.


def _silu(y: Tensor) -> Tensor:
    """silu of dual numbers (N, 2, …)."""
    value, rate = y.unbind(1)
    s = torch.sigmoid(value)
    u = value * s
    return torch.stack([u, (s + u * (1 - s)) * rate], dim=1)


def _gate(layer: "InteractionLayer", blocks: list[Tensor]) -> Tensor:
    """``InteractionLayer.gate`` of dual numbers: blocks (N, 2, 2l+1, …) → (N, 2, D_out, C)."""
    c, gates, out = layer.n_channels, [], []
    for irrep, y in zip(layer.irreps_out, blocks, strict=True):
        if irrep == (0, 1):
            out.append(SILU_GAIN * _silu(y[..., :c]))
            value, rate = y[..., c:].unbind(1)
            s = SIGMOID_GAIN * torch.sigmoid(value)
            gates = list(zip(s.split(c, 2), (s * (1 - s / SIGMOID_GAIN) * rate).split(c, 2), strict=True))
        elif irrep[0] == 0:
            value, rate = y.unbind(1)
            t = torch.tanh(value)
            out.append(TANH_GAIN * torch.stack([t, (1 - t * t) * rate], dim=1))
        else:
            (gate, rate_of_gate), (value, rate) = gates.pop(0), y.unbind(1)
            out.append(torch.stack([value * gate, rate * gate + value * rate_of_gate], dim=1))
    return torch.cat(out, dim=2)
