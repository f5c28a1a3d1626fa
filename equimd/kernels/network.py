"""A whole equivariant network with frozen weights on the CPU: energies, forces and virial in a handful of calls.

What ``models.equivariant`` computes with torch, layer by layer and with autograd, is one compiled kernel per layer and
direction here; see ``network_codegen``. Nothing but per-atom features and a few numbers per edge is kept.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from equimd.kernels import geometry_codegen, network_codegen
from equimd.kernels.compiled import compile_kernel
from equimd.kernels.geometry_codegen import Screening
from equimd.kernels.network_codegen import LayerShape
from equimd.kernels.plan import ConvolutionPlan
from equimd.kernels.radial_table import RadialTable
from equimd.kernels.source import KernelSource
from equimd.kernels.threads import WORK_PER_THREAD, run_ranges
from equimd.kernels.topology import Topology

_TORCH_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_EDGE_DTYPES = {"interval": torch.int64} | dict.fromkeys(("vectors", "slope", "gradient"), torch.float64)
# Arithmetic of the harmonics, per edge, in multiply-adds as slow as theirs.
_GEOMETRY_WORK = 600


@dataclass(frozen=True)
class Layer:
    """Weights of one interaction layer, all (fan in, fan out).

    up: per input irrep (C, C). mix: per output irrep of the plan, (paths · C + skip · C, C), for the scalar with
    (1 + gates) · C columns. table: radial weights (P, C), the factor 1/√n̄ included, on intervals common to all layers.
    """

    plan: ConvolutionPlan
    up: Sequence[Tensor]
    mix: Sequence[Tensor]
    table: RadialTable


@dataclass(frozen=True)
class Network:
    """Weights of a network with frozen weights.

    embedding (S, C) per species; hidden (C, C), bias (C,), weights (C,) and constant () of the read-out;
    screening and pairs (S, S, 3) of the nuclear repulsion, see ``geometry_codegen.geometry_source``.
    """

    layers: Sequence[Layer]
    embedding: Tensor
    hidden: Tensor
    bias: Tensor
    weights: Tensor
    constant: float
    cutoff: float
    screening: Screening
    pairs: Tensor


class Geometry(NamedTuple):
    """positions (N, 3), shifts (E, 3) in lattice vectors, cell (S, 3, 3), all float64; batch (N,) int64."""

    positions: Tensor
    shifts: Tensor
    cell: Tensor
    batch: Tensor


class Evaluation(NamedTuple):
    """output (N,) float64 of the network; repulsion (N,) eV; forces (N, 3) eV/Å and virial (S, 3, 3) eV, float64.

    Forces and virial are those of Σ seed · output + repulsion, the virial Σ r ⊗ ∂E/∂r.
    """

    output: Tensor
    repulsion: Tensor
    forces: Tensor
    virial: Tensor


class FusedNetwork:
    """``network`` as a function of the geometry, compiled for one channel count and one dtype.

    Each directed edge must have its reverse in the list. Edges beyond the cutoff contribute nothing. Results do not
    depend on the number of threads. Raises OSError where no folder can be written to.
    """

    def __init__(self, network: Network, dtype: str) -> None:
        self.dtype = dtype
        layers, c = network.layers, network.embedding.shape[1]
        last = len(layers) - 1
        shapes = [LayerShape(layer.plan, c, k == 0, k == last) for k, layer in enumerate(layers)]
        self._widths = {"sh": (layers[0].plan.l_max_sh + 1) ** 2, "place": 1, "interval": 1, "vectors": 3, "slope": 1}
        self._widths |= {"g_sh": self._widths["sh"], "g_r": 1, "gradient": 3}
        self._rows: dict[str, int] = {}
        self._species = [self._cast(network.embedding), self._cast(network.embedding @ layers[0].up[0])]
        table = layers[0].table
        scales = [network.cutoff, table.first, table.per_angstrom, float(table.n_intervals)]
        self._constants: dict[str, Tensor] = {
            "scales": torch.tensor(scales, dtype=torch.float64, device="cpu"),
            "pairs": network.pairs.to(torch.float64).contiguous(),
            "hidden": self._cast(network.hidden),
            "hidden_back": self._cast(network.hidden.T),
            "bias": self._cast(torch.cat([network.bias.flatten(), network.bias.new_tensor([network.constant])])),
            "weights": self._cast(network.weights),
        }
        l_max, n_species = layers[0].plan.l_max_sh, network.embedding.shape[0]
        self._steps: list[_Step] = []
        self._add(
            geometry_codegen.geometry_source(l_max, dtype, n_species, network.screening), {}, _GEOMETRY_WORK, "geometry"
        )
        for k, (layer, shape) in enumerate(zip(layers, shapes, strict=True)):
            self._add_layer(k, layer, shape)
            following = {} if k == last else {"up_next": f"up{k + 1}", "h_next": f"h{k + 1}", "x_next": f"x{k + 1}"}
            own = ("h", "x", "z", "mix", "table", "mix_back", "g_to", "g_skip")
            names = {name: f"{name}{k}" for name in own} | {"x_next": f"x{k + 1}"} | following
            self._add(network_codegen.forward_source(shape, dtype), names, 2 * shape.work, f"forward {k}")
        for k in range(last, -1, -1):
            before = shapes[k - 1] if k else None
            own = ("h", "table", "g_to", "g_skip", "up_back")
            names = {name: f"{name}{k}" for name in own}
            names |= {f"{name}_before": f"{name}{k - 1}" for name in ("z", "g_to", "g_skip", "mix_back")}
            self._add(
                network_codegen.backward_source(shapes[k], before, dtype), names, 4 * shapes[k].work, f"backward {k}"
            )
        self._add(
            geometry_codegen.gradient_source(l_max, dtype, bool(network.screening)), {}, _GEOMETRY_WORK, "gradient"
        )
        self._add(geometry_codegen.scatter_source(), {}, 0, "scatter", is_parallel=False)  # writes to both ends
        if any(tensor.device.type != "cpu" for tensor in (*self._constants.values(), *self._species)):
            raise ValueError("weights must be on the CPU")
        self._spare: list[_Workspace] = []

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(_TORCH_DTYPES[self.dtype]).contiguous()

    def _add_layer(self, k: int, layer: Layer, shape: LayerShape) -> None:
        """Flat constant arrays of one layer, and rows of its per-atom arrays."""
        self._constants |= {
            f"table{k}": self._cast(layer.table.coefficients),
            f"mix{k}": self._cast(torch.cat([w.flatten() for w in layer.mix])),
            f"mix_back{k}": self._cast(torch.cat([w.T.flatten() for w in layer.mix])),
            f"up{k}": self._cast(torch.cat([w.flatten() for w in layer.up])),
            f"up_back{k}": self._cast(torch.cat([w.T.flatten() for w in layer.up])),
        }
        c = shape.n_channels
        self._rows |= {f"z{k}": shape.n_z * c, f"g_to{k}": shape.plan.dim_out * c, f"x{k + 1}": shape.n_out * c}
        if k:
            self._rows |= {f"h{k}": shape.n_in * c, f"g_skip{k}": shape.n_in * c}

    def _add(
        self, source: KernelSource, names: Mapping[str, str], work: int, title: str, is_parallel: bool = True
    ) -> None:
        kernel = compile_kernel(source.text, len(source.arguments), source.modules)
        arguments = tuple(names.get(name, name) for name in source.arguments)
        self._steps.append(_Step(title, kernel, arguments, work, is_parallel))

    def __call__(
        self,
        geometry: Geometry,
        kind: Tensor,
        seed: Tensor,
        topology: Topology,
        seconds: dict[str, float] | None = None,
    ) -> Evaluation:
        """Outputs, forces and virial; ``seconds`` receives how long each step took.

        kind (N,) are rows of the species, seed (N,) how much each output counts, its scale in eV.

        Raises:
            ValueError: for arrays that do not fit the topology, or are not contiguous, of their type and on the CPU.
        """
        n, n_edges, n_systems = topology.n_receivers, topology.n_edges, geometry.cell.shape[0]
        _check(geometry, kind, topology)
        inputs = geometry._asdict() | {
            "kind": kind,
            "x0": self._species[0].index_select(0, kind),
            "h0": self._species[1].index_select(0, kind),
            "seed": self._cast(seed),
            "order": topology.receiver_order,
            "other": topology.senders,
            "ptr": topology.receiver_ptr,
        }
        doubles = {"dtype": torch.float64, "device": "cpu"}
        results = Evaluation(
            output=torch.empty(n, **doubles),
            repulsion=torch.zeros(n, **doubles),
            forces=torch.zeros(n, 3, **doubles),
            virial=torch.zeros(n_systems, 3, 3, **doubles),
        )
        try:  # one workspace for each thread that is here at the same time
            workspace = self._spare.pop()
        except IndexError:
            workspace = _Workspace(self._constants, self._rows, self._widths, _TORCH_DTYPES[self.dtype])
        workspace.fit(n, n_edges)
        tensors = inputs | results._asdict()
        pointers = workspace.pointers | {name: tensor.data_ptr() for name, tensor in tensors.items()}
        n_threads = torch.get_num_threads()
        for step in self._steps:
            arguments = [pointers[name] for name in step.arguments]
            parts = max(1, min(n_threads, n_edges * step.work // WORK_PER_THREAD)) if step.is_parallel else 1
            start = time.perf_counter()
            run_ranges(step.kernel, arguments, topology.split(parts))
            if seconds is not None:
                seconds[step.title] = time.perf_counter() - start
        self._spare.append(workspace)
        return results


class _Step(NamedTuple):
    title: str
    kernel: Callable[..., None]
    arguments: tuple[str, ...]
    work: int  # multiply-adds per edge
    is_parallel: bool


class _Workspace:
    """Arrays between the steps, for one call at a time; kept from call to call while their size is about right."""

    def __init__(
        self, constants: Mapping[str, Tensor], rows: Mapping[str, int], widths: Mapping[str, int], dtype: torch.dtype
    ) -> None:
        self._rows, self._widths, self._dtype = rows, widths, dtype
        self._n_atoms = self._n_edges = -1
        self._tensors: dict[str, Tensor] = {}
        self.pointers: dict[str, int] = {name: tensor.data_ptr() for name, tensor in constants.items()}

    def fit(self, n_atoms: int, n_edges: int) -> None:
        """Make room for so many atoms and edges, with a little to spare for the next neighbour list."""
        if not self._n_atoms / 4 <= n_atoms <= self._n_atoms:
            self._n_atoms = n_atoms
            for name, row in self._rows.items():
                self._set(name, n_atoms * row, self._dtype)
        if not self._n_edges / 4 <= n_edges <= self._n_edges:
            self._n_edges = n_edges + n_edges // 20
            for name, row in self._widths.items():
                self._set(name, self._n_edges * row, _EDGE_DTYPES.get(name, self._dtype))

    def _set(self, name: str, size: int, dtype: torch.dtype) -> None:
        self._tensors[name] = torch.empty(size, dtype=dtype, device="cpu")
        self.pointers[name] = self._tensors[name].data_ptr()


def _check(geometry: Geometry, kind: Tensor, topology: Topology) -> None:
    n, n_edges, n_systems = topology.n_receivers, topology.n_edges, geometry.cell.shape[0]
    wanted = {"positions": (n, 3), "shifts": (n_edges, 3), "cell": (n_systems, 3, 3), "batch": (n,), "kind": (n,)}
    for name, tensor in (*geometry._asdict().items(), ("kind", kind)):
        dtype = torch.int64 if name in ("batch", "kind") else torch.float64
        if (tensor.shape, tensor.dtype, tensor.device.type) != (wanted[name], dtype, "cpu"):
            raise ValueError(
                f"{name} must be {wanted[name]} {dtype} on the CPU, "
                f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    if n and int(geometry.batch.max()) >= n_systems:
        raise ValueError(f"batch must be below the number of cells, {n_systems}, got {int(geometry.batch.max())}")
