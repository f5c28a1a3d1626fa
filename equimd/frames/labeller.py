"""Attaches labels to the frames of one file, and knows what only the file as a whole, or its spelling, can tell.

A name that was asked for must be in some frame, and a unit that a name or an entry states must be the one that is used.
"""

import logging
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ase import Atoms

from equimd import units
from equimd.errors import InputError
from equimd.frames.labels import DEFAULT_UNITS, ENERGY_NAMES, LabelKeys, UnitSpec, attach_labels

# Spellings of units, in lower case, without blanks; factors to eV, Å and eV/Å³.
_ENERGIES: dict[str, float] = dict.fromkeys(
    ("hartree", "hartrees", "ha", "eh", "a.u.", "au", "atomic_units"), units.HARTREE
)
_ENERGIES |= {"ev": units.EV, "mev": 1e-3, "rydberg": units.HARTREE / 2, "ry": units.HARTREE / 2}
_ENERGIES |= dict.fromkeys(("kcal/mol", "kcal", "kcalmol", "kcal_mol"), units.KCAL_PER_MOL)
_ENERGIES |= dict.fromkeys(("kj/mol", "kj", "kjmol", "kj_mol"), units.KJ_PER_MOL)
_LENGTHS: dict[str, float] = dict.fromkeys(("bohr", "a0", "au", "a.u."), units.BOHR) | {"nm": units.NM}
_LENGTHS |= dict.fromkeys(("angstrom", "angstroms", "ang", "å"), units.ANGSTROM)
_STRESSES = {"gpa": units.GPA, "kbar": units.KBAR, "bar": units.BAR}
_STATEMENT = re.compile(r"(energy|energies|forces?|length|positions?|pos|stress)?_?units?")
_CP2K = ({"i", "time", "E"}, {"i", "E"}, {"Step", "Time", "Energy"})
"""Keys of the comment lines of CP2K's trajectories: FORMAT XMOL with and without time, FORMAT EXTXYZ."""


class Labeller:
    """Labels the frames of one pass through a file.

    Args:
        path: The file, for messages.
        unit_spec: Its units; without them eV, Å and eV/Å³, but for energies that are known to be in others.
        keys: Names of its labels.
        said: What has been logged of this file, which is not logged again.

    Raises:
        InputError: if a name that was asked for states another unit than ``unit_spec``.
    """

    def __init__(self, path: Path, unit_spec: UnitSpec | None, keys: LabelKeys, said: set[str] | None = None) -> None:
        self.path, self._given, self._keys = path, unit_spec, keys
        self._units = unit_spec or DEFAULT_UNITS
        self._said = set() if said is None else said
        self._missing = {label: key for label, key in keys.named().items() if key.lower() != "none"}
        self._names: dict[str, set[str]] = {label: set() for label in self._missing}
        self._plain, self._n_frames = False, 0
        for label, key in self._missing.items():
            self._check_name(label, key)

    def hear(self, line: str, skipped: bool) -> None:
        """The comment line of a frame of XYZ that comes next, or that is skipped."""
        self._plain = "properties" not in line.lower()
        if skipped:
            self._missing = {label: key for label, key in self._missing.items() if key not in line}

    def label(self, atoms: Atoms, where: str) -> Atoms:
        """The frame with its labels, see `attach_labels`.

        Raises:
            InputError: if a label is malformed, or its unit is said to be another than the one that is used.
        """
        self._n_frames += 1
        for label, key in list(self._missing.items()):
            store = atoms.arrays if label == "forces" else atoms.info
            if key in store or key in getattr(atoms.calc, "results", ()):
                del self._missing[label]
            else:
                self._names[label] |= set(map(str, store)) - {"numbers", "positions"}
        self._check_statements(atoms.info, where)
        return attach_labels(atoms, self._units_of(atoms, where), self._keys, where)

    def finish(self) -> None:
        """What is to be said after the last frame.

        Raises:
            InputError: if no frame has a name that was asked for.
        """
        for label, key in self._missing.items() if self._n_frames else ():
            names = sorted(self._names[label])
            near = get_close_matches(key, names, n=1) or get_close_matches(key.lower(), names, n=1)
            offered = f"a name that is there, such as {near[0]!r}" if near else ", ".join(names[:8]) or "no key"
            raise InputError(f"{self.path}: no frame has {key!r}, the key of {label}; accepted: {offered}")

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            logging.getLogger("equimd").warning("%s: %s", self.path, text)

    def _units_of(self, atoms: Atoms, where: str) -> UnitSpec:
        """Units of a frame; CP2K's energies are in Hartree, and those of other comment lines are eV with a notice."""
        info = atoms.info
        if set(info) in _CP2K and set(atoms.arrays) == {"numbers", "positions"}:
            if re.search(r"-(frc|vel)-", self.path.name):
                raise InputError(f"{where}: CP2K wrote forces or velocities in the place of positions; accepted: -pos-")
            if self._given is None:
                self._say("CP2K's comment lines give energies in Hartree, which are read as such")
                return UnitSpec(energy="Hartree")
            if self._units.energy_factor != units.HARTREE:
                what = f"CP2K's comment line gives the energy in Hartree, but energies are read in {self._units.energy}"
                raise InputError(f"{where}: {what}; accepted: the unit energy=Hartree")
        elif self._given is None and self._keys.energy is None and "energy" not in getattr(atoms.calc, "results", ()):
            by_name = {name.lower(): name for name in info if isinstance(name, str)}
            name = next((by_name[name] for name in ENERGY_NAMES if name in by_name), None)
            if name is not None and (self._plain or name.lower() == "e"):
                which = "a comment line that is not extended XYZ" if self._plain else "an entry of this name"
                self._say(f"the energy {name!r} of {which} is taken as eV; if it is not, say so (energy=Hartree)")
        return self._units

    def _check_name(self, label: str, key: str) -> None:
        """Refuse a name such as energy_Ha that is read in eV."""
        parts = [part for part in re.split(r"[^A-Za-z0-9]+|(?<=[a-z])(?=[A-Z])", key) if part not in ("", "Au")]
        parts = [part.lower() for part in parts]
        if label == "stress":
            self._compare(f"the key {key!r}", "stress", parts, _STRESSES, self._units.stress_factor)
            return
        self._compare(f"the key {key!r}", "energy", parts, _ENERGIES, self._energy_factor(label))
        if label == "forces":
            self._compare(f"the key {key!r}", "length", parts, _LENGTHS, self._length_factor())

    def _check_statements(self, info: dict[Any, Any], where: str) -> None:
        """Refuse units that an entry states (energy_unit=Hartree, or the word Hartree alone) and that are not used."""
        for key, value in info.items():
            if not isinstance(key, str):
                continue
            if value is True and key.lower() in _ENERGIES and key != "Au" and len(info) > 1:
                self._compare(
                    f"{where}: the entry {key!r}", "energy", [key.lower()], _ENERGIES, self._energy_factor("")
                )
            statement = _STATEMENT.fullmatch(key.lower())
            if statement is None or not isinstance(value, str):
                continue
            what, said = statement[1] or "energy", f"{where}: {key}={value}"
            text = value.lower().replace(" ", "").replace("^", "").replace("·", "/")
            energy = re.match(r"(kcal/mol|kj/mol|[a-z.]+)/?(.*)", text)
            if what in ("length", "position", "positions", "pos"):
                self._compare(said, "length", [text], _LENGTHS, self._units.length_factor)
            elif what == "stress":
                self._compare(said, "stress", [text], _STRESSES, self._units.stress_factor)
            elif energy is not None:
                label = "forces" if what.startswith("force") else "energy"
                self._compare(said, "energy", [energy[1]], _ENERGIES, self._energy_factor(label))
                if label == "forces":
                    self._compare(said, "length", [energy[2]], _LENGTHS, self._length_factor())

    def _energy_factor(self, label: str) -> float:
        forces = label == "forces" and self._units.force_energy is not None
        return units.ENERGY_UNITS[str(self._units.force_energy)] if forces else self._units.energy_factor

    def _length_factor(self) -> float:
        return units.LENGTH_UNITS[self._units.force_length or self._units.length]

    def _compare(self, said: str, what: str, words: list[str], known: dict[str, float], factor: float) -> None:
        for word in words:
            if word in known and abs(known[word] / factor - 1.0) > 1e-4:  # constants of different years
                used = {"energy": self._units.energy, "length": self._units.length, "stress": self._units.stress}[what]
                raise InputError(f"{said} says {word}, but the unit of {what} is {used}; accepted: the unit in units")
