"""Charge and spin that frames state, under whatever name, and whether a potential is for them: the one definition.

Entries of ``atoms.info`` count by their name, in any case and behind any prefix: ``charge``, ``total_charge``,
``REF_charge``, ``charge_state`` are charges in e; ``multiplicity``, ``spin_multiplicity`` are 2S + 1; ``spin`` and
``total_spin`` are 2S + 1 too, where 0 counts as a singlet, since some programs store 2S there. If no entry speaks of
a charge, initial charges do when they add up to an integer; if none speaks of a spin, initial magnetic moments do. A
moment that a reference computed for a molecule (``magmom``) counts too. Charges that an analysis assigns to atoms
(Mulliken, MBIS) state nothing, and neither does an isolated atom, which is open-shell by nature and only sets a zero
of energy.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from equimd.errors import InputError

What = Literal["charge", "multiplicity", "spin"]
_NAMES: dict[str, What] = {"charge": "charge", "chg": "charge", "multiplicity": "multiplicity", "spin": "spin"}
_NAMES |= {"mult": "multiplicity", "2s+1": "multiplicity"}
# Numbers of unpaired electrons, 2S: one less than the multiplicity.
_UNPAIRED = ("uhf", "nunpaired", "unpaired")
_NAMES |= dict.fromkeys(_UNPAIRED, "multiplicity")
# What may be joined to a name without an underscore: totalCharge, spinMultiplicity.
_JOINED = ("total", "net", "system", "molecular", "formal", "spin", "ref", "dft", "qm")
# Words that make it the charge or spin of a part, of an analysis, or of nuclei.
_OF_A_PART = (
    *("partial", "atomic", "atom", "site", "local", "nuclear", "nucleus", "core", "valence", "surface", "fragment"),
    *("point", "external", "background", "image", "effective", "born", "max", "min", "mean", "per", "number", "n"),
    *("mulliken", "loewdin", "lowdin", "hirshfeld", "bader", "mbis", "ddec", "resp", "chelpg", "esp", "cm5", "nbo"),
)
_SAME = 0.01
_ROUNDED = 0.1  # of sums over atoms: charges are printed with three digits, and moments are integrals over spheres


class Statement(NamedTuple):
    """What a frame states: a charge in e, a multiplicity 2S + 1, or a ``spin``; and the name that states it."""

    what: What
    value: float
    source: str


def check_electrons(
    header: Mapping[str, Any],
    charge: float | None = None,
    multiplicity: float | None = None,
    spin: float | None = None,
) -> None:
    """Refuse a charge or spin that the training data did not have; None means that nothing is said about it.

    Data are neutral and closed-shell unless the checkpoint's header says otherwise (``charge`` in e, ``multiplicity``
    2S + 1, at the top or in the recipe's data).

    Raises:
        InputError: with the value, and the one that the potential was trained on.
    """
    of_data, wanted = electrons_of(header)
    given: tuple[tuple[What, float | None], ...] = (("charge", charge), ("multiplicity", multiplicity), ("spin", spin))
    for what, value in given:
        if value is not None and (problem := contradiction(Statement(what, float(value), what), of_data, wanted)):
            raise InputError(f"{problem}; the potential was trained on {_trained_on(what, of_data, wanted)}")


def check_atoms(atoms: Atoms, header: Mapping[str, Any], where: str = "") -> None:
    """Refuse a frame whose charge or spin, as it states them, the training data did not have.

    Raises:
        InputError: that begins with ``where``.
    """
    statements = stated_electrons(atoms, where)
    if not statements:
        return
    of_data, wanted = electrons_of(header)
    for one in statements:
        if problem := contradiction(one, of_data, wanted):
            raise InputError(f"{where}{problem}; the potential was trained on {_trained_on(one.what, of_data, wanted)}")


def check_frames(frames: Iterable[Atoms], header: Mapping[str, Any], name: str, stride: int = 1) -> None:
    """``check_atoms`` for every frame of a file ``name``, of which every ``stride``-th was read."""
    for k, atoms in enumerate(frames):
        check_atoms(atoms, header, f"{name}, frame {k * stride}: ")


def electrons_of(header: Mapping[str, Any]) -> tuple[float, float]:
    """Charge and multiplicity of the data that a checkpoint was trained on."""
    return float(_of_data(header, "charge", 0.0)), float(_of_data(header, "multiplicity", 1.0))


def stated_electrons(atoms: Atoms, where: str = "") -> list[Statement]:
    """What a frame states of its charge and spin; nothing of an isolated atom (``is_isolated_atom``).

    Raises:
        InputError: for an entry that is no number, beginning with ``where``.
    """
    arrays = atoms.arrays
    entries, moment = electron_entries(atoms), _moment_of_molecule(atoms)
    if not entries and moment is None and "initial_charges" not in arrays and "initial_magmoms" not in arrays:
        return []
    if is_isolated_atom(atoms):
        return []
    found = []
    for name, value in entries.items():
        number = _number(value, f"{where}{name}")
        if number is not None:
            number += 1.0 if str(name).lower().endswith(_UNPAIRED) else 0.0
            found.append(Statement(electron_kind(name), number, name))  # type: ignore[arg-type]
    kinds = {one.what for one in found}
    if "charge" not in kinds and "initial_charges" in arrays:
        found += _of_sum("charge", float(arrays["initial_charges"].sum()), 0.0, "initial_charges")
    if not kinds & {"multiplicity", "spin"} and "initial_magmoms" in arrays:
        # A vector for each atom if moments are not collinear.
        total = float(np.linalg.norm(np.atleast_1d(arrays["initial_magmoms"].sum(axis=0))))
        found += _of_sum("multiplicity", total, 1.0, "initial_magmoms")
    elif not kinds & {"multiplicity", "spin"} and moment is not None:
        found += _of_sum("multiplicity", moment, 1.0, "magmom")
    return found


def _moment_of_molecule(atoms: Atoms) -> float | None:
    """The magnetic moment that a reference computed for a molecule; that of a crystal is no choice of its spin."""
    if not isinstance(atoms.calc, SinglePointCalculator) or atoms.pbc.any():
        return None
    moment = atoms.calc.results.get("magmom")
    return None if moment is None else float(np.linalg.norm(np.atleast_1d(moment)))


def electron_entries(atoms: Atoms) -> dict[str, Any]:
    """The entries of ``atoms.info`` that state a charge or spin, as they are."""
    return {name: value for name, value in atoms.info.items() if electron_kind(name) is not None}


@lru_cache(4096)  # of names: asked for at every step of an MD run
def electron_kind(name: Any) -> What | None:
    """What an entry of this name states; None if it speaks of something else."""
    if not isinstance(name, str):
        return None
    words = name.lower().replace("-", "_").replace(".", "_").replace(" ", "_").removesuffix("_state").split("_")
    last = words.pop()
    for first in _JOINED:
        if last.removeprefix(first) in _NAMES:
            last = last.removeprefix(first)
    return None if set(words).intersection(_OF_A_PART) else _NAMES.get(last)


def contradiction(one: Statement, charge: float, multiplicity: float) -> str | None:
    """How a statement contradicts the charge and multiplicity of a set; None if it does not."""
    if one.what == "charge":
        wrong = not abs(one.value - charge) <= _SAME
        said = f"total charge is {one.value:g} e"
    else:
        value = 1.0 if one.what == "spin" and one.value == 0 and multiplicity == 1 else one.value
        wrong = not abs(value - multiplicity) <= _SAME
        said = f"spin multiplicity is {one.value:g}"
    return (said if one.source in _NAMES else f"{said} ({one.source})") if wrong else None


def is_isolated_atom(atoms: Atoms) -> bool:
    """Whether a frame is one atom that says so: ``config_type=IsolatedAtom``, in any spelling."""
    if len(atoms) != 1:
        return False
    kind = str(atoms.info.get("config_type", "")).lower().replace("_", "").replace("-", "")
    return kind == "isolatedatom"


def _of_sum(what: What, total: float, base: float, source: str) -> list[Statement]:
    """What a sum over atoms states; nothing if it is no integer, as charges of a part or a guess of moments are not."""
    if not np.isfinite(total):
        raise InputError(f"{source} add up to {total}; accepted: finite numbers")
    nearest = float(round(total))
    return [Statement(what, base + nearest, source)] if abs(total - nearest) <= _ROUNDED else []


def _number(value: Any, where: str) -> float | None:
    """The number of an entry; None for an entry that is None, or holds a number for every atom."""
    if value is None:
        return None
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{where} is {str(value)[:40]!r}; accepted: a number") from None
    if array.size != 1:
        return None
    number = float(array.reshape(()))
    if not np.isfinite(number):
        raise InputError(f"{where} is {number}; accepted: a finite number")
    return number


def _trained_on(what: What, charge: float, multiplicity: float) -> str:
    return f"{charge:g} e" if what == "charge" else f"{multiplicity:g}"


def _of_data(header: Mapping[str, Any], key: str, default: float) -> float:
    data = (header.get("recipe") or {}).get("data") or {}
    value = header.get(key, data.get(key))
    return default if value is None else value


class Tally:
    """The different statements of a set of frames, each with the frame that makes it first and how many make it.

    ``entries`` are [what, value, source, index of the first frame, number of frames]; beyond MOST no more are told.
    """

    MOST = 100

    def __init__(self) -> None:
        self._found: dict[Statement, list[int]] = {}

    def add(self, index: int, atoms: Atoms, where: str) -> None:
        """Count what a frame states.

        Raises:
            InputError: for an entry that is no number.
        """
        for one in stated_electrons(atoms, f"{where}: "):
            if one in self._found or len(self._found) < self.MOST:
                self._found.setdefault(one, [index, 0])[1] += 1

    @property
    def entries(self) -> list[list[Any]]:
        """In the order in which frames make them."""
        return [[*one, *counts] for one, counts in self._found.items()]


def differing(entries: Sequence[Sequence[Any]], name: Callable[[int], str]) -> str | None:
    """How frames of a set contradict each other, naming two of them; None if they do not. ``entries`` as in Tally."""
    for what in _NAMES.values():
        same = [(Statement(*entry[:3]), entry[3]) for entry in entries if entry[0] == what]
        for one, index in same[1:]:
            first, first_index = same[0]
            if abs(one.value - first.value) > _SAME:
                kind, unit = ("total charge", " e") if what == "charge" else ("spin multiplicity", "")
                return (
                    f"{name(first_index)} has {kind} {first.value:g}{unit} ({first.source}), {name(index)} has"
                    f" {one.value:g}{unit} ({one.source}); a potential is for one of them"
                )
    return None


def check_set(entries: Sequence[Sequence[Any]], charge: float, multiplicity: float, name: Callable[[int], str]) -> None:
    """Refuse a set whose frames contradict each other, or the charge and multiplicity of a recipe's data.

    Args:
        entries: As in Tally.
        charge: In e.
        multiplicity: 2S + 1.
        name: Names a frame by its index.

    Raises:
        InputError: with one or two of the frames.
    """
    if message := differing(entries, name):
        raise InputError(f"{message}; remove the frames of the others")
    for what, value, source, index, count in entries:
        if problem := contradiction(Statement(what, value, source), charge, multiplicity):
            key = "charge" if what == "charge" else "multiplicity"
            stated = charge if what == "charge" else multiplicity
            raise InputError(
                f"{name(index)}: {problem}, data.{key} of the recipe is {stated:g} ({count} frames say so); set"
                f" data.{key} to what the labels were computed with, or remove what is wrong from the frames"
            )
