"""Charge and spin: what the potential was trained on, and nothing else."""

from collections.abc import Mapping
from typing import Any

from equimd.errors import InputError


def check_electrons(
    header: Mapping[str, Any],
    charge: float | None = None,
    multiplicity: float | None = None,
    spin: float | None = None,
) -> None:
    """Refuse a charge or spin that the training data did not have; None means that nothing is said about it.

    Data are neutral and closed-shell unless the checkpoint's header says otherwise (``charge`` in e, ``multiplicity``
    2S + 1, at the top or in the recipe's data). ``spin`` is a multiplicity under another name, where 0 counts as a
    singlet: some programs store 2S + 1 there, others 2S.
    """
    of_data = float(_of_data(header, "charge", 0.0))
    if charge is not None and not abs(float(charge) - of_data) <= 0.01:
        raise InputError(f"total charge is {float(charge):g} e; the potential was trained on {of_data:g} e")
    wanted = float(_of_data(header, "multiplicity", 1.0))
    if multiplicity is None and spin is not None:
        multiplicity = 1.0 if float(spin) == 0 and wanted == 1 else spin
    if multiplicity is not None and not abs(float(multiplicity) - wanted) <= 0.01:
        raise InputError(f"spin multiplicity is {float(multiplicity):g}; the potential was trained on {wanted:g}")


def _of_data(header: Mapping[str, Any], key: str, default: float) -> float:
    data = (header.get("recipe") or {}).get("data") or {}
    value = header.get(key, data.get(key))
    return default if value is None else value
