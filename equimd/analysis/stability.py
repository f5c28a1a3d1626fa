"""Does a simulation stay physical? First time a bond leaves its reference, after Fu et al. (2023)."""

from collections.abc import Iterable

import numpy as np
from ase import Atoms

from equimd.analysis.inputs import checked_frames
from equimd.analysis.observables import bond_lengths, bonds_of
from equimd.errors import InputError
from equimd.results import Block


class StabilityResult(Block):
    """Whether every bond stayed within ``tolerance`` Å of its reference mean, and when the first one did not.

    first_broken_ps and broken_bond are null for a stable run; largest_deviation in Å over all bonds and frames.
    """

    stable: bool
    first_broken_ps: float | None
    broken_bond: tuple[int, int] | None
    largest_deviation: float
    tolerance: float
    n_bonds: int
    n_frames: int
    duration_ps: float


def bond_stability(
    frames: Iterable[Atoms],
    interval_fs: float,
    reference: Atoms | Iterable[Atoms] | None = None,
    tolerance: float = 0.5,
) -> StabilityResult:
    """Follow the bonds along ``frames``, ``interval_fs`` apart.

    Bonds are those of the first reference frame and their means are taken over the reference (one structure or a
    trajectory of the reference method); without one, the first frame is the reference.
    """
    listed = checked_frames(frames)
    standard = listed[:1] if reference is None else checked_frames(reference)
    if not np.array_equal(standard[0].numbers, listed[0].numbers):
        raise InputError(
            f"reference is {standard[0].symbols}, the trajectory {listed[0].symbols}; expected the same atoms"
        )
    bonds = bonds_of(standard[0])
    deviations = np.abs(bond_lengths(listed, bonds) - bond_lengths(standard, bonds).mean(axis=0))
    broken = np.argwhere(deviations > tolerance)
    when, which = (int(broken[0][0]), int(broken[0][1])) if len(broken) else (0, 0)
    return StabilityResult(
        stable=len(broken) == 0,
        first_broken_ps=when * interval_fs / 1000 if len(broken) else None,
        broken_bond=(int(bonds[which, 0]), int(bonds[which, 1])) if len(broken) else None,
        largest_deviation=float(deviations.max(initial=0.0)),
        tolerance=tolerance,
        n_bonds=len(bonds),
        n_frames=len(listed),
        duration_ps=(len(listed) - 1) * interval_fs / 1000,
    )
