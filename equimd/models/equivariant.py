"""Equivariant potential after NequIP (Batzner et al., Nat. Commun. 13, 2453, 2022), with options of Nequix.

Features are irreps of O(3), channel-last: (N, D, C) with D rows for the (l, m) components. A layer is

    h_i  = Linear_l(x_i)
    m_i  = 1/√n̄ Σ_j R(r_ij) ⊙ (h_j ⊗ Y(r̂_ij))                    the convolution, one fused operation in ``kernels``
    x_i' = Gate(Linear_l([m_i, x_i]))                               the second half of Linear_l is the linear skip

and the atomic output is a small network on the scalars of the last layer. l_max 0 is an invariant, SchNet-like network.
With parity off only irreps of natural parity p = (−1)^l are kept, which is still O(3)-equivariant.
"""

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from equimd.errors import KernelWarning
from equimd.graph import AtomGraph
from equimd.kernels import (
    Backend,
    ConvolutionPlan,
    Irrep,
    Topology,
    convolve,
    make_plan,
    standard_irreps,
)
from equimd.kernels.harmonics import spherical_harmonics
from equimd.kernels.network_codegen import SIGMOID_GAIN, SILU_GAIN, TANH_GAIN
from equimd.kernels.radial_table import RadialTable, tabulate
from equimd.models.potential import FrozenOutput, Potential, PotentialSettings, geometry_of, topology_of
from equimd.models.radial import BesselBasis, polynomial_cutoff, safe_norm, zbl_parameters

if TYPE_CHECKING:
    from equimd.kernels.network import FusedNetwork, Network
    from equimd.models.auxiliary import EquivariantAuxiliary
    from equimd.models.dual_training import Trainer

# Relative error of tabulated radial functions, by precision of the network. That of their slopes is some 200 times
# larger, and in float32 still below the rounding of the forces.
_TABLE_TOLERANCE = {torch.float32: 1e-9, torch.float64: 1e-11}

SCALAR: Irrep = (0, 1)


class EquivariantSettings(PotentialSettings):
    """Architecture of the equivariant family."""

    family: Literal["equivariant"] = "equivariant"
    n_layers: int = Field(default=3, ge=1, le=12, description="interaction layers")
    l_max: int = Field(default=2, ge=0, le=3, description="highest degree of features and spherical harmonics")
    parity: bool = Field(default=False, description="keep irreps of both parities (pseudo-scalars, pseudo-vectors, …)")
    n_channels: int = Field(default=32, ge=1, le=1024, description="channels per irrep")
    n_bessel: int = Field(default=8, ge=1, le=64, description="radial basis functions")
    radial_width: int = Field(default=64, ge=1, le=4096, description="width of the radial networks")
    radial_depth: int = Field(default=2, ge=1, le=4, description="hidden layers of the radial networks")
    cutoff_power: int = Field(default=6, ge=3, le=64, description="p of the polynomial cutoff")
    rms_norm: bool = Field(default=False, description="equivariant RMS norm before each layer")
    avg_num_neighbors: float | None = Field(
        default=None, ge=1e-3, le=1e5, description="n̄; None takes the mean of the training set"
    )


class RadialNetwork(nn.Module):
    """Radial weights R(r): a network without biases, so that what the cutoff sends to zero stays zero."""

    def __init__(self, n_basis: int, width: int, depth: int, n_paths: int, n_channels: int) -> None:
        super().__init__()
        sizes = [n_basis] + [width] * depth
        hidden = [nn.Linear(a, b, bias=False) for a, b in zip(sizes, sizes[1:], strict=False)]
        self.hidden = nn.ModuleList(hidden)
        self.out = nn.Linear(width, n_paths * n_channels, bias=False)
        self.shape = (n_paths, n_channels)
        for k, layer in enumerate([*hidden, self.out]):
            gain = SILU_GAIN if k else 1.0  # of the silu before; in the weights it costs nothing per edge
            nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.in_features))

    def forward(self, basis: Tensor) -> Tensor:
        """Basis (E, n_basis) → weights (E, P, C)."""
        for layer in self.hidden:
            basis = nn.functional.silu(layer(basis))
        return self.out(basis).view(-1, *self.shape)

    def jet(self, basis: Tensor) -> Tensor:
        """Value, slope and curvature of the basis, (3, K, n_basis), → those of the weights, (3, K, P, C)."""
        hidden, out = cast("list[nn.Linear]", list(self.hidden)), self.out
        jet = basis
        for layer in hidden:
            value, slope, curvature = jet @ layer.weight.to(jet).T
            s = torch.sigmoid(value)
            first = s * (1 + value * (1 - s))  # derivatives of silu
            second = s * (1 - s) * (2 + value * (1 - 2 * s))
            jet = torch.stack([value * s, first * slope, second * slope.square() + first * curvature])
        return (jet @ out.weight.to(jet).T).unflatten(-1, self.shape)


class IrrepsLinear(nn.Module):
    """One matrix per irrep that mixes channels: rows of (l, p) with fan_in channels → n_out channels."""

    def __init__(self, blocks: list[tuple[int, int, int]]) -> None:
        """``blocks`` holds (2l+1, fan_in, n_out) per irrep."""
        super().__init__()
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(fan_in, n_out) / math.sqrt(fan_in)) for _, fan_in, n_out in blocks
        )

    def forward(self, blocks: list[Tensor]) -> list[Tensor]:
        """Blocks (N, 2l+1, fan_in) → (N, 2l+1, n_out)."""
        return [x @ weight for x, weight in zip(blocks, self.weights, strict=True)]


class EquivariantRMSNorm(nn.Module):
    """x / rms(x) over all components and channels of an atom, times a learned weight per irrep and channel."""

    row_irrep: Tensor

    def __init__(self, irreps: tuple[Irrep, ...], n_channels: int, eps: float = 1e-4) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(len(irreps), n_channels))
        rows = [k for k, (l, _) in enumerate(irreps) for _ in range(2 * l + 1)]  # noqa: E741
        self.register_buffer("row_irrep", torch.tensor(rows), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, D, C) → (N, D, C)."""
        rms = (x.square().mean(dim=(1, 2), keepdim=True) + self.eps).rsqrt()
        return x * rms * self.weight[self.row_irrep]


class InteractionLayer(nn.Module):
    """Linear, convolution, linear with skip, gate."""

    def __init__(
        self, settings: EquivariantSettings, irreps_in: tuple[Irrep, ...], irreps_out: tuple[Irrep, ...]
    ) -> None:
        super().__init__()
        c = settings.n_channels
        plan = make_plan(irreps_in, settings.l_max, irreps_out)
        # Output irreps that no path and no skip reaches are dropped (0o at l_max 0, for instance).
        kept = tuple((b.l, b.p) for b in plan.blocks if b.n_paths > 0)
        self.plan: ConvolutionPlan = make_plan(irreps_in, settings.l_max, kept)
        self.irreps_in, self.irreps_out = irreps_in, kept
        self.n_gated = sum(irrep[0] > 0 for irrep in kept)
        self.n_channels = c
        self.norm = EquivariantRMSNorm(irreps_in, c) if settings.rms_norm else None
        self.up = IrrepsLinear([(2 * l + 1, c, c) for l, _ in irreps_in])  # noqa: E741
        self.radial = RadialNetwork(
            settings.n_bessel, settings.radial_width, settings.radial_depth, self.plan.n_paths, c
        )
        self.mix = IrrepsLinear(
            [
                (2 * b.l + 1, c * (b.n_paths + ((b.l, b.p) in irreps_in)), c * self._n_out((b.l, b.p)))
                for b in self.plan.blocks
            ]
        )

    def _n_out(self, irrep: Irrep) -> int:
        return 1 + self.n_gated if irrep == SCALAR else 1

    def forward(
        self,
        x: Tensor,
        sh: Tensor,
        basis: Tensor,
        topology: Topology,
        backend: Backend = "auto",
    ) -> Tensor:
        """x (N, D_in, C), sh (E, (l_max+1)²), radial basis (E, n_basis) → (N, D_out, C)."""
        if self.norm is not None:
            x = self.norm(x)
        parts = _split(x, self.irreps_in)
        h = torch.cat(self.up(parts), dim=1)
        edges = (topology.senders, topology.receivers)
        message = convolve(h, sh, self.radial(basis), *edges, self.plan, backend=backend, topology=topology)
        return self._gate(self.mix(self.mix_inputs(message, parts)))

    def mix_inputs(self, message: Tensor, parts: list[Tensor]) -> list[Tensor]:
        """Blocks (…, 2l+1, paths · C [+ C]) of a message (…, D_out, C) and of the skip, ``parts`` of the input."""
        skip = dict(zip(self.irreps_in, parts, strict=True))
        rows = message.split([b.n_paths * (2 * b.l + 1) for b in self.plan.blocks], dim=-2)
        blocks = []
        for block, m in zip(self.plan.blocks, rows, strict=True):
            m = m.unflatten(-2, (block.n_paths, 2 * block.l + 1)).transpose(-3, -2).flatten(-2)
            extra = skip.get((block.l, block.p))
            blocks.append(m if extra is None else torch.cat([m, extra], dim=-1))
        return blocks

    def _gate(self, blocks: list[Tensor]) -> Tensor:
        """silu on even scalars, tanh on odd ones, every l > 0 times a sigmoid of a scalar of its own."""
        c = self.n_channels
        gates: list[Tensor] = []
        out: list[Tensor] = []
        for irrep, y in zip(self.irreps_out, blocks, strict=True):
            if irrep == SCALAR:
                scalars, gate_inputs = y.split([c, y.shape[2] - c], dim=2)
                gates = list((SIGMOID_GAIN * torch.sigmoid(gate_inputs)).split(c, dim=2)) if self.n_gated else []
                out.append(SILU_GAIN * nn.functional.silu(scalars))
            elif irrep[0] == 0:
                out.append(TANH_GAIN * torch.tanh(y))
            else:
                out.append(y * gates.pop(0))
        return torch.cat(out, dim=1)


def _split(x: Tensor, irreps: tuple[Irrep, ...]) -> list[Tensor]:
    return list(x.split([2 * l + 1 for l, _ in irreps], dim=1))  # noqa: E741


class EquivariantPotential(Potential):
    """NequIP-like network; see the module's docstring for the equations."""

    family: ClassVar[str] = "equivariant"
    has_compiled_layers = True
    parts = {
        "embedding": ("embedding",),
        "layers": ("layers",),
        "radial": ("layers.*.radial",),
        "readout": ("readout",),
    }
    species_tables = {"embedding": 1}
    settings: EquivariantSettings
    readout: nn.Sequential

    def __init__(self, settings: EquivariantSettings, species: tuple[int, ...], isolated_atom_energies) -> None:
        super().__init__(settings, species, isolated_atom_energies)
        c = settings.n_channels
        hidden = standard_irreps(settings.l_max, settings.parity)
        self.embedding = nn.Parameter(torch.randn(len(self.species), c))
        self.bessel = BesselBasis(settings.cutoff, settings.n_bessel)
        layers: list[InteractionLayer] = []
        irreps: tuple[Irrep, ...] = (SCALAR,)
        for t in range(settings.n_layers):
            layers.append(InteractionLayer(settings, irreps, (SCALAR,) if t == settings.n_layers - 1 else hidden))
            irreps = layers[-1].irreps_out
        self.layers = nn.ModuleList(layers)
        self.readout = nn.Sequential(nn.Linear(c, c), nn.SiLU(), nn.Linear(c, 1))
        self.message_scale = 1.0 / math.sqrt(settings.avg_num_neighbors or 1.0)

    @property
    def interactions(self) -> "list[InteractionLayer]":
        """The layers."""
        return cast("list[InteractionLayer]", list(self.layers))

    @property
    def readout_maps(self) -> tuple[nn.Linear, nn.Linear]:
        """The two linear maps of the read-out."""
        return cast("tuple[nn.Linear, nn.Linear]", (self.readout[0], self.readout[2]))

    def network(self, graph: AtomGraph, vectors: Tensor) -> Tensor:
        """Dimensionless atomic outputs (N,) from edge vectors (E, 3) in Å."""
        _, scalars = self._features(graph, vectors)
        return self.readout(scalars.flatten(1)).squeeze(-1)

    def network_and_vectors(
        self, graph: AtomGraph, vectors: Tensor, auxiliary: "EquivariantAuxiliary", given: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Outputs (N,), and vectors (N, K, 3) from the features of the last layer but one: the last has scalars."""
        told = None if given is None else auxiliary.tell(given.to(self.dtype))
        features, scalars = self._features(graph, vectors, told)
        return self.readout(scalars.flatten(1)).squeeze(-1), auxiliary.vectors(features)

    def _features(self, graph: AtomGraph, vectors: Tensor, told: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features (N, D, C) after the last layer but one and (N, 1, C) after the last.

        ``told`` (N, D, C) is added after the first layer, which takes scalars only.
        """
        topology = topology_of(graph)
        distances = safe_norm(vectors)
        basis = self.radial_basis(distances).to(self.dtype)
        sh = spherical_harmonics(vectors / distances.unsqueeze(-1), self.settings.l_max)
        sh = (sh * self.message_scale).to(self.dtype)  # 1/√n̄ is applied where it is cheapest
        before = x = self.embedding[self.species_of(graph)].unsqueeze(1)
        for k, layer in enumerate(self.interactions):
            before, x = x, layer(x, sh, basis, topology, self.kernel_backend)
            if k == 0 and told is not None:
                x = x + told
        return before, x

    def fused_matrices(self) -> dict[str, tuple[int, int]]:
        """Radial weights of the paths; scalars and the gates beside them."""
        fused = {}
        for t, layer in enumerate(self.interactions):
            fused[f"layers.{t}.radial.out.weight"] = (0, layer.plan.n_paths)
            if SCALAR in layer.irreps_out:
                fused[f"layers.{t}.mix.weights.{layer.irreps_out.index(SCALAR)}"] = (1, 1 + layer.n_gated)
        return fused

    def radial_basis(self, distances: Tensor) -> Tensor:
        """Radial basis (E, n_bessel), smoothly zero at the cutoff."""
        cutoff = polynomial_cutoff(distances, self.cutoff, self.settings.cutoff_power)
        return self.bessel(distances) * cutoff.unsqueeze(-1)

    # --- frozen weights ----------------------------------------------------------------------------------------------

    def _evaluate_frozen(
        self, network: "FusedNetwork", graph: AtomGraph, kind: Tensor, seconds: dict[str, float] | None = None
    ) -> FrozenOutput:
        return FrozenOutput(*network(geometry_of(graph), kind, self.scale[kind], topology_of(graph), seconds))

    @property
    def _fusing_key(self) -> tuple[Any, ...] | None:
        return None if self.settings.rms_norm else (self.message_scale,)

    def _fuse(self, clocks: bool = False) -> "FusedNetwork | None":
        scaled = [lambda jet, f=layer.radial.jet: f(jet) * self.message_scale for layer in self.interactions]
        try:
            tables = tabulate(scaled, self.radial_basis, self.cutoff, _TABLE_TOLERANCE[self.dtype])
        except ValueError as error:
            warnings.warn(f"{error}; the network is evaluated without tables, slowly", KernelWarning, stacklevel=2)
            return None
        return self.compile_network(self.frozen_weights(tables), clocks)

    def frozen_weights(self, tables: Sequence[RadialTable]) -> "Network":
        """The present weights, with radial functions as given, for ``kernels.network``."""
        from equimd.kernels.network import Layer, Network

        first, last = self.readout_maps
        screening, pairs = ((), torch.zeros(1, 1, 3, device="cpu"))
        if self.settings.zbl:
            screening, pairs = zbl_parameters(self.species, self.cutoff)
        return Network(
            layers=[
                Layer(layer.plan, list(layer.up.weights), list(layer.mix.weights), table)
                for layer, table in zip(self.interactions, tables, strict=True)
            ],
            embedding=self.embedding,
            hidden=first.weight.T,
            bias=first.bias,
            weights=last.weight,
            constant=last.bias,
            cutoff=self.cutoff,
            screening=screening,
            pairs=pairs,
        )

    def compile_network(self, network: "Network", clocks: bool = False) -> "FusedNetwork":
        """``network`` as a function of the geometry."""
        from equimd.kernels.network import FusedNetwork

        return FusedNetwork(network, str(self.dtype).removeprefix("torch."), clocks)

    # --- training ----------------------------------------------------------------------------------------------------

    def _make_trainer(self) -> "Trainer":
        from equimd.models.equivariant_training import EquivariantTrainer

        return EquivariantTrainer(self)
