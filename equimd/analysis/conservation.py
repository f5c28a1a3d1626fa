"""Is the force field conservative? Energy drift in NVE, asymmetry of the force Jacobian, net torque."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from ase import Atoms

from equimd.analysis.inputs import labels_of
from equimd.analysis.statistics import fit_line
from equimd.calculators.forcefield import as_force_field
from equimd.errors import InputError
from equimd.results import Block, Number


class DriftResult(Block):
    """Slope of the total energy in NVE.

    drift_mev_per_atom_per_ps with its standard error, which respects the autocorrelation of the residuals
    (``statistical_inefficiency`` samples are worth one). fluctuation_mev_per_atom: standard deviation of the total
    energy around the line. relative_to_kinetic: |drift| over the whole run divided by the standard deviation of the
    kinetic energy (NaN where no kinetic energies were given).
    """

    drift_mev_per_atom_per_ps: float
    stderr: Number
    fluctuation_mev_per_atom: float
    statistical_inefficiency: float
    relative_to_kinetic: Number
    duration_ps: float
    n_samples: int


def nve_drift(
    times_fs: Sequence[float] | np.ndarray,
    total_energies: Sequence[float] | np.ndarray,
    n_atoms: int,
    kinetic_energies: Sequence[float] | np.ndarray | None = None,
) -> DriftResult:
    """Least-squares drift of total energies (T,) in eV sampled at ``times_fs`` (T,) in an NVE run of ``n_atoms``.

    Sample evenly and often: a vibration that is slower than the sampling is seen by the error bar, a faster one not.
    """
    times, energies = np.asarray(times_fs, dtype=np.float64), np.asarray(total_energies, dtype=np.float64)
    if n_atoms < 1:
        raise InputError(f"n_atoms is {n_atoms}; expected at least 1")
    if not (np.isfinite(times).all() and np.isfinite(energies).all()):
        raise InputError("the energy series holds values that are not finite; the run has exploded")
    line = fit_line(times, energies)
    per_atom = 1000.0 / n_atoms
    duration = float(np.ptp(times))
    relative = float("nan")
    if kinetic_energies is not None and np.std(kinetic_energies) > 0:
        relative = abs(line.slope) * duration / float(np.std(kinetic_energies))
    return DriftResult(
        drift_mev_per_atom_per_ps=line.slope * per_atom * 1000.0,
        stderr=line.stderr * per_atom * 1000.0,
        fluctuation_mev_per_atom=line.residual_std * per_atom,
        statistical_inefficiency=line.inefficiency,
        relative_to_kinetic=relative,
        duration_ps=duration / 1000.0,
        n_samples=len(times),
    )


def nve_drift_of_frames(frames: Sequence[Atoms], interval_fs: float) -> DriftResult:
    """Drift along frames that carry momenta and potential energies, ``interval_fs`` apart."""
    potential = [labels_of(frame).energy for frame in frames]
    if any(energy is None for energy in potential):
        raise InputError(f"frame {potential.index(None)} has no energy; expected one for each frame")
    kinetic = np.array([frame.get_kinetic_energy() for frame in frames])
    total = np.array(potential, dtype=np.float64) + kinetic
    return nve_drift(np.arange(len(frames)) * interval_fs, total, len(frames[0]), kinetic)


def jacobian_asymmetry(calculator: Any, frame: Atoms, step: float = 1e-3, max_atoms: int = 24) -> float:
    """λ = |(J − Jᵀ)/2|_F / |J|_F of the forces; 0 for a gradient, about 0.7 for a random field.

    J (3n, 3n) by central differences of ``step`` Å over the first ``max_atoms`` atoms. In float32 the rounding of the
    forces sets a floor of about 1e-7 |F| / (step |J|).
    """
    field, atoms = as_force_field(calculator), np.arange(min(len(frame), max_atoms))
    displaced = []
    for atom in atoms:
        for axis in range(3):
            for sign in (1.0, -1.0):
                copy = frame.copy()
                copy.set_constraint()
                copy.positions[atom, axis] += sign * step
                displaced.append(copy)
    forces = np.stack(field.evaluate(displaced).forces)[:, atoms].reshape(len(atoms) * 3, 2, -1)
    jacobian = (forces[:, 0] - forces[:, 1]) / (2 * step)
    size = np.linalg.norm(jacobian)
    return float(np.linalg.norm(jacobian - jacobian.T) / 2 / size) if size > 0 else 0.0


def net_torque(positions: np.ndarray, forces: np.ndarray) -> np.ndarray:
    """Torque Σ r × F (3,) in eV about the centroid, with the net force taken out; zero for an invariant energy."""
    return np.cross(positions - positions.mean(0), forces - forces.mean(0)).sum(0)
