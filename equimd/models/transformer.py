"""Neighbour-token transformer: no built-in rotational symmetry, trained with rotations instead.

Every atom i attends over its own environment: one token x_i0 for the atom and one token x_ij for each neighbour j.
After each such transformer the edge tokens pass messages between neighbouring atoms, as in the Point Edge Transformer
(Pozdnyakov & Ceriotti 2023, arXiv:2305.19302): token ij of the next layer receives the output of token ji.

    x_ij = W_0 · φ(r_ij) + a[Z_i] + b[Z_j],   x_i0 = c[Z_i]                                 (embedding)
    x   ← x + Attention(norm x; f_c),   x ← x + SwiGLU(norm x)                               (n_attention_layers times)
    E_i += h_c(norm x_i0) + Σ_j f_c(r_ij) h_e(norm x_ij)                                     (readout, every GNN layer)
    x_ij ← x_ij + W_m · norm x_ji                                                            (message)

Attention weights are α_ab = f_b exp(q_a·k_b/√d) / Σ_c f_c exp(q_a·k_c/√d) with f = 1 for the atom's own token: the
exponentials are multiplied by the cutoff function (adding log f to the logits gives NaN in second derivatives), so
energy and forces are continuous when a neighbour enters or leaves, and an edge beyond the cutoff contributes nothing.
Sums over tokens make the output invariant to permutations, edge vectors to translations; nothing to rotations.

The tokens of N atoms lie in a dense array (N, 1 + M, d), M the largest number of neighbours, so that almost all of the
work is matrix products. Shapes in comments: N atoms, M neighbour slots, T = 1 + M tokens, H heads, d channels.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from equimd.errors import InputError
from equimd.graph import AtomGraph
from equimd.models.potential import Potential, PotentialSettings
from equimd.models.radial import BesselBasis, cosine_cutoff, safe_norm


class TransformerSettings(PotentialSettings):
    """Settings of the transformer family."""

    family: Literal["transformer"] = "transformer"
    d_model: int = Field(64, ge=4, le=4096, description="channels of a token")
    n_heads: int = Field(4, ge=1, le=64, description="attention heads; a divisor of d_model")
    n_gnn_layers: int = Field(2, ge=1, le=16, description="transformers per atom, with messages in between")
    n_attention_layers: int = Field(2, ge=1, le=16, description="attention and SwiGLU blocks in each transformer")
    d_feedforward: int = Field(128, ge=1, le=16384, description="hidden channels of SwiGLU")
    n_radial: int = Field(8, ge=1, le=64, description="Bessel functions of the distance among the edge features")
    cutoff_width: float = Field(1.0, gt=0.0, description="width in Å of the smooth step down to the cutoff")
    direct_forces: bool = Field(False, description="forces from a head of their own, not the gradient of the energy")

    @model_validator(mode="after")
    def _check(self) -> "TransformerSettings":
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model is {self.d_model}, n_heads is {self.n_heads}; n_heads must divide d_model")
        if self.cutoff_width > self.cutoff:
            raise ValueError(f"cutoff_width is {self.cutoff_width} Å; at most the cutoff {self.cutoff} Å is accepted")
        return self


@dataclass(frozen=True)
class NeighbourLayout:
    """Where every edge lies in the dense array of N × M neighbour slots; depends on the edges only.

    edge (N·M,): edge in each slot, E (one past the last) where the slot is empty; None when slot e is edge e.
    neighbour (N·M,): atom of the edge's sender; an empty slot names its own atom. reverse (N·M,): slot of the edge
    back, itself where empty; it is its own inverse. source: the edges that it was made from.
    """

    width: int
    edge: Tensor | None
    neighbour: Tensor
    reverse: Tensor
    source: tuple[Tensor, Tensor]


def neighbour_layout(graph: AtomGraph) -> NeighbourLayout:
    """The layout of ``graph``, kept on the graph as long as it holds the same edge tensors.

    Raises InputError when an edge has no reverse (same atoms, opposite shift).
    """
    edge_index, edge_shifts = graph["edge_index"], graph["edge_shifts"]
    cached = vars(graph).get("_neighbour_layout")
    if cached is None or cached.source[0] is not edge_index or cached.source[1] is not edge_shifts:
        cached = _build_layout(edge_index, edge_shifts, graph.n_atoms)
        object.__setattr__(graph, "_neighbour_layout", cached)  # not as one of the graph's data fields
    return cached


def _build_layout(edge_index: Tensor, edge_shifts: Tensor, n_atoms: int) -> NeighbourLayout:
    (i, j), shifts = edge_index, edge_shifts.to(torch.int64)
    n_edges, device = len(i), i.device
    # One integer per directed edge; that of the reversed edge is made of (j, i, −S).
    base = 2 * int(shifts.abs().max()) + 1 if n_edges else 1
    place = torch.tensor([base * base, base, 1], device=device)
    image = shifts @ place if device.type == "cpu" else (shifts * place).sum(1)
    pair, back = (i * n_atoms + j) * base**3, (j * n_atoms + i) * base**3
    key, order = torch.sort(pair + image)  # also sorts by receiver
    back_key, back_order = torch.sort(back - image)
    if not torch.equal(key, back_key):
        raise InputError("the edge list lacks the reverse of an edge; both directions of every pair are accepted")
    counts = torch.bincount(i, minlength=n_atoms)
    width = int(counts.max()) if n_edges else 0
    first = counts.cumsum(0) - counts
    receiver = i[order]
    slot = torch.empty_like(i)
    slot[order] = receiver * width + torch.arange(n_edges, device=device) - first[receiver]
    neighbour = torch.arange(n_atoms, device=device).repeat_interleave(width)
    neighbour[slot] = j
    reverse = torch.arange(n_atoms * width, device=device)
    reverse[slot[back_order]] = slot[order]
    edge = torch.full((n_atoms * width,), n_edges, device=device)
    edge[slot] = torch.arange(n_edges, device=device)
    in_place = n_edges == n_atoms * width and bool((slot[1:] > slot[:-1]).all())
    return NeighbourLayout(width, None if in_place else edge, neighbour, reverse, (edge_index, edge_shifts))


class _Swap(torch.autograd.Function):
    """Rows of x (n, d) permuted by an involution: the gradient is the same gather, to any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, permutation: Tensor) -> Tensor:
        ctx.save_for_backward(permutation)
        return x.index_select(0, permutation)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Swap.apply(gradients[0], *ctx.saved_tensors), None  # type: ignore[return-value]


def _norm(x: Tensor) -> Tensor:
    """RMSNorm (Zhang & Sennrich 2019); its gain is part of the linear map that follows."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def _linear(d_in: int, d_out: int, gain: float = 1.0, bias: bool = False) -> nn.Linear:
    """A linear map that turns unit-variance input into output of standard deviation ``gain``."""
    layer = nn.Linear(d_in, d_out, bias=bias)
    nn.init.normal_(layer.weight, std=gain / math.sqrt(d_in))
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class AttentionLayer(nn.Module):
    """x ← x + Attention(norm x), x ← x + SwiGLU(norm x) (Shazeer 2020) over the tokens of each atom."""

    def __init__(self, settings: TransformerSettings) -> None:
        super().__init__()
        d, depth = settings.d_model, settings.n_gnn_layers * settings.n_attention_layers
        self.n_heads = settings.n_heads
        self.qkv = _linear(d, 3 * d)
        self.out = _linear(d, d, gain=1 / math.sqrt(2 * depth))
        self.up = _linear(d, 2 * settings.d_feedforward)
        self.down = _linear(settings.d_feedforward, d, gain=1 / math.sqrt(2 * depth))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """New tokens (N, T, d) from tokens and their cutoff weights (N, 1, 1, T)."""
        n, t, d = x.shape
        d_head = d // self.n_heads
        q, k, v = self.qkv(_norm(x)).view(n, t, 3, self.n_heads, d_head).permute(2, 0, 3, 1, 4)
        logits = (q * d_head**-0.5) @ k.transpose(-1, -2)  # (N, H, T, T)
        # The largest logit is taken out against overflow; a constant of each row, it drops out of the ratio below.
        scores = torch.exp(logits - logits.detach().amax(-1, keepdim=True)) * weights
        mixed = (scores @ v) * scores.sum(-1, keepdim=True).reciprocal()  # > 0: the atom's own token weighs 1
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, d))
        gate, value = self.up(_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * value)


class Readout(nn.Module):
    """Σ over an atom's tokens of f_c · head(norm x), one head for the atom's token and one for its neighbours'."""

    def __init__(self, d: int, d_out: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(_linear(d, d, bias=True), nn.SiLU(), _linear(d, d_out, gain=0.1)) for _ in range(2)
        )

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """Outputs (N, d_out) from normalised tokens (N, T, d) and neighbour weights (N, 1, M)."""
        of_atom, of_edge = self.heads[0], self.heads[1]
        return of_atom(x[:, 0]) + (weights @ of_edge(x[:, 1:])).squeeze(1)


class TransformerPotential(Potential):
    """The transformer family; see the module's text for the equations."""

    family: ClassVar[str] = "transformer"

    def __init__(
        self, settings: TransformerSettings, species: tuple[int, ...], isolated_atom_energies: Mapping[int, float]
    ) -> None:
        super().__init__(settings, species, isolated_atom_energies)
        s, d, n_species = settings, settings.d_model, len(self.species)
        self.direct_forces = s.direct_forces
        self.cutoff_width = s.cutoff_width
        self.radial = BesselBasis(s.cutoff, s.n_radial)
        self.edge_embedding = _linear(4 + s.n_radial, d)
        self.species_embedding = nn.Embedding(n_species, d)  # of the atom's own token
        self.pair_embedding = nn.Embedding(n_species * n_species, d)  # of an edge token: (centre, neighbour)
        self.transformers = nn.ModuleList(
            nn.ModuleList(AttentionLayer(s) for _ in range(s.n_attention_layers)) for _ in range(s.n_gnn_layers)
        )
        self.messages = nn.ModuleList(
            _linear(d, d, gain=0.5) if k else nn.Identity() for k in range(s.n_gnn_layers)
        )  # none before the first transformer
        d_out = 4 if s.direct_forces else 1
        self.readouts = nn.ModuleList(Readout(d, d_out) for _ in range(s.n_gnn_layers))

    def network(self, graph: AtomGraph, vectors: Tensor) -> Tensor:
        """Dimensionless atomic outputs (N,) from edge vectors (E, 3) in Å."""
        return self._readout(graph, vectors)[:, 0]

    def network_with_forces(self, graph: AtomGraph, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Atomic outputs (N,) and forces (N, 3) in eV/Å that are no gradient and need not sum to zero."""
        if not self.direct_forces:
            return super().network_with_forces(graph, vectors)
        output = self._readout(graph, vectors)
        return output[:, 0], output[:, 1:] * self.scale[self.species_of(graph)].unsqueeze(1)

    def _readout(self, graph: AtomGraph, vectors: Tensor) -> Tensor:
        """Sum of the readouts of all GNN layers, (N, 1) or (N, 4)."""
        layout = neighbour_layout(graph)
        x, edge_weights = self._embed(graph, vectors, layout)  # (N, T, d), (N, M)
        n, m, d = graph.n_atoms, layout.width, x.shape[2]
        weights = torch.cat([edge_weights.new_ones(n, 1), edge_weights], dim=1).view(n, 1, 1, 1 + m)
        outputs = []
        for transformer, message, readout in zip(self.transformers, self.messages, self.readouts, strict=True):
            if outputs:
                sent = message(_norm(x[:, 1:])).reshape(n * m, d)
                x = x + F.pad(_Swap.apply(sent, layout.reverse).view(n, m, d), (0, 0, 1, 0))  # type: ignore[union-attr]
            for layer in transformer:  # type: ignore[union-attr]
                x = layer(x, weights)
            outputs.append(readout(_norm(x), edge_weights.unsqueeze(1)))
        return torch.stack(outputs).sum(0)

    def _embed(self, graph: AtomGraph, vectors: Tensor, layout: NeighbourLayout) -> tuple[Tensor, Tensor]:
        """Tokens (N, 1 + M, d) and the cutoff weights (N, M) of the neighbours, zero in empty slots."""
        n, m = graph.n_atoms, layout.width
        kind = self.species_of(graph)
        if layout.edge is not None:
            nowhere = vectors.new_tensor([[self.cutoff, 0.0, 0.0]])  # an empty slot holds an edge of weight zero
            vectors = torch.cat([vectors, nowhere]).index_select(0, layout.edge)
        r = safe_norm(vectors)  # (N·M,)
        features = torch.cat([vectors, r.unsqueeze(1), self.radial(r)], dim=1)
        pair = kind.repeat_interleave(m) * len(self.species) + kind[layout.neighbour]
        edges = self.edge_embedding(features) + self.pair_embedding(pair)
        tokens = torch.cat([self.species_embedding(kind).unsqueeze(1), edges.view(n, m, edges.shape[1])], dim=1)
        return tokens, cosine_cutoff(r, self.cutoff, self.cutoff_width).view(n, m)
