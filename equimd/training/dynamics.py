"""The symmetry that a network has learned, recorded along its training: L_mean, L_equiv and percent of loss."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from equimd.decomposition import decompose, percent_of_loss
from equimd.graph import AtomGraph
from equimd.rotations import GroupSample, quadrature, random_rotations, rotate_back_vectors
from equimd.training.augment import rotate_all
from equimd.training.distributed import World
from equimd.training.sections import ValidationSection

_SEED = 20250101  # the same rotations at every validation of every training


class SymmetryRecord(NamedTuple):
    """Loss over the group in (eV/Å)², pooled over frames; l_mean and percent_of_loss are NaN without force labels."""

    l_mean: float
    l_equiv: float
    percent_of_loss: float


def symmetry_sample(section: ValidationSection) -> GroupSample:
    """The rotations that a recipe's validation asks for."""
    if section.degree is not None:
        return quadrature(section.degree, section.inversion)
    return random_rotations(section.n_rotations, _SEED, section.inversion)


def symmetry_record(
    forces_of: Callable[[AtomGraph], Tensor], graphs: Iterable[AtomGraph], sample: GroupSample, world: World
) -> SymmetryRecord:
    """Split the force loss over the rotations of ``sample``; ``forces_of`` gives (N, 3) in eV/Å.

    ``graphs`` hold the frames of this process; the losses are pooled over processes.
    """
    sums = torch.zeros(5, dtype=torch.float64)
    with world.together():
        for graph in graphs:
            sums += _atomic_sums(forces_of, graph, sample)
    l_mean, l_equiv, n_labelled, l_equiv_of_all, n_atoms = world.sum(sums).tolist()
    if n_labelled == 0:
        return SymmetryRecord(math.nan, l_equiv_of_all / n_atoms, math.nan)
    l_mean, l_equiv = l_mean / n_labelled, l_equiv / n_labelled
    return SymmetryRecord(l_mean, l_equiv, percent_of_loss(l_mean, l_equiv))


def _atomic_sums(forces_of: Callable[[AtomGraph], Tensor], graph: AtomGraph, sample: GroupSample) -> Tensor:
    """Sums over labelled atoms of L_mean, L_equiv and 1, and over all atoms of L_equiv and 1."""
    device = graph.positions.device
    known = ~torch.isnan(graph.forces).any(dim=1)
    back = []
    for matrix in sample.rotations:
        rotation = torch.tensor(matrix, device=device)
        back.append(rotate_back_vectors(forces_of(rotate_all(graph, rotation)).to(torch.float64), rotation))
    predictions = torch.stack(back)
    weights = torch.tensor(sample.weights, device=device)
    corrected = sample.kind == "random"
    n_atoms, n_labelled = len(known), int(known.sum())
    l_mean = l_equiv = 0.0
    if n_labelled:
        split = decompose(predictions[:, known], weights, graph.forces[known], corrected)
        l_mean, l_equiv = float(split.l_mean) * n_labelled, float(split.l_equiv) * n_labelled
    of_all = float(decompose(predictions, weights, None, corrected).l_equiv) * n_atoms
    return torch.tensor([l_mean, l_equiv, n_labelled, of_all, n_atoms], dtype=torch.float64)
