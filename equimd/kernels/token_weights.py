"""The weights of a neighbour-token transformer, and their form that compiled kernels take."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from equimd.kernels.geometry_codegen import Screening
from equimd.kernels.ir import LANES


@dataclass(frozen=True)
class Block:
    """Weights of attention and SwiGLU, all (fan out, fan in) as torch's linear maps hold them.

    qkv (3d, d), out (d, d), up (2F, d), down (d, F); atom_up (2A, d) and atom_down (d, A) of a SwiGLU for atoms' tokens
    alone, if there is one.
    """

    qkv: Tensor
    out: Tensor
    up: Tensor
    down: Tensor
    atom_up: Tensor | None = None
    atom_down: Tensor | None = None

    @property
    def weights(self) -> list[Tensor]:
        """Those that there are, in order."""
        maps = (self.qkv, self.out, self.up, self.down, self.atom_up, self.atom_down)
        return [weight for weight in maps if weight is not None]


@dataclass(frozen=True)
class Stage:
    """Blocks, their readout, and the message (d, d) to the next stage; None after the last.

    heads (2, d): of the atom's token and of edges. constant: of the readout.
    """

    blocks: Sequence[Block]
    heads: Tensor
    constant: Tensor
    message: Tensor | None

    @property
    def weights(self) -> list[Tensor]:
        """Those that there are, in order."""
        found = [weight for block in self.blocks for weight in block.weights]
        return [*found, self.heads, self.constant, *([] if self.message is None else [self.message])]


TABLES = ("embedding", "of_atoms", "of_pairs")
"""Weights of the embedding."""


class TokenNetwork(NamedTuple):
    """Weights of a transformer; see ``token_codegen.tokens_source`` for those of the embedding.

    screening and pairs (S, S, 3) of the nuclear repulsion, see ``geometry_codegen.geometry_source``.
    """

    stages: Sequence[Stage]
    frequencies: Tensor
    embedding: Tensor
    of_atoms: Tensor
    of_pairs: Tensor
    n_heads: int
    cutoff: float
    cutoff_width: float
    screening: Screening
    pairs: Tensor

    @property
    def weights(self) -> list[Tensor]:
        """What can be trained, in order."""
        found = [self.embedding, self.of_atoms, self.of_pairs]
        for stage in self.stages:
            found += stage.weights
        return found

    def replaced(self, change: Callable[[Tensor], Tensor]) -> "TokenNetwork":
        """With other weights, made from these in their order."""
        tables = {name: change(getattr(self, name)) for name in TABLES}
        stages = [
            Stage(
                blocks=[Block(*(change(weight) for weight in block.weights)) for block in stage.blocks],
                heads=change(stage.heads),
                constant=change(stage.constant),
                message=None if stage.message is None else change(stage.message),
            )
            for stage in self.stages
        ]
        return self._replace(stages=stages, **tables)


@dataclass(frozen=True)
class Filling:
    """How weights are laid out for kernels: heads and hidden channels are filled up with zeros to whole vectors.

    Queries have the factor 1/√D, D the channels of a head. n_hidden and n_atom_hidden are F and A.
    """

    n_heads: int
    n_channels: int
    n_hidden: int
    n_atom_hidden: int

    @staticmethod
    def of(network: TokenNetwork) -> "Filling":
        """That of a network."""
        block = network.stages[0].blocks[0]
        wide = 0 if block.atom_down is None else block.atom_down.shape[1]
        return Filling(network.n_heads, block.out.shape[0], block.down.shape[1], wide)

    def make_room(self, network: TokenNetwork, dtype: torch.dtype, for_gradient: bool = False) -> TokenNetwork:
        """Zeros in place of weights. Of gradients, those with more rows than columns lie column by column."""
        options: Any = {"dtype": dtype, "device": "cpu"}

        def zeros(rows: int, columns: int) -> Tensor:
            if for_gradient and rows > columns:
                return torch.zeros(columns, rows, **options).T
            return torch.zeros(rows, columns, **options)

        d, heads = self.n_channels, self.n_heads * _whole(self.n_channels // self.n_heads)
        maps = [(3 * heads, d), (d, heads)]
        for width in filter(None, (self.n_hidden, self.n_atom_hidden)):
            maps += [(2 * _whole(width), d), (d, _whole(width))]
        stages = [
            Stage(
                blocks=[Block(*(zeros(*shape) for shape in maps)) for _ in stage.blocks],
                heads=zeros(2, d),
                constant=torch.zeros(1, **options),
                message=None if stage.message is None else zeros(d, d),
            )
            for stage in network.stages
        ]
        tables = {name: torch.zeros(getattr(network, name).shape, **options) for name in TABLES}
        return network._replace(stages=stages, **tables)

    def write(self, network: TokenNetwork, room: TokenNetwork) -> None:
        """Weights into the room made for them."""
        for own, weight in zip(self._parts(room), network.weights, strict=True):
            own.copy_(weight.detach().reshape(own.shape))
        self._scale_queries(room)

    def read(self, network: TokenNetwork, room: TokenNetwork) -> TokenNetwork:
        """The gradient with respect to weights, from that with respect to the room they were written to."""
        self._scale_queries(room)
        parts = iter(self._parts(room))
        return network.replaced(lambda weight: next(parts).reshape(weight.shape))

    def _scale_queries(self, room: TokenNetwork) -> None:
        for stage in room.stages:
            for block in stage.blocks:
                block.qkv[: len(block.qkv) // 3] *= (self.n_channels / self.n_heads) ** -0.5

    def _parts(self, room: TokenNetwork) -> list[Tensor]:
        """What is not filling, in the order of ``TokenNetwork.weights``."""
        d, n, n_heads = self.n_channels, self.n_channels // self.n_heads, self.n_heads

        def of_block(block: Block) -> Block:
            parts = [block.qkv.view(3, n_heads, -1, d)[:, :, :n], block.out.view(d, n_heads, -1)[:, :, :n]]
            for up, down, width in (
                (block.up, block.down, self.n_hidden),
                (block.atom_up, block.atom_down, self.n_atom_hidden),
            ):
                if up is not None and down is not None:
                    parts += [up.view(2, -1, d)[:, :width], down[:, :width]]
            return Block(*parts)

        stages = [
            Stage([of_block(block) for block in stage.blocks], stage.heads, stage.constant, stage.message)
            for stage in room.stages
        ]
        return room._replace(stages=stages).weights


def _whole(n: int) -> int:
    return n + -n % LANES
