"""How many atoms of which element frames have, and the atomic energies that a least-squares fit takes from that.

A fit is of energies per atom, so that a set of mixed sizes is not that of its largest frames. Frames enter it as the
mean energy of each composition, weighted with the root of their number, which has the same solution as all of them;
arrays are read in chunks.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from equimd.frames.arrays import FrameArrays

_RCOND = 1e-8


class Fit(NamedTuple):
    """Energies in eV by atomic number; ``determined`` unless compositions do not tell the elements apart."""

    energies: dict[int, float]
    determined: bool


def fit_atomic_energies(
    arrays: FrameArrays, known: Mapping[int, float], wanted: list[int], by_charge: bool = False
) -> Fit:
    """Energies of the elements ``wanted`` that, with those ``known`` of all, come closest to the energies of frames.

    "Closest" is least squares of the energy per atom.

    What the compositions do not tell is shared out so that Σ energy² is smallest, or Σ (energy / Z)² ``by_charge``, for
    energies that hold all of an atom; zeros without labels.
    """
    counts, n_frames, mean = compositions(arrays, known)
    if not len(counts) or not wanted:
        return Fit(dict.fromkeys(wanted, 0.0), not wanted)
    weight = np.sqrt(n_frames) / counts.sum(axis=1)
    scale = np.array(wanted if by_charge else np.ones(len(wanted)), dtype=np.float64)
    columns = [list(arrays.meta["species"]).index(z) for z in wanted]
    matrix = counts[:, columns] * weight[:, None] * scale
    solution, _, rank, _ = np.linalg.lstsq(matrix, mean * weight, rcond=_RCOND)
    return Fit(dict(zip(wanted, (solution * scale).tolist(), strict=True)), bool(rank == len(wanted)))


def compositions(arrays: FrameArrays, known: Mapping[int, float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct counts of each species (C, Z), the labelled frames of each (C,) and their mean of E − Σ known, in eV."""
    species = arrays.meta["species"]
    reference = np.array([known[z] for z in species])
    found: dict[tuple[int, ...], list[float]] = {}
    for frames, atoms, _ in arrays.chunks():
        energy = arrays["energy"][frames]
        labelled = np.isfinite(energy)
        counts = composition_counts(arrays, frames, atoms)[labelled]
        rows, inverse = np.unique(counts, axis=0, return_inverse=True)
        numbers = np.bincount(inverse.ravel(), minlength=len(rows))
        sums = np.bincount(inverse.ravel(), energy[labelled] - counts @ reference, len(rows))
        for row, number, total in zip(rows.tolist(), numbers.tolist(), sums.tolist(), strict=True):
            entry = found.setdefault(tuple(row), [0.0, 0.0])
            entry[0] += number
            entry[1] += total
    n_frames, total = np.array(list(found.values())).reshape(-1, 2).T
    return np.array(list(found), dtype=np.float64).reshape(-1, len(species)), n_frames, total / n_frames


def composition_counts(arrays: FrameArrays, frames: slice, atoms: slice) -> np.ndarray:
    """Atoms of each species in each frame of a chunk (S, Z)."""
    species = np.array(arrays.meta["species"], dtype=np.int64)
    n_frames = frames.stop - frames.start
    owner = np.repeat(np.arange(n_frames), arrays["n_atoms"][frames])
    column = np.searchsorted(species, arrays["numbers"][atoms])
    flat = np.bincount(owner * len(species) + column, minlength=n_frames * len(species))
    return flat.reshape(n_frames, len(species))
