"""Who made the results that a frame carries: a reference method, whose results are labels, or a potential.

The results of a potential are predictions. If they were taken for labels, the potential would be judged by its own
forces: its error would be zero, and the share of symmetry in it meaningless. So each frame that a potential made says
so: its ``SinglePointCalculator`` holds ``parameters["predicted_by"]``, which ASE's trajectories and databases store,
extxyz has it among the keys of the comment line, and H5MD as an attribute of the particle group.
"""

from typing import Any

from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

KEY = "predicted_by"
_OF_ENERGY = "; energy "
_SAME_ENERGY = 1e-4  # eV; text formats keep eight decimals, and reference energies differ by far more

# Names that ASE gives to calculators of machine-learned potentials: the class without "Calculator", in lower case.
_POTENTIALS = {"ani", "cpunep", "dp", "gpunep", "nep", "orb", "pace", "pet", "quip", "spk", "tp", "uma", "umpa"}
_POTENTIAL_PREFIXES = ("aimnet", "allegro", "alignn", "chgnet", "deepmd", "deeppot", "equimd", "esen", "fairchem")
_POTENTIAL_PREFIXES += ("grace", "m3gnet", "mace", "matgl", "matris", "mattersim", "metatensor", "metatomic", "nequip")
_POTENTIAL_PREFIXES += ("nequix", "orbcalc", "petmad", "pyace", "schnet", "sevennet", "so3lr", "spkcalc", "tensorpot")
_POTENTIAL_PREFIXES += ("torchani", "upet")

# Entries of ``info``, in lower case, in which files of others name the calculator.
_ENTRIES = ("calculator", "calc", "calculator_name", "method", "model", "mlip", "potential")

# Electronic-structure codes, by the names that ASE gives to their calculators; what they store in a run are labels.
_REFERENCES = {"abinit", "aims", "amber-qm", "castep", "cp2k", "crystal", "demon", "dftb", "dftb+", "dftd3", "dftd4"}
_REFERENCES |= {"dmol", "elk", "espresso", "exciting", "fleur", "gamess_us", "gaussian", "gpaw", "mopac", "nwchem"}
_REFERENCES |= {"octopus", "onetep", "openmx", "orca", "psi4", "pyscf", "qchem", "siesta", "tblite", "turbomole"}
_REFERENCES |= {"vasp", "vasp2", "xtb"}


def predicted_by(atoms: Atoms) -> str | None:
    """The potential that made the frame's results, in words; None if nothing says that they are predictions.

    A frame that was written by others is judged by the name that its file gives to the calculator.
    """
    calc = atoms.calc
    if calc is None:
        return confirmed(atoms.info.get(KEY), None) or named_in_info(atoms)
    parameters = getattr(calc, "parameters", None) or {}
    if parameters.get(KEY):
        return str(parameters[KEY])
    # What the frame's own file said of it, as other readers leave it.
    if isinstance(calc, SinglePointCalculator) and (by := confirmed(atoms.info.get(KEY), _energy(atoms))):
        return by
    if {"potential", "family"} <= set(parameters):  # what equimd 0.1.0 stored in ASE's trajectories
        return f"equimd potential {parameters['potential']}"
    own = getattr(calc, "origin", None)
    if isinstance(own, str):
        return own
    if (name := _plain(str(getattr(calc, "name", "")))) and _is_potential(name):
        return name
    return named_in_info(atoms) if isinstance(calc, SinglePointCalculator) else None


def named_in_info(atoms: Atoms) -> str | None:
    """The machine-learned potential that an entry such as ``calculator`` of ``info`` names; None without one."""
    for key, value in atoms.info.items():
        if isinstance(key, str) and key.lower() in _ENTRIES and isinstance(value, str) and _is_potential(_plain(value)):
            return value
    return None


def potential_behind(calculator: Any) -> str | None:
    """The potential that a live calculator computes with, in words, also as a part of a sum; None for other methods."""
    own = getattr(calculator, "origin", None)
    if isinstance(own, str):
        return own
    parts = getattr(getattr(calculator, "mixer", None), "calcs", None) or getattr(calculator, "calcs", None) or ()
    for part in (*parts, *filter(None, [getattr(calculator, "calculator", None)])):
        if (found := potential_behind(part)) is not None:
            return found
    name = _plain(str(getattr(calculator, "name", None) or type(calculator).__name__))
    return name if _is_potential(name) else None


def origin_of(calculator: Any) -> str | None:
    """What to write beside results of a simulation with this calculator; None for electronic-structure codes.

    Results of any other calculator are predictions, whatever its name.
    """
    own = getattr(calculator, "origin", None)
    if isinstance(own, str):
        return own
    name = str(getattr(calculator, "name", None) or type(calculator).__name__)
    return None if _plain(name) in _REFERENCES else name


def mark(atoms: Atoms, by: str | None) -> Atoms:
    """The frame, which from now on says that ``by`` made its results; nothing is done for None.

    Its calculator says so, and so does ``info``, for writers of text that know no calculator. The entry in ``info``
    holds the energy, so that it speaks no longer of a frame that a reference labels later.
    """
    if by and atoms.calc is not None:
        parameters: Any = atoms.calc.parameters
        parameters[KEY] = by
        atoms.info[KEY] = _stamp(by, _energy(atoms))
    return atoms


def stated_in_info(atoms: Atoms) -> Atoms:
    """The frame as text formats need it: its origin among ``info``; a copy if that has to change."""
    by = predicted_by(atoms)
    wanted = None if by is None else _stamp(by, _energy(atoms))
    if atoms.info.get(KEY) == wanted:
        return atoms
    copy = atoms.copy()
    copy.calc = atoms.calc
    copy.info.pop(KEY, None)
    if wanted is not None:
        copy.info[KEY] = wanted
    return copy


def confirmed(stated: Any, energy: float | None) -> str | None:
    """Who made results with this energy (eV), as an entry of ``info`` states it; None if it speaks of other results."""
    if not stated:
        return None
    by, found, predicted = str(stated).partition(_OF_ENERGY)
    try:
        other = bool(found) and energy is not None and abs(float(predicted.split()[0]) - energy) > _SAME_ENERGY
    except (ValueError, IndexError):
        return str(stated)
    return None if other else by


def _stamp(by: str, energy: float | None) -> str:
    return by if energy is None else f"{by}{_OF_ENERGY}{energy:.6f} eV"


def _energy(atoms: Atoms) -> float | None:
    value = (getattr(atoms.calc, "results", None) or {}).get("energy")
    return None if value is None else float(value)


def _plain(name: str) -> str:
    return name.lower().removesuffix("calculator")


def _is_potential(name: str) -> bool:
    return name in _POTENTIALS or name.startswith(_POTENTIAL_PREFIXES)
