"""Observables along a trajectory, the same for every potential and for the reference, each with an error bar.

Frames are assumed to be evenly spaced in time; every error bar is s·sqrt(g/n) (``statistics``).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from ase.geometry import find_mic

from equimd.analysis.inputs import checked_frames
from equimd.analysis.statistics import Estimate, mean_estimate
from equimd.errors import InputError
from equimd.results import Block, Number
from equimd.units import KB_EV_PER_K


class Distribution(Block):
    """A histogram with the standard error of each bin; ``edges`` has one value more than ``density``."""

    edges: list[float]
    density: list[float]
    stderr: list[Number]


def bonds_of(frame: Atoms, scale: float = 1.2) -> np.ndarray:
    """Pairs (B, 2), i < j, closer than ``scale`` times the sum of their covalent radii."""
    from equimd.neighbors import neighbor_list, used_cell  # vesin loads torch where it is installed

    radii = covalent_radii[frame.numbers]
    cutoff = 2 * scale * float(radii.max())
    cell = used_cell(frame.cell.array, frame.pbc)
    (i, j), shifts = neighbor_list(frame.positions, cell, frame.pbc, cutoff)
    lengths = np.linalg.norm(frame.positions[j] - frame.positions[i] + shifts @ cell, axis=1)
    bonded = (lengths < scale * (radii[i] + radii[j])) & (i < j)
    return np.unique(np.stack([i[bonded], j[bonded]], axis=1), axis=0)


def bond_lengths(frames: Iterable[Atoms], bonds: np.ndarray) -> np.ndarray:
    """Lengths (T, B) in Å, by the nearest image where periodic."""
    bonds = np.asarray(bonds, dtype=int).reshape(-1, 2)
    lengths = []
    for frame in frames:
        vectors = frame.positions[bonds[:, 1]] - frame.positions[bonds[:, 0]]
        pbc: Any = frame.pbc  # find_mic is annotated for a single bool
        lengths.append(find_mic(vectors, frame.cell, pbc)[1] if len(bonds) else np.zeros(0))
    return np.array(lengths)


def distribution(samples: np.ndarray, edges: Sequence[float] | np.ndarray) -> Distribution:
    """Density of samples (T, M), M values at each of T times, over ``edges``; integrates to 1 if all fall inside."""
    samples, edges = np.asarray(samples, dtype=np.float64), np.asarray(edges, dtype=np.float64)
    counts = np.array([np.histogram(row, edges)[0] for row in samples])
    return _distribution(counts / (samples.shape[1] * np.diff(edges)), edges)


def bond_length_distribution(frames: Iterable[Atoms], bonds: np.ndarray, n_bins: int = 50) -> Distribution:
    """Distribution in 1/Å of the lengths of the bonds (B, 2) together, for instance all O–H."""
    lengths = bond_lengths(frames, bonds)
    if lengths.size == 0:
        raise InputError("0 bonds or 0 frames given; a distribution needs at least 1 of each")
    low, high = float(lengths.min()), float(lengths.max())
    margin = 0.02 * (high - low) + 1e-6
    return distribution(lengths, np.linspace(low - margin, high + margin, n_bins + 1))


def radial_distribution(
    frames: Iterable[Atoms], r_max: float = 6.0, n_bins: int = 120, pair: tuple[str, str] | None = None
) -> Distribution:
    """g(r) of fully periodic frames, of all atoms or of one pair of elements; r in Å, 1 for an ideal gas."""
    from equimd.neighbors import neighbor_list  # vesin loads torch where it is installed

    listed = checked_frames(frames)
    edges = np.linspace(0.0, r_max, n_bins + 1)
    shells = 4 / 3 * np.pi * np.diff(edges**3)
    curves = []
    for index, frame in enumerate(listed):
        if not frame.pbc.all():
            raise InputError(f"frame {index} has pbc {frame.pbc.tolist()}; g(r) needs a fully periodic one")
        symbols = np.array(frame.get_chemical_symbols())
        first = np.ones(len(frame), bool) if pair is None else symbols == pair[0]
        second = np.ones(len(frame), bool) if pair is None else symbols == pair[1]
        if not (first.any() and second.any()):
            raise InputError(f"frame {index} has no pair {pair}; its elements are {sorted(set(symbols))}")
        (i, j), shifts = neighbor_list(frame.positions, frame.cell.array, frame.pbc, r_max)
        chosen = first[i] & second[j]
        vectors = frame.positions[j[chosen]] - frame.positions[i[chosen]] + shifts[chosen] @ frame.cell.array
        counts = np.histogram(np.linalg.norm(vectors, axis=1), edges)[0]
        n_pairs = first.sum() * second.sum() - (first & second).sum()
        curves.append(counts * frame.get_volume() / (shells * max(n_pairs, 1)))
    return _distribution(np.array(curves), edges)


def temperature(frames: Iterable[Atoms], n_fixed: int = 0) -> Estimate:
    """Mean kinetic temperature in K of frames with momenta; ``n_fixed`` degrees of freedom carry no kinetic energy."""
    listed = checked_frames(frames)
    if not all(frame.has("momenta") for frame in listed):
        raise InputError("a frame has no momenta; a temperature needs them in every frame")
    return mean_estimate(
        np.array([2 * f.get_kinetic_energy() / ((3 * len(f) - n_fixed) * KB_EV_PER_K) for f in listed])
    )


def _distribution(curves: np.ndarray, edges: np.ndarray) -> Distribution:
    estimates = [mean_estimate(column) for column in curves.T]
    return Distribution(
        edges=edges.tolist(), density=[e.value for e in estimates], stderr=[e.stderr for e in estimates]
    )
