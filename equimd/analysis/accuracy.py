"""Errors of a force field against labelled frames."""

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

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
from equimd.analysis.suspicion import suspicion
from equimd.calculators.forcefield import Evaluation, as_force_field
from equimd.errors import InputError
from equimd.results import Block, Number, Provenance, Result, provenance
from equimd.units import GPA

# Names in ``info`` under which data sets say what kind of frame each is, in the order in which they are looked for.
GROUP_KEYS = ("config_type", "configtype", "config", "subset", "group", "tag", "label")


class Errors(Block):
    """Mean absolute and root mean square error over all values, components counted one by one."""

    mae: float
    rmse: float


class GroupErrors(Block):
    """Errors on the frames of one group; counts are of frames that carried the label."""

    n_frames: int
    n_energies: int
    n_forces: int
    energy_per_atom: Errors | None
    force: Errors | None


class AccuracyResult(Result):
    """Errors in eV, eV/Å and eV/Å³; null where no frame carries that label. stress_gpa: the same as stress, in GPa.

    n_energies, n_forces, n_stresses: frames that carried the label. energy_shift_per_atom: mean of predicted minus
    labelled energy per atom, eV. force_per_element: by symbol. force_label_rms: RMS of the labels, the scale of force.
    other_level: in words, if the reference is another level of theory than that of the potential's training.
    lossy: how the format of the frames rounded positions; null if it did not.
    group_key, by_group: the name in ``info`` by which frames are grouped, such as "config_type", and the errors of each
    group ("" holds the frames without that name); null and empty where frames carry no such name.
    suspicious: a sentence if labels seem to be the potential's own predictions, else null.
    """

    name: str
    device: str
    dtype: str
    n_frames: int
    n_energies: int
    n_forces: int
    n_stresses: int
    energy_per_atom: Errors | None
    energy: Errors | None
    force: Errors | None
    stress: Errors | None
    stress_gpa: Errors | None = None
    energy_shift_per_atom: Number
    force_per_element: dict[str, Errors]
    force_label_rms: Number
    other_level: str | None = None
    lossy: str | None = None
    group_key: str | None = None
    by_group: dict[str, GroupErrors] = {}
    suspicious: str | None = None
    provenance: Provenance


def evaluate_accuracy(
    calculator: Any,
    frames: Atoms | Iterable[Atoms],
    reference: Any | None = None,
    *,
    accept_predictions: bool = False,
    other_level: bool = False,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> AccuracyResult:
    """Errors of ``calculator`` (any ASE calculator or ForceField) against the labels of ``frames``.

    Labels come from each frame's SinglePointCalculator, or from ``reference`` (a name, a calculator or a ForceField).
    Predictions that a potential stored in frames are no labels, unless ``accept_predictions`` says so. A named
    reference must be the level of theory that the potential was trained on, unless ``other_level`` allows another. A
    frame without one label counts for the others. Stress is compared by its symmetric part.

    Raises:
        InputError: no frame has any label, the frames are empty or broken, or the reference is of another level.
    """
    listed = checked_frames(frames)
    force_field = as_force_field(calculator)
    source = LabelSource(reference, accept_predictions, other_level)
    labels = reference_labels(listed, force_field, source)
    unused = unused_predictions(listed, source)
    if not any(value is not None for label in labels for value in label):
        none = f"none of {len(listed)} frames has labels; expected energies or forces, or a reference"
        raise InputError(unused or none)
    if unused is not None:
        warnings.warn(unused, PredictionWarning, stacklevel=2)
    parts = []
    for start in range(0, len(listed), batch_size):
        parts.append(force_field.evaluate(listed[start : start + batch_size]))
        if progress is not None:
            progress(min(start + batch_size, len(listed)), len(listed))
    predicted = Evaluation(
        np.concatenate([part.energies for part in parts]),
        [forces for part in parts for forces in part.forces],
        [stress for part in parts for stress in part.stresses],
    )
    result = _summarise(force_field.name, force_field.device, force_field.dtype, listed, labels, predicted)
    return result.model_copy(
        update={"other_level": level_in_words(listed, force_field, reference), "lossy": lossy_of(listed)}
    )


def _summarise(
    name: str, device: str, dtype: str, frames: list[Atoms], labels: list[Labels], predicted: Evaluation
) -> AccuracyResult:
    everything = list(range(len(frames)))
    energy, per_atom = _energy_differences(everything, frames, labels, predicted)
    with_forces = [i for i, label in enumerate(labels) if label.forces is not None]
    force = _force_differences(with_forces, labels, predicted)
    numbers = np.concatenate([frames[i].numbers for i in with_forces]) if with_forces else np.zeros(0, dtype=int)
    stress = np.array(
        [
            (s + s.T) / 2 - label.stress
            for s, label in zip(predicted.stresses, labels, strict=True)
            if s is not None and label.stress is not None
        ]
    )
    label_forces = [label.forces for label in labels if label.forces is not None]
    group_key, groups = group_frames(frames)
    return AccuracyResult(
        name=name,
        device=device,
        dtype=dtype,
        n_frames=len(frames),
        n_energies=len(energy),
        n_forces=len(with_forces),
        n_stresses=len(stress),
        energy_per_atom=_errors(per_atom),
        energy=_errors(energy),
        force=_errors(force),
        stress=_errors(stress),
        stress_gpa=_errors(stress / GPA),
        energy_shift_per_atom=float(per_atom.mean()) if len(per_atom) else float("nan"),
        force_per_element={chemical_symbols[z]: _some_errors(force[numbers == z]) for z in np.unique(numbers)},
        force_label_rms=float(np.sqrt((np.concatenate(label_forces) ** 2).mean())) if label_forces else float("nan"),
        group_key=group_key,
        by_group={group: _group_errors(chosen, frames, labels, predicted) for group, chosen in groups.items()},
        suspicious=suspicion(
            (predicted.forces[i], forces) for i in with_forces if (forces := labels[i].forces) is not None
        ),
        provenance=provenance(),
    )


def _energy_differences(
    chosen: list[int], frames: list[Atoms], labels: list[Labels], predicted: Evaluation
) -> tuple[np.ndarray, np.ndarray]:
    """Predicted minus labelled energies of the chosen frames that have one: total and per atom, eV."""
    labelled = [(i, energy) for i in chosen if (energy := labels[i].energy) is not None]
    total = np.array([predicted.energies[i] - energy for i, energy in labelled])
    return total, total / np.array([len(frames[i]) for i, _ in labelled])


def _force_differences(chosen: list[int], labels: list[Labels], predicted: Evaluation) -> np.ndarray:
    """Predicted minus labelled forces (atoms, 3) of the chosen frames that have them."""
    differences = [predicted.forces[i] - forces for i in chosen if (forces := labels[i].forces) is not None]
    return np.concatenate(differences) if differences else np.zeros((0, 3))


def group_frames(frames: list[Atoms]) -> tuple[str | None, dict[str, list[int]]]:
    """The first of ``GROUP_KEYS`` in ``info``, in any case, that groups the frames, and the indices of each group.

    Frames without it make the group "". A name other than "config_type" that differs from frame to frame numbers the
    frames and groups nothing.
    """
    for key in GROUP_KEYS:
        groups: dict[str, list[int]] = {}
        for i, frame in enumerate(frames):
            values = [v for name, v in frame.info.items() if str(name).lower() == key and np.ndim(v) == 0]
            groups.setdefault(str(values[0]).strip() if values else "", []).append(i)
        if set(groups) != {""} and (len(groups) < len(frames) or key in GROUP_KEYS[:2]):
            return key, dict(sorted(groups.items()))
    return None, {}


def _group_errors(chosen: list[int], frames: list[Atoms], labels: list[Labels], predicted: Evaluation) -> GroupErrors:
    _, per_atom = _energy_differences(chosen, frames, labels, predicted)
    return GroupErrors(
        n_frames=len(chosen),
        n_energies=len(per_atom),
        n_forces=sum(labels[i].forces is not None for i in chosen),
        energy_per_atom=_errors(per_atom),
        force=_errors(_force_differences(chosen, labels, predicted)),
    )


def _errors(differences: np.ndarray) -> Errors | None:
    return _some_errors(differences) if differences.size else None


def _some_errors(differences: np.ndarray) -> Errors:
    return Errors(mae=float(np.abs(differences).mean()), rmse=float(np.sqrt((differences**2).mean())))
