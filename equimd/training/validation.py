"""Errors of a potential on a set of frames, and the symmetry record beside them."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from equimd.graph import AtomGraph
from equimd.models.potential import Potential
from equimd.results import Block
from equimd.training.data import FrameSet
from equimd.training.dynamics import SymmetryRecord, symmetry_record, symmetry_sample
from equimd.training.loss import stress_labels
from equimd.training.sections import ValidationSection

_EDGES_PER_BATCH = 12_000


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


def evaluate(potential: Potential, frames: FrameSet, stress: bool) -> Errors:
    """Errors of ``potential`` on all of ``frames``."""
    energy, per_atom, forces, tensors = [], [], [], []
    for graph in graph_batches(frames):
        prediction = potential(graph, stress=stress)
        n_atoms = torch.bincount(graph.batch, minlength=graph.n_systems)
        known = ~torch.isnan(graph.energy)
        energy.append((prediction.energy - graph.energy)[known])
        per_atom.append(energy[-1] / n_atoms[known])
        forces.append((prediction.forces.to(torch.float64) - graph.forces)[~torch.isnan(graph.forces)])
        if prediction.stress is not None:
            label = stress_labels(graph)
            tensors.append((prediction.stress.to(torch.float64) - label)[~torch.isnan(label)])
    per_atom, force, sigma = (_summary(errors) for errors in (per_atom, forces, tensors))
    return Errors(
        n_frames=len(frames),
        energy_per_atom_mae=per_atom[0],
        energy_per_atom_rmse=per_atom[1],
        energy_mae=_summary(energy)[0],
        force_mae=force[0],
        force_rmse=force[1],
        stress_mae=sigma[0],
        stress_rmse=sigma[1],
    )


def graph_batches(frames: FrameSet, n_frames: int | None = None) -> Iterator[AtomGraph]:
    """One by one, the first ``n_frames`` (None: all) in order, in batches of about 12,000 edges."""
    count = len(frames) if n_frames is None else min(n_frames, len(frames))
    place = torch.div(frames.edge_start[:count], _EDGES_PER_BATCH, rounding_mode="floor").tolist()
    starts = [k for k in range(count) if k == 0 or place[k] != place[k - 1]]
    for a, b in zip(starts, [*starts[1:], count], strict=True):
        yield frames.batch(torch.arange(a, b))


def validate_symmetry(potential: Potential, frames: FrameSet, section: ValidationSection) -> SymmetryRecord | None:
    """L_mean and L_equiv on frames spread evenly over the set; None where the recipe asks for no frames."""
    if section.symmetry_frames == 0:
        return None
    count = min(section.symmetry_frames, len(frames))
    which = torch.linspace(0, len(frames) - 1, count, device=frames.energy.device).round().long()
    return symmetry_record(lambda graph: potential(graph).forces, [frames.batch(which)], symmetry_sample(section))


def _summary(errors: list[Tensor]) -> tuple[float | None, float | None]:
    """MAE and RMSE of the components that have labels; NaN where a prediction is."""
    if not any(error.numel() for error in errors):
        return None, None
    error = torch.cat(errors)
    return float(error.abs().mean()), float(error.square().mean().sqrt())
