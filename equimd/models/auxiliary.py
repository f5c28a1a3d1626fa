"""Heads that only help to train: a potential without them is the same potential, and no file of one holds them.

They read K vectors per atom off the features of a network and tell it one vector per atom. With the atoms' forces told
and the noise of their positions read they serve denoising (Liao et al., TMLR 2024, arXiv:2403.09549), with forces read
direct-force pre-training. Vectors are dimensionless here: forces in units of their RMS, noise in units of its width.

    transformer   x_i0 ← x_i0 + W f_i                    v_i = Σ_layers [H_c norm x_i0 + Σ_j f_c(r_ij) H_e norm x_ij]
    equivariant   x_i^(1,−1) ← x_i^(1,−1) + f_i ⊗ w       v_i = W [σ(G x_i^(0,+1)) ⊙ U x_i^(1,−1)]

Without biases, so that zeros tell nothing and rotations of an equivariant network's input and of what it is told rotate
what is read. Components of (1, −1) are in the order x, y, z, that of ``kernels.harmonics``.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equimd.kernels import Irrep
from equimd.kernels.network_codegen import SIGMOID_GAIN
from equimd.models.equivariant import EquivariantPotential, EquivariantSettings
from equimd.models.potential import Potential, PotentialSettings
from equimd.models.transformer import TransformerPotential

VECTOR: Irrep = (1, -1)
_HEAD_GAIN = 0.1  # vectors begin small, as energies do


class TransformerAuxiliary(nn.Module):
    """Heads on the tokens after every GNN layer; what is told goes to the atoms' own tokens."""

    def __init__(self, potential: TransformerPotential, n_vectors: int) -> None:
        super().__init__()
        settings, d = potential.settings, potential.settings.d_model
        self.told = nn.Parameter(torch.randn(3, d) / math.sqrt(3))
        self.atom_heads = nn.ModuleList(_head(d, 3 * n_vectors) for _ in range(settings.n_gnn_layers))
        self.edge_heads = nn.ModuleList(_head(d, 3 * n_vectors) for _ in range(settings.n_gnn_layers))

    def tell(self, given: Tensor) -> Tensor:
        """Vectors (N, 3) → what they add to the atoms' tokens, (N, d)."""
        return given @ self.told


class EquivariantAuxiliary(nn.Module):
    """Heads on the vectors among the features, gated by the scalars; what is told is added after the first layer."""

    def __init__(self, potential: EquivariantPotential, n_vectors: int) -> None:
        super().__init__()
        c = potential.settings.n_channels
        hidden = [layer.irreps_out for layer in potential.interactions[:-1]]
        self.rows_told, self.rows_read = _rows(hidden[0]), _rows(hidden[-1])
        self.told = nn.Parameter(torch.randn(c))
        self.mix = nn.Parameter(torch.randn(c, c) / math.sqrt(c))
        self.gate = _head(c, c, 1.0)
        self.read = _head(c, n_vectors)

    def tell(self, given: Tensor) -> Tensor:
        """Vectors (N, 3) → what they add to the features after the first layer, (N, D, C)."""
        before, after = self.rows_told
        return F.pad(given.unsqueeze(2) * self.told, (0, 0, before, after))

    def vectors(self, features: Tensor) -> Tensor:
        """Vectors (N, K, 3) read off the features (N, D, C) of the last layer but one."""
        before, _ = self.rows_read
        gates = SIGMOID_GAIN * torch.sigmoid(self.gate(features[:, :1]))  # (N, 1, C); scalars come first
        return self.read((features[:, before : before + 3] @ self.mix) * gates).transpose(1, 2)


Auxiliary = TransformerAuxiliary | EquivariantAuxiliary


def make_auxiliary(potential: Potential, n_vectors: int) -> Auxiliary:
    """Heads for K = ``n_vectors`` vectors per atom, their weights drawn from torch's global generator."""
    if isinstance(potential, TransformerPotential):
        auxiliary = TransformerAuxiliary(potential, n_vectors)
    elif isinstance(potential, EquivariantPotential):
        auxiliary = EquivariantAuxiliary(potential, n_vectors)
    else:
        raise TypeError(f"there are no auxiliary heads for {type(potential).__name__}")
    return auxiliary.to(device=potential.device, dtype=potential.dtype)


def lacking(settings: PotentialSettings, told: bool) -> str | None:
    """What ``settings`` lack for a vector to be read (and, with ``told``, another told before); None where nothing."""
    if not isinstance(settings, EquivariantSettings):
        return None
    if settings.l_max < 1:
        return f"model.l_max is {settings.l_max}; at least 1 is accepted, a vector is to be read off the features"
    least, why = (3, "between the forces told and the noise read") if told else (2, "before the last, of scalars only")
    if settings.n_layers < least:
        return f"model.n_layers is {settings.n_layers}; at least {least} are accepted, a layer must lie {why}"
    return None


def _head(d_in: int, d_out: int, gain: float = _HEAD_GAIN) -> nn.Linear:
    layer = nn.Linear(d_in, d_out, bias=False)
    nn.init.normal_(layer.weight, std=gain / math.sqrt(d_in))
    return layer


def _rows(irreps: tuple[Irrep, ...]) -> tuple[int, int]:
    """How many rows of features lie before and after those of the vectors."""
    sizes = [2 * l + 1 for l, _ in irreps]  # noqa: E741
    k = irreps.index(VECTOR)
    return sum(sizes[:k]), sum(sizes[k + 1 :])
