"""What is measured of one contestant; a part that cannot be measured is left out with its reason."""

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from ase import Atoms

from equimd.analysis.accuracy import evaluate_accuracy
from equimd.analysis.equivariance import Extras, equivariance_error
from equimd.analysis.equivariance_results import EquivarianceResult
from equimd.analysis.stability import bond_stability
from equimd.analysis.throughput import TimingSettings, measure_throughput
from equimd.calculators.forcefield import as_force_field
from equimd.comparison.contestants import Contestant
from equimd.comparison.job import Job
from equimd.errors import InputError
from equimd.report.comparison import Parity, PotentialResult, Trajectory
from equimd.report.verdict import judge

_PARITY_POINTS = 1500
_Part = TypeVar("_Part")


class StoppedWarning(UserWarning):
    """A potential did not survive, or a part of it could not be measured; the others go on."""


def measure(job: Job, contestant: Contestant, pooled: list[Atoms]) -> PotentialResult:
    """Everything that is said of one potential; ``pooled`` are the labelled frames that all are judged on."""
    calculator, own = contestant.calculator, contestant.frames
    missing: dict[str, str] = {}

    def attempt(part: str, work: Callable[[], _Part]) -> _Part | None:
        try:
            return work()
        except Exception as error:  # whatever a calculator finds wrong with frames of others, or of an explosion
            missing[part] = " ".join(f"{type(error).__name__}: {error or 'no message'}".split())
            message = f"{contestant.name}: its {part} could not be measured: {missing[part]}"
            warnings.warn(message, StoppedWarning, stacklevel=2)
            return None

    equivariance = accuracy = own_accuracy = stability = parity = None
    if own:
        stability = attempt("stability", lambda: _stability(job, contestant))
        equivariance = attempt("equivariance", lambda: _equivariance(job, contestant))
    if pooled:
        stage = job.stage(f"{contestant.name}: accuracy")
        accuracy = attempt("accuracy", lambda: _accuracy(calculator, pooled, progress=stage))
        parity = attempt("parity", lambda: _parity(calculator, pooled)) if accuracy is not None else None
    if contestant.labelled:
        own_accuracy = attempt("accuracy on its own run", lambda: _accuracy(calculator, contestant.labelled))
    drift, energies = job.conserve(contestant)
    throughput = attempt("speed", lambda: _throughput(job, contestant))
    if contestant.stopped is not None:
        warnings.warn(f"{contestant.name}: {contestant.stopped.in_words()}", StoppedWarning, stacklevel=2)
    hours = (contestant.header.get("ledger") or {}).get("device_hours")
    potential = getattr(calculator, "potential", None)
    return PotentialResult(
        name=contestant.name,
        family=contestant.family,
        accuracy=accuracy,
        accuracy_own=own_accuracy,
        equivariance=equivariance,
        nve=drift,
        throughput=throughput,
        verdict=None if equivariance is None else judge(equivariance),
        training_device_hours=None if hours is None else float(hours),
        n_parameters=None if potential is None else sum(p.numel() for p in potential.parameters()),
        trajectory=_trajectory(contestant, equivariance),
        nve_energy=energies,
        parity=parity or Parity(reference=[], predicted=[]),
        stopped=contestant.stopped,
        stability=stability,
        n_failed=len(contestant.failed),
        missing=missing,
    )


def _accuracy(calculator: Any, frames: list[Atoms], progress: Callable[[int, int], None] | None = None) -> Any:
    """Errors on labelled frames; predictions that are not finite are a failure, not an error of NaN."""
    result = evaluate_accuracy(calculator, frames, progress=progress)
    if not all(np.isfinite(part.rmse) for part in (result.energy, result.force, result.stress) if part is not None):
        raise InputError(f"{result.name} returned values that are not finite for one of {len(frames)} frames")
    return result


def _equivariance(job: Job, contestant: Contestant) -> EquivarianceResult:
    s = job.settings
    stage = job.stage(f"{contestant.name}: equivariance")
    return equivariance_error(
        contestant.calculator, contestant.frames, s.degree, s.inversion, extras=Extras(), progress=stage
    )


def _throughput(job: Job, contestant: Contestant) -> Any:
    s = job.settings
    return measure_throughput(
        contestant.calculator,
        job.atoms,
        s.timestep_fs,
        settings=TimingSettings(
            warmup_seconds=2 * s.timing_seconds, block_seconds=s.timing_seconds, temperature_K=s.temperature_K
        ),
        progress=job.stage(f"{contestant.name}: speed"),
    )


def _stability(job: Job, contestant: Contestant) -> Any:
    """The bonds of the start along the run, whose frames lie one interval apart and begin one after it."""
    frames = [job.atoms, *contestant.frames]
    return bond_stability(frames, contestant.times_fs[0], reference=job.atoms)


def _trajectory(contestant: Contestant, equivariance: EquivarianceResult | None) -> Trajectory:
    """Series per frame; the share of the loss of one frame is S / (S + |ā − y|²), as for a quadrature.

    Both are unknown for a frame without labels.
    """
    spreads, squared = ([], []) if equivariance is None else (equivariance.per_frame.s, _squared(equivariance))
    totals = [s + e for s, e in zip(spreads, squared, strict=True)]
    shares = [100.0 * s / total if total > 0 else float("nan") for s, total in zip(spreads, totals, strict=True)]
    n = len(totals)  # none if the symmetry error could not be measured
    return Trajectory(
        times_fs=contestant.times_fs[:n],
        temperature_K=contestant.temperature_K[:n],
        rmse_equiv=[] if equivariance is None else equivariance.per_frame.rmse_equiv,
        force_rmse=[float(np.sqrt(total)) for total in totals],
        percent_of_loss=shares,
    )


def _squared(equivariance: EquivarianceResult) -> list[float]:
    return [float("nan") if error is None else error for error in equivariance.per_frame.mean_error_squared]


def _parity(calculator: Any, pooled: list[Atoms]) -> Parity:
    """A fixed random choice of force components on the common frames."""
    predicted = np.concatenate([f.ravel() for f in as_force_field(calculator).evaluate(pooled).forces])
    reference = np.concatenate([frame.get_forces(apply_constraint=False).ravel() for frame in pooled])
    chosen = np.random.default_rng(0).permutation(len(reference))[:_PARITY_POINTS]
    return Parity(reference=reference[chosen].tolist(), predicted=predicted[chosen].tolist())
