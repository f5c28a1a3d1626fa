"""Statistics of a training set: isolated-atom energies where none are given, and what a network is scaled with.

All are sums over chunks of the arrays, so that a set which is mapped into memory is read once and not held. Energies
of many frames enter a least-squares fit as the mean energy of each composition, weighted with the root of its frames,
which has the same solution.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np

from equimd.frames.arrays import FrameArrays
from equimd.results import Block
from equimd.training.cache import remembered

Origin = Literal["recipe", "isolated atoms", "least squares"]
_RCOND = 1e-8  # what the compositions do not tell gets the smallest norm


class Statistics(Block):
    """Energy shifts in eV by atomic number, RMS force in eV/Å (1 without labels), mean neighbours of an atom."""

    shift: dict[int, float]
    force_rms: float
    mean_neighbors: float


class IsolatedAtomEnergies(Block):
    """Energies in eV by atomic number, and where each comes from."""

    energies: dict[int, float]
    origin: dict[int, Origin]


def statistics(arrays: FrameArrays, isolated_atom_energies: Mapping[int, float]) -> Statistics:
    """Per-species shifts by least squares of E − Σ E₀ (of smallest norm where the counts do not tell), RMS force."""
    energies = {z: isolated_atom_energies[z] for z in arrays.meta["species"]}
    return remembered(arrays, "statistics", sorted(energies.items()), Statistics, lambda: _statistics(arrays, energies))


def isolated_atom_energies(arrays: FrameArrays, table: Mapping[int, float] | None) -> IsolatedAtomEnergies:
    """Those of the table; without one, of the isolated atoms among the frames, and for the other elements by fit.

    The fit is that of total energies by the number of atoms of each element, in least squares; where compositions do
    not tell elements apart (one molecule), the energies sum up to what they should and say nothing one by one.
    """
    if table is not None:
        return IsolatedAtomEnergies(energies=dict(table), origin=dict.fromkeys(table, "recipe"))
    measured = {int(z): float(energy) for z, energy in arrays.meta["isolated_atoms"].items()}
    rest = [z for z in arrays.meta["species"] if z not in measured]
    known = {z: measured.get(z, 0.0) for z in arrays.meta["species"]}

    def fit() -> IsolatedAtomEnergies:
        fitted = _fit(arrays, known, rest) if rest else {}
        return IsolatedAtomEnergies(
            energies={**measured, **fitted},
            origin={**dict.fromkeys(measured, "isolated atoms"), **dict.fromkeys(fitted, "least squares")},
        )

    return remembered(arrays, "isolated-atoms", sorted(measured.items()), IsolatedAtomEnergies, fit)


def _statistics(arrays: FrameArrays, energies: Mapping[int, float]) -> Statistics:
    squares, components = 0.0, 0
    for _, atoms, _ in arrays.chunks():
        forces = arrays["forces"][atoms]
        forces = forces[~np.isnan(forces)]
        squares, components = squares + float(np.square(forces).sum()), components + forces.size
    rms = (squares / components) ** 0.5 if components else 1.0
    return Statistics(
        shift=_fit(arrays, energies, list(energies)),
        force_rms=rms if rms > 0 else 1.0,
        mean_neighbors=float(arrays.edge_start[-1] / arrays.atom_start[-1]),
    )


def _fit(arrays: FrameArrays, known: Mapping[int, float], wanted: list[int]) -> dict[int, float]:
    """Energies of the elements ``wanted`` that, added to those known, come closest to the energies of the frames."""
    counts, n_frames, mean = compositions(arrays, known)
    if not len(counts):
        return dict.fromkeys(wanted, 0.0)
    weight = np.sqrt(n_frames)
    columns = [list(arrays.meta["species"]).index(z) for z in wanted]
    solution = np.linalg.lstsq(counts[:, columns] * weight[:, None], mean * weight, rcond=_RCOND)[0]
    return dict(zip(wanted, solution.tolist(), strict=True))


def compositions(arrays: FrameArrays, known: Mapping[int, float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct counts of each species (C, Z), the labelled frames of each (C,) and their mean of E − Σ known, in eV."""
    species = np.array(arrays.meta["species"], dtype=np.int64)
    reference = np.array([known[int(z)] for z in species])
    found: dict[tuple[int, ...], list[float]] = {}
    for frames, atoms, _ in arrays.chunks():
        energy = arrays["energy"][frames]
        counts = composition_counts(arrays, frames, atoms)
        labelled = ~np.isnan(energy)
        rows, inverse = np.unique(counts[labelled], axis=0, return_inverse=True)
        relative = energy[labelled] - counts[labelled] @ reference
        sums = np.bincount(inverse.ravel(), relative, len(rows))
        for row, number, total in zip(
            rows.tolist(), np.bincount(inverse.ravel(), minlength=len(rows)), sums, strict=True
        ):
            entry = found.setdefault(tuple(row), [0.0, 0.0])
            entry[0] += float(number)
            entry[1] += float(total)
    n_frames = np.array([number for number, _ in found.values()])
    total = np.array([total for _, total in found.values()])
    return (
        np.array(list(found), dtype=np.float64).reshape(len(found), len(species)),
        n_frames,
        total / np.maximum(n_frames, 1),
    )


def composition_counts(arrays: FrameArrays, frames: slice, atoms: slice) -> np.ndarray:
    """Atoms of each species in each frame of a chunk (S, Z)."""
    species = np.array(arrays.meta["species"], dtype=np.int64)
    n_frames = frames.stop - frames.start
    owner = np.repeat(np.arange(n_frames), arrays["n_atoms"][frames])
    column = np.searchsorted(species, arrays["numbers"][atoms])
    flat = np.bincount(owner * len(species) + column, minlength=n_frames * len(species))
    return flat.reshape(n_frames, len(species))
