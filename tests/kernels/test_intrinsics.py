"""The exponential of compiled kernels."""

import numpy as np
import pytest
from numba import njit

from equimd.kernels.intrinsics import exp


@njit
def apply(x, out):
    for k in range(x.size):
        out[k] = exp(x[k])


@pytest.mark.parametrize(("dtype", "ulp"), [(np.float32, 1.2e-7), (np.float64, 1.5e-15)])
def test_is_exact_to_rounding(dtype, ulp):
    limit = 87.0 if dtype == np.float32 else 700.0
    x = np.concatenate([np.linspace(-limit, limit, 40_001), [0.0, 1e-30, -1e-30, np.log(2), 0.5 * np.log(2)]]).astype(
        dtype
    )
    out = np.empty_like(x)
    apply(x, out)
    exact = np.exp(x.astype(np.longdouble))
    assert float(np.abs(out / exact - 1).max()) < ulp
    assert float(np.abs(np.nextafter(out, dtype(np.inf)) / exact - 1).max()) > 0.4 * ulp  # a bit more would be seen


def test_what_is_not_a_number_stays_so():
    x = np.array([np.nan, np.inf, -np.inf, 1e30, -1e30], np.float32)
    out = np.empty_like(x)
    apply(x, out)
    assert np.isnan(out[0])
    assert out[1] == out[3] > 1e37
    assert 0 < out[2] == out[4] < 1e-37
