"""Labels that look like the predictions of the potential that is judged by them."""

from collections.abc import Iterable

import numpy as np

# Above what float32 and a file's digits leave of a force, and far below the error of any potential.
_SAME = 1e-5
# eV/Å. Forces that vanish by symmetry, as on one atom alone, agree without telling anything.
_TELLING = 1e-2


def is_own_prediction(predicted: np.ndarray, label: np.ndarray) -> bool:
    """Whether labelled forces (N, 3) equal predicted ones to 1e-5 of their root mean square."""
    scale = float(np.sqrt((label**2).mean()))
    return scale > _TELLING and float(np.sqrt(((predicted - label) ** 2).mean())) < _SAME * scale


def suspicion(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> str | None:
    """One sentence if forces of some (predicted, label) pairs are the same, else None."""
    same = [is_own_prediction(predicted, label) for predicted, label in pairs]
    if not any(same):
        return None
    return (
        f"the force error of {sum(same)} of {len(same)} labelled frames is zero to rounding: these labels seem to be "
        "the potential's own predictions"
    )
