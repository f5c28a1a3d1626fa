"""The symmetry that a network has learned, recorded along its training: L_mean, L_equiv and percent of loss."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from equimd.decomposition import decompose, percent_of_loss
from equimd.graph import AtomGraph
from equimd.rotations import GroupSample, quadrature, random_rotations, rotate_back_vectors
from equimd.training.augment import rotate_all
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
    forces_of: Callable[[AtomGraph], Tensor], batches: list[AtomGraph], sample: GroupSample
) -> SymmetryRecord:
    """Split the force loss of ``batches`` over the rotations of ``sample``; ``forces_of`` gives (N, 3) in eV/Å."""
    device = batches[0].positions.device
    reference = torch.cat([graph.forces for graph in batches])
    known = ~torch.isnan(reference).any(dim=1)
    back = []
    for matrix in sample.rotations:
        rotation = torch.tensor(matrix, device=device)
        forces = torch.cat([forces_of(rotate_all(graph, rotation)) for graph in batches]).to(torch.float64)
        back.append(rotate_back_vectors(forces, rotation))
    predictions = torch.stack(back)
    weights = torch.tensor(sample.weights, device=device)
    corrected = sample.kind == "random"
    if not bool(known.any()):
        nan = float("nan")
        return SymmetryRecord(nan, float(decompose(predictions, weights, None, corrected).l_equiv), nan)
    split = decompose(predictions[:, known], weights, reference[known], corrected)
    l_mean, l_equiv = float(split.l_mean), float(split.l_equiv)
    return SymmetryRecord(l_mean, l_equiv, percent_of_loss(l_mean, l_equiv))
