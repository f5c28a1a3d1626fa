"""The certificate: every check on every structure, the worst of each as a row."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np

from equimd.contract import derivatives, distances, invariances, repetition
from equimd.contract.structures import Predicted, Structure
from equimd.contract.subject import (
    NotApplicable,
    Part,
    Predict,
    Refused,
    Rounding,
    Subject,
    Tolerances,
    energy_rounding,
    estimate_rounding,
    measured_tolerances,
)
from equimd.errors import FailedError, InputError
from equimd.results import Block, Number, Provenance, Result

Status = Literal["pass", "fail", "not applicable"]
# Of the largest force: what a network may break of a symmetry that it was trained to have, but does not have built in.
# The worst atom of the shipped transformers is off by up to half of this.
LEARNED = 0.02
_SYMMETRIES = ("rotation", "inversion")
# Checks that need other structures than the one given, which a calculator may refuse. The others describe the same
# structure again, or one close to it: a calculator that raises there is at fault.
_MAY_REFUSE = ("batch", "cell_orientation", "neighbors", "extensivity", "locality", "isolated_atom", "far_dimer")
_MAY_REFUSE += ("smoothness",)


class Row(Block):
    """One check: its worst deviation, what is accepted and why, on which structure; a note if it does not apply."""

    name: str
    value: Number | None
    tolerance: float | None
    unit: str
    status: Status
    quantity: str = ""
    structure: str = ""
    why: str = ""
    note: str = ""


class Certificate(Result):
    """What holds of a calculator, row by row; ``ok`` if nothing failed."""

    calculator: str
    ok: bool
    structures: list[str]
    learned_symmetry: bool
    rows: list[Row]
    seconds: float
    provenance: Provenance

    @property
    def line(self) -> str:
        """One line to quote."""
        names: dict[str, list[str]] = {"pass": [], "fail": [], "not applicable": []}
        for row in self.rows:
            names[row.status].append(row.name)
        passed, failed, absent = names.values()
        verdict = f"{len(passed)} of {len(passed) + len(failed)} checks passed"
        verdict += f", failed: {', '.join(failed)}" if failed else ""
        verdict += f", not applicable: {', '.join(absent)}" if absent else ""
        version = self.provenance.versions["equimd"]
        return f"{self.calculator}: {verdict} ({', '.join(self.structures)}; equimd {version} check)"


class Case(NamedTuple):
    """A structure, what is predicted for it, and how exact that is."""

    name: str
    structure: Structure
    base: Predicted
    rounding: Rounding
    accepted: Tolerances


Check = Callable[[Subject, Case], list[Part]]


def _exact(check: Callable[[Subject, Structure, Predicted, Tolerances], list[Part]]) -> Check:
    return lambda subject, case: check(subject, case.structure, case.base, case.accepted)


def _smooth(check: Callable[[Subject, Structure, Predicted, Rounding], list[Part]]) -> Check:
    return lambda subject, case: check(subject, case.structure, case.base, case.rounding)


def _repeatability(subject: Subject, case: Case) -> list[Part]:
    return repetition.repeatability(subject, case.structure, case.base, case.accepted, case.rounding)


CHECKS: dict[str, Check] = {
    "repeatability": _repeatability,
    "batch": _exact(repetition.batch),
    "rotation": _exact(invariances.rotation),
    "inversion": _exact(invariances.inversion),
    "translation": _exact(invariances.translation),
    "lattice_translation": _exact(invariances.lattice_translation),
    "permutation": _exact(invariances.permutation),
    "cell_orientation": _exact(invariances.cell_orientation),
    "neighbors": _exact(invariances.neighbors),
    "extensivity": _exact(distances.extensivity),
    "locality": _exact(distances.locality),
    "isolated_atom": _exact(invariances.isolated_atom),
    "far_dimer": _exact(distances.far_dimer),
    "gradient": _smooth(derivatives.gradient),
    "stress": _smooth(derivatives.stress),
    "jacobian": _smooth(derivatives.jacobian),
    "smoothness": _smooth(distances.smoothness),
}


def make_case(subject: Subject, name: str, structure: Structure) -> Case:
    """Predict a structure, and estimate how exactly.

    Raises:
        InputError: for a structure that the calculator refuses.
        FailedError: for predictions that are not finite.
    """
    try:
        base = subject.alone(structure)
        finite = np.isfinite(base.energy) and np.isfinite(base.forces).all()
        rounding = estimate_rounding(subject.alone, structure) if finite else Rounding(0.0, 0.0, None)
        if finite:
            rounding = rounding._replace(energy=max(rounding.energy, energy_rounding(subject.alone, structure)))
    except Refused as refusal:
        raise InputError(
            f"{name} cannot be computed: {refusal}; accepted is a structure of known elements"
        ) from refusal
    if not finite:
        raise FailedError(f"the energy or forces of {name} are not finite: there is nothing to check")
    return Case(name, structure, base, rounding, measured_tolerances(base, structure, rounding))


def certify(
    predict: Predict,
    structures: Sequence[tuple[str, Structure]],
    learned_symmetry: bool = False,
    limits: dict[str, float] | None = None,
    progress: Callable[[int, int], None] | None = None,
    n_points: int = 121,
) -> list[Row]:
    """Every check on every structure; a row each, with the worst part.

    learned_symmetry: rotations and inversion are learned, not built in, and hold to a share of the largest force.
    limits: other tolerances by name of the row, in eV/Å or, for rows without forces, in the unit of the row.
    """
    subject = Subject(predict)
    cases = [make_case(subject, name, structure) for name, structure in structures]
    checks = CHECKS | {"smoothness": _smooth(partial(distances.smoothness, n_points=n_points))}
    rows = []
    for done, (name, check) in enumerate(checks.items()):
        if progress is not None:
            progress(done, len(checks))
        rows.append(_row(name, check, subject, cases, learned_symmetry, (limits or {}).get(name)))
    if progress is not None:
        progress(len(checks), len(checks))
    return rows


def _row(name: str, check: Check, subject: Subject, cases: list[Case], learned: bool, limit: float | None) -> Row:
    found: list[tuple[Part, str]] = []
    notes = []
    for case in cases:
        try:
            parts = check(subject, case)
        except NotApplicable as reason:
            if isinstance(reason, Refused) and name not in _MAY_REFUSE:
                return _failed(name, case.name, str(reason))
            notes.append(str(reason))
            continue
        if learned and name in _SYMMETRIES:
            parts = [_loosened(part, case) for part in parts]
        if limit is not None:
            parts = _limited(parts, limit)
        found += [(part, case.name) for part in parts]
    if not found:
        return Row(name=name, value=None, tolerance=None, unit="", status="not applicable", note="; ".join(set(notes)))
    worst, structure = max(found, key=lambda pair: pair[0].ratio)
    return Row(
        name=name,
        value=worst.value,
        tolerance=worst.tolerance,
        unit=worst.unit,
        status="pass" if worst.value <= worst.tolerance else "fail",
        quantity=worst.quantity,
        structure=structure,
        why=worst.why,
    )


def _failed(name: str, structure: str, note: str) -> Row:
    """A row without a number: the calculator raised."""
    return Row(name=name, value=None, tolerance=None, unit="", status="fail", structure=structure, note=note)


def _limited(parts: list[Part], limit: float) -> list[Part]:
    """The force (or else the first quantity) may deviate by ``limit``, the others in proportion."""
    first = next((part for part in parts if part.unit == "eV/Å"), parts[0])
    factor = limit / first.tolerance
    return [part._replace(tolerance=part.tolerance * factor, why="as asked for") for part in parts]


def _loosened(part: Part, case: Case) -> Part:
    """A part of a symmetry that is learned: energy and stress are scaled as forces are."""
    force = LEARNED * max(float(np.abs(case.base.forces).max()), 1e-3)
    factor = max(force / case.accepted.forces, 1.0)
    why = f"the symmetry is learned, not built in: {LEARNED:g} of the largest force"
    return part._replace(tolerance=part.tolerance * factor, why=why)
