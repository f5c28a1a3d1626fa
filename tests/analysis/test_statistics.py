import numpy as np
import pytest

from equimd.analysis.statistics import (
    block_error,
    correlation,
    fit_line,
    mean_estimate,
    ratio_estimate,
    statistical_inefficiency,
)
from equimd.errors import InputError


def ar1(n, phi, seed, n_series=1):
    """AR(1) series (n_series, n) of unit variance; its statistical inefficiency is (1 + φ) / (1 − φ)."""
    rng = np.random.default_rng(seed)
    x = np.empty((n, n_series))
    x[0] = rng.normal(size=n_series)
    noise = rng.normal(size=(n, n_series)) * np.sqrt(1 - phi**2)
    for t in range(1, n):
        x[t] = phi * x[t - 1] + noise[t]
    return x.T


@pytest.mark.parametrize(("phi", "inefficiency"), [(0.0, 1.0), (0.5, 3.0), (0.8, 9.0)])
def test_inefficiency_of_ar1(phi, inefficiency):
    measured = np.mean([statistical_inefficiency(x) for x in ar1(20_000, phi, 1, 5)])
    # The truncated sum scatters by some 5 % for 20,000 samples.
    assert measured == pytest.approx(inefficiency, rel=0.12)


def test_error_bar_covers_the_scatter_of_means_and_the_naive_one_does_not():
    series = ar1(2_000, 0.8, 2, 200)
    scatter = series.mean(axis=1).std(ddof=1)  # known to 5 % from 200 runs
    claimed = np.mean([mean_estimate(x).stderr for x in series])
    blocks = np.mean([block_error(x) for x in series])
    naive = np.mean([x.std(ddof=1) / np.sqrt(len(x)) for x in series])
    assert claimed == pytest.approx(scatter, rel=0.2)
    assert blocks == pytest.approx(scatter, rel=0.2)
    assert naive < 0.5 * scatter


def test_slope_error_covers_the_scatter_of_slopes():
    series = ar1(1_000, 0.8, 3, 200)
    times = np.arange(1_000) * 0.5
    lines = [fit_line(times, 0.01 * times + x) for x in series]
    slopes = np.array([line.slope for line in lines])
    assert slopes.mean() == pytest.approx(0.01, abs=3 * slopes.std() / np.sqrt(200))
    assert np.mean([line.stderr for line in lines]) == pytest.approx(slopes.std(ddof=1), rel=0.2)


def test_ratio_pools_before_it_divides():
    a, b = np.array([1.0, 1.0]), np.array([1.0, 9.0])
    assert ratio_estimate(a, b).value == pytest.approx(0.2)
    assert ratio_estimate(a, b).value != pytest.approx(np.mean(a / b))
    assert np.isnan(ratio_estimate(a, 0 * b).value)


def test_short_and_constant_series():
    assert statistical_inefficiency(np.ones(10)) == 1.0
    assert np.isnan(mean_estimate(np.array([2.0])).stderr)
    assert mean_estimate(np.full(5, 2.0)).stderr == 0.0
    assert np.isnan(correlation(np.ones(5), np.arange(5)))
    assert correlation(np.arange(5), -np.arange(5)) == pytest.approx(-1.0)


def test_bad_series_are_refused():
    with pytest.raises(InputError, match="at least 1 value"):
        mean_estimate(np.array([]))
    with pytest.raises(InputError, match="at least 2 blocks"):
        block_error(np.ones(3), n_blocks=5)
    with pytest.raises(InputError, match="at least 3"):
        fit_line(np.arange(2), np.arange(2))
    with pytest.raises(InputError, match="all times are equal"):
        fit_line(np.ones(4), np.arange(4))
