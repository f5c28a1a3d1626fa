"""L_total = L_mean + L_equiv and spreads, from arrays of back-rotated predictions; numpy and torch alike.

``a_k = g_k⁻¹ f(g_k x)`` are the predictions of K rotated copies, rotated back; weights w_k sum to one;
``ā = Σ w_k a_k`` is the twirled prediction. For a squared error the loss over the group splits exactly (Shen et al.
2025), also at finite K. Every L is a mean over the 3N components. Functions take numpy arrays or torch tensors
(differentiable, on any device) and return the same kind.
"""

from typing import Any, Literal, NamedTuple

from equimd.errors import InputError

ConvexLoss = Literal["mse", "mae", "huber", "l2"]


class Decomposition(NamedTuple):
    """How a squared error over the group splits, in squared units of the prediction ((eV/Å)² for forces).

    l_total, l_mean: scalars, None without a reference; l_equiv: scalar; spread (N,): per atom Σ w_k |a_k − ā|², summed
    over the three components, with the same correction as l_equiv, so that l_equiv = mean(spread) / 3;
    mean (N, 3): the twirled prediction ā.
    """

    l_total: Any
    l_mean: Any
    l_equiv: Any
    spread: Any
    mean: Any


class LossSplit(NamedTuple):
    """The split of a convex loss: l_total = l_mean + l_equiv, each a scalar in units of the loss."""

    l_total: Any
    l_mean: Any
    l_equiv: Any


class ParitySplit(NamedTuple):
    """The variance over O(3) in two parts, in squared units of the prediction: proper + inversion = variance."""

    proper: Any
    inversion: Any


def decompose(back_rotated: Any, weights: Any, reference: Any | None, corrected: bool) -> Decomposition:
    """Split the squared error of back-rotated predictions (K, N, 3) with weights (K,) against ``reference`` (N, 3).

    corrected=False (quadrature): S = Σ w_k |a_k − ā|², L_equiv = S, L_mean = |ā − y|².
    corrected=True (K random rotations, equal weights): L_equiv = K/(K−1)·S, L_mean = |ā − y|² − S/(K−1), both unbiased.
    Both: L_total = Σ w_k |a_k − y|² = L_mean + L_equiv exactly.
    """
    n_rotations = _check(back_rotated, weights, corrected)
    w = weights[:, None, None]
    mean = (w * back_rotated).sum(0)
    deviation = back_rotated - mean
    sampled = (w * deviation * deviation).sum(0)  # (N, 3)
    spread = sampled.sum(-1)
    if corrected:
        spread = spread * (n_rotations / (n_rotations - 1))
    l_equiv = spread.mean() / 3
    if reference is None:
        return Decomposition(None, None, l_equiv, spread, mean)
    error, mean_error = back_rotated - reference, mean - reference
    l_total = (w * error * error).sum(0).mean()
    l_mean = (mean_error * mean_error).mean()
    if corrected:
        l_mean = l_mean - sampled.mean() / (n_rotations - 1)
    return Decomposition(l_total, l_mean, l_equiv, spread, mean)


def variance(values: Any, weights: Any, corrected: bool) -> Any:
    """Variance over the group of values (K, ...), such as total energies; ``corrected`` as in ``decompose``."""
    w = weights.reshape((-1,) + (1,) * (values.ndim - 1))
    values = values - values[0]  # total energies are large; their differences are what counts, to the last digit
    deviation = values - (w * values).sum(0)
    n = values.shape[0]
    return (w * deviation * deviation).sum(0) * (n / (n - 1) if corrected else 1.0)


def split_by_parity(values: Any, weights: Any, improper: Any, corrected: bool) -> ParitySplit:
    """What of the variance of values (K, ...) over O(3) is there without inversion, and what inversion adds.

    The group has two halves, the proper and the improper elements (``improper`` (K,) is true there). With the means m₊,
    m₋ and the variances V₊, V₋ within them, variance = ½(V₊ + V₋) + ¼|m₊ − m₋|²: the first term is ``proper``, the
    spread over SO(3) of the structure and of its mirror image, averaged; the second is ``inversion``.
    corrected=False (quadrature): these terms; each half must weigh ½.
    corrected=True (K independent elements with equal weights): unbiased estimates. proper is twice the mean of
    ½|a_i − a_j|² over pairs of the same half, counted as zero for the other pairs; inversion is the rest, so it can be
    negative. Both: proper + inversion = ``variance(values, weights, corrected)`` exactly.
    """
    n = values.shape[0]
    if tuple(improper.shape) != (n,):
        raise InputError(f"improper has shape {tuple(improper.shape)}; expected ({n},)")
    w = weights.reshape((-1,) + (1,) * (values.ndim - 1))
    second = improper.reshape(w.shape) * w
    halves = (w - second, second)
    shares = [half.sum() for half in halves]
    if not corrected and abs(float(shares[1]) - 0.5) > 1e-9:  # rounding of weights
        raise InputError(f"improper elements weigh {float(shares[1]):.3g}; expected one half")
    factor = n / (n - 1) if corrected else 1.0
    values = values - values[0]  # as in ``variance``
    overall = (w * values).sum(0)
    # From the means of the halves rather than as differences of sums, which would round a part that is zero.
    proper, squares = 0.0, []
    for half, share in zip(halves, shares, strict=True):
        deviation = values - overall
        squares.append((half * deviation * deviation).sum(0))
        if share > 0:
            deviation = values - (half * values).sum(0) / share
            proper = proper + 2.0 * factor * share * (half * deviation * deviation).sum(0)
    between = (halves[1] * (values - overall)).sum(0)
    inversion = factor * (4.0 * between * between + (shares[1] - shares[0]) * (squares[0] - squares[1]))
    return ParitySplit(proper, inversion)


def split_convex_loss(
    back_rotated: Any, weights: Any, reference: Any, loss: ConvexLoss = "mae", huber_delta: float = 0.01
) -> LossSplit:
    """Split a convex loss: L_mean = loss(ā, y), L_equiv = L_total − L_mean ≥ 0 (Jensen gap), for quadratures only.

    At finite K the gap is biased for random rotations, which is why there is no correction here. "mae" and "huber"
    (``huber_delta`` in units of the prediction) are means over components, "l2" the mean over atoms of the error norm.
    """
    _check(back_rotated, weights, corrected=False)
    per_rotation = _loss(back_rotated - reference, loss, huber_delta)
    l_total = (weights * per_rotation).sum(0)
    mean = (weights[:, None, None] * back_rotated).sum(0)
    l_mean = _loss((mean - reference)[None], loss, huber_delta)[0]
    return LossSplit(l_total, l_mean, l_total - l_mean)


def percent_of_loss(l_mean: float, l_equiv: float) -> float:
    """100 · L_equiv / (L_mean + L_equiv); pool both over frames first, and never report it without ``l_mean``."""
    total = l_mean + l_equiv
    return 100.0 * l_equiv / total if total > 0 else float("nan")


def _loss(error: Any, loss: ConvexLoss, delta: float) -> Any:
    """Loss (K,) of errors (K, N, 3)."""
    size = abs(error)
    if loss == "mse":
        values = error * error
    elif loss == "mae":
        values = size
    elif loss == "huber":
        inner = size.clip(max=delta)
        values = 0.5 * inner * inner + delta * (size - inner)
    elif loss == "l2":
        return ((error * error).sum(-1) ** 0.5).mean(-1)
    else:
        raise InputError(f"loss is {loss!r}; accepted are mse, mae, huber, l2")
    return values.mean(-1).mean(-1)


def _check(back_rotated: Any, weights: Any, corrected: bool) -> int:
    if back_rotated.ndim != 3 or back_rotated.shape[-1] != 3:
        raise InputError(f"back-rotated predictions have shape {tuple(back_rotated.shape)}; expected (K, N, 3)")
    n_rotations = back_rotated.shape[0]
    if tuple(weights.shape) != (n_rotations,):
        raise InputError(f"weights have shape {tuple(weights.shape)}; expected ({n_rotations},)")
    if corrected and n_rotations < 2:
        raise InputError(f"{n_rotations} random rotation given; a spread needs at least 2")
    return n_rotations
