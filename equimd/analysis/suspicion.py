"""Labels that look like the predictions of the potential that is judged by them."""

from collections.abc import Iterable

import numpy as np

# A fraction of the RMS force: above what float32 and four or more decimals in a file leave of it, and a tenth of the
# error of the best potentials.
_SAME = 1e-4


def is_own_prediction(predicted: np.ndarray, label: np.ndarray) -> bool:
    """Whether labelled forces (N, 3) equal predicted ones to 1e-4 of their root mean square; not if they vanish."""
    return float(((predicted - label) ** 2).mean()) < _SAME**2 * float((label**2).mean())


def suspicion(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> str | None:
    """One sentence if forces of some (predicted, label) pairs are the same, else None."""
    same = [is_own_prediction(predicted, label) for predicted, label in pairs]
    if not any(same):
        return None
    return (
        f"the force error of {sum(same)} of {len(same)} labelled frames is zero to rounding: these labels seem to be "
        "the potential's own predictions"
    )
