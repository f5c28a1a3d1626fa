"""Denoising of non-equilibrium structures (DeNS; Liao, Smidt, Das et al., TMLR 2024, arXiv:2403.09549): the corruption.

Which frames are corrupted, and how, follows from (seed, epoch, frame, copy) or (seed, step), and from nothing that runs
along: a resumed training, and one of any number of processes, corrupts the same.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from equimd.graph import AtomGraph
from equimd.training.sections import DenoisingSection

_STREAM = 0x0505  # keeps these numbers apart from those that shuffle and rotate


@dataclass(frozen=True)
class Corrupted:
    """K structures with noise on their positions; their edges are those of the ``clean`` ones.

    moved (N,) bool are the atoms with noise; noise (N, 3) is in units of its standard deviation, zero at the others.
    """

    clean: AtomGraph
    graph: AtomGraph
    moved: Tensor
    noise: Tensor


def chosen_structures(
    section: DenoisingSection, frames: np.ndarray, copies: int, seed: int, epoch: int, step: int
) -> dict[int, np.random.Generator]:
    """The structures of a batch that are to be corrupted, each with the generator of its noise.

    The batch holds ``copies`` of every one of ``frames`` (B,), one after another.
    """
    whole = section.per == "batch"
    if whole and np.random.default_rng([_STREAM, seed, step]).random() >= section.probability:
        return {}
    chosen = {}
    for place, (frame, k) in enumerate((frame, k) for frame in frames.tolist() for k in range(copies)):
        generator = np.random.default_rng([_STREAM, seed, epoch, frame, k])
        if whole or generator.random() < section.probability:
            chosen[place] = generator
    return chosen


def corrupt(clean: AtomGraph, section: DenoisingSection, generators: list[np.random.Generator]) -> Corrupted:
    """Gaussian noise on a part of the atoms of every structure, drawn from its generator.

    An edge that leaves the cutoff by it weighs nothing; one that would enter is missing, where the network's cutoff
    function is small as long as ``sigma`` is. The mean displacement of a structure that is moved whole is taken out:
    networks see no translation.
    """
    counts = torch.bincount(clean.batch, minlength=clean.n_systems).tolist()
    noise = np.zeros((clean.n_atoms, 3))
    moved = np.zeros(clean.n_atoms, dtype=bool)
    start = 0
    for generator, n in zip(generators, counts, strict=True):
        n_moved = max(1, round(section.atoms * n))
        which = start + np.sort(generator.permutation(n)[:n_moved])
        draws = generator.standard_normal((n_moved, 3))
        noise[which] = draws - draws.mean(axis=0) if n_moved == n else draws
        moved[which] = True
        start += n
    device = clean.positions.device
    displacement = torch.from_numpy(noise).to(device)
    graph = copy.copy(clean)
    graph.positions = clean.positions + section.sigma * displacement
    return Corrupted(clean, graph, torch.from_numpy(moved).to(device), displacement)
