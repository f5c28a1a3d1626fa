"""Quantum-chemical reference calculators, and the labelling of structures with them.

The references are the semi-empirical tight-binding methods GFN1-xTB (Grimme, Bannwarth, Shushkov, J. Chem. Theory
Comput. 13, 1989 (2017)) and GFN2-xTB (Bannwarth, Ehlert, Grimme, J. Chem. Theory Comput. 15, 1652 (2019)), computed by
tblite. They are equivariant to rounding and cheap enough to label whatever a simulation visits.
"""

import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import chemical_symbols

from equimd.errors import InputError, in_one_line
from equimd.origin import KEY as ORIGIN_KEY
from equimd.theory import is_same_level

METHODS = {"gfn1-xtb": "GFN1-xTB", "gfn2-xtb": "GFN2-xTB"}

# With tblite's default (1.0) forces carry an error of 6e-5 eV/Å from the self-consistent cycle, with 0.01 of 3e-7, for
# 15 % more time (ethanol): forces are then smooth enough for a fit and for conserving dynamics.
ACCURACY = 0.01

# So many frames on which a reference fails are named with their reasons.
_NAMED = 3

# Hund's rules for the neutral atom.
GROUND_STATE_MULTIPLICITIES = {1: 2, 2: 1, 3: 2, 4: 1, 5: 2, 6: 3, 7: 4, 8: 3, 9: 2, 10: 1, 11: 2, 12: 1, 13: 2, 14: 3}
GROUND_STATE_MULTIPLICITIES |= {15: 4, 16: 3, 17: 2, 18: 1, 35: 2, 53: 2}


def reference_calculator(name: str, *, charge: int = 0, multiplicity: int = 1) -> Calculator:
    """A new ASE calculator of the reference: energy (eV), forces (eV/Å) and, for periodic systems, stress (eV/Å³).

    It starts each self-consistent cycle from the wave function of its last call, so results depend on the history
    within the convergence threshold (3e-7 eV/Å in forces); `label` starts afresh for each frame.

    Args:
        name: `"gfn1-xtb"` or `"gfn2-xtb"`.
        charge: Total charge in elementary charges.
        multiplicity: Spin multiplicity 2S + 1.

    Raises:
        InputError: if the name is not known, or the multiplicity is below 1.
    """
    if name not in METHODS:
        raise InputError(f"unknown reference {name!r}; accepted: {', '.join(METHODS)}")
    if multiplicity < 1:
        raise InputError(f"multiplicity is {multiplicity}; accepted: 1 (singlet), 2 (doublet), ...")
    settings = {"charge": charge, "multiplicity": multiplicity, "accuracy": ACCURACY, "verbosity": 0}
    return _import_tblite()(method=METHODS[name], **settings)


class LabelWarning(UserWarning):
    """The reference fails on some frames, which are left out of what is measured."""


def label(
    frames: Iterable[Atoms], name: str, *, processes: int = 1, progress: Callable[[int], None] | None = None
) -> list[Atoms]:
    """Copies of the frames, in order, with the reference's energy, forces (N, 3) and, if fully periodic, stress (6,).

    Labels are in eV, eV/Å and eV/Å³ (ASE's sign and Voigt order) in a `SinglePointCalculator`. Every frame is a
    neutral singlet and starts from the atomic guess, so that its label depends on nothing but the frame. Frames on
    which the reference fails are left out, and a `LabelWarning` names them with the reason.

    Args:
        frames: Structures; their own calculators are not used.
        name: `"gfn1-xtb"` or `"gfn2-xtb"`.
        processes: Number of worker processes; 1 works in the calling process.
        progress: Called with the number of frames done, after each.

    Raises:
        InputError: if the name is not known, `processes` is below 1, or the reference fails on every frame.
    """
    labelled, _ = label_where_possible(frames, name, processes=processes, progress=progress)
    return [atoms for atoms in labelled if atoms.calc is not None]


def label_where_possible(
    frames: Iterable[Atoms],
    name: str,
    *,
    processes: int = 1,
    progress: Callable[[int], None] | None = None,
    of: str = "",
    refuse: bool = True,
) -> tuple[list[Atoms], dict[int, str]]:
    """As `label`, but with a copy of every frame: one on which the reference fails has no calculator.

    Second come the reasons, by index of the frame. ``of`` is added to a warning; without ``refuse`` the reference may
    fail on every frame.
    """
    reference_calculator(name)  # refuses an unknown name here rather than in a worker
    if processes < 1:
        raise InputError(f"processes is {processes}; accepted: 1 or more")
    labelled = [_bare(atoms) for atoms in frames]
    failed: dict[int, str] = {}
    with _labels(labelled, name, min(processes, len(labelled))) as results:
        for index, (atoms, outcome) in enumerate(zip(labelled, results, strict=True)):
            if isinstance(outcome, str):
                failed[index] = outcome
            else:
                atoms.calc = SinglePointCalculator(atoms, **outcome)
            if progress is not None:
                progress(index + 1)
    _say_failed(name, failed, len(labelled), of, refuse)
    return labelled, failed


def _say_failed(name: str, failed: dict[int, str], n_frames: int, of: str, refuse: bool) -> None:
    """Warn of the frames on which a reference failed, or refuse if none is left."""
    if not failed:
        return
    told = "; ".join(f"frame {index}: {reason}" for index, reason in list(failed.items())[:_NAMED])
    more = f"; and {len(failed) - _NAMED} more" if len(failed) > _NAMED else ""
    if refuse and len(failed) == n_frames:
        raise InputError(
            f"{name} fails on all {n_frames} frames{of} ({told}{more}); accepted: frames that it can label"
        )
    warnings.warn(
        f"{name} fails on {len(failed)} of {n_frames} frames{of}, which are left out ({told}{more})",
        LabelWarning,
        stacklevel=3,
    )


def level_mismatch(calculator: Any, reference: str | None) -> str | None:
    """The level of theory that a potential was trained on, if it states one and ``reference`` is another; else None."""
    level = getattr(calculator, "level_of_theory", None)
    same = level is None or reference is None or is_same_level(str(level), reference)
    return None if same else str(level)


def check_level(calculator: Any, reference: str | None, other_level: bool = False) -> None:
    """Refuse a reference that is another level of theory than that of the training, unless ``other_level`` allows it.

    Raises:
        InputError: with both levels.
    """
    level = level_mismatch(calculator, reference)
    if level is not None and not other_level:
        name = getattr(calculator, "name", "the potential")
        raise InputError(
            f"{name} was trained on {level}, the reference is {reference}: the errors would be those between two levels"
            f" of theory; accepted: {level}, frames labelled with it, or --other-level (other_level=True)"
        )


def isolated_atom_energies(name: str, numbers: Iterable[int]) -> dict[int, float]:
    """The energy (eV) of one neutral atom in its ground-state multiplicity, for each distinct atomic number.

    Raises:
        InputError: if the name is not known, or an element's multiplicity is not in `GROUND_STATE_MULTIPLICITIES`.
    """
    energies: dict[int, float] = {}
    for number in sorted({int(number) for number in numbers}):
        if number not in GROUND_STATE_MULTIPLICITIES:
            accepted = ", ".join(chemical_symbols[known] for known in GROUND_STATE_MULTIPLICITIES)
            raise InputError(f"no ground-state multiplicity for atomic number {number}; accepted: {accepted}")
        atom = Atoms(numbers=[number], positions=[(0.0, 0.0, 0.0)])
        atom.calc = reference_calculator(name, multiplicity=GROUND_STATE_MULTIPLICITIES[number])
        energies[number] = float(atom.get_potential_energy())
    return energies


def _import_tblite() -> type[Calculator]:
    """tblite's calculator with one OpenMP thread, unless the user chose a number.

    A molecule is too small to share, and waiting threads spin: on busy cores that costs a factor of a hundred. OpenMP
    reads the variable when it is loaded, so it is set for the first import only, and not left behind.
    """
    chosen = "OMP_NUM_THREADS" in os.environ
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        from tblite.ase import TBLite
    finally:
        if not chosen:
            del os.environ["OMP_NUM_THREADS"]
    return TBLite


@contextmanager
def _labels(frames: Sequence[Atoms], name: str, processes: int) -> Iterator[Iterator[dict[str, Any] | str]]:
    names = [name] * len(frames)
    if processes <= 1:
        yield map(_single_point, frames, names)
        return
    context = multiprocessing.get_context("spawn")  # OpenMP does not survive a fork
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield pool.map(_single_point, frames, names)


def _single_point(atoms: Atoms, name: str) -> dict[str, Any] | str:
    """Labels of one frame, or in one line why there are none."""
    properties = ["energy", "forces", "stress"] if atoms.pbc.all() else ["energy", "forces"]
    try:
        calculator = reference_calculator(name)
        calculator.calculate(atoms, properties)
        results = {key: calculator.results[key] for key in properties}
    except Exception as error:  # whatever a program of quantum chemistry finds wrong with a frame
        return in_one_line(error)
    odd = [key for key in properties if not np.isfinite(results[key]).all()]
    return f"values of {odd[0]} are not finite" if odd else results


def _bare(atoms: Atoms) -> Atoms:
    copy = atoms.copy()
    copy.calc = None
    copy.info.pop(ORIGIN_KEY, None)  # the results that it spoke of are gone
    return copy
