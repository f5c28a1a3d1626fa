"""Whether masses belong to elements: what tells type indices from atomic numbers, and deuterium from a mistake."""

import numpy as np
from ase.data import atomic_masses, chemical_symbols

# Lightest and heaviest nuclide of each element, from hydrogen on, that is stable, natural or kept in laboratories.
_NUCLIDES = """
1-3 3-4 6-7 9-10 10-11 12-14 14-15 16-18 18-19 20-22 22-23 24-26 26-27 28-30 31-33 32-36 35-37 36-40 39-41 40-48
44-48 44-50 48-51 50-54 52-55 54-60 55-60 56-66 62-67 64-72 66-72 68-76 71-77 72-82 76-82 76-86 82-87 82-90 86-91
88-96 91-96 92-100 95-99 96-106 99-105 102-110 105-112 106-116 111-115 112-126 119-127 118-132 123-131 124-136 129-137
128-140 137-140 134-144 141-145 140-150 143-149 144-154 147-156 148-160 151-161 154-166 161-166 160-172 165-172 166-176
171-177 172-182 177-183 178-188 181-189 184-194 185-194 188-198 194-199 194-204 201-205 202-212 205-212 208-210 209-211
211-222 212-223 223-228 225-228 227-234 229-234 230-238 235-239 236-244 241-243 242-250 247-249 248-254 252-255 250-257
"""
_RANGES = np.array([[0, 0]] + [list(map(int, text.split("-"))) for text in _NUCLIDES.split()], dtype=float)
# Mass numbers differ from masses by less than 0.2 u; force fields round to whole numbers.
_MARGIN = 0.6
# Force fields and ASE have standard weights that differ by up to 1e-4.
_SAME_TOTAL = 1e-3


def wrong_mass(numbers: np.ndarray, masses: np.ndarray) -> int | None:
    """The first atom whose mass (u) is that of no nuclide of its element; None if there is none.

    Hydrogen mass repartitioning is none either: hydrogen has up to 4.1 u there, taken from heavier atoms, and the
    masses add up to those of the elements.
    """
    bounds = np.array([_bounds(number) for number in numbers.tolist()]).reshape(-1, 2)
    wrong = ~((masses >= bounds[:, 0] - _MARGIN) & (masses <= bounds[:, 1] + _MARGIN))
    if not wrong.any():
        return None
    standard = atomic_masses[numbers]
    light = numbers == 1
    moved = np.where(light, (masses >= 0.9) & (masses <= 4.1), (masses > 0.0) & (masses <= standard + 0.1))
    if light.any() and moved.all() and abs(masses.sum() / standard.sum() - 1.0) < _SAME_TOTAL:
        return None
    return int(wrong.argmax())


def wrong_mass_text(numbers: np.ndarray, masses: np.ndarray) -> str | None:
    """What is wrong with the masses of these elements, in a line; None if nothing is."""
    atom = wrong_mass(numbers, masses)
    if atom is None:
        return None
    low, high = _bounds(int(numbers[atom]))
    symbol = chemical_symbols[numbers[atom]]
    return (
        f"species {numbers[atom]} ({symbol}) of atom {atom} has mass {masses[atom]:.5g}, not {low:.0f} to {high:.0f} u"
    )


def _bounds(number: int) -> tuple[float, float]:
    if number < len(_RANGES):
        return tuple(_RANGES[number])
    return atomic_masses[number] - 6.0, atomic_masses[number] + 6.0
