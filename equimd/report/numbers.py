"""Numbers for readers."""

import math

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float | None, digits: int = 3) -> str:
    """A number for a reader: ``digits`` significant, powers of ten only where they are shorter."""
    if value is None or math.isnan(value):
        return "–"
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if exponent < -3 or exponent > 6:
        mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
        return f"{mantissa}·10{str(int(power)).translate(_SUPERSCRIPTS)}".replace("-", "−")
    return f"{value:,.{max(0, digits - 1 - exponent)}f}".replace("-", "−")


def with_error(value: float, stderr: float) -> str:
    """Value and standard error with as many decimals as the error's first two digits need."""
    if not (math.isfinite(stderr) and stderr > 0):
        return number(value)
    decimals = max(0, 1 - math.floor(math.log10(stderr)))
    if decimals <= 4:
        return f"{value:,.{decimals}f} ± {stderr:,.{decimals}f}".replace("-", "−")
    return f"{number(value)} ± {number(stderr, 2)}"
