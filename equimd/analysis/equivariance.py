"""Equivariance error of any force field along a trajectory: its size, its floor, its share of the loss.

For rotations g_k with weights w_k, ``a_k = g_k⁻¹ f(g_k x)`` and ``ā = Σ w_k a_k``; the error is the spread of the a_k
about ā, so no orientation is privileged. Over O(3) it splits into what rotations do and what inversion adds.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms

from equimd.analysis.equivariance_results import DegreeCheck, EquivarianceResult, Group
from equimd.analysis.equivariance_summary import (
    FloorKind,
    FrameSpread,
    Squares,
    energy_block,
    force_block,
    loss_block,
    per_frame_block,
    stress_block,
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
from equimd.analysis.noise import estimate_noise
from equimd.calculators.forcefield import Evaluation, ForceField, as_force_field, evaluate_rotated, in_precision
from equimd.decomposition import decompose, split_by_parity, variance
from equimd.errors import InputError
from equimd.results import provenance
from equimd.rotations import MAX_DEGREE, GroupSample, quadrature, random_rotations, rotate_back_tensor
from equimd.rotations import rotate_back_vectors as rotate_back


@dataclass(frozen=True)
class Extras:
    """What is measured besides, on evenly spaced frames; 0 leaves it out.

    floor_frames: frames where the rounding floor is measured by evaluating them in float64, too (where the field is in
    float32 and offers both), or estimated from a short line through them (18 evaluations each).
    check_frames: frames measured again with the next finer quadrature.
    atoms_per_batch: rotated atoms that are handed to the force field at once.
    """

    floor_frames: int = 8
    check_frames: int = 1
    atoms_per_batch: int = 4096


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
    kind = _floor_kind(force_field, finer)
    with_floor = set(_evenly(len(listed), extras.floor_frames)) if kind is not None else set()
    spreads = []
    for i, (frame, label) in enumerate(zip(listed, labels, strict=True)):
        group = _group_for(i, degree, inversion, n_rotations, seed)
        double = finer if i in with_floor else None
        spread = measure_frame(force_field, frame, group, label, double, extras.atoms_per_batch)
        if kind == "estimated" and i in with_floor:
            _estimate_floor(spread, force_field, frame, seed)
        spreads.append(spread)
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
        force=force_block(spreads, kind),
        energy=energy_block(spreads, kind),
        stress=stress_block(spreads, kind),
        loss=loss_block(spreads),
        degree_check=check,
        other_level=level_in_words(listed, force_field, reference),
        lossy=lossy_of(listed),
        per_frame=per_frame_block(spreads),
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
    exact = None if double is None else _evaluate_group(double, frame, group.rotations, atoms_per_batch)
    back_rotated = rotate_back(rotated, group.rotations)
    corrected = group.kind == "random"
    reference = None if label is None else label.forces
    split = decompose(back_rotated, group.weights, reference, corrected)
    stress = _stack_stress(predicted)
    out = FrameSpread(
        spread=split.spread,
        mean=split.mean,
        force=_squares(back_rotated, group, predicted.forces, None if exact is None else exact.forces),
        energy=_squares(predicted.energies, group, predicted.energies, None if exact is None else exact.energies),
        stress=None,
        stress_squared=None,
        antisymmetric_squared=None,
        torque_squared=_torque_squared(frame, back_rotated, group.weights),
        n_rotations=len(group),
        corrected=corrected,
        numbers=frame.numbers,
    )
    if stress is not None:
        back = rotate_back_tensor(stress, group.rotations)
        out.stress = _squares(back, group, stress, None if exact is None else _stack_stress(exact))
        out.stress_squared = float(group.weights @ (stress**2).mean(axis=(1, 2)))
        # Before it is rotated back: then it is zero, not rounding, for calculators that return six numbers.
        out.antisymmetric_squared = float(
            group.weights @ (((stress - stress.swapaxes(1, 2)) / 2) ** 2).mean(axis=(1, 2))
        )
    if reference is not None:
        out.l_total, out.l_mean = float(split.l_total), float(split.l_mean)
        out.mean_error_squared = float(((split.mean - reference) ** 2).mean())
        out.forces_and_labels = (np.asarray(force_field.evaluate([frame]).forces[0]), reference)
    return out


def _squares(back_rotated: Any, group: GroupSample, predicted: Any, exact: Any) -> Squares:
    """Mean squares over components: the spread of ``back_rotated`` (K, ...), its parts, and the error of rounding."""
    corrected = group.kind == "random"
    total = proper = float(variance(back_rotated, group.weights, corrected).mean())
    inversion = None
    if group.inversion:
        improper = np.linalg.det(group.rotations) < 0
        split = split_by_parity(back_rotated, group.weights, improper, corrected)
        proper, inversion = float(split.proper.mean()), float(split.inversion.mean())
    floor = None
    if exact is not None:
        differences = (np.asarray(predicted) - np.asarray(exact)).reshape(len(group), -1)
        floor = float(group.weights @ (differences**2).mean(axis=1))
    return Squares(total, proper, inversion, floor)


def _floor_kind(field: ForceField, finer: ForceField | None) -> FloorKind:
    """How the floor is found; not at all for a field that is random by intent, whose noise is no rounding."""
    if getattr(field, "stochastic", False):
        return None
    return "estimated" if finer is None else "measured"


def _estimate_floor(spread: FrameSpread, field: ForceField, frame: Atoms, seed: int) -> None:
    noise = estimate_noise(field, frame, seed)
    spread.force.floor, spread.energy.floor = noise.force, noise.energy
    if spread.stress is not None:
        spread.stress.floor = noise.stress


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


def _stack_stress(predicted: Evaluation) -> np.ndarray | None:
    """All stresses (K, 3, 3), or None where one is missing."""
    stresses = [stress for stress in predicted.stresses if stress is not None]
    return np.stack(stresses) if len(stresses) == len(predicted.stresses) else None


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
