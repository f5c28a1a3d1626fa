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
from equimd.kernels.frozen import DTYPES, Evaluation, Geometry, check_inputs, make_evaluation
from equimd.kernels.geometry_codegen import Screening
from equimd.kernels.network_codegen import LayerShape
from equimd.kernels.plan import ConvolutionPlan
from equimd.kernels.radial_table import RadialTable
from equimd.kernels.source import KernelSource
from equimd.kernels.threads import WORK_PER_THREAD, get_num_threads, run_ranges
from equimd.kernels.topology import Topology
from equimd.kernels.workspace import Field, Workspace

# Arithmetic of the harmonics, per edge, in multiply-adds as slow as theirs.
_GEOMETRY_WORK = 600
_MOST_PHASES = 8  # of a kernel with clocks


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

    embedding (S, C) per species; hidden (C, C), bias (C,), weights (1, C) and constant (1,) of the read-out;
    screening and pairs (S, S, 3) of the nuclear repulsion, see ``geometry_codegen.geometry_source``.
    """

    layers: Sequence[Layer]
    embedding: Tensor
    hidden: Tensor
    bias: Tensor
    weights: Tensor
    constant: Tensor
    cutoff: float
    screening: Screening
    pairs: Tensor


class FusedNetwork:
    """``network`` as a function of the geometry, compiled for one channel count and one dtype.

    Each directed edge must have its reverse in the list. Edges beyond the cutoff contribute nothing. Results do not
    depend on the number of threads. Raises OSError where no folder can be written to.

    With ``clocks``, kernels measure their parts, and run on one thread.
    """

    def __init__(self, network: Network, dtype: str, clocks: bool = False) -> None:
        self.dtype = dtype
        layers, c = network.layers, network.embedding.shape[1]
        last = len(layers) - 1
        shapes = [LayerShape(layer.plan, c, k == 0, k == last) for k, layer in enumerate(layers)]
        real, double = DTYPES[dtype], torch.float64
        n_harmonics = (layers[0].plan.l_max_sh + 1) ** 2
        self._fields: dict[str, Field] = {
            "vectors": Field("edge", 3, double),
            "interval": Field("edge", 1, torch.int64),
            "place": Field("edge", 1, real),
            "sh": Field("edge", n_harmonics, real),
            "slope": Field("edge", 1, double),
            "g_sh": Field("edge", n_harmonics, real),
            "g_r": Field("edge", 1, real),
            "gradient": Field("edge", 3, double),
        }
        self._constants = {
            "cycles": torch.zeros(_MOST_PHASES, dtype=torch.int64, device="cpu"),
            "pairs": network.pairs.to(torch.float64).contiguous(),
        } | self._weights(network)
        if any(tensor.device.type != "cpu" for tensor in self._constants.values()):
            raise ValueError("weights must be on the CPU")
        l_max, n_species = layers[0].plan.l_max_sh, network.embedding.shape[0]
        self._steps: list[_Step] = []
        self._add(
            geometry_codegen.geometry_source(l_max, dtype, n_species, network.screening),
            {},
            _GEOMETRY_WORK,
            "forward: geometry",
        )
        for k, shape in enumerate(shapes):
            self._add_arrays(k, shape)
            following = {} if k == last else {"up_next": f"up{k + 1}", "h_next": f"h{k + 1}", "x_next": f"x{k + 1}"}
            own = ("h", "x", "z", "mix", "table", "mix_back", "g_to", "g_skip")
            names = {name: f"{name}{k}" for name in own} | {"x_next": f"x{k + 1}"} | following
            self._add(
                network_codegen.forward_source(shape, dtype, clocks), names, 2 * shape.work, f"forward: layer {k}"
            )
        for k in range(last, -1, -1):
            before = shapes[k - 1] if k else None
            own = ("h", "table", "g_to", "g_skip", "up_back")
            names = {name: f"{name}{k}" for name in own}
            names |= {f"{name}_before": f"{name}{k - 1}" for name in ("z", "g_to", "g_skip", "mix_back")}
            self._add(
                network_codegen.backward_source(shapes[k], before, dtype, clocks),
                names,
                4 * shapes[k].work,
                f"backward: layer {k}",
            )
        self._add(
            geometry_codegen.gradient_source(l_max, dtype, bool(network.screening)),
            {},
            _GEOMETRY_WORK,
            "backward: geometry",
        )
        self._add(
            geometry_codegen.scatter_source(), {}, 0, "backward: geometry", is_parallel=False
        )  # writes to both ends
        self._spare: list[Workspace] = []

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(DTYPES[self.dtype]).clone(memory_format=torch.contiguous_format)

    def _weights(self, network: Network) -> dict[str, Tensor]:
        """Weights as flat arrays; their order is the kernels'."""
        table = network.layers[0].table
        scales = [network.cutoff, table.first, table.per_angstrom, float(table.n_intervals)]
        weights = {
            "scales": torch.tensor(scales, dtype=torch.float64, device="cpu"),
            "species": self._cast(network.embedding),
            "species_up": self._cast(network.embedding @ network.layers[0].up[0]),
            "hidden": self._cast(network.hidden),
            "hidden_back": self._cast(network.hidden.T),
            "bias": self._cast(torch.cat([network.bias.flatten(), network.constant.flatten()])),
            "weights": self._cast(network.weights),
        }
        for k, layer in enumerate(network.layers):
            weights |= {
                f"table{k}": self._cast(layer.table.coefficients),
                f"mix{k}": self._cast(torch.cat([w.flatten() for w in layer.mix])),
                f"mix_back{k}": self._cast(torch.cat([w.T.flatten() for w in layer.mix])),
                f"up{k}": self._cast(torch.cat([w.flatten() for w in layer.up])),
                f"up_back{k}": self._cast(torch.cat([w.T.flatten() for w in layer.up])),
            }
        return weights

    @torch.no_grad()
    def update(self, network: Network) -> None:
        """Other weights for the same network: same shapes, same intervals, same repulsion."""
        for name, tensor in self._weights(network).items():
            self._constants[name].copy_(tensor)

    def _add_arrays(self, k: int, shape: LayerShape) -> None:
        """Per-atom arrays of one layer."""
        c = shape.n_channels
        rows = {f"z{k}": shape.n_z, f"g_to{k}": shape.plan.dim_out, f"x{k + 1}": shape.n_out}
        if k:
            rows |= {f"h{k}": shape.n_in, f"g_skip{k}": shape.n_in}
        self._fields |= {name: Field("atom", n * c, DTYPES[self.dtype]) for name, n in rows.items()}

    def _add(
        self, source: KernelSource, names: Mapping[str, str], work: int, title: str, is_parallel: bool = True
    ) -> None:
        kernel = compile_kernel(source.text, len(source.arguments))
        arguments = tuple(names.get(name, name) for name in source.arguments)
        is_parallel = is_parallel and not source.phases
        self._steps.append(_Step(title, kernel, arguments, work, is_parallel, source.phases))

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
        check_inputs(geometry, kind, topology)
        inputs = geometry._asdict() | {
            "kind": kind,
            "x0": self._constants["species"].index_select(0, kind),
            "h0": self._constants["species_up"].index_select(0, kind),
            "seed": self._cast(seed),
            "order": topology.receiver_order,
            "other": topology.senders,
            "ptr": topology.receiver_ptr,
        }
        results = make_evaluation(n, n_systems)
        try:  # one workspace for each thread that is here at the same time
            workspace = self._spare.pop()
        except IndexError:
            workspace = Workspace(self._fields, self._constants)
        workspace.fit(atom=n, edge=n_edges)
        tensors = inputs | results._asdict()
        pointers = workspace.pointers | {name: tensor.data_ptr() for name, tensor in tensors.items()}
        n_threads = get_num_threads()
        for step in self._steps:
            arguments = [pointers[name] for name in step.arguments]
            parts = max(1, min(n_threads, n_edges * step.work // WORK_PER_THREAD)) if step.is_parallel else 1
            start = time.perf_counter()
            run_ranges(step.kernel, arguments, topology.split(parts))
            if seconds is not None:
                step.add_time(seconds, time.perf_counter() - start, self._constants["cycles"])
        self._spare.append(workspace)
        return results


class _Step(NamedTuple):
    title: str
    kernel: Callable[..., None]
    arguments: tuple[str, ...]
    work: int  # multiply-adds per edge
    is_parallel: bool
    phases: tuple[str, ...]

    def add_time(self, seconds: dict[str, float], passed: float, cycles: Tensor) -> None:
        """To this step, or to its phases by their ``cycles``, which are set back to zero."""
        shares = {self.title: 1.0}
        if self.phases and int(cycles.sum()):
            counts = zip(self.phases, (cycles / cycles.sum()).tolist(), strict=False)
            shares = {f"{self.title}: {phase}": share for phase, share in counts}
            cycles.zero_()
        for title, share in shares.items():
            seconds[title] = seconds.get(title, 0.0) + share * passed
