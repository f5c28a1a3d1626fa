"""Levels of theory: what texts name them, which are the same, and which one a frame states for its labels.

Recipes and data sets write levels as they please (``GFN2-xTB``, ``wB97X/6-31G(d)``, ``PBE-D3``), so two are the same if
their letters and digits agree, or if both name the same method. A basis set is not compared.
"""

import re
from typing import Any

from ase import Atoms

# Methods in plain letters and digits; longer names come before those that they contain.
_METHODS = re.compile(
    r"gfn\d|gfnff|dftb|pm[67]|am1|ccsd|mp2|wb97[mx]?|b97|revpbe0|pbe0|revpbe|rpbe|pbesol|pbe|b3lyp|camb3lyp|blyp|bp86"
    r"|m0[56]|pw91|tpssh|tpss|r2scan|rscan|^scan|hse0[36]|hse|beef|^lda"
)
# Entries of ``info``, in lower case, that may name the level of a frame's labels.
_ENTRIES = (
    "level_of_theory",
    "theory_level",
    "theory",
    "level",
    "reference",
    "method",
    "functional",
    "xc",
    "qm_method",
)


def method_of(text: Any) -> str | None:
    """The method that a text names, in plain letters; None if it names none that is known."""
    found = _METHODS.search(_plain(text)) if isinstance(text, str) else None
    return None if found is None else found[0]


def is_same_level(a: str, b: str) -> bool:
    """Whether two texts name one level of theory."""
    method = method_of(a)
    return _plain(a) == _plain(b) or (method is not None and method == method_of(b))


def stated_level(atoms: Atoms) -> str | None:
    """The level of theory that an entry of ``info`` states, in its words; None if no entry names a known method."""
    if not atoms.info:
        return None
    entries = {str(key).lower(): value for key, value in atoms.info.items()}
    return next((entries[name] for name in _ENTRIES if method_of(entries.get(name)) is not None), None)


def _plain(level: str) -> str:
    return "".join(character for character in level.lower().replace("ω", "w") if character.isalnum())
