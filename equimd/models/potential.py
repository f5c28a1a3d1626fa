"""Potential: one base class for both families; energy, forces, stress and virial are derived here, once for all.

An architecture implements ``network(graph, vectors)``: dimensionless atomic outputs from edge vectors. This class turns
them into energies (per-species scale and shift, optional ZBL repulsion, isolated-atom energies) and into forces and
stress from ONE gradient with respect to edge vectors: with g_ij = ∂E/∂r_ij (Å⁻¹ eV), F_i = Σ_j (g_ij − g_ji) and
σ = (1/V) Σ_ij r_ij ⊗ g_ij (ASE's sign, tension positive, full 3×3).
"""

import copy
import os
import pickle
import statistics
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from equimd.errors import InputError
from equimd.graph import AtomGraph, as_bytes, derived, edge_vectors, has_reverse_edges
from equimd.kernels import Backend, Topology, fuses, make_topology
from equimd.kernels.ambient import in_plain_torch, plain_torch
from equimd.kernels.frozen import Geometry
from equimd.models.radial import zbl_pair_energy
from equimd.results import Checked

if TYPE_CHECKING:
    from equimd.models.dual_training import Trainer

MAX_ATOMIC_NUMBER = 118
_fusing = threading.Lock()  # several threads may ask for the same network at once


class PotentialSettings(Checked):
    """What both families share; each architecture's settings extend it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    cutoff: float = Field(default=5.0, gt=0.5, le=20.0, description="radial cutoff in Å")
    zbl: bool = Field(
        default=True, description="add the Ziegler-Biersack-Littmark repulsion below the sum of covalent radii"
    )


class Prediction(NamedTuple):
    """What a potential says of S structures with N atoms.

    energy (S,) float64 eV, total including isolated atoms; energies (N,) float64 eV, relative to isolated atoms;
    forces (N, 3) eV/Å; stress (S, 3, 3) eV/Å³ or None; virial is −V σ.
    """

    energy: Tensor
    energies: Tensor
    forces: Tensor
    stress: Tensor | None


class FrozenOutput(NamedTuple):
    """output (N,) float64 of ``network`` and repulsion (N,) eV; forces (N, 3) eV/Å and virial (S, 3, 3) eV of both."""

    output: Tensor
    repulsion: Tensor
    forces: Tensor
    virial: Tensor


class Potential(nn.Module, ABC):
    """Base of both families.

    species: atomic numbers the potential knows, ascending. isolated_atom_energies: eV by atomic number.
    kernel_backend: which kernels compute; the self-check chooses slower ones where the fastest are wrong.
    direct_forces: True where forces come from a head of their own instead of the gradient.
    parts: names for groups of parameters, as patterns of their names. species_tables: parameters whose rows are species
    (1) or pairs of species (2). has_compiled_layers: True where autograd goes through compiled operations, too.
    """

    family: ClassVar[str]
    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    species_tables: ClassVar[Mapping[str, int]] = {}
    has_compiled_layers: ClassVar[bool] = False
    direct_forces: bool = False
    kernel_backend: Backend = "auto"
    _fused: tuple[tuple[Any, ...], Any] | None = None
    _trainer: "Trainer | None" = None
    species_index: Tensor
    scale: Tensor
    shift: Tensor

    def __init__(
        self, settings: PotentialSettings, species: tuple[int, ...], isolated_atom_energies: Mapping[int, float]
    ) -> None:
        super().__init__()
        missing = [z for z in species if z not in isolated_atom_energies]
        if missing:
            raise InputError(f"no isolated-atom energy for atomic number {missing[0]}; species are {list(species)}")
        self.settings = settings
        self.species = tuple(sorted(species))
        self.cutoff = settings.cutoff
        index = torch.full((MAX_ATOMIC_NUMBER + 1,), -1, dtype=torch.int64)
        index[list(self.species)] = torch.arange(len(self.species))
        e0 = torch.tensor([float(isolated_atom_energies[z]) for z in self.species], dtype=torch.float64)
        self.register_buffer("species_index", index, persistent=False)
        # Kept as a plain float64 tensor outside ``.to(dtype)``: a total of −10⁴ eV in float32 resolves 1 meV only.
        self._isolated_atom_energies = e0
        self.register_buffer("scale", torch.ones(len(self.species)))
        self.register_buffer("shift", torch.zeros(len(self.species)))

    def _apply(self, fn: Any, recurse: bool = True) -> "Potential":
        """Move the isolated-atom energies with the module, but never cast them."""
        self._fused = self._trainer = None
        super()._apply(fn, recurse)
        self._isolated_atom_energies = self._isolated_atom_energies.to(self.scale.device)
        return self

    @property
    def isolated_atom_energies(self) -> dict[int, float]:
        """Energies of isolated atoms in eV by atomic number."""
        return dict(zip(self.species, self._isolated_atom_energies.tolist(), strict=True))

    @property
    def dtype(self) -> torch.dtype:
        """Precision in which the network computes."""
        return self.scale.dtype

    @property
    def device(self) -> torch.device:
        """Device the parameters live on."""
        return self.scale.device

    def set_scale_shift(self, scale: Mapping[int, float], shift: Mapping[int, float]) -> None:
        """Set the energy scale and shift per species (eV, by atomic number); not trained."""
        for z, k in zip(self.species, range(len(self.species)), strict=True):
            self.scale[k], self.shift[k] = scale[z], shift[z]

    @abstractmethod
    def network(self, graph: AtomGraph, vectors: Tensor) -> Tensor:
        """Dimensionless atomic outputs (N,) from edge vectors (E, 3) in Å, float64; ``graph`` gives species and edges.

        Distances, radial functions and directions are to be formed in float64 and cast to ``self.dtype`` then: a bond
        length that is rounded to float32 already costs 10⁻⁶ of the force of a stiff bond.
        """

    def network_with_forces(self, graph: AtomGraph, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Atomic outputs (N,) and direct forces (N, 3) in eV/Å; only where ``direct_forces`` is True."""
        raise TypeError(f"{type(self).__name__} has no direct-force head")

    def network_and_vectors(
        self, graph: AtomGraph, vectors: Tensor, auxiliary: Any, given: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Outputs of ``network`` (N,) and K dimensionless vectors per atom (N, K, 3) from heads that only train it.

        ``auxiliary`` holds the heads, see ``models.auxiliary``; ``given`` (N, 3), dimensionless, is a vector told to
        each atom, and zeros tell nothing: the outputs are then those of ``network``.
        """
        raise TypeError(f"{type(self).__name__} has no auxiliary heads")

    def fused_matrices(self) -> dict[str, tuple[int, int]]:
        """Parameters that are several matrices side by side, by name: along which dimension, and how many."""
        return {}

    def species_of(self, graph: AtomGraph) -> Tensor:
        """Species index (N,) of every atom; unknown elements are refused where graphs are made."""
        kind = self.species_index[graph.atomic_numbers]
        if kind.device.type == "cpu" and kind.numel() and int(kind.min()) < 0:  # kernels check no index
            unknown = sorted(set(graph.atomic_numbers[kind < 0].tolist()))
            raise InputError(f"atomic number {unknown[0]} is not among the species {list(self.species)}")
        return kind

    def atomic_energies(self, graph: AtomGraph, vectors: Tensor) -> Tensor:
        """Atomic energies (N,) in eV relative to isolated atoms, from edge vectors (E, 3)."""
        return self._energies(graph, vectors, self.network(graph, vectors))

    def atomic_energies_and_forces(self, graph: AtomGraph, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Atomic energies (N,) in eV relative to isolated atoms and direct forces (N, 3) in eV/Å."""
        output, forces = self.network_with_forces(graph, vectors)
        return self._energies(graph, vectors, output), forces

    def energies_of(self, graph: AtomGraph, vectors: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """Total energies (S,) and atomic energies (N,) relative to isolated atoms, float64 eV, from outputs (N,)."""
        energies = self._energies(graph, vectors, output)
        return self._total(graph, energies), energies

    def _energies(self, graph: AtomGraph, vectors: Tensor, output: Tensor) -> Tensor:
        kind = self.species_of(graph)
        energies = (output * self.scale[kind] + self.shift[kind]).to(torch.float64)
        if self.settings.zbl:
            z = graph.atomic_numbers
            pair = zbl_pair_energy(vectors, z[graph.edge_index[0]], z[graph.edge_index[1]], self.cutoff)
            energies = energies.index_add(0, graph.edge_index[0], 0.5 * pair)
        return energies

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """``forward``, whatever torch's default device, autocast and inference mode are where it is called."""
        with plain_torch(keep_autocast=kwargs.get("create_graph", False)):
            return super().__call__(*args, **kwargs)

    def forward(self, graph: AtomGraph, *, stress: bool = False, create_graph: bool = False) -> Prediction:
        """Energy, atomic energies, forces and (if asked) stress; ``create_graph`` keeps them differentiable."""
        kind = self.species_of(graph)
        network = None if create_graph else self._frozen()
        if network is not None and has_reverse_edges(graph):
            frozen = self._evaluate_frozen(network, graph, kind)
            relative = frozen.output * self.scale[kind] + self.shift[kind] + frozen.repulsion
            sigma = _per_volume(frozen.virial, graph) if stress else None
            return Prediction(self._total(graph, relative), relative, frozen.forces, sigma)
        if any(isinstance(value, Tensor) and value.is_inference() for value in graph.to_dict().values()):
            graph = graph.clone()  # autograd takes no tensors that were made in inference mode
        with torch.enable_grad():
            vectors = edge_vectors(graph, torch.float64)
            needs_gradient = stress or not self.direct_forces
            if needs_gradient:
                vectors = vectors.detach().requires_grad_()
            if self.direct_forces:
                relative, forces = self.atomic_energies_and_forces(graph, vectors)
            else:
                relative, forces = self.atomic_energies(graph, vectors), None
            gradient = _edge_gradient(relative, vectors, create_graph) if needs_gradient else None
            if forces is None:
                assert gradient is not None
                forces = _scatter_forces(graph, gradient)
            sigma = _stress(graph, vectors, gradient) if stress and gradient is not None else None
        energies = relative.to(torch.float64)
        energy = self._total(graph, energies)
        if create_graph:
            return Prediction(energy, energies, forces, sigma)
        return Prediction(
            energy.detach(), energies.detach(), forces.detach(), None if sigma is None else sigma.detach()
        )

    def predict_trainable(self, graph: AtomGraph, *, stress: bool = False) -> Prediction:
        """A prediction that can be differentiated once, with respect to the parameters, by the fastest way there is.

        Weights and positions must be the same when it is differentiated.
        """
        trained = self._trainable(graph) if has_reverse_edges(graph) else None
        if trained is None:
            return self(graph, stress=stress, create_graph=True)
        kind = self.species_of(graph)
        relative = trained.output * self.scale[kind] + self.shift[kind] + trained.repulsion
        sigma = _per_volume(trained.virial, graph) if stress else None
        return Prediction(self._total(graph, relative), relative, trained.forces, sigma)

    def _trainable(self, graph: AtomGraph) -> FrozenOutput | None:
        """Outputs, forces and virial, differentiable once in the parameters; None where autograd is to do it."""
        if not self.trains_by_kernels:
            return None
        if self._trainer is None:
            self._trainer = self._make_trainer()
        return self._trainer.predict(graph)

    @property
    def trains_by_kernels(self) -> bool:
        """Whether ``predict_trainable`` is by compiled kernels, for graphs that hold the reverse of every edge.

        It is for what has a frozen network, on a CPU.
        """
        return self._fusing_key is not None and self.kernel_backend == "auto" and fuses(self.dtype, self.device)

    def _make_trainer(self) -> "Trainer":
        """The family's, where ``_fusing_key`` is not None."""
        raise NotImplementedError

    def _total(self, graph: AtomGraph, energies: Tensor) -> Tensor:
        """Energies (S,) with isolated atoms from atomic energies (N,) without, summed in float64."""
        totals = energies + self._isolated_atom_energies[self.species_of(graph)]
        return totals.new_zeros(graph.n_systems).index_add(0, graph.batch, totals)

    # --- frozen weights ----------------------------------------------------------------------------------------------

    @property
    def has_frozen_network(self) -> bool:
        """Whether ``frozen_network`` is there, as the weights are now: a faster way where nothing is differentiated.

        It is for the families and options that have compiled kernels, on a CPU, unless a weight is trainable. Changes
        of weights are noticed, except those made through ``.data`` in place.
        """
        return self._frozen() is not None

    @in_plain_torch
    def frozen_network(self, graph: AtomGraph) -> FrozenOutput:
        """Outputs, forces and virial without autograd; edges beyond the cutoff cost next to nothing.

        For graphs that hold the reverse of every edge.
        """
        network = self._frozen()
        if network is None:
            raise TypeError(f"this {type(self).__name__} has no frozen network")
        return self._evaluate_frozen(network, graph, self.species_of(graph))

    @in_plain_torch
    def profile(self, graph: AtomGraph, repeats: int = 10) -> dict[str, float]:
        """Median seconds of each part of one evaluation on one thread: "forward: layer 0: convolution" and so on.

        Where there is no frozen network, parts are the operations that torch's profiler names.
        """
        n_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            if self._frozen() is None or not has_reverse_edges(graph):
                return _profile_operations(lambda: self(graph), repeats)
            network, kind = self._fuse(clocks=True), self.species_of(graph)
            samples: list[dict[str, float]] = []
            for _ in range(repeats + 1):  # the first makes room
                samples.append({})
                self._evaluate_frozen(network, graph, kind, samples[-1])
        finally:
            torch.set_num_threads(n_threads)
        return {part: statistics.median(sample[part] for sample in samples[1:]) for part in samples[0]}

    def _evaluate_frozen(
        self, network: Any, graph: AtomGraph, kind: Tensor, seconds: dict[str, float] | None = None
    ) -> FrozenOutput:
        """What ``_fuse`` made, called with what it takes; ``kind`` (N,) are rows of the species."""
        raise NotImplementedError

    @property
    def _fusing_key(self) -> tuple[Any, ...] | None:
        """What ``_fuse`` depends on besides tensors; None where it does not know these settings."""
        return None

    def _fuse(self, clocks: bool = False) -> Any:
        """The compiled network of the present weights; None where there is none after all.

        With ``clocks``, its kernels measure their parts.
        """
        raise NotImplementedError

    def _frozen(self) -> Any:
        """What ``_fuse`` made, as long as the weights are the same; None where they are not frozen."""
        key = self._fusing_key
        if key is None or self.kernel_backend != "auto" or not fuses(self.dtype, self.device):
            return None
        tensors = _tensors(self)
        if any(tensor.requires_grad or tensor.is_inference() for tensor in tensors):
            return None  # tensors of inference mode do not count their changes
        state = (*key, *((id(t), t.data_ptr(), t._version) for t in tensors))
        held = self._fused  # another thread may set it
        if held is None or held[0] != state:
            with _fusing:
                held = self._fused
                if held is None or held[0] != state:
                    held = self._fused = (state, self._fuse())
        return held[1]

    def __getstate__(self) -> dict[str, Any]:
        """Without compiled code, which is neither copied nor pickled."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_fused", "_trainer")}

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickled as bytes, see ``as_bytes``: another process has weights of its own, to train or to cast."""
        return _potential_from_bytes, (type(self), as_bytes(self.__getstate__()))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Potential":
        """The default, which ``__reduce_ex__`` would replace."""
        memo[id(self)] = twin = type(self).__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def __copy__(self) -> "Potential":
        """The default, which ``__reduce_ex__`` would replace."""
        twin = type(self).__new__(type(self))
        twin.__setstate__(self.__getstate__())
        return twin


def _potential_from_bytes(kind: type[Potential], state: bytes) -> Potential:
    potential = kind.__new__(kind)
    potential.__setstate__(pickle.loads(state))
    return potential


def topology_of(graph: AtomGraph) -> Topology:
    """The order of the edges by receiver and by sender, made once per edge list."""
    receivers, senders = graph.edge_index
    return derived(graph, "topology", lambda: make_topology(senders, receivers, graph.n_atoms))


def geometry_of(graph: AtomGraph) -> Geometry:
    """What a frozen network reads of the graph."""
    arrays = (graph.positions, graph.edge_shifts, graph.cell, graph.batch)
    return Geometry(*(array.contiguous() for array in arrays))


def _after_fork() -> None:
    """In the child: another thread of the parent may have held the lock."""
    global _fusing
    _fusing = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, without the bookkeeping of ``parameters()``: asked for at every step."""
    found: list[Tensor | None] = []
    modules: list[nn.Module | None] = [module]
    while modules:
        child = modules.pop()
        if child is not None:
            found += child._parameters.values()
            found += child._buffers.values()
            modules += child._modules.values()
    return [tensor for tensor in found if tensor is not None]


def _profile_operations(call: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Mean seconds of torch's operations in one call, on the device where there is one."""
    from torch.profiler import ProfilerActivity, profile

    call()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities) as measured:
        for _ in range(repeats):
            call()
    events = measured.key_averages()
    seconds = {e.key: max(e.self_cpu_time_total, e.self_device_time_total) * 1e-6 / repeats for e in events}
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def _edge_gradient(energies: Tensor, vectors: Tensor, create_graph: bool) -> Tensor:
    """∂(Σ E_i)/∂r_ij (E, 3); of isolated atoms there is none.

    Raises RuntimeError where there are edges and autograd does not lead back to them: forces would be zero.
    """
    if len(vectors) == 0:
        return torch.zeros_like(vectors)
    total, gradient = energies.sum(), None
    if total.requires_grad:
        (gradient,) = torch.autograd.grad(total, vectors, create_graph=create_graph, allow_unused=True)
    if gradient is None:
        raise RuntimeError("the energy was computed without autograd, so there are no forces; do not detach it")
    return gradient


def _scatter_forces(graph: AtomGraph, gradient: Tensor) -> Tensor:
    """F_i = Σ_j (g_ij − g_ji) (N, 3): r_ij falls with the position of i and grows with that of j."""
    i, j = graph.edge_index
    zeros = torch.zeros(graph.n_atoms, 3, dtype=gradient.dtype, device=gradient.device)
    return zeros.index_add(0, i, gradient).index_add(0, j, -gradient)


def _stress(graph: AtomGraph, vectors: Tensor, gradient: Tensor) -> Tensor:
    """σ = (1/V) Σ r ⊗ g (S, 3, 3); NaN for structures without a cell."""
    outer = vectors.unsqueeze(2) * gradient.unsqueeze(1)
    system = graph.batch[graph.edge_index[0]]
    virial = torch.zeros(graph.n_systems, 3, 3, dtype=outer.dtype, device=outer.device).index_add(0, system, outer)
    return _per_volume(virial, graph)


def _per_volume(virial: Tensor, graph: AtomGraph) -> Tensor:
    """Stress (S, 3, 3); NaN without a cell, whose gradient is zero nevertheless."""
    volume = graph.volume.to(virial.dtype)[:, None, None]
    return torch.where(volume > 0, virial / torch.where(volume > 0, volume, 1.0), float("nan"))
