"""Labels of a frame: which names and units a file uses for energy, forces and stress, and how to ask for them.

Inside equimd a labelled frame is an `ase.Atoms` with a `SinglePointCalculator` that holds energy (eV), forces (eV/Å)
and stress (eV/Å³, ASE's sign: tension is positive). Only this module knows other names, units and signs.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from equimd import origin, units
from equimd.errors import InputError

# Lower-cased names, in order of preference. A free energy is taken only where no energy is given.
ENERGY_NAMES = ("energy", "ref_energy", "dft_energy", "qm_energy", "total_energy", "potential_energy", "e")
LAST_RESORT_ENERGY_NAMES = ("free_energy", "ref_free_energy")
FORCES_NAMES = ("forces", "force", "ref_forces", "ref_force", "dft_forces", "dft_force", "qm_forces", "f")
STRESS_NAMES = ("stress", "ref_stress", "dft_stress", "qm_stress")
VIRIAL_NAMES = ("virial", "virials", "ref_virial", "ref_virials", "dft_virial")
KNOWN_NAMES = {
    "energy": ENERGY_NAMES + LAST_RESORT_ENERGY_NAMES,
    "forces": FORCES_NAMES,
    "stress": STRESS_NAMES,
    "virial": VIRIAL_NAMES,
}
_INFO_NAMES = ENERGY_NAMES + LAST_RESORT_ENERGY_NAMES + STRESS_NAMES + VIRIAL_NAMES
# Other results of ASE's calculators, which are kept as they are: shapes, "N" for the number of atoms.
CONFIG_RESULTS: dict[str, tuple[tuple[Any, ...], ...]] = {
    "energy": ((),),
    "free_energy": ((),),
    "stress": ((6,), (3, 3)),
    "dipole": ((3,),),
    "magmom": ((), (3,)),
    "polarization": ((3,),),
    "dielectric_tensor": ((3, 3),),
}
ATOM_RESULTS: dict[str, tuple[tuple[Any, ...], ...]] = {
    "forces": (("N", 3),),
    "energies": (("N",),),
    "stresses": (("N", 6), ("N", 3, 3)),
    "charges": (("N",),),
    "magmoms": (("N",), ("N", 3)),
    "born_effective_charges": (("N", 3, 3),),
}
_LABELS = ("energy", "free_energy", "forces", "stress")

# Where the six components of each convention sit in ASE's order xx yy zz yz xz xy.
VOIGT_ORDERS = {"ase": (0, 1, 2, 3, 4, 5), "vasp": (0, 1, 2, 4, 5, 3)}


@dataclass(frozen=True)
class UnitSpec:
    """Units of a file. Forces are in `energy`/`length` unless `force_energy`/`force_length` say otherwise.

    Raises:
        InputError: for a unit that `equimd.units` does not know.
    """

    energy: str = "eV"
    length: str = "Å"
    stress: str = "eV/Å³"
    force_energy: str | None = None
    force_length: str | None = None

    def __post_init__(self) -> None:
        lookups = [("energy", self.energy, units.ENERGY_UNITS), ("length", self.length, units.LENGTH_UNITS)]
        lookups += [("stress", self.stress, units.STRESS_UNITS)]
        lookups += [("force energy", self.force_energy or self.energy, units.ENERGY_UNITS)]
        lookups += [("force length", self.force_length or self.length, units.LENGTH_UNITS)]
        for what, value, known in lookups:
            if value not in known:
                raise InputError(f"unknown unit of {what}: {value!r}; accepted: {', '.join(known)}")

    @property
    def energy_factor(self) -> float:
        """Energy in eV per file unit."""
        return units.ENERGY_UNITS[self.energy]

    @property
    def length_factor(self) -> float:
        """Length in Å per file unit."""
        return units.LENGTH_UNITS[self.length]

    @property
    def force_factor(self) -> float:
        """Force in eV/Å per file unit."""
        energy = units.ENERGY_UNITS[self.force_energy or self.energy]
        return energy / units.LENGTH_UNITS[self.force_length or self.length]

    @property
    def stress_factor(self) -> float:
        """Stress in eV/Å³ per file unit."""
        return units.STRESS_UNITS[self.stress]


@dataclass(frozen=True)
class LabelKeys:
    """Names of the labels in a file (None: look for the usual names) and the convention of its stress.

    The name ``none`` reads no such label; any other must be in some frame of the file.

    VASP's OUTCAR stress is `UnitSpec(stress="kbar")` with `LabelKeys(voigt="vasp", stress_sign=-1)`. A virial
    (W = −V σ, in energy units) is used where no stress is given. Labels must be finite, but for components of a
    stress that are NaN, which say that they are not known; without `finite` all are passed on as they are.

    Raises:
        InputError: for an order or a sign that there is not.
    """

    energy: str | None = None
    forces: str | None = None
    stress: str | None = None
    virial: str | None = None
    voigt: Literal["ase", "vasp"] = "ase"
    stress_sign: Literal[1, -1] = 1
    finite: bool = True

    def __post_init__(self) -> None:
        if self.voigt not in VOIGT_ORDERS:
            raise InputError(f"voigt is {self.voigt!r}; accepted: {', '.join(VOIGT_ORDERS)}")
        if self.stress_sign not in (1, -1):
            raise InputError(f"stress_sign is {self.stress_sign!r}; accepted: 1 or -1")

    def named(self) -> dict[str, str]:
        """The names that were asked for, by label."""
        names = {label: getattr(self, label) for label in KNOWN_NAMES}
        return {label: name for label, name in names.items() if name is not None}


DEFAULT_UNITS = UnitSpec()
DEFAULT_KEYS = LabelKeys()


def attach_labels(atoms: Atoms, units_: UnitSpec, keys: LabelKeys, where: str) -> Atoms:
    """Scale the geometry to Å and move the labels out of `info` and `arrays` into a `SinglePointCalculator`.

    `where` names file and frame in messages. The frame is changed in place and returned. The calculator is there
    without labels too: then the frame has none, whatever other names `info` and `arrays` still hold. It says who made
    them if they are predictions (see `equimd.origin`).

    Raises:
        InputError: if two names carry different values, a label is not a number, or its shape does not fit.
    """
    if units_.length_factor != 1.0:
        atoms.positions *= units_.length_factor
        atoms.set_cell(atoms.cell.array * units_.length_factor)
    stated = atoms.info.pop(origin.KEY, None)
    by = origin.predicted_by(atoms)
    _move_results(atoms, keys, where)
    results = collect_labels(atoms, units_, keys, where, remove=True)
    results |= _other_results(atoms, units_, where)
    atoms.calc = SinglePointCalculator(atoms, **results)
    return origin.mark(atoms, by or origin.confirmed(stated, results.get("energy")))


def _move_results(atoms: Atoms, keys: LabelKeys, where: str) -> None:
    """Put what ASE moved into a calculator back into `info` and `arrays`, unless other names were asked for."""
    held = getattr(atoms.calc, "results", {})
    atoms.calc = None
    for name, value in held.items():
        wanted = name not in _LABELS or (name != "free_energy" and getattr(keys, name) in (None, name))
        last_resort = name == "free_energy" and keys.energy in (None, name)
        store = atoms.arrays if name in ATOM_RESULTS else atoms.info
        if value is None or not (wanted or last_resort):
            continue
        if name in store and not np.array_equal(store[name], value):
            what = f"{name!r} has one value as a result and another in {'arrays' if store is atoms.arrays else 'info'}"
            raise InputError(f"{where}: {what}; accepted: one of them")
        store[name] = value


def _other_results(atoms: Atoms, units_: UnitSpec, where: str) -> dict[str, Any]:
    """Results beside energy, forces and stress, taken out of `info` and `arrays`; energies in eV, stresses in eV/Å³."""
    results: dict[str, Any] = {}
    for names, store in ((CONFIG_RESULTS, atoms.info), (ATOM_RESULTS, atoms.arrays)):
        for name in [name for name in names if name in store and name not in _LABELS]:
            value = store.pop(name)
            shapes = [tuple(len(atoms) if n == "N" else n for n in shape) for shape in names[name]]
            try:
                array = np.asarray(value, dtype=np.float64)
            except (TypeError, ValueError):
                raise InputError(f"{where}: {name} is {str(value)[:40]!r}; accepted: numbers, or no {name}") from None
            sizes = [shape for shape in shapes if int(np.prod(shape)) == array.size]
            if not sizes:
                accepted = " or ".join(map(str, shapes))
                raise InputError(f"{where}: {name} has shape {array.shape}; accepted: {accepted}, or no {name}")
            factor = {"energies": units_.energy_factor, "stresses": units_.stress_factor}.get(name, 1.0)
            results[name] = float(array.item() * factor) if sizes[0] == () else array.reshape(sizes[0]) * factor
    return results


def collect_labels(
    atoms: Atoms, units_: UnitSpec, keys: LabelKeys, where: str, *, remove: bool = False
) -> dict[str, Any]:
    """Labels found in `info` and `arrays`, in eV, eV/Å and eV/Å³ (stress (6,) in ASE's order), absent ones left out."""
    info, arrays = atoms.info, atoms.arrays
    results: dict[str, Any] = {}
    energy = _find(info, keys.energy, ENERGY_NAMES, where, remove)
    free = _find(info, None, LAST_RESORT_ENERGY_NAMES, where, remove) if keys.energy is None else None
    if keys.energy in LAST_RESORT_ENERGY_NAMES:
        free = energy
    if free is not None:
        results["free_energy"] = float(_numbers(free, (), "free energy", where, False)) * units_.energy_factor
    if energy is None and keys.energy is None:
        energy = free
    if energy is not None:
        results["energy"] = float(_numbers(energy, (), "energy", where, keys.finite)) * units_.energy_factor
    forces = _find(arrays, keys.forces, FORCES_NAMES, where, remove)
    if forces is not None:
        results["forces"] = _numbers(forces, (len(atoms), 3), "forces", where, keys.finite) * units_.force_factor
    stress = _find(info, keys.stress, STRESS_NAMES, where, remove)
    virial = _find(info, keys.virial, VIRIAL_NAMES, where, remove)
    # A stress needs a volume: a molecule in a large box that is not periodic has none.
    if atoms.pbc.any() and abs(atoms.cell.volume) > 0:
        if stress is not None:
            tensor = _tensor(stress, keys, "stress", where)
            results["stress"] = to_voigt(tensor * units_.stress_factor * keys.stress_sign)
        elif virial is not None:
            tensor = _tensor(virial, keys, "virial", where)
            results["stress"] = to_voigt(-tensor * units_.energy_factor / abs(atoms.cell.volume))
            if remove:
                info["stress_from"] = "virial"
    return results


def _find(store: dict, key: str | None, names: tuple[str, ...], where: str, remove: bool) -> Any:
    """The value under `key`, or under the first of the usual names whatever their case; None where there is none."""
    if key is not None:
        if key not in store:
            return None
        return store.pop(key) if remove else store[key]
    if not store:
        return None
    spelled = [name for name in store if isinstance(name, str) and name.lower() in names]
    present = sorted(spelled, key=lambda name: names.index(name.lower()))
    values = [store.pop(name) if remove else store[name] for name in present]
    for name, value in zip(present[1:], values[1:], strict=True):
        if not np.array_equal(value, values[0]):
            raise InputError(f"{where}: {present[0]!r} and {name!r} differ; say which one to read with keys=LabelKeys")
    return values[0] if values else None


def _numbers(value: Any, shape: tuple[int, ...], what: str, where: str, finite: bool = True) -> np.ndarray:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{where}: {what} is {str(value)[:40]!r}; accepted: numbers") from None
    if array.shape != shape:
        raise InputError(f"{where}: {what} has shape {array.shape}; accepted: {shape}")
    if finite and not np.isfinite(array).all():
        raise InputError(f"{where}: {not_finite(what, array)}; accepted: finite numbers, or no {what} at all")
    return array


def not_finite(what: str, array: np.ndarray) -> str:
    """Says which number of a label is the first that is not finite."""
    place = np.argwhere(~np.isfinite(array))[0]
    of = f" of atom {place[0]}" if what == "forces" else ""
    return f"{what}{of} has a value that is not finite ({array[tuple(place)]})"


def _tensor(value: Any, keys: LabelKeys, what: str, where: str) -> np.ndarray:
    """A (3, 3) tensor from nine components or from six in the order of the convention; some may be NaN."""
    if np.size(value) == 9:
        tensor = _numbers(np.reshape(value, (3, 3)), (3, 3), what, where, finite=False)
    else:
        components = _numbers(value, (6,), what, where, finite=False)
        tensor = from_voigt(components[list(VOIGT_ORDERS[keys.voigt])])
    if keys.finite and np.isinf(tensor).any():
        raise InputError(f"{where}: {what} has an infinite component; accepted: finite numbers, NaN where unknown")
    return tensor


def to_voigt(tensor: np.ndarray) -> np.ndarray:
    """Components (6,) in ASE's order xx yy zz yz xz xy of the symmetric part of a tensor (3, 3)."""
    s = 0.5 * (tensor + tensor.T)
    return np.array([s[0, 0], s[1, 1], s[2, 2], s[1, 2], s[0, 2], s[0, 1]])


def from_voigt(components: np.ndarray) -> np.ndarray:
    """The symmetric tensor (3, 3) of components (6,) in ASE's order xx yy zz yz xz xy."""
    xx, yy, zz, yz, xz, xy = components
    return np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])


def labels_of(atoms: Atoms) -> dict[str, Any]:
    """Energy (float), forces (N, 3) and stress (3, 3) in eV, eV/Å and eV/Å³, each None where the frame has none.

    Nothing is computed: only results that a calculator already holds for these very positions count, forces without
    constraints applied; then `info` and `arrays` under the usual names, in eV and Å, as other readers leave them.

    Raises:
        InputError: if two names in `info` or `arrays` carry different values, or a label is malformed.
    """
    results: dict[str, Any] = {}
    calc = atoms.calc
    if calc is not None:
        held = getattr(calc, "results", {})
        if held and not calc.check_state(atoms):
            results = held
    else:
        results = collect_labels(atoms, DEFAULT_UNITS, DEFAULT_KEYS, "frame")
    energy, forces, stress = (results.get(name) for name in ("energy", "forces", "stress"))
    if stress is not None:
        stress = np.array(stress, dtype=np.float64) if np.size(stress) == 9 else from_voigt(np.asarray(stress))
    return {
        "energy": None if energy is None else float(energy),
        "forces": None if forces is None else np.array(forces, dtype=np.float64),
        "stress": None if stress is None else stress.reshape(3, 3),
    }


def strip_labels(atoms: Atoms) -> Atoms:
    """A copy without calculator and without label keys in `info` and `arrays`; momenta, tags and the rest stay."""
    bare = atoms.copy()
    bare.info.pop(origin.KEY, None)
    for store, names in ((bare.info, _INFO_NAMES), (bare.arrays, FORCES_NAMES)):
        for key in [key for key in store if isinstance(key, str) and key.lower() in names]:
            del store[key]
    return bare


def require_labels(frames: Iterable[Atoms], names: Iterable[str] = ("energy", "forces")) -> None:
    """Refuse frames that lack one of the labels `names` (of energy, forces, stress).

    Raises:
        InputError: that says how many frames lack which label, and what they carry instead.
    """
    names = tuple(names)
    missing: dict[str, list[int]] = {name: [] for name in names}
    carried: set[str] = set()
    n_frames = 0
    for index, atoms in enumerate(frames):
        n_frames += 1
        labels = labels_of(atoms)
        for name in names:
            if labels[name] is None:
                missing[name].append(index)
                carried |= set(map(str, atoms.info)) | (set(atoms.arrays) - {"numbers", "positions"})
    for name, indices in missing.items():
        if indices:
            seen = ", ".join(sorted(carried)) or "nothing else"
            raise InputError(
                f"{len(indices)} of {n_frames} frames have no {name} (first: frame {indices[0]}); they carry {seen};"
                f" accepted: labelled frames, or keys=LabelKeys({name}=...)"
            )
