"""Elements from the names that force fields give to atoms, only if there is one answer: "CA" is carbon or calcium."""

import re

import numpy as np
from ase.data import atomic_numbers

_AMINO_ACIDS = "ALA ARG ASN ASP ASH CYS CYX CYM GLN GLU GLH GLY HIS HID HIE HIP HSD HSE HSP ILE LEU LYS LYN MET PHE PRO"
_AMINO_ACIDS += " SER THR TRP TYR VAL ACE NME NMA NHE"
_NUCLEOTIDES = "A C G U I DA DC DG DT DU DI RA RC RG RU ADE CYT GUA THY URA"
_WATERS = "HOH WAT SOL H2O TIP TIP2 TIP3 TIP4 TIP5 TIP3P TIP4P T3P T4P SPC SPCE OH2 HHO OHH TP3 DOD"
# Elements of these begin the names of their atoms, after digits ("1HB"): no metal, no halogen is among them.
_BIOPOLYMER = frozenset(f"{_AMINO_ACIDS} {_NUCLEOTIDES} {_WATERS}".split())
_CHARMM_IONS = {"SOD": "Na", "CLA": "Cl", "POT": "K", "CES": "Cs", "CAL": "Ca", "LIT": "Li", "RUB": "Rb"}


def element_of(name: str, residue: str) -> int | None:
    """Atomic number of an atom by its name and its residue's; None if that could be several elements or is none."""
    found = re.match(r"\d*([A-Za-z]+)", name.strip())
    if found is None:
        return None
    letters = found[1]
    if residue.upper() in _BIOPOLYMER:
        return atomic_numbers[letters[0].upper()] if letters[0].upper() in "HCNOSP" else None
    ion = re.sub(r"[^A-Za-z]", "", residue).upper()
    if letters.upper() == ion:
        return atomic_numbers.get(_CHARMM_IONS.get(ion, ion.capitalize()))
    if len(letters) == 1 or letters[1].islower():
        return atomic_numbers.get(letters)
    return None


def mass_of_symbol(symbol: str) -> float | None:
    """Mass (u) that a symbol states besides its element: deuterium and tritium."""
    return {"D": 2.01410177811, "T": 3.01604928199}.get(symbol.upper())


def number_of_symbol(symbol: str) -> int | None:
    """Atomic number of a symbol in any case, D and T included; None for anything else."""
    return 1 if mass_of_symbol(symbol) is not None else atomic_numbers.get(symbol.strip().capitalize()) or None


def masses_of_symbols(symbols: list[str], numbers: np.ndarray) -> np.ndarray | None:
    """Masses (N,) in u if a symbol states one, else None: they are those of the elements."""
    from ase.data import atomic_masses

    stated = [mass_of_symbol(symbol) for symbol in symbols]
    if not any(stated):
        return None
    return np.array([mass or atomic_masses[number] for mass, number in zip(stated, numbers, strict=True)])
