"""Which of ASE's constraints MD keeps, and how many degrees of freedom they take."""

import numpy as np
from ase import Atoms

from equimd.errors import InputError

# These act on each atom alone, so ASE's default for momenta (the same as for forces) keeps them.
_OF_ONE_ATOM = ("FixAtoms", "FixCartesian", "FixScaled", "FixedLine", "FixedPlane", "ExternalForce")


def check_constraints(atoms: Atoms, ensemble: str) -> None:
    """Refuse constraints that ASE's integrators would not keep, or whose degrees of freedom cannot be counted.

    Raises:
        InputError: such a constraint, any constraint in NPT, or constraints that leave no atom free to move.
    """
    if not atoms.constraints:
        return
    names = [type(constraint).__name__ for constraint in atoms.constraints]
    if ensemble == "npt":
        raise InputError(
            f"the structure has the constraint {names[0]}, but npt moves all atoms with the cell;"
            " accepted: npt without constraints, nvt or nve"
        )
    for constraint, name in zip(atoms.constraints, names, strict=True):
        if name not in _OF_ONE_ATOM and not _counts_and_projects(type(constraint)):
            raise InputError(
                f"the structure has the constraint {name}, which MD cannot keep;"
                f" accepted: {', '.join(_OF_ONE_ATOM)}, FixBondLengths, FixLinearTriatomic, FixCom, Hookean"
            )
    if removed_degrees_of_freedom(atoms) >= 3 * len(atoms):
        raise InputError(f"the constraints ({', '.join(names)}) leave no atom free to move; accepted: one or more")


def fixed_components(atoms: Atoms) -> np.ndarray:
    """Which components of the positions FixAtoms and FixCartesian hold, (N, 3)."""
    fixed = np.zeros((len(atoms), 3), dtype=bool)
    for constraint in atoms.constraints:
        if type(constraint).__name__ in ("FixAtoms", "FixCartesian"):
            fixed[constraint.index] |= getattr(constraint, "mask", True)
    return fixed


def removed_degrees_of_freedom(atoms: Atoms) -> int:
    """How many degrees of freedom the constraints take; an atom that two constraints fix counts once."""
    others = [c for c in atoms.constraints if type(c).__name__ not in ("FixAtoms", "FixCartesian")]
    return int(fixed_components(atoms).sum()) + sum(int(c.get_removed_dof(atoms)) for c in others)


def described(atoms: Atoms) -> list[str]:
    """The constraints as text that does not depend on their order."""
    fixed = fixed_components(atoms)
    out = [
        f"atom {atom} fixed along {''.join(axis for axis, held in zip('xyz', fixed[atom], strict=True) if held)}"
        for atom in np.flatnonzero(fixed.any(axis=1))
    ]
    others = [c for c in atoms.constraints if type(c).__name__ not in ("FixAtoms", "FixCartesian")]
    return out + sorted(str(constraint.todict()) for constraint in others)


def _counts_and_projects(kind: type) -> bool:
    """Whether a class says itself what it does to momenta and how many degrees of freedom it takes."""
    from ase.constraints import FixConstraint

    return all(
        getattr(kind, name, None) not in (None, getattr(FixConstraint, name))
        for name in ("adjust_momenta", "get_removed_dof")
    )
