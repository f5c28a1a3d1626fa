"""Errors of a potential on a set of frames, and the symmetry record beside them."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from equimd.graph import AtomGraph
from equimd.models.potential import Potential
from equimd.results import Block
from equimd.training.data import FrameSet
from equimd.training.distributed import World
from equimd.training.dynamics import SymmetryRecord, symmetry_record, symmetry_sample
from equimd.training.loss import stress_labels
from equimd.training.memory import advising
from equimd.training.sections import ValidationSection
from equimd.training.sharding import contiguous_part, passes


class Errors(Block):
    """Errors on a set of frames; null where there are no labels. Energies per atom in eV, forces in eV/Å, stress eV/Å³.

    ``energy_mae`` is of the total energy.
    """

    n_frames: int
    energy_per_atom_mae: float | None = None
    energy_per_atom_rmse: float | None = None
    energy_mae: float | None = None
    force_mae: float | None = None
    force_rmse: float | None = None
    stress_mae: float | None = None
    stress_rmse: float | None = None

    def metric(self, name: str) -> float:
        """The number that a recipe's validation.metric names; NaN where it is missing."""
        value = getattr(self, name.replace("energy", "energy_per_atom"))
        return math.nan if value is None else value


def evaluate(potential: Potential, frames: FrameSet, stress: bool, world: World, max_edges: int) -> Errors:
    """Errors of ``potential`` on all of ``frames``; each process computes a part, in batches of ``max_edges``."""
    sums = torch.zeros(4, 3, dtype=torch.float64)  # energy per atom, energy, forces, stress: Σ |e|, Σ e², labels
    with world.together():
        for graph in graph_batches(frames, max_edges, world):
            world.check()
            with advising("validation.max_edges", "in a validation", graph):
                prediction = potential(graph, stress=stress)
            n_atoms = torch.bincount(graph.batch, minlength=graph.n_systems)
            sums[0] += _sums(prediction.energy / n_atoms, graph.energy / n_atoms)
            sums[1] += _sums(prediction.energy, graph.energy)
            sums[2] += _sums(prediction.forces, graph.forces)
            if prediction.stress is not None:
                sums[3] += _sums(prediction.stress, stress_labels(graph))
    (per_atom, total, force, sigma) = (_means(*row) for row in world.sum(sums).tolist())
    return Errors(
        n_frames=len(frames),
        energy_per_atom_mae=per_atom[0],
        energy_per_atom_rmse=per_atom[1],
        energy_mae=total[0],
        force_mae=force[0],
        force_rmse=force[1],
        stress_mae=sigma[0],
        stress_rmse=sigma[1],
    )


def graph_batches(frames: FrameSet, max_edges: int, world: World) -> Iterator[AtomGraph]:
    """This process's part of ``frames`` in order, in batches of about ``max_edges`` edges."""
    edge_start = frames.edge_start.cpu().numpy()
    first, last = contiguous_part(edge_start, world.rank, world.size)
    for part in passes(np.diff(edge_start)[first:last], max_edges):
        yield frames.batch(torch.from_numpy(first + part).to(frames.energy.device))


def validate_symmetry(
    potential: Potential, frames: FrameSet, section: ValidationSection, world: World
) -> SymmetryRecord | None:
    """L_mean and L_equiv on frames spread evenly over the set; None where the recipe asks for no frames."""
    if section.symmetry_frames == 0:
        return None
    count = min(section.symmetry_frames, len(frames))
    which = torch.linspace(0, len(frames) - 1, count).round().long()
    own = which[world.rank :: world.size]
    parts = passes(frames.n_edges.cpu()[own].numpy(), section.max_edges)
    graphs = (frames.batch(own[torch.from_numpy(part)].to(frames.energy.device)) for part in parts)

    def forces_of(graph: AtomGraph) -> Tensor:
        world.check()
        with advising("validation.max_edges", "in a validation's record of the symmetry", graph):
            return potential(graph).forces

    return symmetry_record(forces_of, graphs, symmetry_sample(section), world)


def _sums(prediction: Tensor, label: Tensor) -> Tensor:
    """Σ |e|, Σ e² and the number of labels, float64 on the CPU (3,); NaN where a prediction is."""
    known = ~torch.isnan(label)
    error = torch.where(known, prediction.to(torch.float64) - label, 0.0)
    return torch.stack([error.abs().sum(), error.square().sum(), known.sum().to(torch.float64)]).cpu()


def _means(absolute: float, squares: float, count: float) -> tuple[float | None, float | None]:
    """MAE and RMSE; None without labels."""
    return (absolute / count, math.sqrt(squares / count)) if count else (None, None)
