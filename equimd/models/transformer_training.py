"""Training of the transformer family: weights and their gradients between the potential and its compiled network.

See ``dual_training`` for the method, ``kernels.token_training`` for the gradient.
"""

from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from equimd.graph import AtomGraph, reverse_edges
from equimd.kernels.token_training import Record, TrainedTransformer
from equimd.kernels.token_weights import TokenNetwork
from equimd.models.dual_training import Trainer
from equimd.models.potential import FrozenOutput, geometry_of, topology_of

if TYPE_CHECKING:
    from equimd.models.transformer import AttentionLayer, TransformerPotential


class TransformerTrainer(Trainer):
    """With the compiled network."""

    def __init__(self, potential: "TransformerPotential") -> None:
        self.potential: TransformerPotential = potential
        self._network: TrainedTransformer | None = None

    def evaluate(self, graph: AtomGraph) -> tuple[FrozenOutput, Record]:
        """What is held are all values and gradients on the way."""
        potential = self.potential
        if self._network is None:
            dtype = str(potential.dtype).removeprefix("torch.")
            self._network = TrainedTransformer(potential.weights(), dtype)
        else:
            self._network.update(potential.weights())
        kind = potential.species_of(graph)
        arguments = (geometry_of(graph), kind, potential.scale[kind], topology_of(graph), reverse_edges(graph))
        result, record = self._network.record(*arguments)
        return FrozenOutput(*result), record

    def gradients(
        self, graph: AtomGraph, held: Record, factors: Tensor, directions: Tensor, parameters: list[Tensor]
    ) -> list[Tensor | None]:
        """By rates of change of all that is held."""
        assert self._network is not None
        found = _by_parameter(
            self.potential, self._network.gradient(self.potential.weights(), held, factors, directions)
        )
        return [found.get(id(parameter)) for parameter in parameters]


def _by_parameter(potential: "TransformerPotential", gradient: TokenNetwork) -> dict[int, Tensor]:
    """Gradients by the ``id`` of the parameter; the inverse of ``TransformerPotential.weights``."""
    pairs: list[tuple[nn.Module, Tensor]] = [
        (potential.edge_embedding, gradient.embedding.T),
        (potential.species_embedding, gradient.of_atoms),
        (potential.pair_embedding, gradient.of_pairs),
    ]
    biases: list[tuple[nn.Module, Tensor]] = []
    for k, (stage, transformer) in enumerate(zip(gradient.stages, potential.transformers, strict=True)):
        for block, layer in zip(stage.blocks, cast(nn.ModuleList, transformer), strict=True):
            maps = cast("AttentionLayer", layer).maps
            pairs += zip(maps, block.weights, strict=True)
        pairs += zip((potential.atom_heads[k], potential.edge_heads[k]), stage.heads.split(1), strict=True)
        biases.append((potential.atom_heads[k], stage.constant))
        if stage.message is not None:
            pairs.append((potential.messages[k], stage.message))
    found = {id(module.weight): tensor for module, tensor in pairs}
    return found | {id(module.bias): tensor for module, tensor in biases}
