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
from equimd.calculators.forcefield import Evaluation, as_force_field
from equimd.errors import InputError
from equimd.results import Block, Number, Provenance, Result, provenance


class Errors(Block):
    """Mean absolute and root mean square error over all values, components counted one by one."""

    mae: float
    rmse: float


class AccuracyResult(Result):
    """Errors in eV, eV/Å and eV/Å³; null where no frame carries that label.

    n_energies, n_forces, n_stresses: frames that carried the label. energy_shift_per_atom: mean of predicted minus
    labelled energy per atom, eV. force_per_element: by symbol. force_label_rms: RMS of the labels, the scale of force.
    other_level: in words, if the reference is another level of theory than that of the potential's training.
    lossy: how the format of the frames rounded positions; null if it did not.
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
    energy_shift_per_atom: Number
    force_per_element: dict[str, Errors]
    force_label_rms: Number
    other_level: str | None = None
    lossy: str | None = None
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
    return result.model_copy(update={"other_level": level_in_words(force_field, reference), "lossy": lossy_of(listed)})


def _summarise(
    name: str, device: str, dtype: str, frames: list[Atoms], labels: list[Labels], predicted: Evaluation
) -> AccuracyResult:
    sizes = np.array([len(frame) for frame in frames])
    has_energy = np.array([label.energy is not None for label in labels])
    energy = (
        predicted.energies[has_energy] - np.array([label.energy for label in labels if label.energy is not None])
        if has_energy.any()
        else np.zeros(0)
    )
    per_atom = energy / sizes[has_energy]
    with_forces = [i for i, label in enumerate(labels) if label.forces is not None]
    forces = [predicted.forces[i] - labels[i].forces for i in with_forces]
    numbers = np.concatenate([frames[i].numbers for i in with_forces]) if with_forces else np.zeros(0, dtype=int)
    force = np.concatenate(forces) if forces else np.zeros((0, 3))
    stress = [
        (s + s.T) / 2 - label.stress
        for s, label in zip(predicted.stresses, labels, strict=True)
        if s is not None and label.stress is not None
    ]
    label_forces = [label.forces for label in labels if label.forces is not None]
    return AccuracyResult(
        name=name,
        device=device,
        dtype=dtype,
        n_frames=len(frames),
        n_energies=int(has_energy.sum()),
        n_forces=len(with_forces),
        n_stresses=len(stress),
        energy_per_atom=_errors(per_atom),
        energy=_errors(energy),
        force=_errors(force),
        stress=_errors(np.array(stress)),
        energy_shift_per_atom=float(per_atom.mean()) if len(per_atom) else float("nan"),
        force_per_element={chemical_symbols[z]: _some_errors(force[numbers == z]) for z in np.unique(numbers)},
        force_label_rms=float(np.sqrt((np.concatenate(label_forces) ** 2).mean())) if label_forces else float("nan"),
        provenance=provenance(),
    )


def _errors(differences: np.ndarray) -> Errors | None:
    return _some_errors(differences) if differences.size else None


def _some_errors(differences: np.ndarray) -> Errors:
    return Errors(mae=float(np.abs(differences).mean()), rmse=float(np.sqrt((differences**2).mean())))
