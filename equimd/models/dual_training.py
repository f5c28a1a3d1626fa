"""Training of compiled networks: predictions whose gradient with respect to the weights takes no second derivative.

For a loss L(E, F, σ) of energies, forces and stress, with b = ∂L/∂F and B = ∂L/∂(Vσ),

    dL/dθ = d/dθ [ Σ_i ∂L/∂E_i E_i + Σ_ij c_ij · ∂E/∂r_ij ],   c_ij = b_i − b_j + r_ij B,

where the bracket's factors are constants, and its last sum is the rate of change of E along c. So predictions come
from the network that is compiled for frozen weights, and their gradient from rates of change: the equivariant family's
``Trainer`` evaluates anew with dual numbers and differentiates that once, the transformer's goes on from what the
prediction left behind.
"""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from equimd.graph import AtomGraph, edge_vectors
from equimd.kernels.threads import torch_on_one_thread
from equimd.models.potential import FrozenOutput, Potential

MOST_ATOMS_ON_ONE_THREAD = 1000
"""Of a batch: with two threads, 192 atoms gain a quarter by it, 1,536 lose a tenth."""


class Trainer(ABC):
    """What a potential keeps from step to step: the compiled network whose weights are written anew.

    One thread at a time may train a potential.
    """

    potential: Potential

    def predict(self, graph: AtomGraph) -> FrozenOutput:
        """Outputs, forces and virial; differentiable once with respect to the potential's parameters."""
        parameters = [p for p in self.potential.parameters() if p.requires_grad]
        return FrozenOutput(*_Predict.apply(self, graph, parameters, *parameters))  # pyright: ignore

    @abstractmethod
    def evaluate(self, graph: AtomGraph) -> tuple[FrozenOutput, Any]:
        """By the compiled network with the present weights; and what ``gradients`` is to find again, unchanged."""

    @abstractmethod
    def gradients(
        self, graph: AtomGraph, held: Any, factors: Tensor, directions: Tensor, parameters: list[Tensor]
    ) -> list[Tensor | None]:
        """Of Σ_i factor_i · output_i + Σ_ij c_ij · ∂E/∂r_ij; factors (N,), directions c (E, 3), both float64."""


def threads_of_torch(graph: AtomGraph) -> AbstractContextManager[Any]:
    """On one thread where atoms are few: between kernels, operations are too short to share."""
    return torch_on_one_thread() if graph.n_atoms <= MOST_ATOMS_ON_ONE_THREAD else nullcontext()


class _Predict(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, trainer: Trainer, graph: AtomGraph, parameters: list[Tensor], *_: Tensor
    ) -> tuple[Tensor, ...]:
        result, held = trainer.evaluate(graph)
        result = FrozenOutput(*(part.detach() for part in result))  # what is held and has a history is never freed
        ctx.held = trainer, graph, parameters, held
        ctx.versions = _versions(graph, parameters)
        ctx.set_materialize_grads(True)
        ctx.mark_non_differentiable(result.repulsion)
        return tuple(result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output: Tensor, _: Tensor, forces: Tensor, virial: Tensor) -> tuple[Tensor | None, ...]:
        trainer, graph, parameters, held = ctx.held
        if ctx.versions != _versions(graph, parameters):
            raise RuntimeError("weights or positions were changed between a prediction and its gradient")
        output, forces, virial = output.detach(), forces.detach(), virial.detach()  # factors, not functions
        with threads_of_torch(graph):
            i, j = graph.edge_index
            moved = torch.einsum("ea,eab->eb", edge_vectors(graph, torch.float64), virial[graph.batch[i]])
            directions = forces[i] - forces[j] + moved
            gradients = trainer.gradients(graph, held, output, directions, parameters)
        return None, None, None, *gradients


def _versions(graph: AtomGraph, parameters: list[Tensor]) -> list[int]:
    return [t._version for t in (graph.positions, graph.cell, *parameters)]
