"""Who is compared, on which structure, and against which reference."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ase import Atoms

from equimd.calculators.forcefield import as_force_field
from equimd.errors import InputError
from equimd.frames import check_structure, read_frames
from equimd.references import METHODS, level_mismatch
from equimd.report.comparison import CompareSettings, Stopped

DEFAULT_PAIR = ("ethanol-equivariant", "ethanol-transformer")


@dataclass
class Contestant:
    """One potential while it is compared; what was simulated and labelled fills in as it is made.

    frames: of its own run, the start left out, with labels where the reference gave them. failed: why it gave none, by
    index of the frame. stopped: why the Langevin run or the NVE run ended before its last step.
    """

    name: str
    calculator: Any
    family: str
    header: dict[str, Any]
    frames: list[Atoms] = field(default_factory=list)
    times_fs: list[float] = field(default_factory=list)
    temperature_K: list[float] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    stopped: Stopped | None = None

    @property
    def stem(self) -> str:
        """What the names of its files begin with."""
        return stem_of(self.name)

    @property
    def labelled(self) -> list[Atoms]:
        """The frames that have labels."""
        return [frame for frame in self.frames if frame.calc is not None]


def start_structure(potentials: Sequence[Any], structure: Atoms | str | Path | None) -> Atoms:
    """The structure that runs start from: the one given, or the first potential's ``start.xyz``."""
    if isinstance(structure, Atoms):
        return structure.copy()
    if structure is None:
        first = potentials[0] if len(potentials) else None
        if not isinstance(first, str | Path):
            raise InputError("no structure given; expected one, as the first potential brings none")
        from equimd.models.checkpoint import find_potential

        found = find_potential(first)
        structure = (found if found.is_dir() else found.parent) / "start.xyz"
        if not structure.is_file():
            raise InputError(f"{first} brings no start.xyz; give a structure")
    atoms = next(iter(read_frames(structure)))  # checked by the caller, so no word on its plausibility
    atoms.calc = None
    return atoms


def make_contestants(potentials: Sequence[Any], settings: CompareSettings) -> list[Contestant]:
    """A contestant for each potential, under names that differ."""
    if isinstance(potentials, str) or not len(potentials):
        raise InputError(f"potentials are {potentials!r}; expected a list of at least one")
    out: list[Contestant] = []
    for potential in potentials:
        calculator = potential
        if isinstance(potential, str | Path) or not callable(getattr(potential, "get_forces", None)):
            from equimd.calculators.ase import EquimdCalculator

            calculator = EquimdCalculator(potential, device=settings.device, dtype=settings.dtype)
        name = as_force_field(calculator).name
        taken = [c.stem.lower() for c in out]  # names of files, some of which differ in case only on some disks
        if stem_of(name).lower() in taken:
            free = (k for k in range(2, len(potentials) + 2) if stem_of(f"{name}-{k}").lower() not in taken)
            name = f"{name}-{next(free)}"
        header = getattr(calculator, "header", None) or {}
        out.append(Contestant(name, calculator, str(getattr(calculator, "family", "unknown")), header))
    return out


def stem_of(name: str) -> str:
    """A name as it begins the names of files."""
    return re.sub(r"[^\w.-]+", "_", name)


def check(contestant: Contestant, atoms: Atoms) -> None:
    """Refuse a structure that the potential cannot describe, with the potential's name."""
    potential = getattr(contestant.calculator, "potential", None)
    try:
        check_structure(atoms, getattr(potential, "species", None))
    except InputError as error:
        raise InputError(f"{contestant.name}: {error}") from error


def common_reference(contestants: Iterable[Contestant], settings: CompareSettings) -> str:
    """The method that labels the frames: the one asked for, or the one all potentials were trained on."""
    if settings.reference is not None:
        known = {settings.reference.lower()}
    else:
        recipes = [c.header.get("recipe") or {} for c in contestants]
        known = {str(r["data"]["reference"]).lower() for r in recipes if (r.get("data") or {}).get("reference")}
    accepted = ", ".join(METHODS)
    if len(known) > 1:
        raise InputError(f"the potentials were trained on {' and '.join(sorted(known))}; choose one reference")
    if not known or not known <= set(METHODS):
        what = f"the reference is {known.pop()!r}" if known else "no potential says what it was trained on"
        raise InputError(f"{what}; accepted as reference: {accepted}")
    return known.pop()


def other_levels(contestants: Iterable[Contestant], reference: str) -> dict[str, str]:
    """The level of each contestant's training, if it is not that of the reference."""
    levels = {c.name: level_mismatch(c.calculator, reference) for c in contestants}
    return {name: level for name, level in levels.items() if level is not None}
