"""Labelled frames as flat tensors: neighbour lists are built once, a batch is a few index operations."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from torch import Tensor

from equimd.errors import InputError
from equimd.frames import LabelKeys, UnitSpec, labels_of, read_list
from equimd.graph import AtomGraph
from equimd.neighbors import neighbor_list
from equimd.training.sections import BatchSection, DataSection

_STREAM = 0x0101  # keeps the numbers that shuffle apart from those that rotate


@dataclass(frozen=True)
class FrameSet:
    """S structures with N atoms and E edges in all; every tensor is the concatenation over structures.

    atom_start (S + 1,), edge_start (S + 1,): where each structure begins; edge_index (2, E) counts atoms of the
    structure, [receiver, sender]; labels are NaN where a frame has none. Units and names as in AtomGraph.
    """

    positions: Tensor
    atomic_numbers: Tensor
    forces: Tensor
    cell: Tensor
    pbc: Tensor
    energy: Tensor
    stress: Tensor
    edge_index: Tensor
    edge_shifts: Tensor
    atom_start: Tensor
    edge_start: Tensor

    def __len__(self) -> int:
        return len(self.atom_start) - 1

    @property
    def n_atoms(self) -> Tensor:
        """Atoms of every structure (S,)."""
        return self.atom_start.diff()

    @property
    def n_edges(self) -> Tensor:
        """Directed edges of every structure (S,)."""
        return self.edge_start.diff()

    @property
    def species(self) -> tuple[int, ...]:
        """Atomic numbers that occur, ascending."""
        return tuple(int(z) for z in self.atomic_numbers.unique())

    def has(self, label: str) -> bool:
        """Whether any frame has this label: energy, forces or stress."""
        return bool((~torch.isnan(getattr(self, label))).any())

    def to(self, device: torch.device) -> "FrameSet":
        """The same on another device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in vars(self).items()})

    def batch(self, frames: Tensor) -> AtomGraph:
        """The structures ``frames`` (B,), in this order and with repetitions, as one graph."""
        atoms, batch, first_atom = _ranges(self.atom_start, frames)
        edges, system, _ = _ranges(self.edge_start, frames)
        graph = AtomGraph(
            positions=self.positions[atoms],
            atomic_numbers=self.atomic_numbers[atoms],
            forces=self.forces[atoms],
            cell=self.cell[frames],
            pbc=self.pbc[frames],
            energy=self.energy[frames],
            stress=self.stress[frames],
            edge_index=self.edge_index[:, edges] + first_atom[system],
            edge_shifts=self.edge_shifts[edges].to(torch.float64),
            batch=batch,
        )
        graph.n_systems = len(frames)
        return graph


def _ranges(start: Tensor, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Members of the chosen ranges one after another, the place of each one's range, and where each range begins."""
    begin = start[which]
    size = start[which + 1] - begin
    offset = size.cumsum(0) - size
    owner = torch.repeat_interleave(torch.arange(len(which), device=which.device), size)
    return torch.arange(len(owner), device=which.device) + (begin - offset)[owner], owner, offset


def load_frames(path: Path, section: DataSection) -> list[Atoms]:
    """The labelled frames of a file."""
    try:
        units = None if section.units is None else UnitSpec(**section.units)  # type: ignore[arg-type]
        keys = None if section.keys is None else LabelKeys(**section.keys)  # type: ignore[arg-type]
    except TypeError as error:
        raise InputError(f"data.units or data.keys: {error}") from error
    return read_list(path, units=units, keys=keys)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def build_frame_set(
    frames: Sequence[Atoms], cutoff: float, isolated_atom_energies: Mapping[int, float], name: str
) -> FrameSet:
    """Neighbour lists and labels of ``frames``; ``name`` (a file) is for the messages.

    Raises:
        InputError: for no frames, an element without isolated-atom energy, or labels missing everywhere.
    """
    if not frames:
        raise InputError(f"{name} holds no frames; at least one is needed")
    unknown = {int(z) for atoms in frames for z in atoms.numbers} - set(isolated_atom_energies)
    if unknown:
        known = ", ".join(chemical_symbols[z] for z in sorted(isolated_atom_energies))
        raise InputError(
            f"{name} has {chemical_symbols[min(unknown)]}, which has no isolated-atom energy; given are {known}"
        )
    labels = [labels_of(atoms) for atoms in frames]
    if all(label["energy"] is None and label["forces"] is None for label in labels):
        raise InputError(f"{name} has neither energies nor forces; name the labels of the file in data.keys")
    edges = [neighbor_list(atoms.positions, atoms.cell.array, np.asarray(atoms.pbc), cutoff) for atoms in frames]
    return FrameSet(
        positions=_tensor([atoms.positions for atoms in frames]),
        atomic_numbers=torch.from_numpy(np.concatenate([atoms.numbers for atoms in frames]).astype(np.int64)),
        forces=_tensor([_or_nan(label["forces"], (len(a), 3)) for label, a in zip(labels, frames, strict=True)]),
        cell=_tensor([atoms.cell.array[None] for atoms in frames]),
        pbc=torch.from_numpy(np.stack([np.asarray(atoms.pbc, dtype=bool) for atoms in frames])),
        energy=_tensor([_or_nan(label["energy"], (1,)) for label in labels]),
        stress=_tensor([_or_nan(label["stress"], (1, 3, 3)) for label in labels]),
        edge_index=torch.from_numpy(np.concatenate([index for index, _ in edges], axis=1)),
        edge_shifts=torch.from_numpy(np.concatenate([shifts for _, shifts in edges]).astype(np.int16)),
        atom_start=_starts([len(atoms) for atoms in frames]),
        edge_start=_starts([index.shape[1] for index, _ in edges]),
    )


def _tensor(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.float64))


def _or_nan(label: np.ndarray | float | None, shape: tuple[int, ...]) -> np.ndarray:
    return np.full(shape, np.nan) if label is None else np.reshape(np.asarray(label, dtype=np.float64), shape)


def _starts(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


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


@dataclass(frozen=True)
class Statistics:
    """What a network is scaled with: energy shifts in eV by atomic number, RMS force in eV/Å, mean neighbours."""

    shift: dict[int, float]
    force_rms: float
    mean_neighbors: float


def statistics(frames: FrameSet, isolated_atom_energies: Mapping[int, float]) -> Statistics:
    """Per-species shifts by least squares of E − Σ E₀ (of smallest norm where the counts do not tell), RMS force."""
    species = frames.species
    n_frames = len(frames)
    owner = torch.repeat_interleave(torch.arange(n_frames), frames.n_atoms)
    column = torch.searchsorted(torch.tensor(species), frames.atomic_numbers)
    counts = torch.zeros(n_frames, len(species), dtype=torch.float64)
    counts.index_put_((owner, column), torch.ones(len(owner), dtype=torch.float64), accumulate=True)
    e0 = torch.tensor([isolated_atom_energies[z] for z in species], dtype=torch.float64)
    relative = frames.energy - counts @ e0
    known = ~torch.isnan(relative)
    shift = np.zeros(len(species))
    if bool(known.any()):
        shift = np.linalg.lstsq(counts[known].numpy(), relative[known].numpy(), rcond=1e-8)[0]
    forces = frames.forces[~torch.isnan(frames.forces)]
    rms = float(forces.square().mean().sqrt()) if forces.numel() else 1.0
    return Statistics(
        shift=dict(zip(species, shift.tolist(), strict=True)),
        force_rms=rms if rms > 0 else 1.0,
        mean_neighbors=frames.edge_index.shape[1] / len(frames.atomic_numbers),
    )
