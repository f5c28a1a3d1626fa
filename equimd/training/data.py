"""Labelled frames as flat tensors: neighbour lists are built once, a batch is a few index operations."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from torch import Tensor

from equimd.errors import InputError
from equimd.frames.arrays import FrameArrays
from equimd.frames.packing import Packer
from equimd.graph import AtomGraph
from equimd.training.sections import BatchSection

_STREAM = 0x0101  # keeps the numbers that shuffle apart from those that rotate
_ON_DEVICE = 1 << 30
"""Bytes up to which a set is copied to a GPU; of a larger one every batch is."""


@dataclass(frozen=True)
class FrameSet:
    """S structures with N atoms and E edges in all; every tensor is the concatenation over structures.

    atom_start (S + 1,), edge_start (S + 1,): where each structure begins; edges (E, 2) count atoms of the structure,
    [receiver, sender]; labels are NaN where a frame has none. Units and names as in AtomGraph. On the CPU, tensors are
    those of ``arrays`` without a copy, which may be files mapped into memory: never write to them. ``device`` is where
    batches are wanted.
    """

    arrays: FrameArrays
    positions: Tensor
    atomic_numbers: Tensor
    forces: Tensor
    cell: Tensor
    pbc: Tensor
    energy: Tensor
    stress: Tensor
    edges: Tensor
    edge_shifts: Tensor
    atom_start: Tensor
    edge_start: Tensor
    device: torch.device = torch.device("cpu")

    @classmethod
    def from_arrays(cls, arrays: FrameArrays) -> "FrameSet":
        """The tensors of packed frames."""

        def tensor(name: str) -> Tensor:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*not writable")  # nobody writes to them
                return torch.from_numpy(arrays[name])

        return cls(
            arrays=arrays,
            positions=tensor("positions"),
            atomic_numbers=tensor("numbers"),
            forces=tensor("forces"),
            cell=tensor("cell"),
            pbc=tensor("pbc"),
            energy=tensor("energy"),
            stress=tensor("stress"),
            edges=tensor("edges"),
            edge_shifts=tensor("shifts"),
            atom_start=torch.from_numpy(arrays.atom_start),
            edge_start=torch.from_numpy(arrays.edge_start),
        )

    def __len__(self) -> int:
        return len(self.arrays)

    @property
    def n_atoms(self) -> Tensor:
        """Atoms of every structure (S,)."""
        return self.atom_start.diff().to(self.device)

    @property
    def n_edges(self) -> Tensor:
        """Directed edges of every structure (S,)."""
        return self.edge_start.diff().to(self.device)

    @property
    def species(self) -> tuple[int, ...]:
        """Atomic numbers that occur, ascending."""
        return tuple(self.arrays.meta["species"])

    def has(self, label: str) -> bool:
        """Whether any frame has this label: energy, forces or stress."""
        return self.arrays.meta["n_labelled"][label] > 0

    def to(self, device: torch.device) -> "FrameSet":
        """The same for another device: copied there unless it is large."""
        size = sum(array.nbytes for array in self.arrays.arrays.values())
        if device.type == "cpu" or size > _ON_DEVICE:
            return replace(self, device=device)
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, device=device, **tensors)

    def batch(self, frames: Tensor) -> AtomGraph:
        """The structures ``frames`` (B,), in this order and with repetitions, as one graph."""
        frames = frames.to(self.positions.device)
        atoms, batch, first_atom = _ranges(self.atom_start, frames)
        edges, system, _ = _ranges(self.edge_start, frames)
        fields = {
            "positions": self.positions[atoms],
            "atomic_numbers": self.atomic_numbers[atoms].to(torch.int64),
            "forces": self.forces[atoms],
            "cell": self.cell[frames],
            "pbc": self.pbc[frames],
            "energy": self.energy[frames],
            "stress": self.stress[frames],
            "edge_index": (self.edges[edges].T + first_atom[system]).contiguous(),
            "edge_shifts": self.edge_shifts[edges].to(torch.float64),
            "batch": batch,
        }
        graph = AtomGraph(**{name: tensor.to(self.device) for name, tensor in fields.items()})
        graph.n_systems = len(frames)
        return graph


def _ranges(start: Tensor, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Members of the chosen ranges one after another, the place of each one's range, and where each range begins."""
    begin = start[which]
    size = start[which + 1] - begin
    offset = size.cumsum(0) - size
    owner = torch.repeat_interleave(torch.arange(len(which), device=which.device), size)
    return torch.arange(len(owner), device=which.device) + (begin - offset)[owner], owner, offset


def build_frame_set(
    frames: Sequence[Atoms], cutoff: float, isolated_atom_energies: Mapping[int, float], name: str
) -> FrameSet:
    """Neighbour lists and labels of ``frames``, in memory; ``name`` (a file) is for the messages.

    Raises:
        InputError: for no frames, an element without isolated-atom energy, or labels missing everywhere.
    """
    if not frames:
        raise InputError(f"{name} holds no frames; at least one is needed")

    def no_folder():  # noqa: ANN202
        raise AssertionError("the arrays fit into memory")

    with Packer(cutoff, no_folder, in_memory=1 << 62) as packer:
        packer.add_file(enumerate(frames), name)
        built = FrameSet.from_arrays(packer.finish())
    check_frame_set(built, isolated_atom_energies, name)
    return built


def check_frame_set(frames: FrameSet, isolated_atom_energies: Mapping[int, float] | None, name: str) -> None:
    """Refuse a set without any label, and elements that the isolated-atom energies lack (None: they are fitted)."""
    unknown = sorted(set(frames.species) - set(isolated_atom_energies)) if isolated_atom_energies is not None else []
    if unknown:
        known = ", ".join(chemical_symbols[z] for z in sorted(isolated_atom_energies or ()))
        raise InputError(
            f"{name} has {chemical_symbols[unknown[0]]}, which has no isolated-atom energy (first in frame"
            f" {first_with(frames.arrays, unknown[0])}); given are {known}"
        )
    if not frames.has("energy") and not frames.has("forces"):
        raise InputError(f"{name} has neither energies nor forces; name the labels of the file in data.keys")


def first_with(arrays: FrameArrays, number: int) -> int:
    """Index in its files of the first frame that has this atomic number."""
    for _, atoms, _ in arrays.chunks():
        found = np.flatnonzero(arrays["numbers"][atoms] == number)
        if found.size:
            place = int(np.searchsorted(arrays.atom_start, atoms.start + found[0], side="right")) - 1
            return int(arrays["index"][place])
    raise ValueError(f"no frame has atomic number {number}")


def epoch_batches(n_edges: np.ndarray, section: BatchSection, seed: int, epoch: int) -> list[np.ndarray]:
    """Frames of one epoch in the order of (seed, epoch), cut into batches; every frame occurs once.

    A batch ends before it would exceed ``n_frames`` or ``max_edges``; a frame larger than that is one by itself.
    """
    order = np.random.default_rng([_STREAM, seed, epoch]).permutation(len(n_edges))
    most_frames = section.n_frames or len(order)
    most_edges = section.max_edges or float("inf")
    batches, start, held = [], 0, 0
    for k, size in enumerate(n_edges[order].tolist()):
        if k > start and (k - start == most_frames or held + size > most_edges):
            batches.append(order[start:k])
            start, held = k, 0
        held += size
    batches.append(order[start:])
    return batches


def subset(n_frames: int, wanted: int | None, seed: int) -> np.ndarray | None:
    """``wanted`` of ``n_frames`` indices, ascending, drawn with the seed; None where all are wanted.

    Raises:
        InputError: when more are wanted than there are.
    """
    if wanted is None or wanted == n_frames:
        return None
    if wanted > n_frames:
        raise InputError(f"data.n_train is {wanted}; the file has {n_frames} frames")
    return np.sort(np.random.default_rng([_STREAM, seed]).permutation(n_frames)[:wanted])
