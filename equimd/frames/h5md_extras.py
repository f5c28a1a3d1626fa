"""What H5MD has no place for: tags, constraints, `info` and the cell of a molecule, in the group `parameters/equimd`.

`system` is JSON (as of `ase.io.jsonio`) with the constraints and the `info` of the first frame, `arrays` holds other
values of its atoms. `info` has a row for each frame, empty if it equals the first. What cannot be stored is named in
the attribute `not_stored`.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import h5py
import numpy as np
from ase import Atoms
from ase.constraints import dict2constraint
from ase.io.jsonio import decode, encode

from equimd.errors import InputError
from equimd.frames.labels import strip_labels

GROUP = "parameters/equimd"
INFO, CELL = f"{GROUP}/info", f"{GROUP}/cell"
# Datasets of H5MD itself.
_ELSEWHERE = ("numbers", "positions", "momenta", "masses")
OWN_INFO = ("step", "time_fs")
# What decides a simulation, with ASE's values for atoms without them: all frames of a file share it.
_SHARED = ("tags", "initial_charges", "initial_magmoms")
_RESULTS = ("energy", "forces", "stress", "free_energy")
# Their JSON depends on positions.
_CHANGING = ("FixInternals", "FixSymmetry")


class NotStoredWarning(UserWarning):
    """A file that lacks something that its frames had."""


@dataclass
class System:
    """What the frames of a file share: masses in u, other arrays by name, constraints and `info` as JSON."""

    numbers: np.ndarray
    pbc: np.ndarray
    masses: np.ndarray
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    constraints: str = "[]"
    info: str = "{}"
    not_stored: set[str] = field(default_factory=set)
    bare: bool = False
    """Of a file that holds no more than masses, as equimd 0.1.0 and other programs write it."""

    def take(self, other: "System", where: str) -> str:
        """Accept another frame of the same system and return its `info`, empty if it is that of the first.

        Raises:
            InputError: if it differs in what decides a simulation.
        """
        pairs = [("atoms", self.numbers, other.numbers), ("pbc", self.pbc, other.pbc)]
        pairs += [("masses", self.masses, other.masses)]
        if not self.bare:
            zeros = np.zeros(len(self.numbers))
            pairs += [(name, self.arrays.get(name, zeros), other.arrays.get(name, zeros)) for name in _SHARED]
        wrong = [name for name, old, new in pairs if not np.array_equal(old, new)]
        wrong += ["constraints"] if not self.bare and self.constraints != other.constraints else []
        if wrong:
            what = f"other {' and '.join(wrong[:2])} than the first"
            raise InputError(f"{where} has {what}; accepted: frames of one system; extxyz holds several")
        for name in self.arrays.keys() | other.arrays.keys():
            if name not in _SHARED and not _same(self.arrays.get(name), other.arrays.get(name)):
                self.not_stored.add(f"array {name}")
                self.arrays.pop(name, None)
        self.not_stored |= other.not_stored
        return "" if other.info == self.info else other.info


def system_of(atoms: Atoms) -> System:
    """What a frame shares with the others of its file."""
    bare = strip_labels(atoms)
    lost: set[str] = set()
    constraints = []
    for constraint in atoms.constraints:
        try:
            stored = {} if type(constraint).__name__ in _CHANGING else constraint.todict()
            dict2constraint(decode(encode(stored), always_array=False))
            constraints.append(stored)
        except Exception:  # whatever a constraint of someone else's does
            lost.add(f"constraint {type(constraint).__name__}")
    arrays = {name: values for name, values in bare.arrays.items() if name not in _ELSEWHERE}
    lost |= {f"array {name}" for name, values in arrays.items() if values.dtype.kind not in "biufcUS"}
    info = {key: value for key, value in bare.info.items() if key not in OWN_INFO}
    lost |= {f"info {key}" for key, value in info.items() if not _comes_back(key, value)}
    results = getattr(atoms.calc, "results", {})
    lost |= {f"result {name}" for name, value in results.items() if name not in _RESULTS and value is not None}
    if bare.get_celldisp().any():
        lost.add("celldisp")
    return System(
        numbers=atoms.numbers.copy(),
        pbc=np.array(atoms.pbc),
        masses=atoms.get_masses(),
        arrays={name: values for name, values in arrays.items() if f"array {name}" not in lost},
        constraints=encode(constraints),
        info=encode({key: value for key, value in info.items() if f"info {key}" not in lost}),
        not_stored=lost,
    )


def write_system(file: h5py.File, system: System) -> None:
    """Create the group of a new file."""
    group = file.create_group(GROUP)
    group["system"] = f'{{"constraints": {system.constraints}, "info": {system.info}}}'
    arrays = group.create_group("arrays")
    for name, values in system.arrays.items():
        text = values.dtype.kind == "U"
        arrays.create_dataset(name, data=values.astype(object) if text else values, dtype=_text() if text else None)
    file.create_dataset(INFO, (0,), _text(), maxshape=(None,), chunks=(512,))


def update_system(file: h5py.File, system: System, where: str) -> None:
    """Name what the file lacks, and take out arrays that have turned out to differ between frames.

    Warns:
        NotStoredWarning: of what was not named before.
    """
    if GROUP not in file:  # equimd 0.1.0 began it
        return
    group: Any = file[GROUP]
    for name in set(group["arrays"]) - system.arrays.keys():
        del group["arrays"][name]
    named = {str(name) for name in group.attrs.get("not_stored", ())}
    if new := sorted(system.not_stored - named):
        group.attrs["not_stored"] = sorted(named | system.not_stored)
        warnings.warn(f"{where}: H5MD does not store {', '.join(new)} of the frames", NotStoredWarning, stacklevel=4)


def read_system(file: h5py.File, numbers: np.ndarray, pbc: Iterable[bool], masses: np.ndarray) -> System:
    """The system of a file; only what H5MD itself holds if another program or equimd 0.1.0 wrote it."""
    system = System(numbers, np.array(pbc), masses, bare=GROUP not in file)
    if system.bare:
        return system
    group: Any = file[GROUP]
    system.not_stored = {str(name) for name in group.attrs.get("not_stored", ())}
    if "system" in group:
        stored: Any = decode(group["system"].asstr()[()], always_array=False)
        system.constraints, system.info = encode(stored["constraints"]), encode(stored["info"])
    for name, values in group.get("arrays", {}).items():
        text = h5py.check_string_dtype(values.dtype) is not None and values.dtype.kind == "O"
        system.arrays[name] = np.array(values.asstr()[()].tolist()) if text else values[()]
    return system


def template(system: System, where: str) -> Atoms:
    """Atoms at the origin with everything that all frames share.

    Raises:
        InputError: if what is stored makes no sense.
    """
    atoms = Atoms(system.numbers, positions=np.zeros((len(system.numbers), 3)), pbc=system.pbc)
    try:
        if not np.array_equal(system.masses, atoms.get_masses()):
            atoms.set_masses(system.masses)  # pyright: ignore
        for name, values in system.arrays.items():
            atoms.set_array(name, values)
        constraints: Any = decode(system.constraints, always_array=False)
        atoms.set_constraint([dict2constraint(one) for one in constraints])
        atoms.info = decode_info(system.info)
    except Exception as error:  # whatever a damaged file does to ASE
        what = f"{type(error).__name__}: {str(error)[:120]}"
        raise InputError(f"{where}: {GROUP} cannot be read ({what}); accepted: as equimd wrote it") from error
    return atoms


def decode_info(text: str) -> dict[str, Any]:
    """The `info` of a frame."""
    info: Any = decode(text, always_array=False)
    return info


def _comes_back(key: Any, value: Any) -> bool:
    """Whether JSON returns the very value; tuples may become lists."""
    if not isinstance(key, str) or key.isdigit():
        return False
    try:
        return _equal(decode_info(encode({key: value}))[key], value)
    except Exception:  # whatever JSON cannot hold
        return False


def _equal(back: Any, value: Any) -> bool:
    if isinstance(value, dict):
        return isinstance(back, dict) and back.keys() == value.keys() and all(_equal(back[k], value[k]) for k in value)
    if isinstance(value, list | tuple):
        pairs = zip(back, value, strict=True)
        return isinstance(back, list) and len(back) == len(value) and all(_equal(*pair) for pair in pairs)
    if isinstance(value, np.ndarray | np.generic):
        return _same(back, value)
    return type(back) is type(value) and repr(back) == repr(value)


def _same(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return False
    one, other = np.asarray(one), np.asarray(other)
    return (
        one.shape == other.shape
        and one.dtype.kind == other.dtype.kind
        and bool((one == other).all() if one.dtype.kind not in "fc" else np.array_equal(one, other, equal_nan=True))
    )


def _text() -> Any:
    return h5py.string_dtype("utf-8")
