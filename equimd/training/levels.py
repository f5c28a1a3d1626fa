"""Whether energies of isolated atoms and labels can be of one level of theory, by what is left between them.

The mean of E − Σ E₀ per atom is the energy of atomisation, which chemistry bounds: 0 for rare gases, −3 to −5 eV for
molecules, −8.9 eV for tungsten, the most of the elements. Hot or squeezed frames lie higher by at most an electronvolt
or so; atoms that were computed without spin, lower by as much as 3 eV.
"""

import warnings

from equimd.errors import InputError
from equimd.training.statistics import IsolatedAtomEnergies, Statistics
from equimd.units import ENERGY_UNITS

USUAL = (-12.0, 1.0)  # eV/atom
ABSURD = (-30.0, 10.0)  # eV/atom: no atom is bound so strongly, and no frame that is worth learning is so high
_FROM = {"recipe": "data.isolated_atom_energies", "isolated atoms": "isolated atoms among the training frames"}


def check_level(atoms: IsolatedAtomEnergies, numbers: Statistics) -> None:
    """Warn if labels and isolated-atom energies are farther apart than chemistry allows; refuse if absurdly far.

    Fitted energies and a parent's are not judged: the first fit by construction, of the second ``initial`` takes care.

    Raises:
        InputError: with the numbers and the likely cause.
    """
    origins = [atoms.origin[z] for z in numbers.shift]
    given = next((origin for origin in origins if origin in _FROM), None)
    if numbers.energy is None or numbers.reference is None or given is None or not set(origins) <= _FROM.keys():
        return
    left = numbers.energy - numbers.reference
    if USUAL[0] <= left <= USUAL[1]:
        return
    message = (
        f"the labels have a mean of {numbers.energy:.4g} eV/atom, the energies of {_FROM[given]} sum up to"
        f" {numbers.reference:.4g} eV/atom: {left:.4g} eV/atom are left for the bonds, where {USUAL[0]:g} to"
        f" {USUAL[1]:g} is possible; {_likely_cause(numbers.energy, numbers.reference)}"
    )
    if ABSURD[0] <= left <= ABSURD[1]:
        warnings.warn(message, UserWarning, stacklevel=3)
        return
    raise InputError(
        f"{message}; give energies of the labels' level, or leave {_FROM[given]} out: they are fitted then"
    )


def _likely_cause(energy: float, reference: float) -> str:
    def fits(left: float) -> bool:
        return USUAL[0] <= left <= USUAL[1]

    causes = ["the labels look like atomisation energies, with isolated atoms at 0 eV"] if fits(energy) else []
    for name in ("Hartree", "kcal/mol", "kJ/mol"):
        if fits(energy - ENERGY_UNITS[name] * reference):
            causes.append(f"the isolated-atom energies look like {name}")
        if fits(ENERGY_UNITS[name] * energy - reference):
            causes.append(f"the labels look like {name} (data.units)")
    return " or ".join(causes) or "they look like different levels of theory, or all electrons against pseudopotentials"
