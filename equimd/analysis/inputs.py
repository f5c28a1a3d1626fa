"""Frames and labels as the analysis takes them, checked once."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from equimd import frames
from equimd.calculators.forcefield import as_force_field
from equimd.errors import InputError

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


def reference_labels(structures: list[Atoms], reference: Any | None) -> list[Labels]:
    """Labels from ``reference`` (a name, "gfn2-xtb"; an ASE calculator or a ForceField), else the frames' own."""
    if reference is None:
        return [labels_of(frame) for frame in structures]
    if isinstance(reference, str):
        from equimd.references import label

        return [labels_of(frame) for frame in label(structures, reference)]
    evaluation = as_force_field(reference).evaluate(structures)
    return [
        Labels(float(e), f, s)
        for e, f, s in zip(evaluation.energies, evaluation.forces, evaluation.stresses, strict=True)
    ]


def _finite(value: Any) -> np.ndarray | None:
    if value is None:
        return None
    array = np.asarray(value, dtype=np.float64)
    return array if np.isfinite(array).all() else None
