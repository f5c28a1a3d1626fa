"""Statistics of a training set: isolated-atom energies where none are given, and what a network is scaled with.

All are sums over chunks of the arrays, so that a set which is mapped into memory is read once and not held, and are
kept beside the arrays.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np

from equimd.errors import InputError
from equimd.frames.arrays import FrameArrays
from equimd.frames.compositions import compositions, fit_atomic_energies
from equimd.results import Block
from equimd.training.cache import remembered

Origin = Literal["recipe", "isolated atoms", "parent", "least squares"]


class Statistics(Block):
    """Energy shifts in eV by atomic number, RMS force in eV/Å (1 without labels), mean neighbours of an atom.

    energy and reference are the means over labelled frames of E and of Σ E₀, in eV per atom; None without labels.
    """

    shift: dict[int, float]
    force_rms: float
    mean_neighbors: float
    energy: float | None
    reference: float | None


class IsolatedAtomEnergies(Block):
    """Energies in eV by atomic number, and where each comes from; ``determined`` unless only sums mean something."""

    energies: dict[int, float]
    origin: dict[int, Origin]
    determined: bool = True


def statistics(arrays: FrameArrays, isolated_atom_energies: Mapping[int, float]) -> Statistics:
    """Per-species shifts by least squares of E − Σ E₀ (see ``fit_atomic_energies``), RMS force."""
    energies = {z: isolated_atom_energies[z] for z in arrays.meta["species"]}
    return remembered(arrays, "statistics", sorted(energies.items()), Statistics, lambda: _statistics(arrays, energies))


def isolated_atom_energies(
    arrays: FrameArrays, table: Mapping[int, float] | None, of_parent: Mapping[int, float] | None = None
) -> IsolatedAtomEnergies:
    """Those of the table; without one, of the isolated atoms among the frames, else of the parent, else by fit.

    The fit is that of total energies by the number of atoms of each element, in least squares; where compositions do
    not tell elements apart (one molecule), the energies sum up to what they should and say nothing one by one.

    Raises:
        InputError: if isolated atoms of one element have different energies, and there is no table.
    """
    if table is not None:
        return IsolatedAtomEnergies(energies=dict(table), origin=dict.fromkeys(table, "recipe"))
    if arrays.meta["contradictions"]:
        said = arrays.meta["contradictions"][0]
        raise InputError(f"{said}; accepted is one energy for each element, or data.isolated_atom_energies")
    measured = {int(z): float(energy) for z, energy in arrays.meta["isolated_atoms"].items()}
    species = arrays.meta["species"]
    inherited = {z: energy for z, energy in (of_parent or {}).items() if z in species and z not in measured}
    given = {**measured, **inherited}
    rest = [z for z in species if z not in given]
    known = {z: given.get(z, 0.0) for z in species}

    def fit() -> IsolatedAtomEnergies:
        fitted, determined = fit_atomic_energies(arrays, known, rest, by_charge=True)
        return IsolatedAtomEnergies(
            energies={**given, **fitted},
            origin={
                **dict.fromkeys(measured, "isolated atoms"),
                **dict.fromkeys(inherited, "parent"),
                **dict.fromkeys(fitted, "least squares"),
            },
            determined=determined,
        )

    key = sorted(measured.items()), sorted(inherited.items())
    return remembered(arrays, "isolated-atoms", key, IsolatedAtomEnergies, fit)


def _statistics(arrays: FrameArrays, energies: Mapping[int, float]) -> Statistics:
    squares, components = 0.0, 0
    for _, atoms, _ in arrays.chunks():
        forces = arrays["forces"][atoms]
        forces = forces[~np.isnan(forces)]
        squares, components = squares + float(np.square(forces).sum()), components + forces.size
    rms = (squares / components) ** 0.5 if components else 1.0
    counts, n_frames, left = compositions(arrays, energies)
    means: tuple[float, float] | None = None
    if len(counts):
        n_atoms, reference = counts.sum(axis=1), counts @ np.array([energies[z] for z in arrays.meta["species"]])
        per_atom = [np.average(value / n_atoms, weights=n_frames) for value in (left + reference, reference)]
        means = float(per_atom[0]), float(per_atom[1])
    return Statistics(
        shift=fit_atomic_energies(arrays, energies, list(energies)).energies,
        force_rms=rms if rms > 0 else 1.0,
        mean_neighbors=float(arrays.edge_start[-1] / arrays.atom_start[-1]),
        energy=means and means[0],
        reference=means and means[1],
    )
