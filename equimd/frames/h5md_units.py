"""Units as HDF5 files spell them: `kJ mol-1 nm-1` (the units module of H5MD), `hartree/bohr`, `Angstrom fs-1`."""

from equimd import units
from equimd.errors import InputError

_JOULE = units.KJ_PER_MOL * 6.02214076e20  # eV
_BASES = {"angstrom": 1.0, "a": 1.0, "å": 1.0, "nm": units.NM, "pm": 0.01, "fm": 1e-5, "m": 1e10, "bohr": units.BOHR}
_BASES |= {"bohrs": units.BOHR, "ang": 1.0, "angstroms": 1.0}
_BASES |= {"fs": 1.0, "ps": 1000.0, "ns": 1e6, "us": 1e9, "s": 1e15, "sec": 1e15, "second": 1e15, "akma": 48.88821}
_BASES |= {"ev": 1.0, "mev": 1e-3, "hartree": units.HARTREE, "ha": units.HARTREE, "eh": units.HARTREE}
_BASES |= {"kj": units.KJ_PER_MOL, "kcal": units.KCAL_PER_MOL, "mol": 1.0, "j": _JOULE}
_BASES |= {"n": _JOULE * 1e-10, "newton": _JOULE * 1e-10, "gpa": units.GPA, "kbar": units.KBAR, "bar": units.BAR}
_BASES |= {"k": 1.0, "u": 1.0, "amu": 1.0, "da": 1.0, "dalton": 1.0, "g": 1.0, "kg": 1000.0}  # g before mol-1


def unit_factor(text: str, where: str) -> float:
    """The factor from a unit such as `kJ mol-1 nm-1` or `hartree/bohr` to equimd's.

    Raises:
        InputError: for a unit that is not known.
    """
    whole = text
    text, *divisors = text.replace("³", "3").replace("(", "").replace(")", "").split("/")
    factor = 1.0
    for divisor in divisors:
        factor /= unit_factor(divisor, where)
    for token in text.replace("**", "").replace("^", "").replace("*", " ").split():
        base = token.rstrip("+-0123456789")
        exponent = token[len(base) :] or "1"
        if base.lower() not in _BASES or exponent in ("+", "-", "0"):
            raise InputError(f"{where} has unit {whole!r}; accepted: products of {', '.join(_BASES)}")
        factor *= _BASES[base.lower()] ** int(exponent)
    return factor
