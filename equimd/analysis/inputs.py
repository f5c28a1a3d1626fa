"""Frames and labels as the analysis takes them, checked once."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from equimd import frames
from equimd.calculators.forcefield import as_force_field
from equimd.errors import InputError
from equimd.origin import potential_behind, predicted_by
from equimd.theory import is_same_level, method_of, stated_level

Progress = Callable[[int, int], None]


class Labels(NamedTuple):
    """Labels of one frame, None where absent: energy in eV, forces (N, 3) in eV/Å, stress (3, 3) in eV/Å³."""

    energy: float | None
    forces: np.ndarray | None
    stress: np.ndarray | None


def checked_frames(structures: Atoms | Iterable[Atoms]) -> list[Atoms]:
    """The frames as a list; empty lists, empty structures and positions that are not finite are refused."""
    listed = [structures] if isinstance(structures, Atoms) else list(structures)
    if not listed:
        raise InputError("0 frames given; expected at least 1")
    for index, frame in enumerate(listed):
        if len(frame) == 0:
            raise InputError(f"frame {index} has 0 atoms; expected at least 1")
        if not np.isfinite(frame.positions).all():
            atom = int(np.flatnonzero(~np.isfinite(frame.positions).all(axis=1))[0])
            raise InputError(f"frame {index}, atom {atom} is at {frame.positions[atom]}; expected finite positions")
    return listed


def labels_of(frame: Atoms) -> Labels:
    """The frame's own labels (see ``equimd.frames.labels_of``); values that are not finite count as absent.

    What a live calculator happens to hold is no label: a potential would be compared with itself.
    """
    if frame.calc is not None and not isinstance(frame.calc, SinglePointCalculator):
        return Labels(None, None, None)
    held = frames.labels_of(frame)
    energy, forces, stress = (_finite(held[key]) for key in ("energy", "forces", "stress"))
    if forces is not None and forces.shape != (len(frame), 3):
        raise InputError(f"force labels have shape {forces.shape}; expected ({len(frame)}, 3)")
    return Labels(None if energy is None else float(energy), forces, stress)


@dataclass(frozen=True)
class LabelSource:
    """Where labels come from.

    reference: a name ("gfn2-xtb"), an ASE calculator or a ForceField; None takes the frames' own labels.
    accept_predictions: take results that a potential made (see ``equimd.origin``) for labels, stored or computed now.
    other_level: the labels may be of another level of theory than the one that the potential was trained on.
    """

    reference: Any | None = None
    accept_predictions: bool = False
    other_level: bool = False


class PredictionWarning(UserWarning):
    """Results that frames carry are predictions of a potential, and are not taken for labels."""


def reference_labels(structures: list[Atoms], calculator: Any, source: LabelSource) -> list[Labels]:
    """Labels of the frames from ``source``, to judge ``calculator`` by; predictions count as absent.

    Absent, too, are labels of frames on which a named reference fails; a warning names these.

    Raises:
        InputError: for a reference that is not known or is a potential itself, or labels of another level of theory
            than the potential's.
    """
    reference = source.reference
    if reference is None:
        if not source.other_level and (other := _labelled_at_another_level(structures, calculator)) is not None:
            index, level, own = other
            raise InputError(
                f"frame {index} was labelled by {level}, {getattr(calculator, 'name', 'the potential')} was trained on"
                f" {own}: the errors would be those between two levels of theory; accepted: labels of {own}, or"
                " --other-level (other_level=True)"
            )
        absent = Labels(None, None, None)
        use_all = source.accept_predictions
        return [labels_of(frame) if use_all or predicted_by(frame) is None else absent for frame in structures]
    if isinstance(reference, str):
        from equimd.references import check_level, label_where_possible

        check_level(calculator, reference, source.other_level)

        return [labels_of(frame) for frame in label_where_possible(structures, reference)[0]]
    by = potential_behind(reference)
    if by is not None and not source.accept_predictions:
        raise InputError(
            f"the reference is a potential ({by}), whose results are predictions and no labels; accepted: a reference"
            " method, or accept_predictions=True"
        )
    evaluation = as_force_field(reference).evaluate(structures)
    return [
        Labels(float(e), f, s)
        for e, f, s in zip(evaluation.energies, evaluation.forces, evaluation.stresses, strict=True)
    ]


def level_in_words(structures: list[Atoms], calculator: Any, reference: Any) -> str | None:
    """What to write beside figures, if labels are of another level of theory than that of the training."""
    from equimd.references import level_mismatch

    if reference is None:
        other = _labelled_at_another_level(structures, calculator)
        return None if other is None else f"trained on {other[2]}, judged by {other[1]}"
    level = level_mismatch(calculator, reference) if isinstance(reference, str) else None
    return None if level is None else f"trained on {level}, judged by {reference}"


def _labelled_at_another_level(structures: list[Atoms], calculator: Any) -> tuple[int, str, str] | None:
    """Index of the first frame that states another level than the training's, its level and the training's."""
    own = getattr(calculator, "level_of_theory", None)
    if method_of(own) is None:
        return None
    for index, frame in enumerate(structures):
        level = stated_level(frame)
        if level is not None and not is_same_level(level, str(own)):
            return index, level, str(own)
    return None


def unused_predictions(structures: list[Atoms], source: LabelSource) -> str | None:
    """One line about frames whose results are predictions and are therefore not taken for labels; None without any."""
    if source.reference is not None or source.accept_predictions:
        return None
    made_by = [by for frame in structures if (by := predicted_by(frame)) is not None]
    if not made_by:
        return None
    return (
        f"{len(made_by)} of {len(structures)} frames carry predictions ({made_by[0]}), which are no labels; accepted:"
        " frames that a reference method labelled, a reference, or --accept-predictions (accept_predictions=True)"
    )


def lossy_of(structures: list[Atoms]) -> str | None:
    """How the format of the frames has rounded them (``info["lossy"]``); None if nothing says so."""
    return next((str(frame.info["lossy"]) for frame in structures if frame.info.get("lossy")), None)


def _finite(value: Any) -> np.ndarray | None:
    if value is None:
        return None
    array = np.asarray(value, dtype=np.float64)
    return array if np.isfinite(array).all() else None
