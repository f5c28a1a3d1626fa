"""Equivariance error of any force field along a trajectory: its size, its floor, its share of the loss.

For rotations g_k with weights w_k, ``a_k = g_k⁻¹ f(g_k x)`` and ``ā = Σ w_k a_k``; the error is the spread of the a_k
about ā, so no orientation is privileged. Pooled quantities divide sums over frames, never average ratios. Error bars
are s·sqrt(g/n) with the statistical inefficiency g of the per-frame series (``statistics``).
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ase import Atoms

from equimd.analysis.equivariance_results import (
    DegreeCheck,
    EnergySpread,
    EquivarianceResult,
    ForceSpread,
    Group,
    LossShare,
    PerFrame,
    StressSpread,
    WorstAtom,
    WorstFrame,
)
from equimd.analysis.inputs import (
    Labels,
    LabelSource,
    PredictionWarning,
    Progress,
    checked_frames,
    level_in_words,
    lossy_of,
    reference_labels,
    unused_predictions,
)
from equimd.analysis.statistics import correlation, ratio_estimate
from equimd.calculators.forcefield import Evaluation, ForceField, as_force_field, evaluate_rotated, in_precision
from equimd.decomposition import decompose, percent_of_loss, variance
from equimd.errors import InputError
from equimd.results import provenance
from equimd.rotations import MAX_DEGREE, GroupSample, quadrature, random_rotations, rotate_back_tensor
from equimd.rotations import rotate_back_vectors as rotate_back

# A result below this many floors cannot be told from rounding.
FLOORS = 3.0


@dataclass(frozen=True)
class Extras:
    """What is measured besides, on evenly spaced frames; 0 leaves it out.

    floor_frames: frames evaluated in float64, too (where the field is in float32 and offers both).
    check_frames: frames measured again with the next finer quadrature.
    atoms_per_batch: rotated atoms that are handed to the force field at once.
    """

    floor_frames: int = 8
    check_frames: int = 1
    atoms_per_batch: int = 4096


@dataclass
class FrameSpread:
    """What one frame contributes; forces in eV/Å, energies in eV, stress in eV/Å³, torque in eV."""

    spread: np.ndarray  # (N,) Σ w_k |a_k − ā|², corrected where random
    mean: np.ndarray  # (N, 3) ā
    energy_variance: float
    torque_squared: float | None
    stress_variance: float | None
    antisymmetric_squared: float | None
    n_rotations: int
    corrected: bool
    l_total: float | None = None
    l_mean: float | None = None
    mean_error_squared: float | None = None
    floor_squared: float | None = None
    numbers: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))

    @property
    def l_equiv(self) -> float:
        """L_equiv of the frame in (eV/Å)²."""
        return float(self.spread.mean() / 3)

    @property
    def s(self) -> float:
        """S = Σ w_k |a_k − ā|² without the correction, mean over components."""
        k = self.n_rotations
        return self.l_equiv * ((k - 1) / k if self.corrected else 1.0)


def equivariance_error(
    calculator: Any,
    frames: Atoms | Iterable[Atoms],
    degree: int = 4,
    inversion: bool = True,
    n_rotations: int | None = None,
    seed: int = 0,
    reference: Any | None = None,
    *,
    accept_predictions: bool = False,
    other_level: bool = False,
    extras: Extras | None = None,
    progress: Progress | None = None,
) -> EquivarianceResult:
    """Equivariance error of the forces, energies and stresses of ``calculator`` over ``frames``.

    Args:
        calculator: Any ASE calculator or ForceField.
        frames: Structures; labels in a SinglePointCalculator are the reference where there is no other.
        degree: A quadrature exact to this degree; the mean of a function of degree L needs L, its spread 2L.
        inversion: Average over O(3) instead of SO(3).
        n_rotations: Use this many random rotations per frame instead of the quadrature.
        seed: Of the random rotations; frame i uses (seed, i).
        reference: A name ("gfn2-xtb"), an ASE calculator or a ForceField that labels the frames for the loss.
        accept_predictions: Take results that a potential stored in the frames for labels; else they count as absent.
        other_level: Allow a named reference of another level of theory than that of the potential's training.
        extras: What is measured besides: noise floor, finer quadrature.
        progress: Called with (frames done, frames in all).

    Raises:
        InputError: No frames, empty or broken structures, too few rotations, an unknown degree or reference, a
            reference of another level of theory.
    """
    listed = checked_frames(frames)
    extras = extras or Extras()
    force_field = as_force_field(calculator)
    source = LabelSource(reference, accept_predictions, other_level)
    labels = reference_labels(listed, force_field, source)
    if (unused := unused_predictions(listed, source)) is not None:
        warnings.warn(unused, PredictionWarning, stacklevel=2)
    finer = in_precision(force_field, "float64") if force_field.dtype == "float32" else None
    with_floor = set(_evenly(len(listed), extras.floor_frames)) if finer is not None else set()
    spreads = []
    for i, (frame, label) in enumerate(zip(listed, labels, strict=True)):
        group = _group_for(i, degree, inversion, n_rotations, seed)
        double = finer if i in with_floor else None
        spreads.append(measure_frame(force_field, frame, group, label, double, extras.atoms_per_batch))
        if progress is not None:
            progress(i + 1, len(listed))
    check = None
    if n_rotations is None and extras.check_frames > 0:
        check = _check_degree(force_field, listed, spreads, degree, inversion, extras)
    group = _group_for(0, degree, inversion, n_rotations, seed)
    return EquivarianceResult(
        name=force_field.name,
        device=force_field.device,
        dtype=force_field.dtype,
        n_frames=len(listed),
        group=Group(
            kind=group.kind,
            degree=group.degree,
            inversion=inversion,
            n_rotations=len(group),
            seed=None if n_rotations is None else seed,
        ),
        force=_force_block(spreads),
        energy=_energy_block(spreads),
        stress=_stress_block(spreads),
        loss=_loss_block(spreads),
        degree_check=check,
        per_frame=_per_frame(spreads),
        other_level=level_in_words(force_field, reference),
        lossy=lossy_of(listed),
        provenance=provenance(),
    )


def measure_frame(
    force_field: ForceField,
    frame: Atoms,
    group: GroupSample,
    label: Labels | None = None,
    double: ForceField | None = None,
    atoms_per_batch: int = 4096,
) -> FrameSpread:
    """Evaluate one frame under every rotation of ``group``; ``double`` is the same field in float64, for the floor."""
    predicted = _evaluate_group(force_field, frame, group.rotations, atoms_per_batch)
    rotated = np.stack(predicted.forces)
    if not np.isfinite(rotated).all():
        raise InputError(f"{force_field.name} returned forces that are not finite; the frame is out of its range")
    back_rotated = rotate_back(rotated, group.rotations)
    corrected = group.kind == "random"
    reference = None if label is None else label.forces
    split = decompose(back_rotated, group.weights, reference, corrected)
    stress_variance, antisymmetric = _stress_spread(predicted, group)
    out = FrameSpread(
        spread=split.spread,
        mean=split.mean,
        energy_variance=float(variance(predicted.energies, group.weights, corrected)),
        torque_squared=_torque_squared(frame, back_rotated, group.weights),
        stress_variance=stress_variance,
        antisymmetric_squared=antisymmetric,
        n_rotations=len(group),
        corrected=corrected,
        numbers=frame.numbers,
    )
    if reference is not None:
        out.l_total, out.l_mean = float(split.l_total), float(split.l_mean)
        out.mean_error_squared = float(((split.mean - reference) ** 2).mean())
    if double is not None:
        exact = np.stack(_evaluate_group(double, frame, group.rotations, atoms_per_batch).forces)
        out.floor_squared = float(group.weights @ ((rotated - exact) ** 2).mean(axis=(1, 2)))
    return out


def next_degree(degree: int, inversion: bool = True) -> int:
    """The lowest degree whose quadrature has more elements than that of ``degree``."""
    size = len(quadrature(degree, inversion))
    for candidate in range(degree + 1, MAX_DEGREE + 1):
        if len(quadrature(candidate, inversion)) > size:
            return candidate
    raise InputError(f"there is no quadrature beyond degree {degree}; the highest is {MAX_DEGREE}")


def _group_for(frame_index: int, degree: int, inversion: bool, n_rotations: int | None, seed: int) -> GroupSample:
    if n_rotations is None:
        return quadrature(degree, inversion)
    # Independent rotations for each frame, so that their noise averages out over frames.
    own_seed = int(np.random.SeedSequence([seed, frame_index]).generate_state(1)[0])
    return random_rotations(n_rotations, own_seed, inversion)


def _evenly(n: int, wanted: int) -> list[int]:
    """Indices of ``wanted`` of n frames, evenly spaced, each in the middle of its stretch."""
    wanted = min(n, wanted)
    return [int((i + 0.5) * n / wanted) for i in range(wanted)]


def _evaluate_group(force_field: ForceField, frame: Atoms, rotations: np.ndarray, atoms_per_batch: int) -> Evaluation:
    size = max(1, atoms_per_batch // len(frame))
    parts = [evaluate_rotated(force_field, frame, rotations[k : k + size]) for k in range(0, len(rotations), size)]
    return Evaluation(
        np.concatenate([np.asarray(part.energies, dtype=np.float64) for part in parts]),
        [np.asarray(forces, dtype=np.float64) for part in parts for forces in part.forces],
        [stress for part in parts for stress in part.stresses],
    )


def _torque_squared(frame: Atoms, back_rotated: np.ndarray, weights: np.ndarray) -> float | None:
    """Mean over rotations of |Σ r × a_k|² in eV², for isolated structures; zero for an invariant energy."""
    if frame.pbc.any():
        return None
    arms = frame.positions - frame.positions.mean(0)
    # Forces that do not sum to zero have no torque of their own: take the mean force out.
    centred = back_rotated - back_rotated.mean(axis=1, keepdims=True)
    torques = np.cross(arms, centred).sum(axis=1)
    return float(weights @ (torques**2).sum(-1))


def _stress_spread(predicted: Evaluation, group: GroupSample) -> tuple[float | None, float | None]:
    """Spread of the back-rotated stress and mean square of its antisymmetric part, per component in (eV/Å³)²."""
    stresses = [stress for stress in predicted.stresses if stress is not None]
    if len(stresses) < len(predicted.stresses):
        return None, None
    back_rotated = rotate_back_tensor(np.stack(stresses), group.rotations)
    spread = variance(back_rotated, group.weights, group.kind == "random")
    antisymmetric = (back_rotated - back_rotated.swapaxes(1, 2)) / 2
    return float(spread.mean()), float(group.weights @ (antisymmetric**2).mean(axis=(1, 2)))


def _check_degree(
    force_field: ForceField,
    frames: list[Atoms],
    spreads: list[FrameSpread],
    degree: int,
    inversion: bool,
    extras: Extras,
) -> DegreeCheck:
    """Measure a few frames again with the next finer quadrature."""
    finer, chosen = next_degree(degree, inversion), _evenly(len(frames), extras.check_frames)
    group = quadrature(finer, inversion)
    again = [measure_frame(force_field, frames[i], group, None, None, extras.atoms_per_batch) for i in chosen]
    before, after = (
        np.sqrt(np.concatenate([s.spread for s in some]).mean() / 3) for some in ([spreads[i] for i in chosen], again)
    )
    change = float((after - before) / before) if before > 0 else float("nan")
    return DegreeCheck(degree=finer, n_frames=len(chosen), rmse_equiv=float(after), relative_change=change)


def _force_block(spreads: list[FrameSpread]) -> ForceSpread:
    sums = np.array([s.spread.sum() for s in spreads])
    components = np.array([3.0 * len(s.spread) for s in spreads])
    pooled = ratio_estimate(sums, components)
    rmse = float(np.sqrt(pooled.value))
    force_rms = float(np.sqrt(sum((s.mean**2).sum() for s in spreads) / components.sum()))
    per_frame = np.sqrt(sums / components)
    floors = [(s.floor_squared, len(s.spread)) for s in spreads if s.floor_squared is not None]
    floor = float(np.sqrt(sum(f * n for f, n in floors) / sum(n for _, n in floors))) if floors else None
    worst = int(per_frame.argmax())
    return ForceSpread(
        rmse_equiv=rmse,
        relative=rmse / force_rms if force_rms > 0 else float("nan"),
        # d sqrt(x) = dx / (2 sqrt(x))
        stderr=pooled.stderr / (2 * rmse) if rmse > 0 else 0.0,
        p95=float(np.percentile(per_frame, 95)),
        worst_frame=WorstFrame(index=worst, rmse_equiv=float(per_frame[worst])),
        worst_atom=_worst_atom(spreads),
        floor=floor,
        at_floor=floor is not None and rmse < FLOORS * floor,
        floor_frames=len(floors),
        per_element=_per_element(spreads),
        rms_force=force_rms,
        net_torque_rms=_root_mean([s.torque_squared for s in spreads]),
    )


def _worst_atom(spreads: list[FrameSpread]) -> WorstAtom:
    frame = int(np.argmax([s.spread.max() for s in spreads]))
    atom = int(spreads[frame].spread.argmax())
    return WorstAtom(
        frame=frame,
        index=atom,
        element=_symbol(spreads[frame].numbers[atom]),
        rmse_equiv=float(np.sqrt(spreads[frame].spread[atom] / 3)),
    )


def _per_element(spreads: list[FrameSpread]) -> dict[str, float]:
    numbers = np.concatenate([s.numbers for s in spreads])
    spread = np.concatenate([s.spread for s in spreads])
    return {_symbol(z): float(np.sqrt(spread[numbers == z].mean() / 3)) for z in np.unique(numbers)}


def _symbol(number: int) -> str:
    from ase.data import chemical_symbols

    return chemical_symbols[int(number)]


def _energy_block(spreads: list[FrameSpread]) -> EnergySpread:
    per_atom = [s.energy_variance / len(s.spread) ** 2 for s in spreads]
    return EnergySpread(std_per_atom=float(np.sqrt(np.mean(per_atom))))


def _stress_block(spreads: list[FrameSpread]) -> StressSpread | None:
    rmse = _root_mean([s.stress_variance for s in spreads])
    antisymmetric = _root_mean([s.antisymmetric_squared for s in spreads])
    return None if rmse is None or antisymmetric is None else StressSpread(rmse_equiv=rmse, antisymmetric=antisymmetric)


def _root_mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.sqrt(np.mean(known))) if known else None


def _loss_block(spreads: list[FrameSpread]) -> LossShare | None:
    """Pool numerator and denominator over the labelled frames, then divide."""
    labelled = [s for s in spreads if s.l_mean is not None]
    if not labelled:
        return None
    n = np.array([len(s.spread) for s in labelled], dtype=float)
    n_equiv = n * [s.l_equiv for s in labelled]
    n_mean = n * np.array([s.l_mean for s in labelled])
    n_total = n * np.array([s.l_total for s in labelled])
    l_mean, l_equiv = float(n_mean.sum() / n.sum()), float(n_equiv.sum() / n.sum())
    return LossShare(
        n_frames=len(labelled),
        l_total=float(n_total.sum() / n.sum()),
        l_mean=l_mean,
        l_equiv=l_equiv,
        percent_of_loss=percent_of_loss(l_mean, l_equiv),
        stderr=100.0 * ratio_estimate(n_equiv, n_total).stderr,
        correlation_with_force_error=correlation(
            np.sqrt([s.l_equiv for s in labelled]), np.sqrt([s.mean_error_squared or 0.0 for s in labelled])
        ),
    )


def _per_frame(spreads: list[FrameSpread]) -> PerFrame:
    return PerFrame(
        n_atoms=[len(s.spread) for s in spreads],
        n_rotations=[s.n_rotations for s in spreads],
        rmse_equiv=[float(np.sqrt(s.l_equiv)) for s in spreads],
        s=[s.s for s in spreads],
        mean_error_squared=[s.mean_error_squared for s in spreads],
        mean_force_squared=[float((s.mean**2).mean()) for s in spreads],
        energy_variance=[s.energy_variance for s in spreads],
        floor=[None if s.floor_squared is None else float(np.sqrt(s.floor_squared)) for s in spreads],
    )
