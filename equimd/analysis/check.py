"""A certificate for any calculator: what every simulation relies on, measured."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import bulk, molecule

from equimd.calculators.forcefield import ForceField, as_force_field, as_predict
from equimd.contract.certificate import CHECKS, Certificate, certify
from equimd.contract.structures import Structure
from equimd.errors import InputError
from equimd.frames.electrons import contradiction, stated_electrons
from equimd.results import provenance

_RATTLE = 0.05  # Å: no force is zero by symmetry, and none is large
_FEWEST = 8  # atoms of a periodic structure: forces on the atom of a primitive cell are zero by symmetry
_MOST = 3  # structures
# The path that looks for jumps: as many points as fit into this time, within these bounds.
_SECONDS, _POINTS = 12.0, (41, 161)


def check(
    calculator: Any,
    structures: Atoms | Sequence[Atoms] | None = None,
    *,
    tolerances: Mapping[str, float] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Certificate:
    """Check what every simulation relies on: symmetries, derivatives, distances, repetition.

    Structures are rattled by 0.05 Å, so that no force vanishes by symmetry, and small cells are repeated. Each row of
    the certificate holds the worst deviation over all structures. A row applies to no structure if the calculator
    refuses the structures that it needs, such as single atoms.

    Args:
        calculator: Any ASE calculator or ForceField.
        structures: One to three structures of elements that it knows; without any, the first of ethanol, Cu, Si, NaCl
            and Ar that it can compute.
        tolerances: Other tolerances by name of the row, in eV/Å; in eV for ``smoothness``, eV/Å² for ``jacobian``, and
            eV/Å³ for ``stress``.
        seed: Of the displacements.
        progress: Called with (checks done, checks in all).

    Raises:
        InputError: for an unknown row, no atoms, more than three structures, a structure that cannot be computed, or
            one that states a charge or an open shell.
        FailedError: for energies or forces that are not finite.
    """
    field = as_force_field(calculator)
    limits = dict(tolerances or {})
    for name, limit in limits.items():
        if name not in CHECKS:
            raise InputError(f"there is no check {name!r}; accepted are {', '.join(CHECKS)}")
        if not 0 < limit < np.inf:
            raise InputError(f"the tolerance of {name} is {limit}; accepted is a positive number")
    listed = [structures] if isinstance(structures, Atoms) else list(structures or _default(field))
    if len(listed) > _MOST:
        raise InputError(f"{len(listed)} structures given; accepted are 1 to {_MOST}")
    prepared = [prepare(atoms, seed) for atoms in listed]
    learned = bool(getattr(field, "learned_symmetry", False))
    start = time.perf_counter()
    rows = certify(
        as_predict(field),
        [(_name(atoms), _structure(atoms)) for atoms in prepared],
        learned_symmetry=learned,
        limits=limits,
        progress=progress,
        n_points=_n_points(field, prepared[0]),
    )
    return Certificate(
        calculator=field.name,
        ok=all(row.status != "fail" for row in rows),
        structures=[_name(atoms) for atoms in prepared],
        learned_symmetry=learned,
        rows=rows,
        seconds=time.perf_counter() - start,
        provenance=provenance(),
    )


def prepare(atoms: Atoms, seed: int = 0) -> Atoms:
    """A rattled copy without constraints; a small cell is repeated along its shortest vectors.

    Raises:
        InputError: for no atoms, a charge or an open shell, or a periodic direction without a vector.
    """
    if len(atoms) == 0:
        raise InputError("the structure has 0 atoms; expected at least 1")
    for one in stated_electrons(atoms):
        if (problem := contradiction(one, 0.0, 1.0)) is not None:
            raise InputError(f"{_name(atoms)}: {problem}; accepted: neutral singlets, which can be cut and repeated")
    periodic = atoms.copy()
    periodic.calc = None
    periodic.set_constraint()
    if not np.isfinite(periodic.positions).all() or not np.isfinite(periodic.cell.array[periodic.pbc]).all():
        raise InputError(f"{_name(atoms)} has positions or cell vectors that are not finite")
    if periodic.pbc.any() and np.linalg.matrix_rank(periodic.cell.array[periodic.pbc]) < periodic.pbc.sum():
        raise InputError(f"{_name(atoms)} is periodic in {int(atoms.pbc.sum())} directions, but its cell is flat")
    while periodic.pbc.any() and len(periodic) < _FEWEST:
        lengths = np.where(periodic.pbc, periodic.cell.lengths(), np.inf)
        shortest = int(np.argmin(lengths))
        periodic = periodic.repeat([2 if k == shortest else 1 for k in range(3)])
    periodic.positions += np.random.default_rng(seed).normal(scale=_RATTLE, size=periodic.positions.shape)
    return periodic


def _default(field: ForceField) -> list[Atoms]:
    """The first of some everyday structures that the force field can compute."""
    tried = []
    for atoms in (molecule("CH3CH2OH"), bulk("Cu"), bulk("Si"), bulk("NaCl", "rocksalt", a=5.64), bulk("Ar", a=5.3)):
        try:
            if np.isfinite(field.evaluate([prepare(atoms)]).forces[0]).all():
                return [atoms]
        except Exception as error:  # whatever a calculator raises for what it does not know
            tried.append(f"{_name(atoms)} ({type(error).__name__})")
    raise InputError(f"{field.name} cannot compute any of {', '.join(tried)}; name a structure that it can")


def _name(atoms: Atoms) -> str:
    kind = {0: "", 3: ", periodic"}.get(int(atoms.pbc.sum()), ", partly periodic")
    return f"{atoms.symbols.formula.format('hill')}{kind}"


def _structure(atoms: Atoms) -> Structure:
    return Structure(atoms.positions.copy(), atoms.numbers.copy(), atoms.cell.array.copy(), atoms.pbc.copy())


def _n_points(field: ForceField, atoms: Atoms) -> int:
    """How many points of a path can be afforded; odd, as Simpson's rule wants."""
    try:
        start = time.perf_counter()
        field.evaluate([atoms])
        seconds = time.perf_counter() - start
    except Exception:  # the certificate says so in its own words
        return _POINTS[0]
    return int(np.clip(_SECONDS / max(seconds, 1e-4), *_POINTS)) // 2 * 2 + 1
