"""Neighbour-token transformer: no built-in rotational symmetry, trained with rotations instead.

Every atom i attends over its own environment: one token x_i0 for the atom and one token x_ij for each neighbour j.
After each such transformer the edge tokens pass messages between neighbouring atoms, as in the Point Edge Transformer
(Pozdnyakov & Ceriotti 2023, arXiv:2305.19302): token ij of the next layer receives the output of token ji.

    x_ij = W_0 · φ(r_ij) + b[Z_i, Z_j],   x_i0 = a[Z_i]                                      (embedding)
    x   ← x + Attention(norm x; f_c),   x ← x + SwiGLU(norm x)                               (n_attention_layers times)
    E_i += h_c · norm x_i0 + Σ_j f_c(r_ij) h_e · norm x_ij                                   (readout, every GNN layer)
    x_ij ← x_ij + W_m · norm x_ji                                                            (message)

Attention weights are α_ab = f_b exp(q_a·k_b/√D) / Σ_c f_c exp(q_a·k_c/√D), f the cutoff function of a neighbour's token
and 1 for the atom's own: energy and forces are continuous when a neighbour enters or leaves, and an edge beyond the
cutoff contributes nothing. φ is the Cartesian vector, its length and Bessel functions of the length. Sums over tokens
make the output invariant to permutations, edge vectors to translations; nothing to rotations.

The tokens of N atoms lie in a dense array (N, 1 + M, d), M the largest number of neighbours, so that almost all of the
work is matrix products. Shapes in comments: N atoms, M neighbour slots, T = 1 + M tokens, H heads, d channels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from equimd.graph import AtomGraph, derived, reverse_edges
from equimd.models.potential import FrozenOutput, Potential, PotentialSettings, geometry_of, topology_of
from equimd.models.radial import BesselBasis, cosine_cutoff, safe_norm, zbl_parameters
from equimd.models.token_ops import attention, rms_norm, swiglu

if TYPE_CHECKING:
    from equimd.kernels.token_network import FusedTransformer
    from equimd.kernels.token_weights import TokenNetwork
    from equimd.models.auxiliary import TransformerAuxiliary
    from equimd.models.dual_training import Trainer


class TransformerSettings(PotentialSettings):
    """Settings of the transformer family."""

    family: Literal["transformer"] = "transformer"
    d_model: int = Field(default=64, ge=4, le=4096, description="channels of a token")
    n_heads: int = Field(default=4, ge=1, le=64, description="attention heads; a divisor of d_model")
    n_gnn_layers: int = Field(default=2, ge=1, le=16, description="transformers per atom, with messages in between")
    n_attention_layers: int = Field(
        default=2, ge=1, le=16, description="attention and SwiGLU blocks in each transformer"
    )
    d_feedforward: int = Field(default=128, ge=1, le=16384, description="hidden channels of SwiGLU")
    d_atom_feedforward: int = Field(
        default=0, ge=0, le=16384, description="hidden channels of a further SwiGLU for atoms' own tokens; 0 for none"
    )
    n_radial: int = Field(
        default=8, ge=1, le=64, description="Bessel functions of the distance among the edge features"
    )
    cutoff_width: float = Field(default=1.0, ge=1e-3, description="width in Å of the smooth step down to the cutoff")
    direct_forces: bool = Field(
        default=False, description="forces from a head of their own, not the gradient of the energy"
    )

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
    back, itself where empty; it is its own inverse.
    """

    width: int
    edge: Tensor | None
    neighbour: Tensor
    reverse: Tensor


def neighbour_layout(graph: AtomGraph) -> NeighbourLayout:
    """The layout of ``graph``, kept on the graph as long as it holds the same ``edge_index``.

    Raises InputError when an edge has no reverse (same atoms, opposite shift).
    """
    return derived(graph, "neighbour_layout", lambda: _build_layout(graph))


def _build_layout(graph: AtomGraph) -> NeighbourLayout:
    (i, j), n_atoms, n_edges, device = graph.edge_index, graph.n_atoms, graph.n_edges, graph.edge_index.device
    topology = topology_of(graph)
    order, first = topology.receiver_order, topology.receiver_ptr
    width = int((first[1:] - first[:-1]).max()) if n_edges else 0
    receiver = i[order]
    slot = torch.empty_like(i)
    slot[order] = receiver * width + torch.arange(n_edges, device=device) - first[receiver]
    neighbour = torch.arange(n_atoms, device=device).repeat_interleave(width)
    neighbour[slot] = j
    reverse = torch.arange(n_atoms * width, device=device)
    reverse[slot] = slot[reverse_edges(graph)]
    edge = torch.full((n_atoms * width,), n_edges, device=device)
    edge[slot] = torch.arange(n_edges, device=device)
    in_place = n_edges == n_atoms * width and bool((slot[1:] > slot[:-1]).all())
    return NeighbourLayout(width, None if in_place else edge, neighbour, reverse)


class _Swap(torch.autograd.Function):
    """Rows of x (n, d) permuted by an involution: the gradient is the same gather, to any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, permutation: Tensor) -> Tensor:
        ctx.save_for_backward(permutation)
        return x.index_select(0, permutation)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Swap.apply(gradients[0], *ctx.saved_tensors), None  # type: ignore[return-value]


def _linear(d_in: int, d_out: int, gain: float = 1.0, bias: bool = False) -> nn.Linear:
    """A linear map that turns unit-variance input into output of standard deviation ``gain``."""
    layer = nn.Linear(d_in, d_out, bias=bias)
    nn.init.normal_(layer.weight, std=gain / math.sqrt(d_in))
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class AttentionLayer(nn.Module):
    """x ← x + Attention(norm x), x ← x + SwiGLU(norm x) (Shazeer 2020) over the tokens of each atom.

    With ``d_atom_feedforward``, the atom's own token gets SwiGLU'(norm x) besides, of weights and width of its
    own: capacity at next to no cost, where PET gives atoms more channels.
    """

    def __init__(self, settings: TransformerSettings) -> None:
        super().__init__()
        d, depth = settings.d_model, settings.n_gnn_layers * settings.n_attention_layers
        self.n_heads = settings.n_heads
        self.qkv = _linear(d, 3 * d)
        self.out = _linear(d, d, gain=1 / math.sqrt(2 * depth))
        self.up = _linear(d, 2 * settings.d_feedforward)
        self.down = _linear(settings.d_feedforward, d, gain=1 / math.sqrt(2 * depth))
        self.atom_up = self.atom_down = None
        if settings.d_atom_feedforward:
            self.atom_up = _linear(d, 2 * settings.d_atom_feedforward)
            self.atom_down = _linear(settings.d_atom_feedforward, d, gain=1 / math.sqrt(2 * depth))

    @property
    def maps(self) -> list[nn.Linear]:
        """The linear maps that there are, in the order of ``kernels.token_weights.Block``."""
        maps = (self.qkv, self.out, self.up, self.down, self.atom_up, self.atom_down)
        return [linear for linear in maps if linear is not None]

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """New tokens (N, T, d) from tokens and their cutoff weights (N, T)."""
        x = x + self.out(attention(self.qkv(rms_norm(x)), weights, self.n_heads))
        normed = rms_norm(x)
        x = x + self.down(swiglu(self.up(normed)))
        if self.atom_up is None or self.atom_down is None:
            return x
        atoms = self.atom_down(swiglu(self.atom_up(normed[:, :1])))
        return x + F.pad(atoms, (0, 0, 0, x.shape[1] - 1))


class TransformerPotential(Potential):
    """The transformer family; see the module's text for the equations."""

    family: ClassVar[str] = "transformer"
    parts = {
        "embedding": ("edge_embedding", "species_embedding", "pair_embedding"),
        "layers": ("transformers", "messages"),
        "readout": ("atom_heads", "edge_heads"),
    }
    species_tables = {"species_embedding.weight": 1, "pair_embedding.weight": 2}
    settings: TransformerSettings

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
        self.messages = nn.ModuleList(_linear(d, d, gain=0.5) for _ in range(s.n_gnn_layers - 1))
        d_out = 4 if s.direct_forces else 1
        self.atom_heads = nn.ModuleList(_linear(d, d_out, gain=0.1, bias=True) for _ in range(s.n_gnn_layers))
        self.edge_heads = nn.ModuleList(_linear(d, d_out, gain=0.1) for _ in range(s.n_gnn_layers))

    def network(self, graph: AtomGraph, vectors: Tensor) -> Tensor:
        """Dimensionless atomic outputs (N,) from edge vectors (E, 3) in Å."""
        return self._readout(graph, vectors)[0][:, 0]

    def network_with_forces(self, graph: AtomGraph, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Atomic outputs (N,) and forces (N, 3) in eV/Å that are no gradient and need not sum to zero."""
        if not self.direct_forces:
            return super().network_with_forces(graph, vectors)
        (output,) = self._readout(graph, vectors)
        return output[:, 0], output[:, 1:] * self.scale[self.species_of(graph)].unsqueeze(1)

    def network_and_vectors(
        self, graph: AtomGraph, vectors: Tensor, auxiliary: "TransformerAuxiliary", given: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Outputs (N,) and vectors (N, K, 3), both read from the tokens after every GNN layer."""
        told = None if given is None else auxiliary.tell(given.to(self.dtype))
        output, read = self._readout(graph, vectors, told, [(auxiliary.atom_heads, auxiliary.edge_heads)])
        return output[:, 0], read.unflatten(1, (-1, 3))

    def fused_matrices(self) -> dict[str, tuple[int, int]]:
        """Queries, keys and values; the two halves of SwiGLU."""
        parts = {".qkv.weight": 3, ".up.weight": 2, ".atom_up.weight": 2}
        names = [name for name, _ in self.named_parameters()]
        return {name: (0, n) for name in names for end, n in parts.items() if name.endswith(end)}

    # --- frozen weights ----------------------------------------------------------------------------------------------

    def _evaluate_frozen(
        self, network: "FusedTransformer", graph: AtomGraph, kind: Tensor, seconds: dict[str, float] | None = None
    ) -> FrozenOutput:
        arguments = (geometry_of(graph), kind, self.scale[kind], topology_of(graph), reverse_edges(graph))
        return FrozenOutput(*network(*arguments, seconds))

    @property
    def _fusing_key(self) -> tuple[Any, ...] | None:
        return None if self.direct_forces else ()

    def _fuse(self, clocks: bool = False) -> "FusedTransformer":  # its steps are timed as they are
        from equimd.kernels.token_network import FusedTransformer

        return FusedTransformer(self.weights(), str(self.dtype).removeprefix("torch."))

    def weights(self) -> "TokenNetwork":
        """The present weights, for ``kernels.token_network``."""
        from equimd.kernels.token_weights import Block, Stage, TokenNetwork

        stages = []
        for k, transformer in enumerate(self.transformers):
            blocks = [Block(*(linear.weight for linear in layer.maps)) for layer in transformer]  # type: ignore
            heads = torch.cat([self.atom_heads[k].weight, self.edge_heads[k].weight])  # type: ignore
            message = self.messages[k].weight if k < len(self.messages) else None
            stages.append(Stage(blocks, heads, self.atom_heads[k].bias, message))  # type: ignore
        screening, pairs = ((), torch.zeros(1, 1, 3, device="cpu"))
        if self.settings.zbl:
            screening, pairs = zbl_parameters(self.species, self.cutoff)
        return TokenNetwork(
            stages=stages,
            frequencies=self.radial.frequencies,
            embedding=self.edge_embedding.weight.T,
            of_atoms=self.species_embedding.weight,
            of_pairs=self.pair_embedding.weight,
            n_heads=self.settings.n_heads,
            cutoff=self.cutoff,
            cutoff_width=self.cutoff_width,
            screening=screening,
            pairs=pairs,
        )

    # --- training ----------------------------------------------------------------------------------------------------

    def _make_trainer(self) -> "Trainer":
        from equimd.models.transformer_training import TransformerTrainer

        return TransformerTrainer(self)

    # --- autograd ----------------------------------------------------------------------------------------------------

    def _readout(
        self,
        graph: AtomGraph,
        vectors: Tensor,
        told: Tensor | None = None,
        more: Sequence[tuple[nn.ModuleList, nn.ModuleList]] = (),
    ) -> list[Tensor]:
        """Sums over the GNN layers of what is read by the heads, (N, 1) or (N, 4), and by ``more`` of them.

        ``told`` (N, d) is added to the atoms' own tokens at the start.
        """
        layout = neighbour_layout(graph)
        x, edge_weights = self._embed(graph, vectors, layout, told)  # (N, T, d), (N, M)
        n, m, d = graph.n_atoms, layout.width, x.shape[2]
        weights = torch.cat([edge_weights.new_ones(n, 1), edge_weights], dim=1)
        heads = [(self.atom_heads, self.edge_heads), *more]
        outputs = [x.new_zeros(n, 1)] * len(heads)
        for k, transformer in enumerate(self.transformers):
            for layer in transformer:  # type: ignore[union-attr]
                x = layer(x, weights)
            normed = rms_norm(x)
            atoms, edges = normed[:, 0], normed[:, 1:]
            for which, (of_atoms, of_edges) in enumerate(heads):
                read = (edge_weights.unsqueeze(1) @ of_edges[k](edges)).squeeze(1)
                outputs[which] = outputs[which] + of_atoms[k](atoms) + read
            if k < len(self.messages):
                sent = self.messages[k](edges).reshape(n * m, d)
                received = _Swap.apply(sent, layout.reverse).view(n, m, d)  # type: ignore[union-attr]
                x = x + F.pad(received, (0, 0, 1, 0))
        return outputs

    def _embed(
        self, graph: AtomGraph, vectors: Tensor, layout: NeighbourLayout, told: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Tokens (N, 1 + M, d) and the cutoff weights (N, M) of the neighbours, zero in empty slots."""
        n, m = graph.n_atoms, layout.width
        kind = self.species_of(graph)
        if layout.edge is not None:
            nowhere = vectors.new_tensor([[self.cutoff, 0.0, 0.0]])  # an empty slot holds an edge of weight zero
            vectors = torch.cat([vectors, nowhere]).index_select(0, layout.edge)
        r = safe_norm(vectors)  # (N·M,)
        features = torch.cat([vectors, r.unsqueeze(1), self.radial(r)], dim=1).to(self.dtype)
        pair = kind.repeat_interleave(m) * len(self.species) + kind[layout.neighbour]
        edges = self.edge_embedding(features) + self.pair_embedding(pair)
        atoms = self.species_embedding(kind) if told is None else self.species_embedding(kind) + told
        tokens = torch.cat([atoms.unsqueeze(1), edges.view(n, m, edges.shape[1])], dim=1)
        return tokens, cosine_cutoff(r, self.cutoff, self.cutoff_width).to(self.dtype).view(n, m)
