"""Error bars that respect autocorrelation, for time series along a trajectory.

The statistical inefficiency is g = 1 + 2 Σ_t (1 − t/n) ρ(t), the number of samples that are worth one independent one;
the sum stops at the first non-positive ρ(t) (Chodera et al., J. Chem. Theory Comput. 3, 26 (2007)). A standard error is
then s·sqrt(g/n). All error bars of the analysis are made in this way; ``block_error`` is the independent check.
"""

from typing import NamedTuple

import numpy as np

from equimd.errors import InputError


class Estimate(NamedTuple):
    """A value with its standard error (NaN where there are too few samples for one)."""

    value: float
    stderr: float


class Line(NamedTuple):
    """A straight line fitted to a series: slope with its standard error, and what the residuals look like."""

    slope: float
    stderr: float
    residual_std: float
    inefficiency: float


def autocorrelation(series: np.ndarray) -> np.ndarray:
    """Normalised autocorrelation ρ(t) (n,) of a series (n,), each lag divided by its own number of pairs."""
    x = np.asarray(series, dtype=np.float64) - np.mean(series)
    n = len(x)
    spectrum = np.fft.rfft(x, 2 * n)
    covariance = np.fft.irfft(spectrum * spectrum.conj())[:n] / (n - np.arange(n))
    return covariance / covariance[0]


def statistical_inefficiency(series: np.ndarray) -> float:
    """How many samples of the series (n,) are worth one independent sample; at least 1, at most n."""
    x = np.asarray(series, dtype=np.float64)
    n = len(x)
    if n < 3 or np.ptp(x) <= 1e-14 * np.abs(x).max(initial=0.0):
        return 1.0
    rho = autocorrelation(x)[1:]
    negative = np.flatnonzero(rho <= 0)
    stop = int(negative[0]) if len(negative) else len(rho)
    lags = np.arange(1, stop + 1)
    return float(np.clip(1.0 + 2.0 * np.sum((1.0 - lags / n) * rho[:stop]), 1.0, n))


def mean_estimate(series: np.ndarray) -> Estimate:
    """Mean of a series (n,) with its standard error s·sqrt(g/n)."""
    x = np.asarray(series, dtype=np.float64)
    n = len(x)
    if n == 0:
        raise InputError("the series is empty; a mean needs at least 1 value")
    stderr = float(x.std(ddof=1) * np.sqrt(statistical_inefficiency(x) / n)) if n > 1 else float("nan")
    return Estimate(float(x.mean()), stderr)


def ratio_estimate(numerator: np.ndarray, denominator: np.ndarray) -> Estimate:
    """Pooled ratio Σa/Σb of two series (n,), with the error of its linearisation (a − θb)/mean(b)."""
    a, b = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    if b.sum() == 0:
        return Estimate(float("nan"), float("nan"))
    ratio = float(a.sum() / b.sum())
    return Estimate(ratio, mean_estimate((a - ratio * b) / b.mean()).stderr)


def block_error(series: np.ndarray, n_blocks: int = 10) -> float:
    """Standard error of the mean from ``n_blocks`` contiguous block averages; the remainder at the start is dropped."""
    x = np.asarray(series, dtype=np.float64)
    size = len(x) // n_blocks
    if n_blocks < 2 or size < 1:
        raise InputError(f"{len(x)} samples in {n_blocks} blocks; expected at least 2 blocks of 1 sample")
    blocks = x[len(x) - size * n_blocks :].reshape(n_blocks, size).mean(axis=1)
    return float(blocks.std(ddof=1) / np.sqrt(n_blocks))


def fit_line(x: np.ndarray, y: np.ndarray) -> Line:
    """Least-squares line through y(x); the slope's error is the ordinary one times sqrt(g) of the residuals."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(x) != len(y) or len(x) < 3:
        raise InputError(f"a line was asked through {len(x)} times and {len(y)} values; expected the same, at least 3")
    dx = x - x.mean()
    if not np.ptp(x) > 0:
        raise InputError("all times are equal; a slope needs at least two different ones")
    slope = float(dx @ (y - y.mean()) / (dx @ dx))
    residuals = y - y.mean() - slope * dx
    variance = float(residuals @ residuals) / (len(x) - 2)
    inefficiency = statistical_inefficiency(residuals)
    return Line(slope, float(np.sqrt(variance / (dx @ dx) * inefficiency)), float(np.sqrt(variance)), inefficiency)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation of two series; NaN for fewer than three samples or a constant series."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])
