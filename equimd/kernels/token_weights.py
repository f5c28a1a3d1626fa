"""The weights of a neighbour-token transformer, and their form that compiled kernels take."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from equimd.kernels.geometry_codegen import Screening
from equimd.kernels.source import LANES


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


def prepare_block(block: Block, n_heads: int) -> Block:
    """With 1/√D in the queries' weights; heads and hidden channels filled up with zeros to whole vectors."""
    d = block.out.shape[0]
    qkv = block.qkv.view(3, n_heads, d // n_heads, d).clone()
    qkv[0] *= (d / n_heads) ** -0.5
    out = block.out.view(d, n_heads, d // n_heads)
    weights = [_fill(qkv, 2).flatten(0, 2), _fill(out, 2).flatten(1)]
    for up, down in ((block.up, block.down), (block.atom_up, block.atom_down)):
        if up is not None and down is not None:
            weights += [_fill(up.view(2, -1, d), 1).flatten(0, 1), _fill(down, 1)]
    return Block(*weights)


def restore_block(gradient: Block, like: Block, n_heads: int) -> Block:
    """The gradient with respect to a block from that with respect to what ``prepare_block`` made of it."""
    d = like.out.shape[0]
    qkv = gradient.qkv.view(3, n_heads, -1, d)[:, :, : d // n_heads].clone()
    qkv[0] *= (d / n_heads) ** -0.5
    out = gradient.out.view(d, n_heads, -1)[:, :, : d // n_heads]
    weights = [qkv.flatten(0, 2), out.flatten(1)]
    for up, down, own in (
        (gradient.up, gradient.down, like.down),
        (gradient.atom_up, gradient.atom_down, like.atom_down),
    ):
        if up is not None and down is not None and own is not None:
            width = own.shape[1]
            weights += [up.view(2, -1, d)[:, :width].flatten(0, 1), down[:, :width]]
    return Block(*weights)


def _fill(weight: Tensor, axis: int) -> Tensor:
    """With zeros along the axis, so that it is of whole vectors."""
    missing = -weight.shape[axis] % LANES
    return F.pad(weight, [0, 0] * (weight.ndim - 1 - axis) + [0, missing]) if missing else weight
