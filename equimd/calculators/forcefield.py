"""ForceField: what the analysis sees of a potential; ``ASEForceField`` gives it any ASE calculator.

Imports no torch, so that a published model's calculator is measured without loading ours.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError
from ase.stress import voigt_6_to_full_3x3_stress

from equimd.contract.structures import Predicted, Structure
from equimd.contract.subject import Predict
from equimd.errors import InputError
from equimd.rotations import rotate_vectors


@dataclass(frozen=True)
class Evaluation:
    """Predictions for S frames: energies (S,) in eV, forces S × (N, 3) in eV/Å, stresses S × (3, 3) in eV/Å³ or None.

    Stress is the raw 3×3, antisymmetric part included where the force field has one.
    """

    energies: np.ndarray
    forces: list[np.ndarray]
    stresses: list[np.ndarray | None]


@runtime_checkable
class ForceField(Protocol):
    """The least that can be measured; the optional methods below are used where present.

    evaluate_rotated(frame, rotations (K, 3, 3)) -> Evaluation: K rotated copies at once, in the ROTATED frame;
    with_dtype("float32" | "float64") -> ForceField: the same potential in another precision;
    synchronize() -> None: wait until the device is idle; peak_memory() -> float: MiB so far;
    profile(frame) -> dict: seconds of each part of an evaluation.
    """

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    @property
    def device(self) -> str:
        """Such as "cpu", "cuda:0" or "unknown"."""
        ...

    @property
    def dtype(self) -> str:
        """Such as "float32", "float64" or "unknown"."""
        ...

    def evaluate(self, frames: Sequence[Atoms]) -> Evaluation:
        """Energies, forces and stresses of the frames, which are not changed."""
        ...


class ASEForceField:
    """Any ASE calculator as a ForceField, one frame after the other."""

    def __init__(self, calculator: Any, name: str | None = None) -> None:
        if not callable(getattr(calculator, "get_forces", None)):
            raise InputError(f"{type(calculator).__name__} is not a force field; accepted is any ASE calculator")
        self.calculator = calculator
        self.name: str = name or str(getattr(calculator, "name", None) or type(calculator).__name__)
        self.device = str(getattr(calculator, "device", "unknown"))
        dtype = getattr(calculator, "dtype", "unknown")
        self.dtype = str(getattr(dtype, "__name__", dtype)).removeprefix("torch.")  # numpy's are classes

    def evaluate(self, frames: Sequence[Atoms]) -> Evaluation:
        """Energies, forces and (for fully periodic frames, where implemented) stresses; constraints are ignored."""
        energies, forces, stresses = [], [], []
        for frame in frames:
            atoms = frame.copy()
            # Forces first: a calculator that computes what it is asked for has the energy by then, too.
            force = np.array(self.calculator.get_forces(atoms), dtype=np.float64)
            if force.shape != (len(atoms), 3):
                raise InputError(f"{self.name} returned forces of shape {force.shape}; expected ({len(atoms)}, 3)")
            forces.append(force)
            energies.append(float(self.calculator.get_potential_energy(atoms)))
            stresses.append(self._stress(atoms))
        return Evaluation(np.array(energies), forces, stresses)

    def _stress(self, atoms: Atoms) -> np.ndarray | None:
        if not atoms.pbc.all() or "stress" not in getattr(self.calculator, "implemented_properties", ("stress",)):
            return None
        try:
            stress = np.array(self.calculator.get_stress(atoms), dtype=np.float64)
        except (PropertyNotImplementedError, NotImplementedError, AttributeError):
            return None
        return stress if stress.shape == (3, 3) else voigt_6_to_full_3x3_stress(stress)

    def peak_memory(self) -> float:
        """Peak resident memory of this process in MiB."""
        return process_peak_memory()


def as_force_field(obj: Any) -> ForceField:
    """``obj`` itself if it is a ForceField, an ASE calculator wrapped as one; anything else is refused."""
    if isinstance(obj, ForceField):
        return obj
    return ASEForceField(obj)


def rotated_frame(frame: Atoms, rotation: np.ndarray) -> Atoms:
    """A copy of the structure, rotated with its cell and momenta; tags, charges and info stay as they are."""
    out = frame.copy()
    out.set_constraint()
    out.set_cell(rotate_vectors(frame.cell.array, rotation), scale_atoms=False)
    out.positions = rotate_vectors(frame.positions, rotation)
    if frame.has("momenta"):
        out.arrays["momenta"] = rotate_vectors(frame.arrays["momenta"], rotation)
    return out


def evaluate_rotated(field: ForceField, frame: Atoms, rotations: np.ndarray) -> Evaluation:
    """Predictions for K rotated copies of one frame, in the rotated frame; as one batch where the field offers it."""
    batched = getattr(field, "evaluate_rotated", None)
    if batched is not None:
        return batched(frame, rotations)
    return field.evaluate([rotated_frame(frame, rotation) for rotation in rotations])


def in_precision(field: ForceField, dtype: str) -> ForceField | None:
    """The same force field in "float32" or "float64", or None where it has one precision only.

    None, too, for a ``stochastic`` one: its two precisions would differ by more than rounding.
    """
    if getattr(field, "stochastic", False):
        return None
    if field.dtype == dtype:
        return field
    change = getattr(field, "with_dtype", None)
    return None if change is None else change(dtype)


def as_predict(field: ForceField) -> Predict:
    """The force field as the contract sees it: a function of plain structures."""

    def predict(structures: Sequence[Structure]) -> list[Predicted]:
        got = field.evaluate([Atoms(s.numbers, positions=s.positions, cell=s.cell, pbc=s.pbc) for s in structures])
        rows = zip(got.energies, got.forces, got.stresses, strict=True)
        return [
            Predicted(float(energy), np.asarray(forces, dtype=np.float64), stress) for energy, forces, stress in rows
        ]

    return predict


def synchronize(field: ForceField) -> None:
    """Wait until the field's device is idle; nothing to do where it does not say how."""
    getattr(field, "synchronize", lambda: None)()


def process_peak_memory() -> float:
    """Peak resident memory of this process in MiB; NaN where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
